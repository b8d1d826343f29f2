// 16-bit floats in plain C++, for the parts of the library that are compiled for any processor.
#pragma once
#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace lowbit {

LOWBIT_INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

LOWBIT_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

LOWBIT_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16;
    const uint32_t rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x0400u) return from_bits(sign | ((rest << 13) + (112u << 23)));
    const float tiny = float(rest) * 0x1p-24f;  // subnormal: an exact product
    return from_bits(sign | to_bits(tiny));
}

LOWBIT_INLINE uint16_t float_to_half(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or is larger
    if (rest < 0x38800000u) {                                  // subnormal: the adder rounds to a multiple of 2**-24
        return uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));
    }
    return uint16_t(sign | ((rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13));
}

LOWBIT_INLINE float bfloat_to_float(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

LOWBIT_INLINE uint16_t float_to_bfloat(float value) {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// One number of the dtypes of lowbit_cpu.h, read and written at index i.
LOWBIT_INLINE float read_number(const void* data, int64_t i, int dtype) {
    if (dtype == 0) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return dtype == 1 ? bfloat_to_float(bits) : half_to_float(bits);
}

LOWBIT_INLINE void write_number(void* data, int64_t i, int dtype, float value) {
    if (dtype == 0) {
        static_cast<float*>(data)[i] = value;
    } else {
        static_cast<uint16_t*>(data)[i] = dtype == 1 ? float_to_bfloat(value) : float_to_half(value);
    }
}

}  // namespace lowbit
