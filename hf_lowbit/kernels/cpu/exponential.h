// e**x in plain C++ that compilers vectorise, which they do not do to the library's: that one took 50 us for the 8192 gates of a layer.
#pragma once
#include <cstdint>
#include <cstring>

namespace lowbit {
namespace {

// Within one unit in the last place; 0 below the smallest normal number, infinite above the largest, NaN of NaN.
inline float exponential(float x) {
    const float inside = x < -87.0f ? -87.0f : x > 88.7f ? 88.7f : x;
    // The nearest whole number of doublings, by adding 1.5 * 2**23; what remains is within half of log 2.
    const float shifted = inside * 1.44269504f + 12582912.0f;
    const float doublings = shifted - 12582912.0f;
    const float rest = (inside - doublings * 0.693359375f) + doublings * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    int32_t bits, power;
    std::memcpy(&power, &shifted, 4);
    std::memcpy(&bits, &sum, 4);
    bits += int32_t(uint32_t(power - 0x4b400000) << 23);
    std::memcpy(&sum, &bits, 4);
    sum = x < -87.0f ? 0.0f : sum;
    sum = x > 88.7f ? x * 3.0e38f : sum;
    return x == x ? sum : x;
}

}  // namespace
}  // namespace lowbit
