// AArch64 with the dot product extension: a quarter of a tile of 16 rows in a register.
#pragma once
#include <arm_neon.h>

#include <cstring>

#include "matrix.h"

namespace lowbit {
namespace {

struct Isa {
    static constexpr int kLanes = 4, kSlices = 4;
    static constexpr int kMostRows = 8;  // of x whose sums fit the registers
    static constexpr bool kQuadsFirst = false;  // eight levels, sums of groups and of the run fill the registers
    static constexpr int kBias = 0, kFewBias = 0;  // sdot takes signed levels
    using Bytes = uint8x16_t;
    using Ints = int32x4_t;
    using Floats = float32x4_t;

    static Bytes bytes(uint32x4_t v) { return vreinterpretq_u8_u32(v); }
    static uint32x4_t words(Bytes v) { return vreinterpretq_u32_u8(v); }

    static Bytes load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
    static void store(void* p, Bytes v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
    static Bytes splat(int v) { return vdupq_n_u8(uint8_t(v)); }
    static Bytes and_(Bytes a, Bytes b) { return vandq_u8(a, b); }
    static Bytes or_(Bytes a, Bytes b) { return vorrq_u8(a, b); }
    static Bytes add8(Bytes a, Bytes b) { return vaddq_u8(a, b); }
    template <int N>
    static Bytes shr(Bytes a) {
        if constexpr (N == 0) return a;
        else return bytes(vshrq_n_u32(words(a), N));
    }
    template <int N>
    static Bytes shl(Bytes a) {
        return bytes(vshlq_n_u32(words(a), N));
    }
    static Bytes shuffle(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
    // Table r holds the tables of row r of the four: one look-up in all 64 bytes.
    static Bytes shuffle_rows(const Bytes table[4], Bytes index) {
        const Bytes row = bytes(uint32x4_t{0, 0x10101010, 0x20202020, 0x30303030});
        return vqtbl4q_u8({{table[0], table[1], table[2], table[3]}}, vorrq_u8(index, row));
    }
    template <int N>
    static Bytes shuffle_far(const Bytes (&table)[N][1], Bytes index) {
        if constexpr (N == 2) return vqtbl2q_u8({{table[0][0], table[1][0]}}, index);
        else return vqtbl4q_u8({{table[0][0], table[1][0], table[2][0], table[3][0]}}, index);
    }
    static Ints start(int32_t) { return vdupq_n_s32(0); }
    template <int BIAS>
    static Ints dot(Ints sum, Bytes level, Bytes x) {
        return vdotq_s32(sum, vreinterpretq_s8_u8(level), vreinterpretq_s8_u8(x));
    }
    // Where loops are unrolled `quad` is known: then a product by one lane of a register of x, since broadcasting each quad costs
    // as much as the product.
    template <int BIAS>
    static Ints dot_quad(Ints sum, Bytes level, const int8_t* x, int quad) {
        if (!__builtin_constant_p(quad)) {
            int32_t bits;
            std::memcpy(&bits, x + 4 * quad, 4);
            return dot<BIAS>(sum, level, vreinterpretq_u8_s32(vdupq_n_s32(bits)));
        }
        const int8x16_t a = vreinterpretq_s8_u8(level), four = vld1q_s8(x + quad / 4 * 16);
        switch (quad % 4) {
            case 0: return vdotq_laneq_s32(sum, a, four, 0);
            case 1: return vdotq_laneq_s32(sum, a, four, 1);
            case 2: return vdotq_laneq_s32(sum, a, four, 2);
            default: return vdotq_laneq_s32(sum, a, four, 3);
        }
    }
    static Ints plus(Ints a, Ints b) { return vaddq_s32(a, b); }
    static Ints minus(Ints a, Ints b) { return vsubq_s32(a, b); }
    static Floats to_floats(Ints v) { return vcvtq_f32_s32(v); }
    static Floats zero() { return vdupq_n_f32(0); }
    static Floats set(float v) { return vdupq_n_f32(v); }
    static Floats loadf(const float* p) { return vld1q_f32(p); }
    static void storef(float* p, Floats v) { vst1q_f32(p, v); }
    static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
    static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static Floats halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static Floats signed_bytes(const int8_t* p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
    }
    // The bytes of a table of floats.
    struct Levels {
        uint8x16x4_t all;
    };
    static Levels levels(const float* table, int entries) {
        float padded[16];
        for (int i = 0; i < 16; ++i) padded[i] = table[i & (entries - 1)];
        Levels out;
        for (int k = 0; k < 4; ++k) out.all.val[k] = load(padded + 4 * k);
        return out;
    }
    // The low bits of each lane, two bits up and with the numbers of a float's bytes below, are the places of those bytes.
    template <int BITS>
    static Floats pick(const Levels& t, Bytes index) {
        const Bytes lowest = bytes(uint32x4_t{0, 0x04040404, 0x08080808, 0x0c0c0c0c}), of_float = bytes(vdupq_n_u32(0x03020100));
        const Bytes entry = vandq_u8(vqtbl1q_u8(index, lowest), splat((1 << BITS) - 1));
        const Bytes at = vsliq_n_u8(of_float, entry, 2);
        Bytes found;
        if constexpr (BITS <= 2) found = vqtbl1q_u8(t.all.val[0], at);
        else if constexpr (BITS == 3) found = vqtbl2q_u8({{t.all.val[0], t.all.val[1]}}, at);
        else found = vqtbl4q_u8(t.all, at);
        return vreinterpretq_f32_u8(found);
    }
    static Floats gather(const float* base, Bytes index) {
        const uint32x4_t at = words(index);
        return Floats{base[vgetq_lane_u32(at, 0)], base[vgetq_lane_u32(at, 1)], base[vgetq_lane_u32(at, 2)],
                      base[vgetq_lane_u32(at, 3)]};
    }
    static Bytes low_byte(Bytes v) { return vandq_u8(v, bytes(vdupq_n_u32(255))); }
    static Bytes add32(Bytes a, Bytes b) { return bytes(vaddq_u32(words(a), words(b))); }
};

}  // namespace
}  // namespace lowbit
