// Single rows of the dense matrix, for embedding look-ups and for the exact product of many rows.
#include <cstring>
#include <exception>
#include <vector>

#include "half.h"
#include "lowbit_cpu.h"
#include "matrix.h"
#include "threads.h"

namespace lowbit {
namespace {

// One lane of a block back to 32 codes: the inverse of place_codes in prepare.cpp.
void lane_codes(const uint8_t* block, int bits, int lane, uint8_t* out) {
    uint32_t v[8], q[kQuads];
    for (int i = 0; i < bits; ++i) std::memcpy(&v[i], block + 64 * i + 4 * lane, 4);
    for (int k = 0; k < kQuads; ++k) {
        switch (bits) {
            case 1: q[k] = v[0] >> k & 0x01010101u; break;
            case 2: q[k] = v[k / 4] >> (k % 4 * 2) & 0x03030303u; break;
            case 3:
                if (k < 6) {
                    q[k] = v[k / 2] >> (k % 2 * 4) & 0x07070707u;
                } else {
                    q[k] = 0;
                    for (int i = 0; i < 3; ++i) q[k] |= (v[i] >> (k == 6 ? 3 : 7) & 0x01010101u) << i;
                }
                break;
            case 8: q[k] = v[k]; break;
            default:
                q[k] = v[k / 2] >> (k % 2 * 4) & 0x0f0f0f0fu;
                if (bits == 5) q[k] |= (v[4] >> k & 0x01010101u) << 4;
                if (bits == 6) q[k] |= (v[4 + k / 4] >> (k % 4 * 2) & 0x03030303u) << 4;
        }
    }
    std::memcpy(out, q, sizeof q);
}

float group_value(const Stage& s, const uint8_t* from, int group, int lane) {
    uint16_t half;
    if (s.wide_scales) {
        float value;
        std::memcpy(&value, from + 4 * (group * kTile + lane), 4);
        return value;
    }
    if (!s.coded_scales) {
        std::memcpy(&half, from + 2 * (group * kTile + lane), 2);
        return half_to_float(half);
    }
    std::memcpy(&half, from + s.groups * kTile + 2 * (group / s.per_super * kTile + lane), 2);
    return float(int8_t(from[group * kTile + lane])) * half_to_float(half);
}

// Adds a stage's values of its row `slot` to out, in the order of the reference: level - zero, * scale, + offset, + what was there.
void add_stage(const Matrix& m, const Stage& s, int slot, float* out) {
    const uint8_t* tile = m.tile(s, slot / kTile);
    const int lane = slot % kTile;
    const int table = s.tables > 1 ? reinterpret_cast<const int32_t*>(tile)[lane] : 0;
    const float* levels = m.at<float>(s.levels_at) + int64_t(table) * s.entries;
    int group = -1;
    float scale = 0, offset = 0, zero = 0;
    for (int b = 0; b < m.blocks; ++b) {
        uint8_t codes[kBlock];
        lane_codes(tile + s.codes_at + int64_t(b) * 64 * s.bits, s.bits, lane, codes);
        const int last = m.columns - b * kBlock < kBlock ? m.columns - b * kBlock : kBlock;
        for (int i = 0; i < last;) {
            const int column = b * kBlock + i, g = column / s.group;
            if (g != group) {
                group = g;
                scale = group_value(s, tile + s.scales_at, g, lane);
                offset = s.has_offset ? group_value(s, tile + s.offsets_at, g, lane) : 0.0f;
                zero = s.has_zero ? float(int8_t(tile[s.zeros_at + g * kTile + lane])) : 0.0f;
            }
            const int64_t stop = int64_t(g + 1) * s.group - b * kBlock;
            const int end = stop < last ? int(stop) : last;
            if (s.has_offset) {
                for (; i < end; ++i) out[b * kBlock + i] += (levels[codes[i]] - zero) * scale + offset;
            } else {
                for (; i < end; ++i) out[b * kBlock + i] += (levels[codes[i]] - zero) * scale;
            }
        }
    }
}

void decode_row(const Matrix& m, int row, float* out) {
    std::memset(out, 0, sizeof(float) * size_t(m.columns));
    for (int i = 0; i < m.stages; ++i) {
        const Stage& s = m.stage[i];
        const int32_t* ids = m.at<int32_t>(s.row_ids_at);
        for (int slot = ids ? 0 : row; slot < (ids ? s.rows : row + 1); ++slot) {
            if (!ids || ids[slot] == row) add_stage(m, s, slot, out);
        }
    }
    const float* a = m.at<float>(m.low_rank_a_at);
    const float* b = m.at<float>(m.low_rank_b_at);
    for (int c = 0; a && c < m.columns; ++c) {
        float sum = 0;
        for (int k = 0; k < m.rank; ++k) sum += b[int64_t(row) * m.rank + k] * a[int64_t(k) * m.columns + c];
        out[c] += sum;
    }
    if (const int32_t* starts = m.at<int32_t>(m.outlier_starts_at)) {
        const uint16_t* values = m.at<uint16_t>(m.outlier_values_at);
        for (int e = starts[row]; e < starts[row + 1]; ++e) {
            const int column = m.columns <= 65536 ? m.at<uint16_t>(m.outlier_columns_at)[e] : m.at<int32_t>(m.outlier_columns_at)[e];
            out[column] += half_to_float(values[e]);
        }
    }
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

int32_t lowbit_rows(const void* matrix, int64_t bytes, const int64_t* ids, int64_t count, int32_t dtype, void* out,
                    int32_t threads) try {
    const Matrix& m = *static_cast<const Matrix*>(matrix);
    if (bytes < int64_t(sizeof(Matrix)) || m.magic != kMagic || m.bytes != bytes || m.abi != LOWBIT_ABI_VERSION) return LOWBIT_E_MATRIX;
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= m.rows) return LOWBIT_E_WIDTH;
    }
    const int32_t* places = m.at<int32_t>(m.permutation_at);
    parallel_for(count, 4, threads, [&](int64_t first, int64_t last) {
        std::vector<float> row(size_t(m.columns));
        for (int64_t i = first; i < last; ++i) {
            decode_row(m, int(ids[i]), row.data());
            for (int c = 0; c < m.columns; ++c) {
                write_number(out, i * m.columns + (places ? places[c] : c), dtype, row[size_t(c)] * m.unit);
            }
        }
    });
    return 0;
} catch (const std::exception&) {
    return LOWBIT_E_MEMORY;
}
