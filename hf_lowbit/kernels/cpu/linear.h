// The multiplication as other C++ calls it: a fused op rounds its activations once and multiplies by several matrices.
#pragma once
#include "activations.h"
#include "matrix.h"

namespace lowbit {

// ys[i] = x @ W_i.T (+ biases[i]), as lowbit_linear without its checks.
int32_t linear(const Matrix* const* matrices, int count, const void* x, int64_t batch, int dtype, const float* const* biases,
               void* const* ys, int mode, int threads);

// Bytes `place_activations` takes from `at`, which it moves on; `fill_activations` then makes one row (call it for each).
int64_t activation_bytes(int64_t batch, int32_t columns);
void place_activations(char*& at, int64_t batch, int32_t columns, bool rounded, Activations& x);
void fill_activations(const Matrix& m, const void* data, int dtype, int64_t row, const Activations& x);

}  // namespace lowbit
