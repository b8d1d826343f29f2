// Attention over a packed cache, one head of keys at a time. Included after an Isa, as attend.h.
//
// Keys of packed blocks are laid out so that lane r of a vector belongs to token r: a quad of channels of 16 tokens is one integer
// dot product. Values have a channel a lane, and a 32-bit word holds several tokens of it: levels are looked up as floats.
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

void int8_scores(const HeadWork& w, const LowbitRows& r, int64_t first, int count, const Rounded* queries) {
    const int dim = w.c.dim;
    alignas(64) int8_t room[1024];
    for (int i = 0; i < count; ++i) {
        const int64_t slot = w.head() * r.room + first + i;
        const int8_t* row = static_cast<const int8_t*>(r.keys) + slot * dim;
        const float scale = half_to_float(r.key_scale[slot]) * w.c.scale;
        if (dim != w.padded) {
            std::memset(room, 0, size_t(w.padded));
            std::memcpy(room, row, size_t(dim));
            row = room;
        }
        for (int q = 0; q < w.queries; ++q) {
            auto sum = Isa::start(0);
            for (int at = 0; at < w.padded; at += kVector) {
                auto key = Isa::load(row + at);
                if constexpr (Isa::kBias != 0) key = Isa::add8(key, Isa::splat(Isa::kBias));
                sum = Isa::template dot<Isa::kBias>(sum, key, Isa::load(queries[q].rounded + at));
            }
            const int32_t whole = add_lanes(sum) - Isa::kBias * queries[q].sum;
            w.scores[q * kKvBlock + i] = float(whole) * (queries[q].scale * scale);
        }
    }
}

// A row of `kind` as floats: itself, or widened into `room`.
inline const float* widened(const void* data, int64_t at, int kind, int dim, float* room) {
    if (kind != 2) return cache_row(data, at, kind, dim, room);
    const uint16_t* row = static_cast<const uint16_t*>(data) + at;
    for (int i = 0; i < dim; i += Isa::kLanes) Isa::storef(room + i, Isa::halves(row + i));
    return room;
}

void float_scores(const HeadWork& w, const LowbitRows& r, int64_t first, int count) {
    const int dim = w.c.dim;
    for (int i = 0; i < count; ++i) {
        const float* row = widened(r.keys, (w.head() * r.room + first + i) * dim, r.kind, dim, w.folded);
        for (int q = 0; q < w.queries; ++q) w.scores[q * kKvBlock + i] = w.c.scale * dot_row(w.query(q, r.low), row, dim);
    }
}

void mix_int8(const HeadWork& w, const LowbitRows& r, int64_t first, int count) {
    const int dim = w.c.dim;
    const int64_t slot = w.head() * r.room + first;
    for (int i = 0; i < count; ++i) {
        const float scale = half_to_float(r.value_scale[slot + i]);
        for (int q = 0; q < w.queries; ++q) w.scores[q * kKvBlock + i] *= scale;
    }
    const int8_t* rows = static_cast<const int8_t*>(r.values) + slot * dim;
    mix_rows(w, count, w.scores, [&](int i, int c) { return Isa::signed_bytes(rows + int64_t(i) * dim + c); });
}

void mix_floats(const HeadWork& w, const LowbitRows& r, int64_t first, int count) {
    const int dim = w.c.dim;
    const int64_t slot = w.head() * r.room + first;
    if (r.kind == 0) {
        const float* rows = static_cast<const float*>(r.values) + slot * dim;
        mix_rows(w, count, w.scores, [&](int i, int c) { return Isa::loadf(rows + int64_t(i) * dim + c); });
        return;
    }
    if (r.kind == 2) {
        const uint16_t* rows = static_cast<const uint16_t*>(r.values) + slot * dim;
        mix_rows(w, count, w.scores, [&](int i, int c) { return Isa::halves(rows + int64_t(i) * dim + c); });
        return;
    }
    for (int i = 0; i < count; ++i) {
        const float* row = widened(r.values, (slot + i) * dim, r.kind, dim, w.folded);
        for (int q = 0; q < w.queries; ++q) add_row(w.scores[q * kKvBlock + i], row, w.sums + q * dim, dim);
    }
}

