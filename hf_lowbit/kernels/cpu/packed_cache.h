// Attention over a packed KV cache: rows of important tokens and packed blocks of 64 tokens, as hf_lowbit/kv stores them.
#pragma once
#include "lowbit_cpu.h"
#include "matrix.h"

constexpr int kLowbitMaxRows = 8, kLowbitMaxBlocks = 4;

// Tokens kept row by row, [batch, heads, room, dim]; the first `length` of them count. Scales are fp16 [batch, heads, room].
struct LowbitRows {
    const void *keys, *values;
    const uint16_t *key_scale, *value_scale;  // of 8-bit rows
    const void* positions;                    // [batch, heads, room], or null where they follow each other from `first`
    int64_t length, room, first, position_room;
    int32_t kind;                             // a LowbitDtype, or 3: int8
    int32_t wide;                             // positions of 32 bits instead of 16
    int32_t low;                              // whether `turned` queries read it; its weights are not asked for
};

// Packed blocks (hf_lowbit/kv/blocks.py). Scales and offsets are fp16 [batch, heads, count, dim] or [batch, heads, count, 64].
struct LowbitBlocks {
    const uint8_t *keys, *values;
    const uint16_t *key_scale, *key_offset, *value_scale, *value_offset;
    const void* positions;                    // [batch, heads, count, 64]
    const float *key_levels, *value_levels;   // whole numbers, 2**bits of them
    int64_t count;
    int32_t key_bits, value_bits, keys_by_channel, values_by_channel, wide;
};

struct LowbitKv {
    LowbitRows rows[kLowbitMaxRows];
    LowbitBlocks blocks[kLowbitMaxBlocks];
    int32_t row_count, block_count;
    int32_t batch, heads, group, tokens, dim;
    int64_t length;                           // of the sequence, new tokens included
    float scale;
    const float *queries, *turned;            // [batch, heads * group, tokens, dim] by strides, dim contiguous; turned likewise
    int64_t query_batch, query_head, query_token;
    int64_t turned_batch, turned_head, turned_token;
    const void* mask;                         // as in decoder_layer.h
    int64_t mask_batch, mask_query, mask_key;
    int32_t mask_kind;                        // 0 none (causal), 1 bool, 2 float
    int32_t threads;
    float* out;                               // [batch, tokens, heads * group, dim]
    float* weights;                           // [batch, heads, tokens, rows that are not low], or null
};

// Softmax attention, block by block in one pass. Queries are rounded to int8 for keys stored as integers, relative to their
// largest magnitude; all else is float32. The result does not depend on the number of threads.
LOWBIT_EXPORT int32_t lowbit_kv_attend(const LowbitKv* cache);

// Rows x [outer, tokens, dim] of `dtype` as int8 codes and fp16 scales, written to slots `at`.. of [outer, room, dim].
LOWBIT_EXPORT int32_t lowbit_kv_round(const void* x, int32_t dtype, int64_t outer, int64_t tokens, int32_t dim, int8_t* codes,
                                      uint16_t* scales, int64_t room, int64_t at);

namespace lowbit {

constexpr int kRowInt8 = 3;
constexpr int kKvBlock = 64;  // tokens worked on at a time, and of a packed block

// Rows whose weights are asked for.
LOWBIT_INLINE int64_t kv_raw_room(const LowbitKv& c) {
    int64_t total = 0;
    for (int i = 0; i < c.row_count; ++i) total += c.rows[i].low ? 0 : c.rows[i].length;
    return total;
}

// Numbers of scratch one head of keys needs.
int64_t kv_scratch(const LowbitKv& c);

}  // namespace lowbit
