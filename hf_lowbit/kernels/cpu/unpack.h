// Codes of one block (16 rows x 32 columns) as eight vectors of bytes, a quad of columns each. See matrix.h for the layout.
//
// Included by the file of each instruction set after its Isa; everything has internal linkage.
#pragma once

// Loops over registers: left rolled, the compiler keeps them in memory, which costs half the speed.
#if defined(__clang__)
#define LOWBIT_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define LOWBIT_UNROLL _Pragma("GCC unroll 8")
#else
#define LOWBIT_UNROLL
#endif
// Where registers are arrays, unrolled loops take the compiler minutes.
#if defined(LOWBIT_PORTABLE)
#undef LOWBIT_UNROLL
#define LOWBIT_UNROLL
#endif

namespace lowbit {
namespace {

using Bytes = Isa::Bytes;
using Ints = Isa::Ints;
using Floats = Isa::Floats;
constexpr int kStep = Isa::kLanes * 4;  // bytes of a vector of 64 that one register holds

template <int N>
inline Bytes nibble(const Bytes& v) {
    return Isa::and_(Isa::shr<N>(v), Isa::splat(15));
}

// Quads 6 and 7 of a block of 3-bit codes from the top bits of the nibbles: one in the low, one in the high nibble, whose
// own top bits are zero.
inline Bytes three_bit_rest(const Bytes& a, const Bytes& b, const Bytes& c) {
    return Isa::or_(Isa::or_(Isa::and_(Isa::shr<3>(a), Isa::splat(0x11)), Isa::and_(Isa::shr<2>(b), Isa::splat(0x22))),
                    Isa::and_(Isa::shr<1>(c), Isa::splat(0x44)));
}

template <int BITS>
inline void nibbles(const uint8_t* p, Bytes out[kQuads]) {
    LOWBIT_UNROLL
    for (int k = 0; k < 4; ++k) {
        const Bytes v = Isa::load(p + 64 * k);
        out[2 * k] = nibble<0>(v), out[2 * k + 1] = nibble<4>(v);
    }
}

template <int K>
inline Bytes pair_above(const Bytes& v) {  // bit pair K of a byte, moved to bits 4 and 5
    if constexpr (K <= 2) return Isa::and_(Isa::shl<4 - 2 * K>(v), Isa::splat(0x30));
    else return Isa::and_(Isa::shr<2>(v), Isa::splat(0x30));
}

template <int K>
inline Bytes bit_above(const Bytes& v) {  // bit K of a byte, moved to bit 4
    if constexpr (K < 4) return Isa::and_(Isa::shl<4 - K>(v), Isa::splat(0x10));
    else return Isa::and_(Isa::shr<K - 4>(v), Isa::splat(0x10));
}

// The codes themselves, 0 .. 2**BITS - 1 in each byte.
template <int BITS>
inline void unpack_codes(const uint8_t* p, Bytes out[kQuads]) {
    if constexpr (BITS == 8) {
        LOWBIT_UNROLL
        for (int k = 0; k < kQuads; ++k) out[k] = Isa::load(p + 64 * k);
    } else if constexpr (BITS == 1) {
        const Bytes v = Isa::load(p), one = Isa::splat(1);
        out[0] = Isa::and_(v, one), out[1] = Isa::and_(Isa::shr<1>(v), one);
        out[2] = Isa::and_(Isa::shr<2>(v), one), out[3] = Isa::and_(Isa::shr<3>(v), one);
        out[4] = Isa::and_(Isa::shr<4>(v), one), out[5] = Isa::and_(Isa::shr<5>(v), one);
        out[6] = Isa::and_(Isa::shr<6>(v), one), out[7] = Isa::and_(Isa::shr<7>(v), one);
    } else if constexpr (BITS == 2) {
        LOWBIT_UNROLL
        for (int k = 0; k < 2; ++k) {
            const Bytes v = Isa::load(p + 64 * k), three = Isa::splat(3);
            out[4 * k] = Isa::and_(v, three), out[4 * k + 1] = Isa::and_(Isa::shr<2>(v), three);
            out[4 * k + 2] = Isa::and_(Isa::shr<4>(v), three), out[4 * k + 3] = Isa::and_(Isa::shr<6>(v), three);
        }
    } else if constexpr (BITS == 3) {
        const Bytes a = Isa::load(p), b = Isa::load(p + 64), c = Isa::load(p + 128), seven = Isa::splat(7);
        const Bytes v[3] = {a, b, c}, rest = three_bit_rest(a, b, c);
        LOWBIT_UNROLL
        for (int k = 0; k < 3; ++k) {
            out[2 * k] = Isa::and_(v[k], seven), out[2 * k + 1] = Isa::and_(Isa::shr<4>(v[k]), seven);
        }
        out[6] = Isa::and_(rest, seven), out[7] = Isa::and_(Isa::shr<4>(rest), seven);
    } else {
        nibbles<BITS>(p, out);
        if constexpr (BITS == 5) {
            const Bytes v = Isa::load(p + 256);
            out[0] = Isa::or_(out[0], bit_above<0>(v)), out[1] = Isa::or_(out[1], bit_above<1>(v));
            out[2] = Isa::or_(out[2], bit_above<2>(v)), out[3] = Isa::or_(out[3], bit_above<3>(v));
            out[4] = Isa::or_(out[4], bit_above<4>(v)), out[5] = Isa::or_(out[5], bit_above<5>(v));
            out[6] = Isa::or_(out[6], bit_above<6>(v)), out[7] = Isa::or_(out[7], bit_above<7>(v));
        } else if constexpr (BITS == 6) {
            LOWBIT_UNROLL
            for (int k = 0; k < 2; ++k) {
                const Bytes v = Isa::load(p + 256 + 64 * k);
                out[4 * k] = Isa::or_(out[4 * k], pair_above<0>(v));
                out[4 * k + 1] = Isa::or_(out[4 * k + 1], pair_above<1>(v));
                out[4 * k + 2] = Isa::or_(out[4 * k + 2], pair_above<2>(v));
                out[4 * k + 3] = Isa::or_(out[4 * k + 3], pair_above<3>(v));
            }
        }
    }
}

// What is added to levels so that they are unsigned. An instruction set that multiplies unsigned by signed bytes wants it; at
// up to 3 bits levels are at most 63, so that level + 64 times int8 in pairs still fits the 16 bits of AVX2.
template <int BITS, int KIND>
constexpr int bias_of() {
    return BITS <= 3 ? Isa::kFewBias : Isa::kBias;
}

// The int8 tables of one slice of a tile, in registers or near them.
template <int BITS, int KIND>
struct Tables {
    static constexpr int kVariants = BITS == 1 ? 4 : BITS == 2 ? 2 : BITS <= 4 ? 1 : BITS == 5 ? 2 : 4;
    static constexpr int kPasses = KIND == kMixed ? 4 : 1;
    Bytes part[kVariants][kPasses];
    Bytes zero;

