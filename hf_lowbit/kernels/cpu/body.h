// One set of kernels compiled for one instruction set. Each ISA's file fills in a Body; dispatch.cpp picks one.
#pragma once
#include "activations.h"
#include "attention.h"
#include "matrix.h"
#include "packed_cache.h"

namespace lowbit {

// What one thread needs while it works on tiles; every pointer is 64-byte aligned.
struct Scratch {
    float* scales;       // [groups, 16]
    int8_t* tables;      // [variants or parts, passes, 64]
};

struct Body {
    const char* name;
    bool (*runs_here)();
    // Round one row: values [blocks * 32] to rounded, scale, bias as in Activations.
    void (*round_row)(const float* values, int blocks, int8_t* rounded, float* scale, int32_t* bias);
    // y[m, r] = row r of one tile of a stage times row m of x, for all of its rows; y is float [batch, 16]. group_sums, of a
    // stage with offsets: float [batch, groups], sums of x over each group.
    void (*tile_int8)(const Matrix&, const Stage&, int tile, const Activations&, const float* group_sums, Scratch&, float* y);
    void (*tile_exact)(const Matrix&, const Stage&, int tile, const Activations&, const float* group_sums, Scratch&, float* y);
    // All queries of one sequence that share one head of keys.
    void (*attend_head)(const Attention&, int sequence, int head, float* scratch);
    // The same over a packed cache.
    void (*attend_packed)(const LowbitKv&, int sequence, int head, float* scratch);
};

const Body* body_portable();
const Body* body_avx2();    // null where not compiled
const Body* body_avx512();
const Body* body_neon();
const Body& body();         // the one in use

}  // namespace lowbit
