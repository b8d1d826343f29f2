// The kernels proper: one tile of 16 rows of one stage times some rows of x. Included after an Isa, as unpack.h.
#pragma once
#include <cstring>

#include "body.h"
#include "unpack.h"

namespace lowbit {
namespace {

// How a tile is read; the same for every row of x.
struct Walk {
    const uint8_t* codes;
    const int8_t* tables;
    const float* scales;         // [groups, 16]
    const float* levels;         // exact mode: tables of floats
    const int32_t* table_of_row; // exact mode, several tables
    int blocks, group, groups, zero, entries, variants;
    int64_t tile_bytes;
};

// Ask for the share of the next tile that belongs to block b of slice s. With two slices a tile is read twice, the second
// time from the cache: without this the memory would idle meanwhile.
template <int BITS>
inline void prefetch_next(const Walk& w, int s, int b) {
    constexpr int kShare = 64 * BITS / Isa::kSlices;
    const uint8_t* next = w.codes + w.tile_bytes + (int64_t(s) * w.blocks + b) * kShare;
    for (int at = 0; at < kShare; at += 64) __builtin_prefetch(next + at);
}

// y[m] += sum over groups of scale * (sum over the group's blocks of x's scale * integer sum), for M rows of x.
template <int BITS, int KIND, int M, bool ALIGNED>
void rows_int8(const Walk& w, const Activations& x, int64_t first, float* y) {
    constexpr int kS = Isa::kSlices, kBytes = 64 * BITS, kBias = bias_of<BITS, KIND>();
    const int64_t stride = int64_t(x.blocks);
    for (int s = 0; s < kS; ++s) {
        const Tables<BITS, KIND> tables(w.tables, s, w.zero);
        const uint8_t* p = w.codes + s * kStep;
        const float* scales = w.scales + s * Isa::kLanes;
        Floats sum[M];
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) sum[m] = Isa::zero();
        if constexpr (ALIGNED) {
            const int per_group = w.group / kBlock;
            for (int b = 0, g = 0; b < w.blocks; ++g) {
                const int end = b + per_group < w.blocks ? b + per_group : w.blocks;
                Floats part[M];
                LOWBIT_UNROLL
                for (int m = 0; m < M; ++m) part[m] = Isa::zero();
                for (; b < end; ++b, p += kBytes) {
                    Bytes level[kQuads];
                    if (first == 0) prefetch_next<BITS>(w, s, b);
                    unpack_levels<BITS, KIND>(p, tables, level);
                    LOWBIT_UNROLL
                    for (int m = 0; m < M; ++m) {
                        const int64_t at = (first + m) * stride + b;
                        Ints whole = Isa::start(kBias ? x.bias[at] : 0);
                        LOWBIT_UNROLL
                        for (int k = 0; k < kQuads; ++k) {
                            whole = Isa::template dot<kBias>(whole, level[k], Isa::quad(x.rounded + at * kBlock + 4 * k));
                        }
                        part[m] = Isa::fma(Isa::to_floats(whole), Isa::set(x.scale[at]), part[m]);
                    }
                }
                const Floats scale = Isa::loadf(scales + g * kTile);
                LOWBIT_UNROLL
                for (int m = 0; m < M; ++m) sum[m] = Isa::fma(part[m], scale, sum[m]);
            }
        } else {
            const int per_group = w.group / 4;
            int g = 0, left = per_group;
            for (int b = 0; b < w.blocks; ++b, p += kBytes) {
                Bytes level[kQuads];
                unpack_levels<BITS, KIND>(p, tables, level);
                for (int k = 0; k < kQuads;) {
                    const int end = k + left < kQuads ? k + left : kQuads;
                    const Floats scale = Isa::loadf(scales + (g < w.groups ? g : w.groups - 1) * kTile);
                    for (int m = 0; m < M; ++m) {
                        const int64_t at = (first + m) * stride + b;
                        Ints whole = Isa::start(0);
                        for (int i = k; i < end; ++i) {
                            const Bytes four = Isa::quad(x.rounded + at * kBlock + 4 * i);
                            whole = Isa::template dot<kBias>(whole, level[i], four);
                            if constexpr (kBias != 0) whole = Isa::minus(whole, Isa::template dot<kBias>(Isa::start(0), Isa::splat(kBias), four));
                        }
                        const Floats part = Isa::mul(Isa::to_floats(whole), Isa::set(x.scale[at]));
                        sum[m] = Isa::fma(part, scale, sum[m]);
                    }
                    left -= end - k, k = end;
                    if (left == 0) left = per_group, ++g;
                }
            }
        }
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) Isa::storef(y + m * kTile + s * Isa::kLanes, sum[m]);
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

// As rows_int8, without rounding: the four sums of a group are joined and scaled where it ends.
template <int BITS, bool GATHER, int M>
void rows_exact(const Walk& w, const Activations& x, int64_t first, float* y) {
    const int64_t stride = int64_t(x.blocks) * kBlock;
    const bool aligned = w.group % kBlock == 0;
    for (int s = 0; s < Isa::kSlices; ++s) {
        const uint8_t* p = w.codes + s * kStep;
        const float* scales = w.scales + s * Isa::kLanes;
        const float* values = x.values + first * stride;
        alignas(64) int32_t starts[kTile] = {};
        for (int r = 0; GATHER && w.table_of_row && r < kTile; ++r) starts[r] = w.table_of_row[r] * w.entries;
        const Bytes start = Isa::load(starts + s * Isa::kLanes);
        typename Isa::Levels levels{};
        if constexpr (!GATHER) levels = Isa::levels(w.levels, w.entries);
        Floats sum[M], part[M][4];
        const auto clear = [&] {
            LOWBIT_UNROLL
            for (int m = 0; m < M; ++m) {
                LOWBIT_UNROLL
                for (int j = 0; j < 4; ++j) part[m][j] = Isa::zero();
            }
        };
        const auto close = [&](int g) {
            const Floats scale = Isa::loadf(scales + (g < w.groups ? g : w.groups - 1) * kTile);
            LOWBIT_UNROLL
            for (int m = 0; m < M; ++m) {
                sum[m] = Isa::fma(Isa::add(Isa::add(part[m][0], part[m][1]), Isa::add(part[m][2], part[m][3])), scale, sum[m]);
            }
            clear();
        };
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) sum[m] = Isa::zero();
        clear();
        int g = 0, left = w.group / 4;
        for (int b = 0; b < w.blocks; ++b, p += 64 * BITS, values += kBlock) {
            Bytes code[kQuads];
            if (first == 0) prefetch_next<BITS>(w, s, b);
            unpack_codes<BITS>(p, code);
            if (aligned) {
                if constexpr (GATHER) {
                    for (int k = 0; k < kQuads; ++k) quad_exact<BITS, true, M>(w, levels, start, code[k], values + 4 * k, stride, part);
                } else {
                    LOWBIT_UNROLL
                    for (int k = 0; k < kQuads; ++k) quad_exact<BITS, false, M>(w, levels, start, code[k], values + 4 * k, stride, part);
                }
                if ((left -= kQuads) == 0) close(g++), left = w.group / 4;
                continue;
            }
            for (int k = 0; k < kQuads; ++k) {
                quad_exact<BITS, GATHER, M>(w, levels, start, code[k], values + 4 * k, stride, part);
                if (--left == 0) close(g++), left = w.group / 4;
            }
        }
        if (left != w.group / 4) close(g);
        LOWBIT_UNROLL
        for (int m = 0; m < M; ++m) Isa::storef(y + m * kTile + s * Isa::kLanes, sum[m]);
    }
}

// Scales or offsets of a tile as floats [groups, 16].
inline void decode_scales(const Stage& s, const uint8_t* from, float* out) {
    for (int half = 0; half < Isa::kSlices; ++half) {
        const int at = half * Isa::kLanes;
        if (!s.coded_scales) {
            const uint16_t* values = reinterpret_cast<const uint16_t*>(from) + at;
            for (int g = 0; g < s.groups; ++g) Isa::storef(out + g * kTile + at, Isa::halves(values + g * kTile));
            continue;
        }
        const int8_t* values = reinterpret_cast<const int8_t*>(from) + at;
        const uint16_t* heads = reinterpret_cast<const uint16_t*>(from + s.groups * kTile) + at;
        for (int k = 0, g = 0; k < s.supers; ++k) {
            const Floats head = Isa::halves(heads + k * kTile);
            for (const int end = g + s.per_super < s.groups ? g + s.per_super : s.groups; g < end; ++g) {
                Isa::storef(out + g * kTile + at, Isa::mul(Isa::signed_bytes(values + g * kTile), head));
            }
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

// Run a kernel over all rows of x, four at a time and then two and one. Unpacking a block costs a few percent of four
// products with it; expanding a tile into memory once for all rows was slower (1.2 against 0.9 cycles per 32 products).
template <class Pick>
void over_rows(const Walk& w, const Activations& x, const Pick& pick, float* y) {
    for (int64_t m = 0; m < x.batch;) {
        const int64_t left = x.batch - m;
        const int take = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        pick(take)(w, x, m, y + m * kTile);
        m += take;
    }
}

template <int BITS, int KIND, bool ALIGNED>
Rows int8_rows(int rows) {
    return rows == 1 ? rows_int8<BITS, KIND, 1, ALIGNED> : rows == 2 ? rows_int8<BITS, KIND, 2, ALIGNED> : rows_int8<BITS, KIND, 4, ALIGNED>;
}

template <int BITS, int KIND>
void run_int8(const Walk& w, const Activations& x, float* y) {
    over_rows(w, x, w.group % kBlock ? int8_rows<BITS, KIND, false> : int8_rows<BITS, KIND, true>, y);
}

template <int BITS>
void run_shuffle(int kind, const Walk& w, const Activations& x, float* y) {
    if (kind == kMixed) run_int8<BITS, kMixed>(w, x, y);
    else run_int8<BITS, kTable>(w, x, y);
}

template <int BITS>
void run_wide(int kind, const Walk& w, const Activations& x, float* y) {
    if (kind == kLinear) run_int8<BITS, kLinear>(w, x, y);
    else run_int8<BITS, kTable>(w, x, y);
}

Walk start_walk(const Matrix& m, const Stage& s, const uint8_t* tile, Scratch& scratch) {
    decode_scales(s, tile + s.scales_at, scratch.scales);
    const int32_t* ids = s.tables > 1 ? reinterpret_cast<const int32_t*>(tile) : nullptr;
    return {tile + s.codes_at, scratch.tables, scratch.scales, m.at<float>(s.levels_at), ids,
            m.blocks, s.group, s.groups, s.zero, s.entries, s.variants, s.tile_bytes};
}

// y += offset[g] * sum of x over group g.
void add_offsets(const Stage& s, const uint8_t* tile, int64_t batch, const float* group_sums, Scratch& scratch, float* y) {
    decode_scales(s, tile + s.offsets_at, scratch.scales);
    for (int64_t m = 0; m < batch; ++m) {
        for (int at = 0; at < kTile; at += Isa::kLanes) {
            Floats sum = Isa::zero();
            for (int g = 0; g < s.groups; ++g) {
                sum = Isa::fma(Isa::loadf(scratch.scales + g * kTile + at), Isa::set(group_sums[m * s.groups + g]), sum);
            }
            Isa::storef(y + m * kTile + at, Isa::add(Isa::loadf(y + m * kTile + at), sum));
        }
    }
}

void tile_int8(const Matrix& m, const Stage& s, int number, const Activations& x, const float* group_sums, Scratch& scratch,
               float* y) {
    const uint8_t* tile = m.tile(s, number);
    const Walk w = start_walk(m, s, tile, scratch);
    if (s.kind == kTable || s.kind == kMixed) spread_tables(m, s, tile, scratch.tables);
    switch (s.bits) {
        case 1: run_shuffle<1>(s.kind, w, x, y); break;
        case 2: run_shuffle<2>(s.kind, w, x, y); break;
        case 3: run_shuffle<3>(s.kind, w, x, y); break;
        case 4: run_shuffle<4>(s.kind, w, x, y); break;
        case 5: run_wide<5>(s.kind, w, x, y); break;
        case 6: run_wide<6>(s.kind, w, x, y); break;
        default: run_int8<8, kLinear>(w, x, y); break;
    }
    const float* of_row = reinterpret_cast<const float*>(tile) + kTile;
    for (int64_t i = 0; i < x.batch; ++i) {
        for (int r = 0; r < kTile; ++r) y[i * kTile + r] *= s.tables > 1 ? of_row[r] : s.table_scale;
    }
    if (s.has_offset) add_offsets(s, tile, x.batch, group_sums, scratch, y);
}

template <int BITS>
Rows exact_rows(int rows, bool gather) {
    if constexpr (BITS <= 4) {
        if (!gather) return rows == 1 ? rows_exact<BITS, false, 1> : rows == 2 ? rows_exact<BITS, false, 2> : rows_exact<BITS, false, 4>;
    }
    return rows == 1 ? rows_exact<BITS, true, 1> : rows == 2 ? rows_exact<BITS, true, 2> : rows_exact<BITS, true, 4>;
}

void tile_exact(const Matrix& m, const Stage& s, int number, const Activations& x, const float* group_sums, Scratch& scratch,
                float* y) {
    const uint8_t* tile = m.tile(s, number);
    const Walk w = start_walk(m, s, tile, scratch);
    const auto pick = [&](int rows) {
        switch (s.bits) {
            case 1: return exact_rows<1>(rows, s.tables > 1);
            case 2: return exact_rows<2>(rows, s.tables > 1);
            case 3: return exact_rows<3>(rows, s.tables > 1);
            case 4: return exact_rows<4>(rows, s.tables > 1);
            case 5: return exact_rows<5>(rows, true);
            case 6: return exact_rows<6>(rows, true);
            default: return exact_rows<8>(rows, true);
        }
    };
    over_rows(w, x, pick, y);
    if (s.has_offset) add_offsets(s, tile, x.batch, group_sums, scratch, y);
}

// Plain C++, vectorised by the compiler for the instruction set of the including file.
void round_row(const float* values, int blocks, int8_t* rounded, float* scale, int32_t* bias) {
    for (int b = 0; b < blocks; ++b, values += kBlock, rounded += kBlock) {
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
        scale[b] = finite ? largest / 127.0f : largest - largest;  // not finite: NaN, and so is every output
        bias[b] = -Isa::kFewBias * sum;
    }
}

}  // namespace
}  // namespace lowbit
