// Attention of a few new tokens over a cache; compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace lowbit {

// Queries float [batch * tokens, heads, dim], as is `out`. Keys and values are read where the cache keeps them: strides are in
// numbers, dim is contiguous. The mask, bool (1) or float (2), is [batch, tokens, length] by its strides; 0 is none.
struct Attention {
    const float* queries;
    float* out;
    const void *keys, *values;
    int32_t dtype;  // of keys and values: 0 float, 1 bfloat16
    int64_t key_batch, key_head, key_token, value_batch, value_head, value_token;
    const void* mask;
    int32_t mask_kind;
    int64_t mask_batch, mask_query, mask_key;
    int32_t batch, tokens, heads, kv_heads, dim;
    int64_t length;
    float scale;
    bool causal;  // without a mask: token t sees the first length - tokens + t + 1
};

// Numbers of scratch one head of keys needs: a score for every query that shares it and every token, and a row.
inline int64_t attention_scratch(const Attention& a) {
    return int64_t(a.heads / a.kv_heads) * a.tokens * a.length + a.dim;
}

}  // namespace lowbit
