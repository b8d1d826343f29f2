// The kernels for AVX-512 with BW, VL and VNNI; compiled with those flags, run only where the processor has them.
#include "body.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "isa_avx512.h"
#include "attend.h"
#include "attend_packed.h"
#include "tile.h"

namespace lowbit {

const Body* body_avx512() {
    static const Body body{"avx512",
                           [] {
                               return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
                           },
                           round_row, tiles_int8, tiles_exact, attend_head, attend_packed, gate_silu};
    return &body;
}

}  // namespace lowbit
#else
const lowbit::Body* lowbit::body_avx512() { return nullptr; }
#endif
