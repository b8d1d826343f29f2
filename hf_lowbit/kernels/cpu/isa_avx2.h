// AVX2 with FMA and F16C: half a tile of 16 rows in a register.
#pragma once
#include <immintrin.h>

#include "matrix.h"

namespace lowbit {
namespace {

struct Isa {
    static constexpr int kLanes = 8, kSlices = 2;
    static constexpr int kMostRows = 4;  // of x whose sums fit the registers
    static constexpr bool kQuadsFirst = false;
    static constexpr int kBias = 0, kFewBias = 64;
    using Bytes = __m256i;
    using Ints = __m256i;
    using Floats = __m256;

    static Bytes load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static void store(void* p, Bytes v) { _mm256_storeu_si256((__m256i*)p, v); }
    static Bytes splat(int v) { return _mm256_set1_epi8(char(v)); }
    static Bytes and_(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
    static Bytes or_(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
    static Bytes add8(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
    static Bytes adds8(Bytes a, Bytes b) { return _mm256_adds_epu8(a, b); }
    template <int N>
    static Bytes shr(Bytes a) {
        if constexpr (N == 0) return a;
        else return _mm256_srli_epi32(a, N);
    }
    template <int N>
    static Bytes shl(Bytes a) {
        return _mm256_slli_epi32(a, N);
    }
    static Bytes shuffle(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
    // Table r holds the tables of row r of each lane of four; the top bit of an index makes the shuffle give zero.
    static Bytes shuffle_rows(const Bytes table[4], Bytes index) {
        Bytes out = _mm256_setzero_si256();
        for (int r = 0; r < 4; ++r) {
            const __m128i lane = _mm_set_epi32(r == 3 ? 0 : -1, r == 2 ? 0 : -1, r == 1 ? 0 : -1, r == 0 ? 0 : -1);
            out = or_(out, shuffle(table[r], or_(index, _mm256_broadcastsi128_si256(lane))));
        }
        return out;
    }
    // Each sixteenth answers the indices in its range: elsewhere the saturated sum has its top bit set, which makes the shuffle
    // give zero.
    template <int N>
    static Bytes shuffle_far(const Bytes (&table)[N][1], Bytes index) {
        Bytes out = shuffle(table[0][0], adds8(index, splat(0x70)));
        for (int s = 1; s < N; ++s) out = or_(out, shuffle(table[s][0], adds8(add8(index, splat(-16 * s)), splat(0x70))));
        return out;
    }
    static Ints start(int32_t bias) { return _mm256_set1_epi32(bias); }
    // Levels of either sign: |level| * (x with the sign of level), at most 2 * 128 * 127 per pair, which fits 16 bits.
    template <int BIAS>
    static Ints dot(Ints sum, Bytes level, Bytes x) {
        __m256i pairs;
        if constexpr (BIAS != 0) pairs = _mm256_maddubs_epi16(level, x);
        else pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(level), _mm256_sign_epi8(x, level));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    template <int BIAS>
    static Ints dot_quad(Ints sum, Bytes level, const int8_t* x, int quad) {
        int32_t four;
        __builtin_memcpy(&four, x + 4 * quad, 4);
        return dot<BIAS>(sum, level, _mm256_set1_epi32(four));
    }
    static Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static Ints minus(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
    static Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats set(float v) { return _mm256_set1_ps(v); }
    static Floats loadf(const float* p) { return _mm256_loadu_ps(p); }
    static void storef(float* p, Floats v) { _mm256_storeu_ps(p, v); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static Floats signed_bytes(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
    struct Levels {
        Floats low, high;
    };
    static Levels levels(const float* table, int entries) {
        alignas(32) float padded[16];
        for (int i = 0; i < 16; ++i) padded[i] = table[i & (entries - 1)];
        return {_mm256_load_ps(padded), _mm256_load_ps(padded + 8)};
    }
    template <int BITS>
    static Floats pick(const Levels& t, Bytes index) {
        const Floats low = _mm256_permutevar8x32_ps(t.low, index);
        if constexpr (BITS <= 3) {
            return low;
        } else {
            const Floats high = _mm256_permutevar8x32_ps(t.high, index);
            return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
        }
    }
    static Floats gather(const float* base, Bytes index) { return _mm256_i32gather_ps(base, index, 4); }
    static Bytes low_byte(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi32(255)); }
    static Ints add32(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
};

}  // namespace
}  // namespace lowbit
