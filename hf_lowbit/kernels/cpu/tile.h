// The kernels proper: a few neighbouring tiles of 16 rows of one stage times some rows of x. Included after an Isa, as unpack.h.
#pragma once
#include <cstring>

#include "walk.h"

namespace lowbit {
namespace {

// part[m] += x's scale * sum of level * x over a block, for M rows side by side.
template <int M, int BIAS>
inline void add_products(const Bytes level[kQuads], const int8_t* x, const int32_t* bias, const float* scale, Floats part[M]) {
    constexpr int kChains = M == 1 ? 2 : 1;  // sums that do not wait for each other; several rows have several anyway
    Ints sum[M][kChains];
    const auto start = [&](int m, int chain) { sum[m][chain] = Isa::start(BIAS && chain == 0 ? bias[m] : 0); };
    const auto dot = [&](int m, int k) {
        sum[m][k % kChains] = Isa::template dot_quad<BIAS>(sum[m][k % kChains], level[k], x + m * kBlock, k);
    };
    const auto finish = [&](int m) {
        if constexpr (kChains == 2) sum[m][0] = Isa::plus(sum[m][0], sum[m][1]);
        part[m] = Isa::fma(Isa::to_floats(sum[m][0]), Isa::set(scale[m]), part[m]);
    };
    if constexpr (Isa::kQuadsFirst) {
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) {
            LOWBIT_UNROLL
            for (int c = 0; c < kChains; ++c) start(m, c);
        }
        LOWBIT_UNROLL
        for (int k = 0; k < kQuads; ++k) {
            LOWBIT_UNROLL
            for (int m = 0; m < M; ++m) dot(m, k);
        }
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) finish(m);
    } else {
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) {
            LOWBIT_UNROLL
            for (int c = 0; c < kChains; ++c) start(m, c);
            LOWBIT_UNROLL
            for (int k = 0; k < kQuads; ++k) dot(m, k);
            finish(m);
        }
    }
}

// y[m] += sum over groups of scale * (sum over the group's blocks of x's scale * integer sum), for M rows of x; groups are whole
// blocks.
template <int BITS, int KIND, int M>
void rows_int8(const Walk& w, const Activations& x, int64_t first, float* y) {
    constexpr int kBytes = 64 * BITS, kBias = bias_of<BITS, KIND>();
    clear_sums(w, M, y);
    over_pieces<BITS>(w, [&](int t, int s, int b, int end, Place place) {
        const Tables<BITS, KIND> tables(w.tables + t * w.tables_step, s, w.zero);
        const uint8_t* p = w.codes(t) + int64_t(b) * kBytes + s * kStep;
        float* out = y + t * w.batch * kTile + s * Isa::kLanes;
        Floats sum[M];
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) sum[m] = Isa::loadf(out + m * kTile);
        for (int64_t at = x.place(first, b); b < end; place.next_group(w)) {
            const int stop = b + place.blocks_left < end ? b + place.blocks_left : end;
            Floats part[M];
            LOWBIT_UNROLL
            for (int m = 0; m < M; ++m) part[m] = Isa::zero();
            for (; b < stop; ++b, p += kBytes, at += x.panel) {
                Bytes level[kQuads];
                if (first == 0) prefetch_piece<BITS>(p, s);
                unpack_levels<BITS, KIND>(p, tables, level);
                add_products<M, kBias>(level, x.rounded + at * kBlock, x.bias + at, x.scale + at, part);
            }
            const Floats scale = scale_of(w, t, place.group, place.super, s);
            LOWBIT_UNROLL
            for (int m = 0; m < M; ++m) sum[m] = Isa::fma(part[m], scale, sum[m]);
        }
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) Isa::storef(out + m * kTile, sum[m]);
    });
}

