// Activations made from what callers give: numbers of any dtype, permuted and padded, rounded or rounded already.
#include "activations.h"

#include <cstring>

#include "body.h"
#include "half.h"
#include "lowbit_cpu.h"
#include "room.h"

namespace lowbit {
namespace {

void fill_row(const Matrix& m, const void* x, int64_t row, int dtype, float* out) {
    const int32_t* from = m.at<int32_t>(m.permutation_at);
    const int64_t start = row * m.columns;
    if (from) {
        for (int i = 0; i < m.columns; ++i) out[i] = read_number(x, start + from[i], dtype);
    } else if (dtype == LOWBIT_F32) {
        std::memcpy(out, static_cast<const float*>(x) + start, sizeof(float) * size_t(m.columns));
    } else {
        for (int i = 0; i < m.columns; ++i) out[i] = read_number(x, start + i, dtype);
    }
    for (int i = m.columns; i < m.blocks * kBlock; ++i) out[i] = 0;
}

void fill_codes(const Matrix& m, const Codes& from, int64_t row, const Activations& x) {
    for (int b = 0; b < m.blocks; ++b) {
        const int64_t at = x.place(row, b), start = row * m.columns + int64_t(b) * kBlock;
        const int count = m.columns - b * kBlock < kBlock ? m.columns - b * kBlock : kBlock;
        int8_t* out = const_cast<int8_t*>(x.rounded) + at * kBlock;
        std::memset(out, 0, kBlock);
        int32_t sum = 0;
        for (int i = 0; i < count; ++i) {
            const int8_t code = from.data[start + i];
            out[i] = from.whole || code != -128 ? (from.second ? int8_t(0) : code) : (from.second ? int8_t(-1) : int8_t(-127));
            sum += out[i];
        }
        const_cast<float*>(x.scale)[at] = 1;
        const_cast<int32_t*>(x.bias)[at] = from.bias * sum;
    }
}

}  // namespace

int64_t activation_bytes(int64_t batch, int32_t columns) {
    const int64_t blocks = ceil_div(columns, kBlock), rows = batch + kPanel - 1;
    return blocks * (batch * kBlock * 4 + rows * (kBlock + 8)) + 64 * 5;
}

void place_activations(char*& at, int64_t batch, int32_t columns, bool rounded, Activations& x) {
    x.batch = batch, x.blocks = int32_t(ceil_div(columns, kBlock)), x.panel = int32_t(batch < kPanel ? batch : kPanel);
    const int64_t places = rounded ? ceil_div(batch, x.panel) * x.panel * x.blocks : 0;
    x.values = take<float>(at, batch * x.blocks * kBlock);
    x.rounded = rounded ? take<int8_t>(at, places * kBlock) : nullptr;
    x.scale = rounded ? take<float>(at, places) : nullptr;
    x.bias = rounded ? take<int32_t>(at, places) : nullptr;
}

void fill_activations(const Matrix& m, const void* data, int dtype, int64_t row, const Activations& x) {
    if (dtype == kCodes) return fill_codes(m, *static_cast<const Codes*>(data), row, x);
    float* values = const_cast<float*>(x.values) + row * x.blocks * kBlock;
    fill_row(m, data, row, dtype, values);
    if (x.rounded) {
        const int64_t at = x.place(row, 0);
        body().round_row(values, x.blocks, x.panel, const_cast<int8_t*>(x.rounded) + at * kBlock, const_cast<float*>(x.scale) + at,
                         const_cast<int32_t*>(x.bias) + at);
    }
}

}  // namespace lowbit
