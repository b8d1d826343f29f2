// Activations as the kernels read them: in stored column order, padded with zeros to whole blocks of 32 columns.
#pragma once
#include <cstdint>

#include "matrix.h"

namespace lowbit {

// Rows of x, made once per call and shared by all matrices that read them.
//
// int8: x[m, i] is near scale[m, i / 32] * rounded[m, i], off by at most half of scale = max |x| of the block / 127.
// Rounded blocks lie in panels of kPanel rows (of all, where there are fewer): block after block, the rows' in each side by
// side, so that a kernel of several rows reads one stream.
constexpr int kPanel = 8;

struct Activations {
    int64_t batch = 0;
    int32_t blocks = 0;
    int32_t panel = 1;                // rows
    const float* values = nullptr;    // [batch, blocks * 32], row after row
    const int8_t* rounded = nullptr;  // [panels, blocks, panel, 32], int8 mode only
    const float* scale = nullptr;     // [panels, blocks, panel]
    const int32_t* bias = nullptr;    // [panels, blocks, panel], what levels stored as level + bias add to a block, negated

    int64_t place(int64_t row, int64_t block) const { return (row / panel * blocks + block) * panel + row % panel; }
};

// In the place of a LowbitDtype: x are Codes, y is float.
constexpr int kCodes = -1;

// Rows of x that were rounded elsewhere. Where the body knows no -128 they take two passes: -127 in its place, then the -1 that
// leaves.
struct Codes {
    const int8_t* data;
    bool second, whole;
    int32_t bias;
};

// Bytes `place_activations` takes from `at`, which it moves on; `fill_activations` then makes one row (call it for each).
int64_t activation_bytes(int64_t batch, int32_t columns);
void place_activations(char*& at, int64_t batch, int32_t columns, bool rounded, Activations& x);
void fill_activations(const Matrix& m, const void* data, int dtype, int64_t row, const Activations& x);

}  // namespace lowbit
