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
};

// y[m] += sum over groups of scale * (sum over the group's blocks of x's scale * integer sum), for M rows of x.
template <int BITS, int KIND, int M, bool ALIGNED>
void rows_int8(const Walk& w, const Activations& x, int64_t first, float* y) {
    constexpr int kS = Isa::kSlices, kBytes = KIND == kLevels ? 512 : 64 * BITS;
    const int64_t stride = int64_t(x.blocks);
    for (int s = 0; s < kS; ++s) {
        const Tables<BITS, KIND> tables(w.tables, s, w.zero);
        const uint8_t* p = w.codes + s * kStep;
        const float* scales = w.scales + s * Isa::kLanes;
        Floats sum[M];
        for (int m = 0; m < M; ++m) sum[m] = Isa::zero();
        if constexpr (ALIGNED) {
            const int per_group = w.group / kBlock;
            for (int b = 0, g = 0; b < w.blocks; ++g) {
                const int end = b + per_group < w.blocks ? b + per_group : w.blocks;
                Floats part[M];
                for (int m = 0; m < M; ++m) part[m] = Isa::zero();
                for (; b < end; ++b, p += kBytes) {
                    Bytes level[kQuads];
                    unpack_levels<BITS, KIND>(p, tables, level);
                    for (int m = 0; m < M; ++m) {
                        const int64_t at = (first + m) * stride + b;
                        Ints whole = Isa::start(x.bias[at]);
                        for (int k = 0; k < kQuads; ++k) whole = Isa::dot(whole, level[k], Isa::quad(x.rounded + at * kBlock + 4 * k));
                        part[m] = Isa::fma(Isa::to_floats(whole), Isa::set(x.scale[at]), part[m]);
                    }
                }
                const Floats scale = Isa::loadf(scales + g * kTile);
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
                        for (int i = k; i < end; ++i) whole = Isa::dot_whole(level[i], Isa::quad(x.rounded + at * kBlock + 4 * i), whole);
                        const Floats part = Isa::mul(Isa::to_floats(whole), Isa::set(x.scale[at]));
                        sum[m] = Isa::fma(part, scale, sum[m]);
                    }
                    left -= end - k, k = end;
                    if (left == 0) left = per_group, ++g;
                }
            }
        }
        for (int m = 0; m < M; ++m) Isa::storef(y + m * kTile + s * Isa::kLanes, sum[m]);
    }
}