// As rows_int8 for groups that are not whole blocks.
template <int BITS, int KIND, int M>
void rows_int8_ragged(const Walk& w, const Activations& x, int64_t first, float* y) {
    constexpr int kBias = bias_of<BITS, KIND>();
    clear_sums(w, M, y);
    for (int t = 0; t < w.tiles; ++t) {
        for (int s = 0; s < Isa::kSlices; ++s) {
            const Tables<BITS, KIND> tables(w.tables + t * w.tables_step, s, w.zero);
            Bytes level[kQuads];
            over_quads(w, [&](int b, int k, int end, const Place& place) {
                if (k == 0) unpack_levels<BITS, KIND>(w.codes(t) + int64_t(b) * 64 * BITS + s * kStep, tables, level);
                const Floats scale = scale_of(w, t, place.group, place.super, s);
                for (int m = 0; m < M; ++m) {
                    const int64_t at = x.place(first + m, b);
                    Ints whole = Isa::start(0);
                    for (int i = k; i < end; ++i) {
                        const int8_t* block = x.rounded + at * kBlock;
                        whole = Isa::template dot_quad<kBias>(whole, level[i], block, i);
                        if constexpr (kBias != 0) whole = Isa::minus(whole, Isa::template dot_quad<kBias>(Isa::start(0), Isa::splat(kBias), block, i));
                    }
                    const Floats part = Isa::mul(Isa::to_floats(whole), Isa::set(x.scale[at]));
                    float* out = y + (t * w.batch + m) * kTile + s * Isa::kLanes;
                    Isa::storef(out, Isa::fma(part, scale, Isa::loadf(out)));
                }
            });
        }
    }
}

// Adds the products of one quad of columns, with float x and true levels, to four sums by column within the quad.
template <int BITS, bool GATHER, int M>
inline void quad_exact(const Walk& w, const typename Isa::Levels& levels, const Bytes& start, const Bytes& code, const float* x,
                       int64_t stride, Floats part[M][4]) {
    const Bytes lane[4] = {code, Isa::shr<8>(code), Isa::shr<16>(code), Isa::shr<24>(code)};
    LOWBIT_UNROLL
    for (int j = 0; j < 4; ++j) {
        Floats level;
        if constexpr (GATHER) level = Isa::gather(w.levels, Isa::add32(Isa::low_byte(lane[j]), start));
        else level = Isa::pick<BITS>(levels, lane[j]);
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) part[m][j] = Isa::fma(level, Isa::set(x[m * stride + j]), part[m][j]);
    }
}

// What the exact kernels look levels up in, for one slice of a tile.
template <bool GATHER>
struct FloatLevels {
    typename Isa::Levels levels{};
    Bytes start{};

    FloatLevels(const Walk& w, int t, int s) {
        if constexpr (GATHER) {
            alignas(64) int32_t starts[kTile] = {};
            for (int r = 0; w.many_tables && r < kTile; ++r) starts[r] = w.table_of_row(t)[r] * w.entries;
            start = Isa::load(starts + s * Isa::kLanes);
        } else {
            levels = Isa::levels(w.levels, w.entries);
        }
    }
};

template <int M>
inline void add_quads(const Floats part[M][4], const Floats& scale, Floats sum[M]) {
    LOWBIT_UNROLL
    for (int m = 0; m < M; ++m) {
        sum[m] = Isa::fma(Isa::add(Isa::add(part[m][0], part[m][1]), Isa::add(part[m][2], part[m][3])), scale, sum[m]);
    }
}

template <int M>
inline void clear_quads(Floats part[M][4]) {
    LOWBIT_UNROLL
    for (int m = 0; m < M; ++m) {
        LOWBIT_UNROLL
        for (int j = 0; j < 4; ++j) part[m][j] = Isa::zero();
    }
}

