// Attention over a packed cache, one head of keys at a time. Included after an Isa, as attend.h.
#pragma once
#include <cstring>

#include "packed_blocks.h"
#include "packed_rows.h"

namespace lowbit {
namespace {

// Weights of the rows that are not low, averaged over the heads of the group.
void write_weights(const HeadWork& w) {
    const LowbitKv& c = w.c;
    const int64_t width = kv_raw_room(c);
    float* out = c.weights + w.head() * c.tokens * width;
    for (int64_t i = 0; i < c.tokens * width; ++i) out[i] = 0;
    for (int q = 0; q < w.queries; ++q) {
        float* raw = w.raw + q * width;
        exp_row(raw, int(width), w.top[q] == kHiddenScore ? 0.0f : w.top[q]);
        const float share = w.total[q] > 0 ? 1.0f / (w.total[q] * float(c.group)) : 0.0f;
        float* row = out + (q % c.tokens) * width;
        for (int64_t i = 0; i < width; ++i) row[i] += raw[i] * share;
    }
}

// All queries of sequence `b` that share the keys of head `h`.
void attend_packed(const LowbitKv& c, int b, int h, float* scratch) {
    const int queries = c.group * c.tokens, padded = (c.dim + 63) / 64 * 64;
    HeadWork w{c, b, h, queries, padded, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    w.plain = reinterpret_cast<Rounded*>(scratch);
    w.other = w.plain + queries;
    w.codes = reinterpret_cast<int8_t*>(w.other + queries);
    for (int q = 0; q < queries; ++q) {
        w.plain[q].rounded = w.codes + int64_t(q) * padded;
        w.other[q].rounded = w.codes + int64_t(queries + q) * padded;
    }
    std::memset(w.codes, 0, size_t(2) * size_t(queries) * size_t(padded));
    w.scores = reinterpret_cast<float*>(w.codes + int64_t(2) * queries * padded);
    w.sums = w.scores + queries * kKvBlock;
    w.top = w.sums + queries * c.dim, w.total = w.top + queries, w.shift = w.total + queries;
    w.folded = w.shift + queries;
    w.raw = w.folded + (queries > 3 ? queries : 3) * c.dim;
    for (int q = 0; q < queries; ++q) {
        round_query(w.query(q, false), c.dim, w.plain[q]);
        w.top[q] = kHiddenScore, w.total[q] = 0;
        for (int i = 0; i < c.dim; ++i) w.sums[q * c.dim + i] = 0;
    }
    int64_t at = 0;
    for (int i = 0; i < c.row_count; ++i) {
        const bool asked = c.weights && !c.rows[i].low;
        attend_rows(w, c.rows[i], asked ? w.raw + at : nullptr);
        if (!c.rows[i].low) at += c.rows[i].length;
    }
    for (int i = 0; i < c.block_count; ++i) attend_blocks(w, c.blocks[i]);
    for (int q = 0; q < queries; ++q) {
        const float share = w.total[q] > 0 ? 1.0f / w.total[q] : 0.0f;
        float* out = w.out(q);
        for (int i = 0; i < c.dim; ++i) out[i] = w.sums[q * c.dim + i] * share;
    }
    if (c.weights) write_weights(w);
}

}  // namespace
}  // namespace lowbit
