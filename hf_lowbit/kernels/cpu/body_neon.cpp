// The kernels for AArch64 with the dot product extension; compiled with its flag, run only where the processor has it.
#include "body.h"

#if defined(__AARCH64EL__) && defined(__ARM_FEATURE_DOTPROD)
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "isa_neon.h"
#include "attend.h"
#include "attend_packed.h"
#include "tile.h"

namespace lowbit {

const Body* body_neon() {
    static const Body body{"neon",
                           [] {
#if defined(__linux__)
                               constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP, which old headers lack
                               return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#elif defined(__APPLE__)
                               return true;  // all of them have it
#else
                               return false;  // nobody to ask
#endif
                           },
                           round_row, tiles_int8, tiles_exact, attend_head, attend_packed, gate_silu};
    return &body;
}

}  // namespace lowbit
#else
const lowbit::Body* lowbit::body_neon() { return nullptr; }
#endif
