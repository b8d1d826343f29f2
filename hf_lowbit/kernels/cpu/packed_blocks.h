// Attention over packed blocks of 64 tokens. Included after an Isa, as attend.h.
//
// Keys are laid out so that lane r of a vector belongs to token r: a quad of channels of 16 tokens is one integer dot product.
// Values have a channel a lane, and a 32-bit word holds several tokens of it: levels are looked up as floats.
#pragma once
#include <cstring>

#include "packed_work.h"

namespace lowbit {
namespace {

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

}  // namespace
}  // namespace lowbit
