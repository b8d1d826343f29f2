// Attention proper, one head of keys at a time. Included after an Isa, as tile.h.
#pragma once
#include <cmath>
#include <limits>

#include "attention.h"
#include "exponential.h"
#include "half.h"

namespace lowbit {
namespace {

// One row of a cache as floats: itself, or widened into `room`.
inline const float* cache_row(const void* data, int64_t at, int dtype, int dim, float* room) {
    if (dtype == 0) return static_cast<const float*>(data) + at;
    const uint16_t* row = static_cast<const uint16_t*>(data) + at;
    for (int i = 0; i < dim; ++i) room[i] = bfloat_to_float(row[i]);
    return room;
}

// `dim` is a multiple of 16. As many sums as make sixteen lanes: none waits for its last product.
inline float dot_row(const float* a, const float* b, int dim) {
    Isa::Floats sum[Isa::kSlices];
    for (auto& part : sum) part = Isa::zero();
    for (int i = 0; i < dim; i += kTile) {
        for (int s = 0; s < Isa::kSlices; ++s) {
            const int at = i + s * Isa::kLanes;
            sum[s] = Isa::fma(Isa::loadf(a + at), Isa::loadf(b + at), sum[s]);
        }
    }
    float lanes[kTile];
    for (int s = 0; s < Isa::kSlices; ++s) Isa::storef(lanes + s * Isa::kLanes, sum[s]);
    float total = 0;
    for (float lane : lanes) total += lane;
    return total;
}

inline void add_row(float weight, const float* row, float* out, int dim) {
    const auto w = Isa::set(weight);
    for (int i = 0; i < dim; i += Isa::kLanes) Isa::storef(out + i, Isa::fma(w, Isa::loadf(row + i), Isa::loadf(out + i)));
}

// What the mask adds to the score of a key; minus infinity where it hides it.
inline float masked(const Attention& a, int b, int t, int64_t key) {
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    if (a.mask_kind == 0) return a.causal && key > a.length - a.tokens + t ? kHidden : 0.0f;
    const int64_t at = b * a.mask_batch + t * a.mask_query + key * a.mask_key;
    if (a.mask_kind == 1) return static_cast<const uint8_t*>(a.mask)[at] ? 0.0f : kHidden;
    return static_cast<const float*>(a.mask)[at];
}

// Scores to weights that add up to 1; a query that sees nothing gets zeros, as the host's attention gives it.
inline void softmax(float* scores, int64_t length) {
    float top = scores[0];
    for (int64_t i = 1; i < length; ++i) top = scores[i] > top ? scores[i] : top;
    if (!(top > -std::numeric_limits<float>::infinity())) top = 0;
    for (int64_t i = 0; i < length; ++i) scores[i] = exponential(scores[i] - top);
    float total = 0;
    for (int64_t i = 0; i < length; ++i) total += scores[i];
    const float share = total > 0 ? 1 / total : 0;
    for (int64_t i = 0; i < length; ++i) scores[i] *= share;
}

// gate = silu(gate) * up, silu(x) = x / (1 + e**-x)
void gate_silu(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// All queries of sequence `b` that share the keys of head `h`.
void attend_head(const Attention& a, int b, int h, float* scratch) {
    const int group = a.heads / a.kv_heads, queries = group * a.tokens;
    float* room = scratch + queries * a.length;
    const auto place = [&](int q) {  // of query q in queries and out
        return ((int64_t(b) * a.tokens + q / group) * a.heads + h * group + q % group) * a.dim;
    };
    for (int64_t key = 0; key < a.length; ++key) {
        const float* row = cache_row(a.keys, b * a.key_batch + h * a.key_head + key * a.key_token, a.dtype, a.dim, room);
        for (int q = 0; q < queries; ++q) scratch[q * a.length + key] = a.scale * dot_row(a.queries + place(q), row, a.dim);
    }
    for (int q = 0; q < queries; ++q) {
        float* scores = scratch + q * a.length;
        if (a.mask_kind || a.causal) {
            for (int64_t key = 0; key < a.length; ++key) scores[key] += masked(a, b, q / group, key);
        }
        softmax(scores, a.length);
        for (int i = 0; i < a.dim; ++i) a.out[place(q) + i] = 0;
    }
    for (int64_t key = 0; key < a.length; ++key) {
        const float* row = cache_row(a.values, b * a.value_batch + h * a.value_head + key * a.value_token, a.dtype, a.dim, room);
        for (int q = 0; q < queries; ++q) add_row(scratch[q * a.length + key], row, a.out + place(q), a.dim);
    }
}

}  // namespace
}  // namespace lowbit