// As rows_int8, without rounding.
template <int BITS, bool GATHER, int M>
void rows_exact(const Walk& w, const Activations& x, int64_t first, float* y) {
    constexpr int kBytes = 64 * BITS;
    const int64_t stride = int64_t(x.blocks) * kBlock;
    clear_sums(w, M, y);
    over_pieces<BITS>(w, [&](int t, int s, int b, int end, Place place) {
        const FloatLevels<GATHER> from(w, t, s);
        const uint8_t* p = w.codes(t) + int64_t(b) * kBytes + s * kStep;
        const float* values = x.values + first * stride + int64_t(b) * kBlock;
        float* out = y + t * w.batch * kTile + s * Isa::kLanes;
        Floats sum[M];
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) sum[m] = Isa::loadf(out + m * kTile);
        for (; b < end; place.next_group(w)) {
            const int stop = b + place.blocks_left < end ? b + place.blocks_left : end;
            Floats part[M][4];
            clear_quads<M>(part);
            for (; b < stop; ++b, p += kBytes, values += kBlock) {
                Bytes code[kQuads];
                if (first == 0) prefetch_piece<BITS>(p, s);
                unpack_codes<BITS>(p, code);
                if constexpr (GATHER) {
                    for (int k = 0; k < kQuads; ++k) quad_exact<BITS, true, M>(w, from.levels, from.start, code[k], values + 4 * k, stride, part);
                } else {
                    LOWBIT_UNROLL
                    for (int k = 0; k < kQuads; ++k) quad_exact<BITS, false, M>(w, from.levels, from.start, code[k], values + 4 * k, stride, part);
                }
            }
            add_quads<M>(part, scale_of(w, t, place.group, place.super, s), sum);
        }
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) Isa::storef(out + m * kTile, sum[m]);
    });
}

// As rows_exact for groups that are not whole blocks.
template <int BITS, bool GATHER, int M>
void rows_exact_ragged(const Walk& w, const Activations& x, int64_t first, float* y) {
    const int64_t stride = int64_t(x.blocks) * kBlock;
    for (int t = 0; t < w.tiles; ++t) {
        for (int s = 0; s < Isa::kSlices; ++s) {
            const FloatLevels<GATHER> from(w, t, s);
            Bytes code[kQuads];
            Floats sum[M];
            for (int m = 0; m < M; ++m) sum[m] = Isa::zero();
            over_quads(w, [&](int b, int k, int end, const Place& place) {
                if (k == 0) unpack_codes<BITS>(w.codes(t) + int64_t(b) * 64 * BITS + s * kStep, code);
                Floats part[M][4];
                clear_quads<M>(part);
                for (; k < end; ++k) {
                    const float* values = x.values + first * stride + int64_t(b) * kBlock + 4 * k;
                    quad_exact<BITS, GATHER, M>(w, from.levels, from.start, code[k], values, stride, part);
                }
                add_quads<M>(part, scale_of(w, t, place.group, place.super, s), sum);
            });
            for (int m = 0; m < M; ++m) Isa::storef(y + (t * w.batch + m) * kTile + s * Isa::kLanes, sum[m]);
        }
    }
}

// The int8 tables of a tile, [variants, passes, 64]: 16 bytes for each lane of four rows, one pass per row where they differ.
inline void spread_tables(const Matrix& m, const Stage& s, const uint8_t* tile, int8_t* out) {
    const int8_t* bytes = m.at<int8_t>(s.bytes_at);
    const int32_t* ids = s.tables > 1 ? reinterpret_cast<const int32_t*>(tile) : nullptr;
    const int bias = s.bits <= 3 ? Isa::kFewBias : Isa::kBias;
    const int passes = s.kind == kMixed ? 4 : 1, parts = s.entries > 16 ? s.entries / 16 : s.variants;
    for (int v = 0; v < parts; ++v) {
        for (int r = 0; r < passes; ++r) {
            for (int lane = 0; lane < 4; ++lane, out += 16) {
                const int table = ids ? ids[4 * lane + r] : 0;
                std::memcpy(out, bytes + 16 * (int64_t(table) * parts + v), 16);
                for (int i = 0; i < 16; ++i) out[i] = int8_t(out[i] + bias);
            }
        }
    }
}

using Rows = void (*)(const Walk&, const Activations&, int64_t, float*);

// Run a kernel over all rows of x, as many at a time as registers hold, then four, two and one. Expanding a tile into memory once
// for all rows was slower (1.2 against 0.9 cycles per 32 products).
template <class Pick>
void over_rows(const Walk& w, const Activations& x, int most, const Pick& pick, float* y) {
    for (int64_t m = 0; m < x.batch;) {
        const int64_t left = x.batch - m;
        const int take = left >= most ? most : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        pick(take)(w, x, m, y + m * kTile);
        m += take;
    }
}

