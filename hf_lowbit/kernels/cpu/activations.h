// Activations as the kernels read them: in stored column order, padded with zeros to whole blocks of 32 columns.
#pragma once
#include <cstdint>

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

}  // namespace lowbit
