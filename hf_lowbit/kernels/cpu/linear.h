// The multiplication as other C++ calls it: a fused op rounds its activations once and multiplies by several matrices.
#pragma once
#include "activations.h"
#include "matrix.h"

namespace lowbit {

// ys[i] = x @ W_i.T (+ biases[i]), as lowbit_linear without its checks.
int32_t linear(const Matrix* const* matrices, int count, const void* x, int64_t batch, int dtype, const float* const* biases,
               void* const* ys, int mode, int threads);

}  // namespace lowbit
