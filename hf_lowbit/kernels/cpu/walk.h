// How a run of neighbouring tiles of 16 rows is walked: groups, scales, and the order of pieces. Included after an Isa, as unpack.h.
//
// Tiles of a run advance together, a piece of each in turn, so that a thread reads as many streams: one stream of an Ice Lake
// core brings 10.7 GB/s, four bring 12.8 and eight 14.4.
#pragma once
#include <cstring>

#include "body.h"
#include "unpack.h"

namespace lowbit {
namespace {

// How a run of tiles is read; the same for every row of x.
struct Walk {
    const uint8_t* tile;         // the first
    int tiles;
    int64_t tile_bytes, scales_at, codes_at;
    const int8_t* tables;        // of each tile, or of all
    int tables_step;
    const float* levels;         // exact mode: tables of floats
    bool many_tables;            // exact mode: each row names its own
    int blocks, group, groups, zero, entries;
    bool coded_scales, wide_scales;
    int per_super;               // groups that share a super-scale, where scales are coded
    int64_t batch;               // rows of x: the step between tiles in y

    const uint8_t* codes(int t) const { return tile + t * tile_bytes + codes_at; }
    const int32_t* table_of_row(int t) const { return reinterpret_cast<const int32_t*>(tile + t * tile_bytes); }
};

// Where a walk along a row stands among its groups and, where scales are coded, super-groups.
struct Place {
    int group = 0, blocks_left = 0, super = 0, groups_left = 0;

    explicit Place(const Walk& w) : blocks_left(w.group / kBlock), groups_left(w.per_super) {}

    void next_group(const Walk& w) {
        ++group, blocks_left = w.group / kBlock;
        if (--groups_left == 0) ++super, groups_left = w.per_super;
    }
};

// Scales or offsets, stored from `from` on, of slice s of a tile.
inline Floats group_values(const uint8_t* from, const Walk& w, int group, int super, int s) {
    const int at = s * Isa::kLanes;
    if (!w.coded_scales) {
        if (w.wide_scales) return Isa::loadf(reinterpret_cast<const float*>(from) + group * kTile + at);
        return Isa::halves(reinterpret_cast<const uint16_t*>(from) + group * kTile + at);
    }
    const Floats values = Isa::signed_bytes(reinterpret_cast<const int8_t*>(from) + group * kTile + at);
    return Isa::mul(values, Isa::halves(reinterpret_cast<const uint16_t*>(from + w.groups * kTile) + super * kTile + at));
}

inline Floats scale_of(const Walk& w, int t, int group, int super, int s) {
    return group_values(w.tile + t * w.tile_bytes + w.scales_at, w, group, super, s);
}

inline void clear_sums(const Walk& w, int rows, float* y) {
    for (int t = 0; t < w.tiles; ++t) std::memset(y + t * w.batch * kTile, 0, sizeof(float) * size_t(rows * kTile));
}

// Blocks of one tile that are worked on before it is the next tile's turn: half a kilobyte to one. Shorter pieces of two bits cost
// more instructions than their streams bring, longer ones of four bits lose a tenth.
template <int BITS>
constexpr int kPiece = BITS >= 4 ? 2 : BITS == 3 ? 4 : 8;

// Calls f(tile, slice, first block, behind the last, place) for the pieces of all tiles of a run in turn, or once for a single tile.
template <int BITS, class F>
inline void over_pieces(const Walk& w, F&& f) {
    Place place(w);
    const int piece = w.tiles > 1 ? kPiece<BITS> : w.blocks;
    for (int b = 0; b < w.blocks; b += piece) {
        const int end = b + piece < w.blocks ? b + piece : w.blocks;
        for (int t = 0; t < w.tiles; ++t) {
            for (int s = 0; s < Isa::kSlices; ++s) f(t, s, b, end, place);
        }
        for (int left = end - b; left > 0;) {
            if (left < place.blocks_left) place.blocks_left -= left, left = 0;
            else left -= place.blocks_left, place.next_group(w);
        }
    }
}

// Asks for slice s's share of the block that lies a piece behind the one at p: its turn comes when the other tiles have had theirs. Without this the streams bring 5 % more than one does, with it 30 %.
template <int BITS>
inline void prefetch_piece(const uint8_t* p, int s) {
    constexpr int kBytes = 64 * BITS, kShare = kBytes / Isa::kSlices;
    for (int line = 0; line < kShare; line += 64) __builtin_prefetch(p + kPiece<BITS> * kBytes + s * kShare + line);
}

// Calls f(block, first quad, behind the last, place) for what lies of each block in one group, where groups are not whole blocks.
template <class F>
inline void over_quads(const Walk& w, F&& f) {
    Place place(w);
    for (int b = 0, left = w.group / 4; b < w.blocks; ++b) {
        for (int k = 0; k < kQuads;) {
            const int end = k + left < kQuads ? k + left : kQuads;
            f(b, k, end, place);
            left -= end - k, k = end;
            if (left > 0) continue;
            left = w.group / 4;
            if (place.group + 1 < w.groups) place.next_group(w);  // what pads the last block counts as of the last group
        }
    }
}

}  // namespace
}  // namespace lowbit
