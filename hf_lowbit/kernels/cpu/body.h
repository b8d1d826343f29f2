// One set of kernels compiled for one instruction set. Each ISA's file fills in a Body; dispatch.cpp picks one.
#pragma once
#include "activations.h"
#include "attention.h"
#include "matrix.h"
#include "packed_cache.h"

namespace lowbit {

constexpr int kRun = 8;             // most tiles that a thread works on at once
constexpr int kTableBytes = 16 * 64;  // room for the int8 tables of a tile

struct Body {
    const char* name;
    bool (*runs_here)();
    // Round one row: values [blocks * 32] to rounded, scale, bias as in Activations, `step` places from block to block.
    void (*round_row)(const float* values, int blocks, int step, int8_t* rounded, float* scale, int32_t* bias);
    // y[t, m, r] = row r of tile first + t of a stage times row m of x, for all of x's rows and at most kRun tiles; y is float
    // [count, batch, 16]. group_sums, of a stage with offsets: float [batch, groups], sums of x over each group. tables: room
    // of count * kTableBytes, 64-byte aligned.
    void (*tiles_int8)(const Matrix&, const Stage&, int first, int count, const Activations&, const float* group_sums,
                       int8_t* tables, float* y);
    void (*tiles_exact)(const Matrix&, const Stage&, int first, int count, const Activations&, const float* group_sums,
                        int8_t* tables, float* y);
    // All queries of one sequence that share one head of keys.
    void (*attend_head)(const Attention&, int sequence, int head, float* scratch);
    // The same over a packed cache.
    void (*attend_packed)(const LowbitKv&, int sequence, int head, float* scratch);
    // gate = silu(gate) * up
    void (*gate_silu)(float* gate, const float* up, int64_t count);
};

const Body* body_portable();
const Body* body_avx2();    // null where not compiled
const Body* body_avx512();
const Body* body_neon();
const Body& body();         // the one in use

}  // namespace lowbit
