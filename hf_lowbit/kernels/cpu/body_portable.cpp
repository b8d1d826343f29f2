// The kernels in plain C++, for any processor.
#define LOWBIT_PORTABLE
#include "isa_portable.h"
#include "attend.h"
#include "attend_packed.h"
#include "tile.h"

namespace lowbit {

const Body* body_portable() {
    static const Body body{"portable", [] { return true; }, round_row, tile_int8, tile_exact, attend_head, attend_packed};
    return &body;
}

}  // namespace lowbit
