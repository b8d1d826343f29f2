// A decoder layer of the Llama family for a few tokens: norm, q/k/v, norms of heads, rotary positions; then, once the host
// has put keys and values into its cache, attention, o, residual, norm, gate/up, SiLU, down, residual.
#include "decoder_layer.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "attention.h"
#include "body.h"
#include "half.h"
#include "linear.h"
#include "threads.h"

namespace lowbit {
namespace {

enum Part { kQ, kK, kV, kO, kGate, kUp, kDown };
enum Norm { kInput, kMiddle, kQueryHead, kKeyHead };

// Waking a thread is worth about this many multiply-adds outside the matrices.
constexpr int64_t kWorkPerThread = 1 << 17;

bool fits(const LowbitLayer& l) {
    const int32_t heads = l.heads * l.dim, keys = l.kv_heads * l.dim;
    const int32_t rows[7] = {heads, keys, keys, l.hidden, l.inner, l.inner, l.hidden};
    const int32_t columns[7] = {l.hidden, l.hidden, l.hidden, heads, l.hidden, l.hidden, l.inner};
    for (int i = 0; i < 7; ++i) {
        if (lowbit_columns(l.matrices[i], l.bytes[i], rows[i]) != columns[i]) return false;
    }
    return l.kv_heads > 0 && l.heads % l.kv_heads == 0 && l.dim % 16 == 0;
}

// y = x / rms(x) * weight over `size` numbers; y may be x.
void rms_norm(const float* x, const void* weight, int dtype, int size, float epsilon, float* y) {
    double square = 0;
    for (int i = 0; i < size; ++i) square += double(x[i]) * x[i];
    const float factor = 1.0f / std::sqrt(float(square / size) + epsilon);
    for (int i = 0; i < size; ++i) y[i] = x[i] * factor * read_number(weight, i, dtype);
}

void norm_rows(const LowbitLayer& l, Norm which, const float* x, int64_t rows, float* y) {
    for (int64_t r = 0; r < rows; ++r) {
        rms_norm(x + r * l.hidden, l.norms[which], l.dtype, l.hidden, l.epsilon[which], y + r * l.hidden);
    }
}

// Turn each half of a head against the other: x cos + (-x_high, x_low) sin.
void rotate(float* x, int dim, const void* cosines, const void* sines, int64_t at, int dtype) {
    const int half = dim / 2;
    for (int i = 0; i < half; ++i) {
        const float low = x[i], high = x[i + half];
        x[i] = low * read_number(cosines, at + i, dtype) - high * read_number(sines, at + i, dtype);
        x[i + half] = high * read_number(cosines, at + i + half, dtype) + low * read_number(sines, at + i + half, dtype);
    }
}

std::unique_ptr<float[]> floats(int64_t count) { return std::unique_ptr<float[]>(new (std::nothrow) float[size_t(count)]); }

void widen(const LowbitLayer& l, const void* x, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = read_number(x, i, l.dtype);
}

int32_t product(const LowbitLayer& l, Part first, int count, const float* x, int64_t rows, float* const* ys) {
    const Matrix* matrices[3];
    for (int i = 0; i < count; ++i) matrices[i] = static_cast<const Matrix*>(l.matrices[first + i]);
    void* outs[3];
    for (int i = 0; i < count; ++i) outs[i] = ys[i];
    return linear(matrices, count, x, rows, LOWBIT_F32, l.biases + first, outs, l.mode, l.threads);
}

int threads_for(const LowbitLayer& l, int64_t work) {
    return work / kWorkPerThread + 1 < l.threads ? int(work / kWorkPerThread + 1) : l.threads;
}

int32_t attend(const LowbitLayer& l, const Attention& a) {
    const int64_t each = attention_scratch(a), heads = int64_t(a.batch) * a.kv_heads;
    const int threads = threads_for(l, int64_t(a.batch) * a.tokens * a.heads * a.length * a.dim * 2);
    std::unique_ptr<float[]> scratch = floats(each * (threads > 1 ? heads : 1));
    if (!scratch) return LOWBIT_E_MEMORY;
    parallel_for(heads, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            body().attend_head(a, int(i / a.kv_heads), int(i % a.kv_heads), scratch.get() + (threads > 1 ? i * each : 0));
        }
    });
    return 0;
}