template <int BITS, int KIND>
Rows int8_rows(int rows, bool ragged) {
    if (ragged) return rows == 1 ? rows_int8_ragged<BITS, KIND, 1> : rows == 2 ? rows_int8_ragged<BITS, KIND, 2> : rows_int8_ragged<BITS, KIND, 4>;
    if (rows > 4) return rows_int8<BITS, KIND, Isa::kMostRows>;
    return rows == 1 ? rows_int8<BITS, KIND, 1> : rows == 2 ? rows_int8<BITS, KIND, 2> : rows_int8<BITS, KIND, 4>;
}

template <int BITS>
Rows int8_kernel(int kind, int rows, bool ragged) {
    if constexpr (BITS <= 4) {
        if (kind == kMixed) return int8_rows<BITS, kMixed>(rows, ragged);
    } else {
        if (kind == kLinear) return int8_rows<BITS, kLinear>(rows, ragged);
    }
    if constexpr (BITS <= 6) return int8_rows<BITS, kTable>(rows, ragged);
    else return nullptr;
}

template <int BITS, bool GATHER>
Rows exact_rows(int rows, bool ragged) {
    if (ragged) return rows == 1 ? rows_exact_ragged<BITS, GATHER, 1> : rows == 2 ? rows_exact_ragged<BITS, GATHER, 2> : rows_exact_ragged<BITS, GATHER, 4>;
    return rows == 1 ? rows_exact<BITS, GATHER, 1> : rows == 2 ? rows_exact<BITS, GATHER, 2> : rows_exact<BITS, GATHER, 4>;
}

template <int BITS>
Rows exact_kernel(bool many_tables, int rows, bool ragged) {
    if constexpr (BITS <= 4) {
        if (!many_tables) return exact_rows<BITS, false>(rows, ragged);
    }
    return exact_rows<BITS, true>(rows, ragged);
}

Walk start_walk(const Matrix& m, const Stage& s, int first, int count, int64_t batch, const int8_t* tables, int tables_step) {
    return {m.tile(s, first), count, s.tile_bytes, s.scales_at, s.codes_at, tables, tables_step, m.at<float>(s.levels_at), s.tables > 1,
            m.blocks, s.group, s.groups, s.zero, s.entries, s.coded_scales != 0, s.wide_scales != 0, s.coded_scales ? s.per_super : 1, batch};
}

// y += (offset[g] - zero[g] * scale[g]) * sum of x over group g.
void add_offsets(const Walk& w, const Stage& s, const float* group_sums, float* y) {
    for (int t = 0; t < w.tiles; ++t) {
        const uint8_t* tile = w.tile + t * w.tile_bytes;
        const int8_t* zeros = reinterpret_cast<const int8_t*>(tile + s.zeros_at);
        for (int64_t m = 0; m < w.batch; ++m) {
            for (int slice = 0; slice < Isa::kSlices; ++slice) {
                Floats sum = Isa::zero();
                for (Place place(w); place.group < w.groups; place.next_group(w)) {
                    Floats value = s.has_offset ? group_values(tile + s.offsets_at, w, place.group, place.super, slice) : Isa::zero();
                    if (s.has_zero) {
                        const Floats zero = Isa::signed_bytes(zeros + place.group * kTile + slice * Isa::kLanes);
                        const Floats less = Isa::mul(zero, scale_of(w, t, place.group, place.super, slice));
                        value = Isa::fma(less, Isa::set(-1.0f), value);
                    }
                    sum = Isa::fma(value, Isa::set(group_sums[m * w.groups + place.group]), sum);
                }
                float* out = y + (t * w.batch + m) * kTile + slice * Isa::kLanes;
                Isa::storef(out, Isa::add(Isa::loadf(out), sum));
            }
        }
    }
}