void attend_rows(const HeadWork& w, const LowbitRows& r, float* raw) {
    const LowbitKv& c = w.c;
    const Rounded* queries = w.plain;
    if (r.kind == kRowInt8 && r.low && c.turned != c.queries) {
        for (int q = 0; q < w.queries; ++q) round_query(w.query(q, true), c.dim, w.other[q]);
        queries = w.other;
    }
    for (int64_t first = 0; first < r.length; first += kKvBlock) {
        const int count = int(r.length - first < kKvBlock ? r.length - first : kKvBlock);
        if (r.kind == kRowInt8) int8_scores(w, r, first, count, queries);
        else float_scores(w, r, first, count);
        if (r.positions) {
            const int64_t at = w.head() * r.position_room + first;
            hide(w, count, [&](int i) { return position_at(r.positions, r.wide, at + i); });
        } else {
            hide(w, count, [&](int i) { return r.first + first + i; });
        }
        if (raw) {
            for (int q = 0; q < w.queries; ++q) {
                std::memcpy(raw + q * kv_raw_room(c) + first, w.scores + q * kKvBlock, sizeof(float) * size_t(count));
            }
        }
        soften(w, count);
        if (r.kind == kRowInt8) mix_int8(w, r, first, count);
        else mix_floats(w, r, first, count);
    }
}

// Levels as bytes for a shuffle, biased as this Isa's dot product wants them.
inline Isa::Bytes byte_levels(const float* levels, int bits) {
    alignas(64) uint8_t table[64];
    for (int i = 0; i < 64; ++i) table[i] = uint8_t(int(levels[i & ((1 << bits) - 1)]) + Isa::kBias);
    return Isa::load(table);
}

// Integer sums of a block's tokens for queries q .. q + N: out[k][64].
template <int BITS, int N>
void block_dots(const uint8_t* codes, int dim, Isa::Bytes table, const Rounded* queries, int32_t (*out)[kKvBlock]) {
    constexpr int kPairs = BITS == 4 ? 2 : 1, kTilesAtOnce = kKvTiles / kPairs;
    const int quads = dim / 4;
    const uint8_t* high = codes + int64_t(kKvBlock) * dim * 2 / 8;  // of 3 bits: the top bits
    for (int pair = 0; pair < kPairs; ++pair) {
        for (int slice = 0; slice < Isa::kSlices; ++slice) {
            Isa::Ints sum[kTilesAtOnce][N];
            for (int tile = 0; tile < kTilesAtOnce; ++tile) {
                for (int k = 0; k < N; ++k) sum[tile][k] = Isa::start(-Isa::kBias * queries[k].sum);
            }
            for (int quad = 0; quad < quads; ++quad) {
                const auto v = Isa::load(codes + (int64_t(pair) * quads + quad) * 64 + slice * kVector);
                Isa::Bytes index[kTilesAtOnce];
                if constexpr (BITS == 4) {
                    index[0] = Isa::and_(v, Isa::splat(15)), index[1] = Isa::and_(Isa::template shr<4>(v), Isa::splat(15));
                } else {
                    index[0] = Isa::and_(v, Isa::splat(3)), index[1] = Isa::and_(Isa::template shr<2>(v), Isa::splat(3));
                    index[2] = Isa::and_(Isa::template shr<4>(v), Isa::splat(3));
                    index[3] = Isa::and_(Isa::template shr<6>(v), Isa::splat(3));
                }
                if constexpr (BITS == 3) {
                    auto top = Isa::load(high + int64_t(quad / 2) * 64 + slice * kVector);
                    if (quad % 2) top = Isa::template shr<4>(top);
                    const auto four = Isa::splat(4);
                    index[0] = Isa::or_(index[0], Isa::and_(Isa::template shl<2>(top), four));
                    index[1] = Isa::or_(index[1], Isa::and_(Isa::template shl<1>(top), four));
                    index[2] = Isa::or_(index[2], Isa::and_(top, four));
                    index[3] = Isa::or_(index[3], Isa::and_(Isa::template shr<1>(top), four));
                }
                for (int tile = 0; tile < kTilesAtOnce; ++tile) {
                    const auto level = Isa::shuffle(table, index[tile]);
                    for (int k = 0; k < N; ++k) {
                        sum[tile][k] = Isa::template dot_quad<Isa::kBias>(sum[tile][k], level, queries[k].rounded, quad);
                    }
                }
            }
            for (int tile = 0; tile < kTilesAtOnce; ++tile) {
                for (int k = 0; k < N; ++k) {
                    const int at = (pair * kTilesAtOnce + tile) * kTokensOfTile + slice * Isa::kLanes;
                    std::memcpy(out[k] + at, &sum[tile][k], sizeof sum[tile][k]);
                }
            }
        }
    }
}

