// AVX-512 with BW, VL and VNNI: a whole tile of 16 rows in one register.
#pragma once
#include <immintrin.h>

#include "matrix.h"

namespace lowbit {
namespace {

struct Isa {
    static constexpr int kLanes = 16, kSlices = 1;
    static constexpr int kMostRows = 8;  // of x whose sums fit the registers
    static constexpr bool kQuadsFirst = true;  // registers for all sums: no product waits for the one before
    static constexpr int kBias = 128, kFewBias = 128;  // vpdpbusd takes unsigned levels
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;

    static Bytes load(const void* p) { return _mm512_loadu_si512(p); }
    static void store(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
    static Bytes splat(int v) { return _mm512_set1_epi8(char(v)); }
    static Bytes and_(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
    static Bytes or_(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
    static Bytes add8(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
    static Bytes adds8(Bytes a, Bytes b) { return _mm512_adds_epu8(a, b); }
    template <int N>
    static Bytes shr(Bytes a) {
        if constexpr (N == 0) return a;
        else return _mm512_srli_epi32(a, N);
    }
    template <int N>
    static Bytes shl(Bytes a) {
        return _mm512_slli_epi32(a, N);
    }
    static Bytes shuffle(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
    // Table r holds the tables of row r of each lane of four.
    static Bytes shuffle_rows(const Bytes table[4], Bytes index) {
        Bytes out = _mm512_shuffle_epi8(table[0], index);
        out = _mm512_mask_shuffle_epi8(out, 0x00f000f000f000f0ULL, table[1], index);
        out = _mm512_mask_shuffle_epi8(out, 0x0f000f000f000f00ULL, table[2], index);
        return _mm512_mask_shuffle_epi8(out, 0xf000f000f000f000ULL, table[3], index);
    }
    // Each sixteenth answers the indices in its range: elsewhere the saturated sum has its top bit set, which makes the shuffle
    // give zero.
    template <int N>
    static Bytes shuffle_far(const Bytes (&table)[N][1], Bytes index) {
        Bytes out = shuffle(table[0][0], adds8(index, splat(0x70)));
        for (int s = 1; s < N; ++s) out = or_(out, shuffle(table[s][0], adds8(add8(index, splat(-16 * s)), splat(0x70))));
        return out;
    }
    static Ints start(int32_t bias) { return _mm512_set1_epi32(bias); }
    template <int BIAS>
    static Ints dot(Ints sum, Bytes level, Bytes x) {
        return _mm512_dpbusd_epi32(sum, level, x);
    }
    // With quad `quad` of x for every lane; the compilers do not fold the broadcast into the product, which spares every
    // second instruction of the kernels.
    template <int BIAS>
    static Ints dot_quad(Ints sum, Bytes level, const int8_t* x, int quad) {
        const auto& four = *reinterpret_cast<const int8_t(*)[4]>(x + 4 * quad);
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(level), "m"(four));
        return sum;
    }
    static Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
    static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats set(float v) { return _mm512_set1_ps(v); }
    static Floats loadf(const float* p) { return _mm512_loadu_ps(p); }
    static void storef(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static Floats signed_bytes(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    // Floats of a table of 8 or 16 entries, indexed by the low bits of each lane.
    struct Levels {
        Floats all;
    };
    static Levels levels(const float* table, int entries) {
        alignas(64) float padded[16];
        for (int i = 0; i < 16; ++i) padded[i] = table[i & (entries - 1)];
        return {_mm512_load_ps(padded)};
    }
    template <int BITS>
    static Floats pick(const Levels& t, Bytes index) {
        return _mm512_permutexvar_ps(index, t.all);
    }
    static Floats gather(const float* base, Bytes index) { return _mm512_i32gather_ps(index, base, 4); }
    static Bytes low_byte(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi32(255)); }
    static Ints add32(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
};

}  // namespace
}  // namespace lowbit