void tiles_int8(const Matrix& m, const Stage& s, int first, int count, const Activations& x, const float* group_sums,
                int8_t* tables, float* y) {
    const int own = s.tables > 1 ? count : 1;
    const Walk w = start_walk(m, s, first, count, x.batch, tables, own > 1 ? kTableBytes : 0);
    for (int t = 0; t < own && (s.kind == kTable || s.kind == kMixed); ++t) {
        spread_tables(m, s, w.tile + t * s.tile_bytes, tables + t * kTableBytes);
    }
    const bool ragged = s.group % kBlock != 0;
    const auto pick = [&](int rows) {
        switch (s.bits) {
            case 1: return int8_kernel<1>(s.kind, rows, ragged);
            case 2: return int8_kernel<2>(s.kind, rows, ragged);
            case 3: return int8_kernel<3>(s.kind, rows, ragged);
            case 4: return int8_kernel<4>(s.kind, rows, ragged);
            case 5: return int8_kernel<5>(s.kind, rows, ragged);
            case 6: return int8_kernel<6>(s.kind, rows, ragged);
            default: return int8_kernel<8>(kLinear, rows, ragged);
        }
    };
    over_rows(w, x, ragged ? 4 : Isa::kMostRows, pick, y);
    for (int t = 0; t < count; ++t) {
        const float* of_row = reinterpret_cast<const float*>(w.tile + t * s.tile_bytes) + kTile;
        for (int64_t i = t * x.batch; i < (t + 1) * x.batch; ++i) {
            for (int r = 0; r < kTile; ++r) y[i * kTile + r] *= s.tables > 1 ? of_row[r] : s.table_scale;
        }
    }
    if (s.needs_sums()) add_offsets(w, s, group_sums, y);
}

void tiles_exact(const Matrix& m, const Stage& s, int first, int count, const Activations& x, const float* group_sums, int8_t*,
                 float* y) {
    const Walk w = start_walk(m, s, first, count, x.batch, nullptr, 0);
    const bool ragged = s.group % kBlock != 0, many = s.tables > 1;
    const auto pick = [&](int rows) {
        switch (s.bits) {
            case 1: return exact_kernel<1>(many, rows, ragged);
            case 2: return exact_kernel<2>(many, rows, ragged);
            case 3: return exact_kernel<3>(many, rows, ragged);
            case 4: return exact_kernel<4>(many, rows, ragged);
            case 5: return exact_kernel<5>(many, rows, ragged);
            case 6: return exact_kernel<6>(many, rows, ragged);
            default: return exact_kernel<8>(many, rows, ragged);
        }
    };
    over_rows(w, x, 4, pick, y);
    if (s.needs_sums()) add_offsets(w, s, group_sums, y);
}

// Plain C++, vectorised by the compiler for the instruction set of the including file.
void round_row(const float* values, int blocks, int step, int8_t* rounded, float* scale, int32_t* bias) {
    for (int b = 0; b < blocks; ++b, values += kBlock, rounded += step * kBlock, scale += step, bias += step) {
        int32_t bits[kBlock], top = 0;
        std::memcpy(bits, values, sizeof bits);
        for (int i = 0; i < kBlock; ++i) {
            const int32_t size = bits[i] & 0x7fffffff;
            top = size > top ? size : top;
        }
        float largest;
        std::memcpy(&largest, &top, 4);
        const bool finite = top < 0x7f800000;
        const float inverse = finite && largest > 1e-35f ? 127.0f / largest : 0.0f;
        int32_t sum = 0;
        for (int i = 0; i < kBlock; ++i) {
            // Adding 1.5 * 2**23 leaves the nearest integer (ties to even) in the low bits.
            const float shifted = (finite ? values[i] : 0.0f) * inverse + 12582912.0f;
            int32_t code;
            std::memcpy(&code, &shifted, 4);
            code -= 0x4b400000;
            rounded[i] = int8_t(code);
            sum += code;
        }
        *scale = finite ? largest / 127.0f : largest - largest;  // not finite: NaN, and so is every output
        *bias = -Isa::kFewBias * sum;
    }
}

}  // namespace
}  // namespace lowbit