    Tables(const int8_t* tables, int slice, int zero_code) : zero(Isa::splat(bias_of<BITS, KIND>() - zero_code)) {
        if constexpr (KIND == kTable || KIND == kMixed) {
            LOWBIT_UNROLL
            for (int v = 0; v < kVariants; ++v) {
                LOWBIT_UNROLL
                for (int r = 0; r < kPasses; ++r) part[v][r] = Isa::load(tables + 64 * (v * kPasses + r) + slice * kStep);
            }
        }
    }

    template <int V>
    Bytes look(const Bytes& index) const {
        if constexpr (KIND == kMixed) return Isa::shuffle_rows(part[V], index);
        return Isa::shuffle(part[V][0], index);
    }

    Bytes look_far(const Bytes& code) const { return Isa::template shuffle_far<kVariants>(part, code); }
};

// The int8 levels of a block, in the form Isa::dot takes.
template <int BITS, int KIND>
inline void unpack_levels(const uint8_t* p, const Tables<BITS, KIND>& t, Bytes out[kQuads]) {
    if constexpr (KIND == kLinear) {
        unpack_codes<BITS>(p, out);
        LOWBIT_UNROLL
        for (int k = 0; k < kQuads; ++k) out[k] = Isa::add8(out[k], t.zero);
    } else if constexpr (BITS == 4) {
        LOWBIT_UNROLL
        for (int k = 0; k < 4; ++k) {
            const Bytes v = Isa::load(p + 64 * k);
            out[2 * k] = t.template look<0>(nibble<0>(v)), out[2 * k + 1] = t.template look<0>(nibble<4>(v));
        }
    } else if constexpr (BITS == 3) {  // the table is there twice, so the top bit of a nibble does not matter
        const Bytes a = Isa::load(p), b = Isa::load(p + 64), c = Isa::load(p + 128);
        const Bytes v[3] = {a, b, c}, rest = three_bit_rest(a, b, c);
        LOWBIT_UNROLL
        for (int k = 0; k < 3; ++k) {
            out[2 * k] = t.template look<0>(nibble<0>(v[k])), out[2 * k + 1] = t.template look<0>(nibble<4>(v[k]));
        }
        out[6] = t.template look<0>(nibble<0>(rest)), out[7] = t.template look<0>(nibble<4>(rest));
    } else if constexpr (BITS == 2) {  // a nibble is two codes; a table for each spares their separation
        LOWBIT_UNROLL
        for (int k = 0; k < 2; ++k) {
            const Bytes v = Isa::load(p + 64 * k), low = nibble<0>(v), high = nibble<4>(v);
            out[4 * k] = t.template look<0>(low), out[4 * k + 1] = t.template look<1>(low);
            out[4 * k + 2] = t.template look<0>(high), out[4 * k + 3] = t.template look<1>(high);
        }
    } else if constexpr (BITS == 1) {
        const Bytes v = Isa::load(p), low = nibble<0>(v), high = nibble<4>(v);
        out[0] = t.template look<0>(low), out[1] = t.template look<1>(low);
        out[2] = t.template look<2>(low), out[3] = t.template look<3>(low);
        out[4] = t.template look<0>(high), out[5] = t.template look<1>(high);
        out[6] = t.template look<2>(high), out[7] = t.template look<3>(high);
    } else {
        unpack_codes<BITS>(p, out);
        LOWBIT_UNROLL
        for (int k = 0; k < kQuads; ++k) out[k] = t.look_far(out[k]);
    }
}

}  // namespace
}  // namespace lowbit