template <int BITS>
void block_scores(const HeadWork& w, const LowbitBlocks& s, int64_t block, Isa::Bytes table, const Rounded* turned) {
    const LowbitKv& c = w.c;
    const int64_t at = w.head() * s.count + block;
    const uint8_t* codes = s.keys + at * kKvBlock * c.dim * BITS / 8;
    const Rounded* queries = turned;
    float scale[kKvBlock], offset[kKvBlock];
    if (s.keys_by_channel) {
        float* factor = w.folded;
        float* add = w.folded + c.dim;
        widen_halves(s.key_scale + at * c.dim, c.dim, factor);
        widen_halves(s.key_offset + at * c.dim, c.dim, add);
        float* folded = w.folded + 2 * c.dim;
        for (int q = 0; q < w.queries; ++q) {
            const float* query = w.query(q, true);
            for (int i = 0; i < c.dim; ++i) folded[i] = query[i] * factor[i];
            round_query(folded, c.dim, w.other[q]);
            w.shift[q] = dot_row(query, add, c.dim);
        }
        queries = w.other;
    } else {
        widen_halves(s.key_scale + at * kKvBlock, kKvBlock, scale);
        widen_halves(s.key_offset + at * kKvBlock, kKvBlock, offset);
    }
    for (int q = 0; q < w.queries; q += kAtOnce) {
        const int n = w.queries - q < kAtOnce ? w.queries - q : kAtOnce;
        int32_t whole[kAtOnce][kKvBlock];
        if (n == kAtOnce) block_dots<BITS, kAtOnce>(codes, c.dim, table, queries + q, whole);
        else for (int k = 0; k < n; ++k) block_dots<BITS, 1>(codes, c.dim, table, queries + q + k, whole + k);
        for (int k = 0; k < n; ++k) {
            float* scores = w.scores + (q + k) * kKvBlock;
            const float factor = queries[q + k].scale * c.scale, shift = w.shift[q + k] * c.scale;
            if (s.keys_by_channel) {
                for (int i = 0; i < kKvBlock; ++i) scores[i] = float(whole[k][i]) * factor + shift;
            } else {
                for (int i = 0; i < kKvBlock; ++i) scores[i] = (float(whole[k][i]) * factor) * scale[i] + shift * offset[i];
            }
        }
    }
}

// sums[q] += weights[q, i] * level of value i, for one block.
template <int BITS>
void mix_block(const HeadWork& w, const uint8_t* codes, const float* levels) {
    constexpr int kPart = BITS == 3 ? 2 : BITS, kTokens = 32 / kPart;
    const int dim = w.c.dim;
    const auto table = Isa::levels(levels, 1 << BITS);
    const uint8_t* high = codes + int64_t(kKvBlock) * dim * 2 / 8;
    for (int c = 0; c < dim; c += Isa::kLanes) {
        for (int q = 0; q < w.queries; q += kAtOnce) {
            const int n = w.queries - q < kAtOnce ? w.queries - q : kAtOnce;
            Isa::Floats sum[kAtOnce];
            for (int k = 0; k < n; ++k) sum[k] = Isa::loadf(w.sums + (q + k) * dim + c);
            for (int chunk = 0; chunk < kKvBlock / kTokens; ++chunk) {
                auto word = Isa::load(codes + (int64_t(chunk) * dim + c) * 4);
                auto top = word;
                if constexpr (BITS == 3) {
                    top = Isa::load(high + (int64_t(chunk / 2) * dim + c) * 4);
                    if (chunk % 2) top = Isa::template shr<16>(top);
                }
                for (int t = 0; t < kTokens; ++t) {
                    auto index = word;
                    if constexpr (BITS == 3) {
                        index = Isa::or_(Isa::and_(word, Isa::splat(3)), Isa::and_(Isa::template shl<2>(top), Isa::splat(4)));
                        top = Isa::template shr<1>(top);
                    }
                    const auto level = Isa::template pick<BITS>(table, index);
                    const float* weights = w.scores + q * kKvBlock + chunk * kTokens + t;
                    if (n == kAtOnce) {
                        for (int k = 0; k < kAtOnce; ++k) sum[k] = Isa::fma(Isa::set(weights[k * kKvBlock]), level, sum[k]);
                    } else {
                        for (int k = 0; k < n; ++k) sum[k] = Isa::fma(Isa::set(weights[k * kKvBlock]), level, sum[k]);
                    }
                    word = Isa::template shr<kPart>(word);
                }
            }
            for (int k = 0; k < n; ++k) Isa::storef(w.sums + (q + k) * dim + c, sum[k]);
        }
    }
}