// gate = silu(gate) * up
void activate(const LowbitLayer& l, float* gate, const float* up, int64_t count) {
    parallel_for(count, 1024, threads_for(l, count * 4), [&](int64_t first, int64_t last) {
        body().gate_silu(gate + first, up + first, last - first);
    });
}

// Everything behind attention: o, norm, gate, up, down, and both residuals.
int32_t output(const LowbitLayer& l, const void* x, const float* mixed, int64_t rows, void* y) {
    std::unique_ptr<float[]> room = floats(rows * (3 * int64_t(l.hidden) + 2 * int64_t(l.inner)));
    if (!room) return LOWBIT_E_MEMORY;
    float *hidden = room.get(), *normed = hidden + rows * l.hidden;
    float *out = normed + rows * l.hidden, *gate = out + rows * l.hidden, *up = gate + rows * l.inner;
    if (const int32_t wrong = product(l, kO, 1, mixed, rows, &out)) return wrong;
    widen(l, x, rows * l.hidden, hidden);
    for (int64_t i = 0; i < rows * l.hidden; ++i) hidden[i] += out[i];
    norm_rows(l, kMiddle, hidden, rows, normed);
    float* const inner[2] = {gate, up};
    if (const int32_t wrong = product(l, kGate, 2, normed, rows, inner)) return wrong;
    activate(l, gate, up, rows * l.inner);
    if (const int32_t wrong = product(l, kDown, 1, gate, rows, &out)) return wrong;
    for (int64_t i = 0; i < rows * l.hidden; ++i) write_number(y, i, l.dtype, hidden[i] + out[i]);
    return 0;
}

// Norm, q/k/v, norms of heads and positions; the new tokens' keys and values become the last ones of the cache.
int32_t begin(const LowbitLayer& l, const LowbitTokens& in, float* queries, const LowbitCache& cache) {
    const int64_t rows = int64_t(in.batch) * in.tokens, wide = int64_t(l.kv_heads) * l.dim;
    std::unique_ptr<float[]> room = floats(rows * (l.hidden + 2 * wide));
    if (!room) return LOWBIT_E_MEMORY;
    float *normed = room.get(), *k = normed + rows * l.hidden, *v = k + rows * wide;
    widen(l, in.x, rows * l.hidden, normed);
    norm_rows(l, kInput, normed, rows, normed);
    float* const ys[3] = {queries, k, v};
    if (const int32_t wrong = product(l, kQ, 3, normed, rows, ys)) return wrong;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t b = r / in.tokens, t = r % in.tokens;
        const int64_t position = ((in.position_rows == 1 ? 0 : b) * in.tokens + t) * l.dim;
        for (int h = 0; h < l.heads; ++h) {
            float* head = queries + (r * l.heads + h) * l.dim;
            if (l.norms[kQueryHead]) rms_norm(head, l.norms[kQueryHead], l.dtype, l.dim, l.epsilon[kQueryHead], head);
            rotate(head, l.dim, in.cosines, in.sines, position, l.dtype);
        }
        for (int h = 0; h < l.kv_heads; ++h) {
            float* head = k + r * wide + h * l.dim;
            if (l.norms[kKeyHead]) rms_norm(head, l.norms[kKeyHead], l.dtype, l.dim, l.epsilon[kKeyHead], head);
            rotate(head, l.dim, in.cosines, in.sines, position, l.dtype);
            const int64_t place = cache.length - in.tokens + t;
            const auto at = [&](const int64_t* strides) { return b * strides[0] + h * strides[1] + place * strides[2]; };
            const int64_t key = at(cache.key_strides), value = at(cache.value_strides);
            for (int i = 0; i < l.dim; ++i) {
                write_number(cache.keys, key + i, l.dtype, head[i]);
                write_number(cache.values, value + i, l.dtype, v[r * wide + h * l.dim + i]);
            }
        }
    }
    return 0;
}

