// The kernels in plain C++, for any processor.
#define LOWBIT_PORTABLE
#include "isa_portable.h"
#include "attend.h"
#include "attend_packed.h"
#include "tile.h"

namespace lowbit {

const Body* body_portable() {
    static const Body body{"portable", [] { return true; }, round_row, tiles_int8, tiles_exact, attend_head, attend_packed, gate_silu};
    return &body;
}

}  // namespace lowbit