// Values of one block, scales and offsets taken apart: per token they go into the weights, per channel they come after the sum.
template <int BITS>
void block_values(const HeadWork& w, const LowbitBlocks& s, int64_t block) {
    const LowbitKv& c = w.c;
    const int64_t at = w.head() * s.count + block;
    const uint8_t* codes = s.values + at * kKvBlock * c.dim * BITS / 8;
    if (!s.values_by_channel) {
        float scale[kKvBlock], offset[kKvBlock];
        widen_halves(s.value_scale + at * kKvBlock, kKvBlock, scale);
        widen_halves(s.value_offset + at * kKvBlock, kKvBlock, offset);
        for (int q = 0; q < w.queries; ++q) {
            float* weights = w.scores + q * kKvBlock;
            const float add = dot_row(weights, offset, kKvBlock);
            for (int i = 0; i < kKvBlock; ++i) weights[i] *= scale[i];
            for (int i = 0; i < c.dim; ++i) w.sums[q * c.dim + i] += add;
        }
        mix_block<BITS>(w, codes, s.value_levels);
        return;
    }
    HeadWork apart = w;
    apart.sums = w.folded;  // of this block alone
    for (int i = 0; i < w.queries * c.dim; ++i) apart.sums[i] = 0;
    mix_block<BITS>(apart, codes, s.value_levels);
    for (int q = 0; q < w.queries; ++q) {
        const float weight = summed(w.scores + q * kKvBlock, kKvBlock);
        for (int i = 0; i < c.dim; ++i) {
            const int64_t channel = at * c.dim + i;
            w.sums[q * c.dim + i] +=
                apart.sums[q * c.dim + i] * half_to_float(s.value_scale[channel]) + weight * half_to_float(s.value_offset[channel]);
        }
    }
}

void attend_blocks(const HeadWork& w, const LowbitBlocks& s) {
    const LowbitKv& c = w.c;
    const auto table = byte_levels(s.key_levels, s.key_bits);
    const Rounded* turned = w.plain;
    if (!s.keys_by_channel) {
        for (int q = 0; q < w.queries; ++q) {
            const float* query = w.query(q, true);
            if (c.turned != c.queries) round_query(query, c.dim, w.other[q]);
            w.shift[q] = 0;
            for (int i = 0; i < c.dim; ++i) w.shift[q] += query[i];
        }
        if (c.turned != c.queries) turned = w.other;
    }
    for (int64_t block = 0; block < s.count; ++block) {
        switch (s.key_bits) {
            case 2: block_scores<2>(w, s, block, table, turned); break;
            case 3: block_scores<3>(w, s, block, table, turned); break;
            default: block_scores<4>(w, s, block, table, turned);
        }
        if (c.mask_kind) {  // blocks lie before every query
            const int64_t at = (w.head() * s.count + block) * kKvBlock;
            hide(w, kKvBlock, [&](int i) { return position_at(s.positions, s.wide, at + i); });
        }
        soften(w, kKvBlock);
        switch (s.value_bits) {
            case 2: block_values<2>(w, s, block); break;
            case 3: block_values<3>(w, s, block); break;
            default: block_values<4>(w, s, block);
        }
    }
}

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
