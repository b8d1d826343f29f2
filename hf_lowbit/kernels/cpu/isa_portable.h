// Plain C++: the meaning of every operation, and the body of processors without one of their own.
#pragma once
#include <cmath>
#include <cstring>

#include "half.h"
#include "matrix.h"

namespace lowbit {
namespace {

struct Isa {
    static constexpr int kLanes = 16, kSlices = 1;
    static constexpr int kMostRows = 4;  // of x whose sums fit the registers
    static constexpr bool kQuadsFirst = false;  // whether a quad meets all rows of x before the next quad does
    static constexpr int kBias = 0, kFewBias = 0;
    struct Bytes {
        uint8_t v[64];
    };
    struct Ints {
        int32_t v[16];
    };
    struct Floats {
        float v[16];
    };

    template <class T, class F>
    static T each(F f) {
        T out;
        for (int i = 0; i < int(sizeof(out.v) / sizeof(out.v[0])); ++i) out.v[i] = f(i);
        return out;
    }
    static Bytes load(const void* p) {
        Bytes out;
        std::memcpy(out.v, p, 64);
        return out;
    }
    static void store(void* p, const Bytes& v) { std::memcpy(p, v.v, 64); }
    static Bytes splat(int v) { return each<Bytes>([&](int) { return uint8_t(v); }); }
    static Bytes and_(const Bytes& a, const Bytes& b) { return each<Bytes>([&](int i) { return uint8_t(a.v[i] & b.v[i]); }); }
    static Bytes or_(const Bytes& a, const Bytes& b) { return each<Bytes>([&](int i) { return uint8_t(a.v[i] | b.v[i]); }); }
    static Bytes add8(const Bytes& a, const Bytes& b) { return each<Bytes>([&](int i) { return uint8_t(a.v[i] + b.v[i]); }); }
    // 32-bit lanes, as little-endian machines see them: of each pair of a and b what f makes of them.
    template <class F>
    static Bytes each_word(const Bytes& a, const Bytes& b, F f) {
        Bytes out;
        for (int i = 0; i < 16; ++i) {
            uint32_t x, y;
            std::memcpy(&x, a.v + 4 * i, 4);
            std::memcpy(&y, b.v + 4 * i, 4);
            x = f(x, y);
            std::memcpy(out.v + 4 * i, &x, 4);
        }
        return out;
    }
    template <int N>
    static Bytes shr(const Bytes& a) {
        return each_word(a, a, [](uint32_t x, uint32_t) { return x >> N; });
    }
    template <int N>
    static Bytes shl(const Bytes& a) {
        return each_word(a, a, [](uint32_t x, uint32_t) { return x << N; });
    }
    // In each 16 bytes: byte `index`, below 16, of the table.
    static Bytes shuffle(const Bytes& table, const Bytes& index) {
        return each<Bytes>([&](int i) { return table.v[(i & 48) + (index.v[i] & 15)]; });
    }
    // The same with a table for each of four rows.
    static Bytes shuffle_rows(const Bytes table[4], const Bytes& index) {
        return each<Bytes>([&](int i) { return table[i / 4 % 4].v[(i & 48) + (index.v[i] & 15)]; });
    }
    // The same with a table of N sixteenths, 2 or 4, and an index below 16 * N.
    template <int N>
    static Bytes shuffle_far(const Bytes (&table)[N][1], const Bytes& index) {
        return each<Bytes>([&](int i) { return table[index.v[i] / 16 % N][0].v[(i & 48) + (index.v[i] & 15)]; });
    }
    static Ints start(int32_t) { return Ints{}; }
    // Products of the four levels of each lane and four of x, added to the lane.
    template <int BIAS>
    static Ints dot(const Ints& sum, const Bytes& level, const Bytes& x) {
        Ints out;
        for (int i = 0; i < 16; ++i) {
            int32_t total = sum.v[i];
            for (int k = 4 * i; k < 4 * i + 4; ++k) total += int(int8_t(level.v[k])) * int(int8_t(x.v[k]));
            out.v[i] = total;
        }
        return out;
    }
    // The same with quad `quad` of x for every lane.
    template <int BIAS>
    static Ints dot_quad(const Ints& sum, const Bytes& level, const int8_t* x, int quad) {
        return dot<BIAS>(sum, level, each<Bytes>([&](int i) { return uint8_t(x[4 * quad + (i & 3)]); }));
    }
    static Ints plus(const Ints& a, const Ints& b) { return each<Ints>([&](int i) { return a.v[i] + b.v[i]; }); }
    static Ints minus(const Ints& a, const Ints& b) { return each<Ints>([&](int i) { return a.v[i] - b.v[i]; }); }
    static Floats to_floats(const Ints& v) { return each<Floats>([&](int i) { return float(v.v[i]); }); }
    static Floats zero() { return Floats{}; }
    static Floats set(float v) { return each<Floats>([&](int) { return v; }); }
    static Floats loadf(const float* p) {
        Floats out;
        std::memcpy(out.v, p, 64);
        return out;
    }
    static void storef(float* p, const Floats& v) { std::memcpy(p, v.v, 64); }
    static Floats add(const Floats& a, const Floats& b) { return each<Floats>([&](int i) { return a.v[i] + b.v[i]; }); }
    static Floats mul(const Floats& a, const Floats& b) { return each<Floats>([&](int i) { return a.v[i] * b.v[i]; }); }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return each<Floats>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
    }
    static Floats halves(const uint16_t* p) { return each<Floats>([&](int i) { return half_to_float(p[i]); }); }
    static Floats signed_bytes(const int8_t* p) { return each<Floats>([&](int i) { return float(p[i]); }); }
    struct Levels {
        const float* table;
        int mask;
    };
    static Levels levels(const float* table, int entries) { return {table, entries - 1}; }
    // Entry `low BITS bits of the lane` of the table; what lies above them is not looked at.
    template <int BITS>
    static Floats pick(const Levels& t, const Bytes& index) {
        return each<Floats>([&](int i) { return t.table[index.v[4 * i] & t.mask]; });
    }
    static Floats gather(const float* base, const Bytes& index) {
        Floats out;
        for (int i = 0; i < 16; ++i) {
            int32_t at;
            std::memcpy(&at, index.v + 4 * i, 4);
            out.v[i] = base[at];
        }
        return out;
    }
    static Bytes low_byte(const Bytes& v) {
        return each<Bytes>([&](int i) { return uint8_t(i % 4 ? 0 : v.v[i]); });
    }
    static Bytes add32(const Bytes& a, const Bytes& b) {
        return each_word(a, b, [](uint32_t x, uint32_t y) { return x + y; });
    }
};

}  // namespace
}  // namespace lowbit
