// The prepared form of a low-bit matrix: what the kernels stream.
//
// Rows are cut into tiles of 16, columns into blocks of 32. A tile of a stage is one contiguous run of bytes
//     [int32 table of each row, float scale of each row's int8 table]   only with several tables
//     group scales, then group offsets, then zero points                16 rows side by side per group
//     codes                                                             block after block
// so that one sequential stream feeds a thread. A block of b-bit codes takes 64 * b bytes, b vectors of 64; in each, lane r
// of 4 bytes belongs to row r and byte j of it to column j of a quad. Quad k of the eight of a block lies
//     4 bits: nibble k % 2 of vector k / 2            2 bits: bit pair k % 4 of vector k / 4         1 bit: bit k
//     3 bits: quads 0..5 as nibbles' low 3 bits of vectors 0..2; the nibbles' top bits are quads 6 and 7, a bit a vector
//     5 and 6 bits: the low nibble as at 4 bits, the rest as at 1 and 2 bits; 7 and 8 bits: vector k
// Scales stay fp16, float, or int8 under fp16 super-scales, which keeps the prepared form within a few percent of the file.
#pragma once
#include <cstddef>
#include <cstdint>

// Shared inline functions are expanded in place: a copy compiled for a newer instruction set must never be the one the linker
// keeps for all.
#if defined(_MSC_VER)
#define LOWBIT_INLINE __forceinline
#else
#define LOWBIT_INLINE inline __attribute__((always_inline))
#endif

namespace lowbit {

constexpr int kTile = 16;    // rows
constexpr int kBlock = 32;   // columns
constexpr int kQuads = kBlock / 4;
constexpr int kMaxStages = 8;
constexpr uint64_t kMagic = 0x31304c4254574f4cULL;

// What an int8 level is computed from.
enum Kind : int32_t {
    kTable = 0,   // byte shuffle, one table per lane of four rows
    kMixed = 1,   // byte shuffle, a table per row
    kLinear = 2,  // code - zero
    kNone = 3,    // no int8 form: too many levels, or several tables of more than 16
};

struct Stage {
    int32_t bits;          // of a code as prepared: 7 becomes 8
    int32_t kind;
    int32_t zero;          // of kLinear
    int32_t rows, tiles;   // rows this stage covers
    int32_t group, groups; // columns per scale (a multiple of 4), and their number
    int32_t tables, entries, variants;
    int32_t coded_scales;  // int8 under super-scales
    int32_t wide_scales;   // float
    int32_t per_super, supers;
    int32_t has_offset, has_zero;
    int32_t auto_int8;     // whether rounding the levels is far below the error of the codes themselves
    float table_scale;     // of the int8 table where there is one
    int64_t tile_bytes, tiles_at, row_ids_at;
    int64_t scales_at, offsets_at, zeros_at, codes_at;  // inside a tile
    int64_t bytes_at;      // int8 [tables, variants, 16], or for 5 and 6 bits [entries]
    int64_t levels_at;     // float [tables, entries]

    // Whether a group adds a multiple of the sum of its activations.
    LOWBIT_INLINE bool needs_sums() const { return has_offset || has_zero; }
};

struct Matrix {
    uint64_t magic;
    int64_t bytes;
    int32_t abi, rows, columns, blocks, tiles, stages, rank;
    int32_t auto_mode, has_int8;
    float unit;            // 2**shift
    int64_t permutation_at, outlier_values_at, outlier_columns_at, outlier_starts_at;
    int64_t low_rank_a_at, low_rank_b_at;     // float
    Stage stage[kMaxStages];

    template <class T>
    LOWBIT_INLINE const T* at(int64_t offset) const {
        return offset ? reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(this) + offset) : nullptr;
    }
    LOWBIT_INLINE const uint8_t* tile(const Stage& s, int number) const { return at<uint8_t>(s.tiles_at) + number * s.tile_bytes; }
};

LOWBIT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LOWBIT_INLINE int64_t align64(int64_t n) { return ceil_div(n, 64) * 64; }

}  // namespace lowbit