// The same with float x and true levels: four sums by column within a quad, joined at the end of each group.
template <int BITS, bool GATHER, int M>
void rows_exact(const Walk& w, const Activations& x, int64_t first, float* y) {
    const int64_t stride = int64_t(x.blocks) * kBlock;
    for (int s = 0; s < Isa::kSlices; ++s) {
        const uint8_t* p = w.codes + s * kStep;
        const float* scales = w.scales + s * Isa::kLanes;
        alignas(64) int32_t starts[kTile] = {};
        for (int r = 0; GATHER && w.table_of_row && r < kTile; ++r) starts[r] = w.table_of_row[r] * w.entries;
        const Bytes start = Isa::load(starts + s * Isa::kLanes);
        typename Isa::Levels levels{};
        if constexpr (!GATHER) levels = Isa::levels(w.levels, w.entries);
        Floats sum[M], part[M][4];
        for (int m = 0; m < M; ++m) {
            sum[m] = Isa::zero();
            for (int j = 0; j < 4; ++j) part[m][j] = Isa::zero();
        }
        int g = 0, left = w.group / 4;
        for (int b = 0; b < w.blocks; ++b, p += 64 * BITS) {
            Bytes code[kQuads];
            unpack_codes<BITS>(p, code);
            for (int k = 0; k < kQuads; ++k) {
                const Bytes lane[4] = {code[k], Isa::shr<8>(code[k]), Isa::shr<16>(code[k]), Isa::shr<24>(code[k])};
                for (int j = 0; j < 4; ++j) {
                    Floats level;
                    if constexpr (GATHER) level = Isa::gather(w.levels, Isa::add32(Isa::low_byte(lane[j]), start));
                    else level = Isa::pick<BITS>(levels, lane[j]);
                    for (int m = 0; m < M; ++m) {
                        part[m][j] = Isa::fma(level, Isa::set(x.values[(first + m) * stride + b * kBlock + 4 * k + j]), part[m][j]);
                    }
                }
                if (--left && !(b + 1 == w.blocks && k + 1 == kQuads)) continue;
                const Floats scale = Isa::loadf(scales + (g < w.groups ? g : w.groups - 1) * kTile);
                for (int m = 0; m < M; ++m) {
                    sum[m] = Isa::fma(Isa::add(Isa::add(part[m][0], part[m][1]), Isa::add(part[m][2], part[m][3])), scale, sum[m]);
                    for (int j = 0; j < 4; ++j) part[m][j] = Isa::zero();
                }
                left = w.group / 4, ++g;
            }
        }
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
    const int passes = s.kind == kMixed ? 4 : 1, parts = s.entries > 16 ? s.entries / 16 : s.variants;
    for (int v = 0; v < parts; ++v) {
        for (int r = 0; r < passes; ++r) {
            for (int lane = 0; lane < 4; ++lane, out += 16) {
                const int table = ids ? ids[4 * lane + r] : 0;
                std::memcpy(out, bytes + 16 * (int64_t(table) * parts + v), 16);
                for (int i = 0; Isa::kBiased && i < 16; ++i) out[i] = int8_t(out[i] ^ -128);
            }
        }
    }
}

using Rows = void (*)(const Walk&, const Activations&, int64_t, float*);

// Run a kernel over all rows of x: MOST of them at a time while there are so many, then 4, 2 and 1.
template <int MOST, class Pick>
void over_rows(const Walk& w, const Activations& x, const Pick& pick, float* y) {
    for (int64_t m = 0; m < x.batch;) {
        const int64_t left = x.batch - m;
        const int take = left >= MOST ? MOST : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        pick(take)(w, x, m, y + m * kTile);
        m += take;
    }
}

template <int BITS, int KIND>
Rows int8_rows(int rows, bool aligned) {
    switch (rows) {
        case 1: return aligned ? rows_int8<BITS, KIND, 1, true> : rows_int8<BITS, KIND, 1, false>;
        case 2: return aligned ? rows_int8<BITS, KIND, 2, true> : rows_int8<BITS, KIND, 2, false>;
        case 4: return aligned ? rows_int8<BITS, KIND, 4, true> : rows_int8<BITS, KIND, 4, false>;
        default: return aligned ? rows_int8<BITS, KIND, Isa::kRows, true> : rows_int8<BITS, KIND, Isa::kRows, false>;
    }
}

template <int BITS, int KIND>
void expand(const Walk& w, uint8_t* out) {
    for (int s = 0; s < Isa::kSlices; ++s) {
        const Tables<BITS, KIND> tables(w.tables, s, w.zero);
        for (int b = 0; b < w.blocks; ++b) {
            Bytes level[kQuads];
            unpack_levels<BITS, KIND>(w.codes + b * 64 * BITS + s * kStep, tables, level);
            for (int k = 0; k < kQuads; ++k) Isa::store(out + (b * kQuads + k) * 64 + s * kStep, level[k]);
        }
    }
}

// From this many rows of x on, a tile is expanded once instead of once per four rows.
constexpr int kExpandFrom = 8;

template <int BITS, int KIND>
void run_int8(Walk& w, const Activations& x, uint8_t* room, float* y) {
    const bool aligned = w.group % kBlock == 0;
    if (x.batch < kExpandFrom) {
        over_rows<4>(w, x, [&](int rows) { return int8_rows<BITS, KIND>(rows, aligned); }, y);
        return;
    }
    expand<BITS, KIND>(w, room);
    w.codes = room;
    over_rows<Isa::kRows>(w, x, [&](int rows) { return int8_rows<8, kLevels>(rows, aligned); }, y);
}

template <int BITS>
void run_shuffle(int kind, Walk& w, const Activations& x, uint8_t* room, float* y) {
    if (kind == kMixed) run_int8<BITS, kMixed>(w, x, room, y);
    else run_int8<BITS, kTable>(w, x, room, y);
}

template <int BITS>
void run_wide(int kind, Walk& w, const Activations& x, uint8_t* room, float* y) {
    if (kind == kLinear) run_int8<BITS, kLinear>(w, x, room, y);
    else run_int8<BITS, kTable>(w, x, room, y);
}

Walk start_walk(const Matrix& m, const Stage& s, const uint8_t* tile, Scratch& scratch) {
    decode_scales(s, tile + s.scales_at, scratch.scales);
    const int32_t* ids = s.tables > 1 ? reinterpret_cast<const int32_t*>(tile) : nullptr;
    return {tile + s.codes_at, scratch.tables, scratch.scales, m.at<float>(s.levels_at), ids,
            m.blocks, s.group, s.groups, s.zero, s.entries, s.variants};
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
    Walk w = start_walk(m, s, tile, scratch);
    if (s.kind == kTable || s.kind == kMixed) spread_tables(m, s, tile, scratch.tables);
    switch (s.bits) {
        case 1: run_shuffle<1>(s.kind, w, x, scratch.levels, y); break;
        case 2: run_shuffle<2>(s.kind, w, x, scratch.levels, y); break;
        case 3: run_shuffle<3>(s.kind, w, x, scratch.levels, y); break;
        case 4: run_shuffle<4>(s.kind, w, x, scratch.levels, y); break;
        case 5: run_wide<5>(s.kind, w, x, scratch.levels, y); break;
        case 6: run_wide<6>(s.kind, w, x, scratch.levels, y); break;
        default: run_int8<8, kLinear>(w, x, scratch.levels, y); break;
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
    over_rows<4>(w, x, pick, y);
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
        bias[b] = -128 * sum;
    }
}

}  // namespace
}  // namespace lowbit
