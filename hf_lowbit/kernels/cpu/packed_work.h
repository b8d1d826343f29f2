// What attention over a packed cache works with for one head of keys: queries, online softmax, weighted sums. Included after an
// Isa, as attend.h.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "attend.h"
#include "exponential.h"
#include "half.h"
#include "packed_cache.h"

namespace lowbit {
namespace {

constexpr float kHiddenScore = -std::numeric_limits<float>::infinity();
constexpr int kVector = Isa::kLanes * 4;                 // bytes
constexpr int kAtOnce = Isa::kLanes == 16 ? 4 : 2;       // queries whose sums stay in registers
constexpr int kKvTiles = 4, kTokensOfTile = 16;

inline void exp_row(float* x, int count, float minus) {
    for (int i = 0; i < count; ++i) x[i] = exponential(x[i] - minus);
}

// Largest and summed up over 64 scores, in lanes of 16 that the compiler can keep in registers.
inline float largest(const float* x, int count, float least) {
    float lanes[16];
    for (float& lane : lanes) lane = least;
    int i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int k = 0; k < 16; ++k) lanes[k] = x[i + k] > lanes[k] ? x[i + k] : lanes[k];
    }
    for (; i < count; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    for (float lane : lanes) least = lane > least ? lane : least;
    return least;
}

inline float summed(const float* x, int count) {
    float lanes[16] = {};
    int i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int k = 0; k < 16; ++k) lanes[k] += x[i + k];
    }
    float total = 0;
    for (; i < count; ++i) total += x[i];
    for (float lane : lanes) total += lane;
    return total;
}

inline void widen_halves(const uint16_t* from, int count, float* to) {
    for (int i = 0; i < count; i += Isa::kLanes) Isa::storef(to + i, Isa::halves(from + i));
}

// One query rounded to int8: x near scale * rounded.
struct Rounded {
    int8_t* rounded;
    float scale;
    int32_t sum;
};

inline void round_query(const float* x, int dim, Rounded& to) {
    int32_t most = 0;  // magnitudes order like their bits
    for (int i = 0; i < dim; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float top;
    std::memcpy(&top, &most, 4);
    to.scale = top / 127.0f, to.sum = 0;
    const float factor = top > 0 ? 127.0f / top : 0.0f;
    for (int i = 0; i < dim; ++i) {
        // Adding this rounds to the nearest whole number, which the compiler can vectorize.
        const float whole = x[i] * factor + 12582912.0f;
        to.rounded[i] = int8_t(int(whole - 12582912.0f));
    }
    for (int i = 0; i < dim; ++i) to.sum += to.rounded[i];
}

inline int32_t add_lanes(const Isa::Ints& v) {
    int32_t lanes[Isa::kLanes];
    std::memcpy(lanes, &v, sizeof lanes);
    int32_t total = 0;
    for (int32_t lane : lanes) total += lane;
    return total;
}

// What one head of keys works with; everything is in its scratch.
struct HeadWork {
    const LowbitKv& c;
    int b, h, queries, padded;   // padded: dim rounded up to whole vectors
    float *scores, *sums, *top, *total, *folded, *shift, *raw;
    int8_t* codes;
    Rounded* plain;              // queries as they are, for 8-bit rows
    Rounded* other;              // queries with the scales of a block in them

    const float* query(int q, bool low) const {
        const int64_t head = int64_t(h) * c.group + q / c.tokens, token = q % c.tokens;
        return low ? c.turned + b * c.turned_batch + head * c.turned_head + token * c.turned_token
                   : c.queries + b * c.query_batch + head * c.query_head + token * c.query_token;
    }
    float* out(int q) const {
        return c.out + ((int64_t(b) * c.tokens + q % c.tokens) * c.heads * c.group + int64_t(h) * c.group + q / c.tokens) * c.dim;
    }
    int64_t head() const { return int64_t(b) * c.heads + h; }
};

inline float mask_at(const LowbitKv& c, int b, int t, int64_t key) {
    const int64_t at = b * c.mask_batch + t * c.mask_query + key * c.mask_key;
    if (c.mask_kind == 1) return static_cast<const uint8_t*>(c.mask)[at] ? 0.0f : kHiddenScore;
    return static_cast<const float*>(c.mask)[at];
}

inline int64_t position_at(const void* positions, int wide, int64_t at) {
    return wide ? static_cast<const int32_t*>(positions)[at] : static_cast<const int16_t*>(positions)[at];
}

// Add the mask to the scores of `count` tokens; position(i) says where token i stands.
template <class F>
void hide(const HeadWork& w, int count, F position) {
    const LowbitKv& c = w.c;
    if (c.mask_kind == 0 && c.tokens == 1) return;
    for (int i = 0; i < count; ++i) {
        const int64_t key = position(i);
        for (int q = 0; q < w.queries; ++q) {
            const int t = q % c.tokens;
            float& score = w.scores[q * kKvBlock + i];
            if (c.mask_kind) score += mask_at(c, w.b, t, key);
            else if (key > c.length - c.tokens + t) score = kHiddenScore;
        }
    }
}

// Scores of `count` tokens to weights, what was summed before brought to the same scale.
void soften(const HeadWork& w, int count) {
    for (int q = 0; q < w.queries; ++q) {
        float* scores = w.scores + q * kKvBlock;
        const float top = largest(scores, count, w.top[q]);
        if (top > w.top[q]) {
            const float fade = w.top[q] == kHiddenScore ? 0.0f : std::exp(w.top[q] - top);
            float* sums = w.sums + q * w.c.dim;
            for (int i = 0; i < w.c.dim; ++i) sums[i] *= fade;
            w.total[q] *= fade, w.top[q] = top;
        }
        exp_row(scores, count, top == kHiddenScore ? 0.0f : top);
        w.total[q] += summed(scores, count);
    }
}

// sums[q] += weights[q, i] * value(i) for kAtOnce queries at a time; load(i, c) gives kLanes channels of token i as floats.
template <class F>
void mix_rows(const HeadWork& w, int count, const float* weights, F load) {
    for (int c = 0; c < w.c.dim; c += Isa::kLanes) {
        for (int q = 0; q < w.queries; q += kAtOnce) {
            const int n = w.queries - q < kAtOnce ? w.queries - q : kAtOnce;
            if (n == kAtOnce) {
                Isa::Floats sum[kAtOnce];
                for (int k = 0; k < kAtOnce; ++k) sum[k] = Isa::loadf(w.sums + (q + k) * w.c.dim + c);
                for (int i = 0; i < count; ++i) {
                    const auto row = load(i, c);
                    for (int k = 0; k < kAtOnce; ++k) sum[k] = Isa::fma(Isa::set(weights[(q + k) * kKvBlock + i]), row, sum[k]);
                }
                for (int k = 0; k < kAtOnce; ++k) Isa::storef(w.sums + (q + k) * w.c.dim + c, sum[k]);
                continue;
            }
            for (int k = 0; k < n; ++k) {
                auto sum = Isa::loadf(w.sums + (q + k) * w.c.dim + c);
                for (int i = 0; i < count; ++i) sum = Isa::fma(Isa::set(weights[(q + k) * kKvBlock + i]), load(i, c), sum);
                Isa::storef(w.sums + (q + k) * w.c.dim + c, sum);
            }
        }
    }
}

}  // namespace
}  // namespace lowbit
