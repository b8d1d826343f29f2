// Activations as the kernels read them: in stored column order, padded with zeros to whole blocks of 32 columns.
#pragma once
#include <cstdint>

namespace lowbit {

// Rows of x, made once per call and shared by all matrices that read them.
//
// int8: x[m, i] is near scale[m, i / 32] * rounded[m, i], off by at most half of scale = max |x| of the block / 127.
struct Activations {
    int64_t batch = 0;
    int32_t blocks = 0;
    const float* values = nullptr;    // [batch, blocks * 32]
    const int8_t* rounded = nullptr;  // [batch, blocks * 32], int8 mode only
    const float* scale = nullptr;     // [batch, blocks]
    const int32_t* bias = nullptr;    // [batch, blocks], what levels stored as level + bias add to a block, negated
};

}  // namespace lowbit
