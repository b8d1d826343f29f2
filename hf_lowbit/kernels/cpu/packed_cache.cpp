// Entry points of the packed KV cache.
#include "packed_cache.h"

#include <cmath>
#include <exception>
#include <memory>
#include <new>

#include "body.h"
#include "half.h"
#include "threads.h"

namespace lowbit {
namespace {

// Waking a thread is worth about this many multiply-adds.
constexpr int64_t kWorkPerThread = 1 << 17;

bool known(const LowbitKv& c) {
    if (c.dim <= 0 || c.dim % 16 || c.dim > 1024 || c.heads <= 0 || c.group <= 0 || c.tokens <= 0 || c.batch <= 0) return false;
    if (c.row_count < 0 || c.row_count > kLowbitMaxRows || c.block_count < 0 || c.block_count > kLowbitMaxBlocks) return false;
    for (int i = 0; i < c.block_count; ++i) {
        const LowbitBlocks& s = c.blocks[i];
        if (s.key_bits < 2 || s.key_bits > 4 || s.value_bits < 2 || s.value_bits > 4) return false;
    }
    return true;
}

}  // namespace

int64_t kv_scratch(const LowbitKv& c) {
    const int64_t queries = int64_t(c.group) * c.tokens, padded = (c.dim + 63) / 64 * 64;
    const int64_t rounded = (2 * queries * (int64_t(sizeof(int8_t*)) + 8) + 2 * queries * padded) / 4;
    const int64_t floats = queries * (kKvBlock + c.dim + 3) + (queries > 3 ? queries : 3) * c.dim;
    return (rounded + floats + (c.weights ? queries * kv_raw_room(c) : 0) + 31) / 16 * 16;
}

}  // namespace lowbit

using namespace lowbit;

int32_t lowbit_kv_attend(const LowbitKv* cache) try {
    const LowbitKv& c = *cache;
    if (!known(c)) return LOWBIT_E_LAYOUT;
    const int64_t each = kv_scratch(c), heads = int64_t(c.batch) * c.heads;
    const int64_t work = heads * c.group * c.tokens * c.length * c.dim;
    const int threads = work / kWorkPerThread + 1 < c.threads ? int(work / kWorkPerThread + 1) : c.threads;
    const int64_t slots = threads > 1 ? heads : 1;
    std::unique_ptr<float[]> scratch(new (std::nothrow) float[size_t(each * slots)]);
    if (!scratch) return LOWBIT_E_MEMORY;
    parallel_for(heads, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            body().attend_packed(c, int(i / c.heads), int(i % c.heads), scratch.get() + (slots > 1 ? i * each : 0));
        }
    });
    return 0;
} catch (const std::exception&) {
    return LOWBIT_E_MEMORY;
}

int32_t lowbit_kv_round(const void* x, int32_t dtype, int64_t outer, int64_t tokens, int32_t dim, int8_t* codes, uint16_t* scales,
                        int64_t room, int64_t at) {
    if (at < 0 || at + tokens > room || dim <= 0 || dtype < 0 || dtype > 2) return LOWBIT_E_WIDTH;
    for (int64_t row = 0; row < outer * tokens; ++row) {
        const int64_t slot = row / tokens * room + at + row % tokens;
        float top = 0;
        for (int i = 0; i < dim; ++i) {
            const float v = std::fabs(read_number(x, row * dim + i, dtype));
            top = v > top ? v : top;
        }
        top /= 127.0f;
        scales[slot] = float_to_half(top < 65504.0f ? top : 65504.0f);
        const float scale = half_to_float(scales[slot]);
        for (int i = 0; i < dim; ++i) {
            float v = scale > 0 ? std::nearbyint(read_number(x, row * dim + i, dtype) / scale) : 0.0f;
            v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
            codes[slot * dim + i] = int8_t(v);
        }
    }
    return 0;
}