// Attention over the cache, then the rest of the layer.
int32_t finish(const LowbitLayer& l, const LowbitTokens& in, const float* queries, const LowbitCache& cache, const LowbitMask& mask,
               void* y) {
    const int64_t rows = int64_t(in.batch) * in.tokens, wide = int64_t(l.heads) * l.dim;
    std::unique_ptr<float[]> mixed = floats(rows * wide);
    if (!mixed) return LOWBIT_E_MEMORY;
    Attention a{};
    a.queries = queries, a.out = mixed.get(), a.keys = cache.keys, a.values = cache.values, a.dtype = l.dtype;
    a.key_batch = cache.key_strides[0], a.key_head = cache.key_strides[1], a.key_token = cache.key_strides[2];
    a.value_batch = cache.value_strides[0], a.value_head = cache.value_strides[1], a.value_token = cache.value_strides[2];
    a.mask = mask.data, a.mask_kind = mask.kind;
    a.mask_batch = mask.strides[0], a.mask_query = mask.strides[1], a.mask_key = mask.strides[2];
    a.batch = in.batch, a.tokens = in.tokens, a.heads = l.heads, a.kv_heads = l.kv_heads, a.dim = l.dim;
    a.length = cache.length, a.scale = l.scale, a.causal = in.tokens > 1 && mask.kind == 0;
    if (const int32_t wrong = attend(l, a)) return wrong;
    return output(l, in.x, mixed.get(), rows, y);
}

bool fits(const LowbitLayer& l, const LowbitTokens& in, const LowbitCache& cache) {
    return fits(l) && (in.position_rows == 1 || in.position_rows == in.batch) && cache.length >= in.tokens;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

int32_t lowbit_layer_start(const LowbitLayer* layer, const LowbitTokens* in, float* queries, const LowbitCache* cache) try {
    return fits(*layer, *in, *cache) ? begin(*layer, *in, queries, *cache) : int32_t(LOWBIT_E_MATRIX);
} catch (const std::exception&) {
    return LOWBIT_E_MEMORY;
}

int32_t lowbit_layer_finish(const LowbitLayer* layer, const LowbitTokens* in, const float* queries, const LowbitCache* cache,
                            const LowbitMask* mask, void* y) try {
    return fits(*layer, *in, *cache) ? finish(*layer, *in, queries, *cache, *mask, y) : int32_t(LOWBIT_E_MATRIX);
} catch (const std::exception&) {
    return LOWBIT_E_MEMORY;
}

int32_t lowbit_layer(const LowbitLayer* layer, const LowbitTokens* in, const LowbitCache* cache, const LowbitMask* mask, void* y) try {
    if (!fits(*layer, *in, *cache)) return LOWBIT_E_MATRIX;
    std::unique_ptr<float[]> queries = floats(int64_t(in->batch) * in->tokens * layer->heads * layer->dim);
    if (!queries) return LOWBIT_E_MEMORY;
    if (const int32_t wrong = begin(*layer, *in, queries.get(), *cache)) return wrong;
    return finish(*layer, *in, queries.get(), *cache, *mask, y);
} catch (const std::exception&) {
    return LOWBIT_E_MEMORY;
}

int32_t lowbit_layer_output(const LowbitLayer* layer, const void* x, const float* mixed, int64_t rows, void* y) try {
    return fits(*layer) ? output(*layer, x, mixed, rows, y) : int32_t(LOWBIT_E_MATRIX);
} catch (const std::exception&) {
    return LOWBIT_E_MEMORY;
}
