// The fused decoder layer's C ABI: one call where the cache has room for the new keys and values, else two, between which the
// host's cache takes them.
#pragma once
#include "lowbit_cpu.h"

struct LowbitLayer {
    const void* matrices[7];  // prepared q, k, v, o, gate, up, down
    int64_t bytes[7];
    const float* biases[7];   // float, or null
    const void* norms[4];     // weights of the norms before attention and MLP, and of query and key heads (or null)
    float epsilon[4];
    float scale;              // of the scores
    int32_t dtype;            // of hidden states, norms, positions and cache: 0 float, 1 bfloat16
    int32_t hidden, heads, kv_heads, dim, inner;
    int32_t mode, threads;
};

// The tokens a layer is given.
struct LowbitTokens {
    const void* x;                  // [batch, tokens, hidden]
    const void *cosines, *sines;    // [position_rows (1 or batch), tokens, dim]
    int32_t batch, tokens, position_rows;
};

struct LowbitCache {
    void *keys, *values;                           // [batch, kv_heads, length, dim], dim contiguous
    int64_t key_strides[3], value_strides[3];      // in numbers: batch, head, token
    int64_t length;                                // the given tokens included, which are the last ones
};

struct LowbitMask {
    const void* data;
    int64_t strides[3];  // in numbers: sequence, query, key
    int32_t kind;        // 0 none (causal), 1 bool, true is seen, 2 float, added to the scores
};

// Queries float [batch, tokens, heads, dim]; writes the given tokens' keys and values into the cache.
LOWBIT_EXPORT int32_t lowbit_layer_start(const LowbitLayer* layer, const LowbitTokens* in, float* queries,
                                         const LowbitCache* cache);
// y [batch, tokens, hidden], the layer's output. The result does not depend on the number of threads.
LOWBIT_EXPORT int32_t lowbit_layer_finish(const LowbitLayer* layer, const LowbitTokens* in, const float* queries,
                                          const LowbitCache* cache, const LowbitMask* mask, void* y);
// Both, one behind the other, over one cache.
LOWBIT_EXPORT int32_t lowbit_layer(const LowbitLayer* layer, const LowbitTokens* in, const LowbitCache* cache,
                                   const LowbitMask* mask, void* y);
// The rest of lowbit_layer_finish where attention was done elsewhere: mixed float [batch, tokens, heads, dim] is its output.
LOWBIT_EXPORT int32_t lowbit_layer_output(const LowbitLayer* layer, const void* x, const float* mixed, int64_t rows, void* y);
