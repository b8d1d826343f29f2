// From the stored record to the prepared form of matrix.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "half.h"
#include "lowbit_cpu.h"
#include "matrix.h"
#include "threads.h"

namespace lowbit {
namespace {

struct Int8Table {
    float scale = 1;
    double rounding = 0, spacing = 0;  // mean squares: of the levels' rounding, and of what the usual gap between levels makes
};

// Largest integer a level becomes: at up to 3 bits half of what a byte holds, which lets AVX2 do without the signs (unpack.h),
// and is still thirty times finer than the codes.
int range_of(int bits) { return bits <= 3 ? 63 : 127; }

// The scale under which the levels lie nearest to integers of at most `range`: exact for tables of such integers. A level counts
// as often as it is used: where fitted levels are `gap` apart weights have a density of gap**-3, so about gap**-2 share one.
Int8Table fit_int8(const float* levels, int count, int range) {
    Int8Table best;
    double top = 0;
    std::vector<double> gaps, uses;
    for (int i = 0; i < count; ++i) top = std::max(top, std::fabs(double(levels[i])));
    for (int i = 1; i < count; ++i) gaps.push_back(std::fabs(double(levels[i]) - double(levels[i - 1])));
    for (int i = 0; i < count; ++i) {
        const double around = i == 0 ? 2 * gaps[0] : i == count - 1 ? 2 * gaps[size_t(i) - 1] : gaps[size_t(i) - 1] + gaps[size_t(i)];
        uses.push_back(around > 0 ? 1 / (around * around) : 0);
    }
    // The median, since a far level for outliers makes one wide gap that few weights lie in.
    std::nth_element(gaps.begin(), gaps.begin() + count / 2 - 1, gaps.end());
    best.spacing = gaps[size_t(count / 2 - 1)] * gaps[size_t(count / 2 - 1)] / 12;
    if (!(top > 0) || !std::isfinite(top)) return best;
    double least = std::numeric_limits<double>::infinity();
    std::vector<double> scales;
    if (top <= range) scales.push_back(1);
    // Eighths of steps: with the weights above, int8 arithmetic changes the perplexity of a 3-bit stories260K by 0.03 %, where
    // whole steps and equal weights changed it by 0.37 %.
    for (int eighths = 8 * range; eighths > 4 * range; --eighths) scales.push_back(8 * top / eighths);
    for (double scale : scales) {
        double sum = 0, weighted = 0;
        const double rounded = double(float(scale));
        for (int i = 0; i < count; ++i) {
            const double error = levels[i] - rounded * std::nearbyint(levels[i] / rounded);
            sum += error * error, weighted += uses[size_t(i)] * error * error;
        }
        if (weighted < least) least = weighted, best.rounding = sum / count, best.scale = float(scale);
        if (sum == 0) break;
    }
    return best;
}

int8_t round_level(float level, float scale, int range) {
    return int8_t(std::min<double>(range, std::max<double>(-range, std::nearbyint(double(level) / double(scale)))));
}

// Whether the levels are code - zero, save that neighbours may be equal at the very top (`uniform`).
bool is_linear(const float* levels, int count, int32_t* zero) {
    if (levels[0] != std::nearbyint(levels[0]) || levels[0] < -128 || levels[0] > 0) return false;
    *zero = int32_t(-levels[0]);
    for (int i = 0; i + 1 < count; ++i) {
        if (levels[i] != float(i - *zero)) return false;
    }
    return levels[count - 1] <= 127 && (levels[count - 1] == float(count - 1 - *zero) || levels[count - 1] == levels[count - 2]);
}

int variants_of(int bits) { return bits == 1 ? 4 : bits == 2 ? 2 : 1; }

bool plan_stage(const LowbitSource& source, const LowbitStageSource& from, Stage& s, int64_t& end) {
    if (from.bits < 1 || from.bits > 8 || from.group_size < 1 || from.rows < 1 || from.tables < 1) return false;
    s.bits = from.bits == 7 ? 8 : from.bits;
    s.rows = from.rows, s.tiles = int32_t(ceil_div(from.rows, kTile));
    s.groups = int32_t(ceil_div(source.columns, from.group_size));
    s.group = s.groups == 1 ? int32_t(ceil_div(source.columns, kBlock) * kBlock) : from.group_size;
    if (s.group % 4) return false;
    s.tables = from.tables, s.entries = 1 << from.bits, s.variants = variants_of(from.bits);
    s.coded_scales = from.scale_bits != 16;
    s.per_super = from.per_super, s.supers = s.coded_scales ? int32_t(ceil_div(s.groups, from.per_super)) : 0;
    s.has_offset = from.offset != nullptr;
    const int64_t blocks = ceil_div(source.columns, kBlock);
    const int64_t head = from.table_of_row ? kTile * 8 : 0;
    const int64_t scales = s.coded_scales ? kTile * (s.groups + 2 * s.supers) : 2 * kTile * s.groups;
    s.scales_at = head, s.offsets_at = head + scales;
    s.codes_at = align64(s.offsets_at + (s.has_offset ? scales : 0));
    s.tile_bytes = s.codes_at + blocks * 64 * s.bits;
    s.tiles_at = end;
    end = align64(end + s.tiles * s.tile_bytes);
    s.row_ids_at = from.row_ids ? end : 0;
    end = align64(end + (from.row_ids ? 4 * int64_t(from.rows) : 0));
    s.bytes_at = end;
    end = align64(end + int64_t(s.tables) * (from.bits <= 4 ? 16 * s.variants : s.entries));
    s.levels_at = end;
    end = align64(end + 4 * int64_t(s.tables) * s.entries);
    return true;
}

bool plan(const LowbitSource& source, Matrix& m) {
    if (source.rows < 1 || source.columns < 1 || source.stage_count < 1 || source.stage_count > kMaxStages) return false;
    std::memset(static_cast<void*>(&m), 0, sizeof m);
    m.magic = kMagic, m.abi = LOWBIT_ABI_VERSION;
    m.rows = source.rows, m.columns = source.columns;
    m.blocks = int32_t(ceil_div(source.columns, kBlock)), m.tiles = int32_t(ceil_div(source.rows, kTile));
    m.stages = source.stage_count, m.rank = source.rank;
    m.unit = float(std::ldexp(1.0, source.shift));
    int64_t end = align64(sizeof(Matrix));
    for (int i = 0; i < m.stages; ++i) {
        if (!plan_stage(source, source.stages[i], m.stage[i], end)) return false;
    }
    const auto place = [&end](bool there, int64_t bytes) {
        const int64_t at = there ? end : 0;
        end = align64(end + (there ? bytes : 0));
        return at;
    };
    m.permutation_at = place(source.permutation, 4 * int64_t(m.columns));
    m.outlier_values_at = place(source.outliers > 0, 2 * int64_t(source.outliers));
    m.outlier_columns_at = place(source.outliers > 0, (m.columns <= 65536 ? 2 : 4) * int64_t(source.outliers));
    m.outlier_starts_at = place(source.outliers > 0, 4 * int64_t(m.rows + 1));
    m.low_rank_a_at = place(source.rank > 0, 4 * int64_t(m.rank) * m.columns);
    m.low_rank_b_at = place(source.rank > 0, 4 * int64_t(m.rank) * m.rows);
    m.bytes = end;
    return true;
}

// `count` packed integers of `bits` bits (hf_lowbit/format/packing.py) from `row`; out is padded to a whole block.
void unpack_row(const uint8_t* row, int bits, int block, int64_t count, uint8_t* out) {
    if (bits == 8) {
        std::memcpy(out, row, size_t(count));
    } else if (8 % bits == 0) {
        const int per_byte = 8 / bits, mask = (1 << bits) - 1;
        for (int64_t byte = 0; byte * per_byte < count; ++byte) {
            for (int k = 0; k < per_byte; ++k) out[byte * per_byte + k] = uint8_t(row[byte] >> (k * bits) & mask);
        }
    } else {
        // Bit p of eight neighbours in a byte is spread to the low bits of eight bytes by one multiplication and mask.
        for (int64_t start = 0; start < count; start += 8) {
            const uint8_t* planes = row + start / block * block * bits / 8 + start % block / 8;
            uint64_t codes = 0;
            for (int p = 0; p < bits; ++p) {
                const uint64_t bit = uint64_t(planes[p * block / 8]);
                const uint64_t low = ((bit & 0x7f) * 0x0002040810204081ULL) & 0x0101010101010101ULL;
                codes |= (low | (bit >> 7) << 56) << p;
            }
            for (int k = 0; k < 8; ++k) out[start + k] = uint8_t(codes >> (8 * k));
        }
    }
}

// The codes of one row into their lane of a tile. `codes` is padded with zeros to whole blocks.
void place_codes(const uint8_t* codes, int bits, int lane, int64_t blocks, uint8_t* out) {
    for (int64_t b = 0; b < blocks; ++b, codes += kBlock, out += 64 * bits) {
        uint32_t q[kQuads], v[8] = {};
        std::memcpy(q, codes, sizeof q);
        switch (bits) {
            case 1:
                for (int k = 0; k < 8; ++k) v[0] |= q[k] << k;
                break;
            case 2:
                for (int k = 0; k < 8; ++k) v[k / 4] |= q[k] << (k % 4 * 2);
                break;
            case 3:
                for (int k = 0; k < 6; ++k) v[k / 2] |= q[k] << (k % 2 * 4);
                for (int i = 0; i < 3; ++i) {
                    v[i] |= (q[6] >> i & 0x01010101u) << 3 | (q[7] >> i & 0x01010101u) << 7;
                }
                break;
            case 8:
                for (int k = 0; k < 8; ++k) v[k] = q[k];
                break;
            default:
                for (int k = 0; k < 8; ++k) {
                    v[k / 2] |= (q[k] & 0x0f0f0f0fu) << (k % 2 * 4);
                    if (bits == 5) v[4] |= (q[k] >> 4 & 0x01010101u) << k;
                    if (bits == 6) v[4 + k / 4] |= (q[k] >> 4 & 0x03030303u) << (k % 4 * 2);
                }
        }
        for (int i = 0; i < bits; ++i) std::memcpy(out + 64 * i + 4 * lane, &v[i], 4);
    }
}

// Scales (or offsets) of one row into their lane.
void place_scales(const Stage& s, const LowbitStageSource& from, const void* stored, const uint16_t* supers, int row, int lane,
                  uint8_t* scratch, uint8_t* out) {
    if (!s.coded_scales) {
        const uint16_t* values = static_cast<const uint16_t*>(stored) + int64_t(row) * s.groups;
        for (int g = 0; g < s.groups; ++g) std::memcpy(out + 2 * (g * kTile + lane), values + g, 2);
        return;
    }
    const int64_t width = ceil_div(s.groups, 8) * from.scale_bits;
    unpack_row(static_cast<const uint8_t*>(stored) + row * width, from.scale_bits, 8, s.groups, scratch);
    for (int g = 0; g < s.groups; ++g) out[g * kTile + lane] = uint8_t(scratch[g] - (1 << (from.scale_bits - 1)));
    uint8_t* heads = out + s.groups * kTile;
    for (int k = 0; k < s.supers; ++k) std::memcpy(heads + 2 * (k * kTile + lane), supers + int64_t(row) * s.supers + k, 2);
}

void fill_tables(const LowbitStageSource& from, Stage& s, uint8_t* base, std::vector<float>& scales) {
    const int64_t all = int64_t(s.tables) * s.entries;
    std::memcpy(base + s.levels_at, from.levels, size_t(4 * all));
    s.kind = kNone, s.auto_int8 = 0, s.table_scale = 1;
    scales.assign(size_t(s.tables), 1);
    for (int64_t i = 0; i < all; ++i) {
        if (!std::isfinite(from.levels[i])) return;
    }
    if (from.bits > 4 && s.tables == 1 && is_linear(from.levels, s.entries, &s.zero)) {
        s.kind = kLinear, s.auto_int8 = 1;
        return;
    }
    if (from.bits > 6 || (from.bits > 4 && s.tables > 1)) return;
    s.kind = kTable, s.auto_int8 = 1;
    for (int t = 0; t < s.tables; ++t) {
        const float* levels = from.levels + int64_t(t) * s.entries;
        const Int8Table found = fit_int8(levels, s.entries, range_of(from.bits));
        scales[size_t(t)] = found.scale;
        if (from.bits > 4 && found.rounding > 0.25 * found.spacing) s.auto_int8 = 0;
        int8_t* out = reinterpret_cast<int8_t*>(base + s.bytes_at) + int64_t(t) * (from.bits <= 4 ? 16 * s.variants : s.entries);
        if (from.bits > 4) {
            for (int i = 0; i < s.entries; ++i) out[i] = round_level(levels[i], found.scale, 127);
            continue;
        }
        for (int v = 0; v < s.variants; ++v) {
            for (int i = 0; i < 16; ++i) {
                const float level = levels[i >> (v * from.bits) & (s.entries - 1)];
                out[16 * v + i] = round_level(level, found.scale, range_of(from.bits));
            }
        }
    }
    if (s.tables == 1) s.table_scale = scales[0];
    // Whether each lane of four rows of each tile has one table.
    for (int row = 0; from.table_of_row && row < s.rows; ++row) {
        if (from.table_of_row[row] != from.table_of_row[row / 4 * 4]) s.kind = kMixed;
    }
}

void fill_stage(const Matrix& m, const LowbitStageSource& from, Stage& s, uint8_t* base, int threads) {
    std::vector<float> scales;
    fill_tables(from, s, base, scales);
    if (from.row_ids) std::memcpy(base + s.row_ids_at, from.row_ids, size_t(4 * s.rows));
    const int64_t width = ceil_div(m.columns, 32) * 32 * from.bits / 8;
    const int top = s.entries - 1;
    const bool alias = s.kind == kLinear && from.levels[top] == from.levels[top - 1];
    parallel_for(s.tiles, 1, threads, [&](int64_t first, int64_t last) {
        std::vector<uint8_t> codes(size_t(m.blocks) * kBlock), numbers(size_t(s.groups) + 8);
        for (int64_t tile = first; tile < last; ++tile) {
            uint8_t* out = base + s.tiles_at + tile * s.tile_bytes;
            std::memset(out, 0, size_t(s.tile_bytes));
            for (int lane = 0; lane < kTile && tile * kTile + lane < s.rows; ++lane) {
                const int row = int(tile * kTile + lane);
                if (from.table_of_row) {
                    std::memcpy(out + 4 * lane, from.table_of_row + row, 4);
                    std::memcpy(out + 4 * (kTile + lane), &scales[size_t(from.table_of_row[row])], 4);
                }
                place_scales(s, from, from.scale, from.scale_super, row, lane, numbers.data(), out + s.scales_at);
                if (s.has_offset) {
                    place_scales(s, from, from.offset, from.offset_super, row, lane, numbers.data(), out + s.offsets_at);
                }
                unpack_row(from.codes + row * width, from.bits, 32, m.columns, codes.data());
                for (int i = m.columns; i < m.blocks * kBlock; ++i) codes[size_t(i)] = 0;
                if (alias) {
                    for (auto& code : codes) code = code == top ? uint8_t(top - 1) : code;
                }
                place_codes(codes.data(), s.bits, lane, m.blocks, out + s.codes_at);
            }
        }
    });
}

void halves(const uint16_t* from, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(from[i]);
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

int64_t lowbit_prepared_bytes(const LowbitSource* source) {
    Matrix m;
    return plan(*source, m) ? m.bytes : 0;
}

int32_t lowbit_prepare(const LowbitSource* source, void* out, int64_t bytes, int32_t threads) try {
    Matrix m;
    if (!plan(*source, m)) return LOWBIT_E_LAYOUT;
    if (bytes < m.bytes || reinterpret_cast<uintptr_t>(out) % 64) return LOWBIT_E_MATRIX;
    uint8_t* base = static_cast<uint8_t*>(out);
    m.auto_mode = LOWBIT_INT8, m.has_int8 = 1;
    // Gaps of the alignment, so that equal records give equal bytes.
    std::memset(base, 0, size_t(m.stage[0].tiles_at));
    for (int i = 0; i < m.stages; ++i) {
        const int64_t from = m.stage[i].tiles_at + m.stage[i].tiles * m.stage[i].tile_bytes;
        std::memset(base + from, 0, size_t((i + 1 < m.stages ? m.stage[i + 1].tiles_at : m.bytes) - from));
    }
    for (int i = 0; i < m.stages; ++i) {
        fill_stage(m, source->stages[i], m.stage[i], base, threads);
        if (m.stage[i].kind == kNone) m.has_int8 = 0;
        if (!m.stage[i].auto_int8) m.auto_mode = LOWBIT_EXACT;
    }
    if (source->permutation) std::memcpy(base + m.permutation_at, source->permutation, size_t(4) * m.columns);
    if (source->outliers > 0) {
        std::memcpy(base + m.outlier_values_at, source->outlier_values, size_t(2) * source->outliers);
        std::memcpy(base + m.outlier_columns_at, source->outlier_columns, size_t(m.columns <= 65536 ? 2 : 4) * source->outliers);
        std::memcpy(base + m.outlier_starts_at, source->outlier_starts, size_t(4) * (m.rows + 1));
    }
    if (m.rank > 0) {
        halves(source->low_rank_a, int64_t(m.rank) * m.columns, reinterpret_cast<float*>(base + m.low_rank_a_at));
        halves(source->low_rank_b, int64_t(m.rank) * m.rows, reinterpret_cast<float*>(base + m.low_rank_b_at));
    }
    std::memcpy(base, &m, sizeof m);
    return 0;
} catch (const std::exception&) {
    return LOWBIT_E_MEMORY;
}

int32_t lowbit_auto_mode(const void* matrix) { return static_cast<const Matrix*>(matrix)->auto_mode; }
