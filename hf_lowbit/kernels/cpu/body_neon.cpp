// Where the kernels for AArch64 with the dot product extension will be; until then that processor runs the portable body.
#include "body.h"

const lowbit::Body* lowbit::body_neon() { return nullptr; }
