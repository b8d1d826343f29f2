// The kernels for AVX2, FMA and F16C; compiled with those flags, run only where the processor has them.
#include "body.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "isa_avx2.h"
#include "attend.h"
#include "attend_packed.h"
#include "tile.h"

namespace lowbit {

const Body* body_avx2() {
    static const Body body{
        "avx2",
        [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
        round_row, tiles_int8, tiles_exact, attend_head, attend_packed, gate_silu};
    return &body;
}

}  // namespace lowbit
#else
const lowbit::Body* lowbit::body_avx2() { return nullptr; }
#endif
