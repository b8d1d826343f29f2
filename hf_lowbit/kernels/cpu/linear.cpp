// x @ W.T for prepared matrices: activations made once, tiles handed to threads, and the terms that are not codes.
#include "linear.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "body.h"
#include "half.h"
#include "lowbit_cpu.h"
#include "room.h"
#include "threads.h"

namespace lowbit {
namespace {

// A thread is worth waking for this many multiplications: 2**18 take about 10 us on one core.
constexpr int64_t kWorkPerThread = 1 << 18;

constexpr int64_t kKeep = 8 << 20;

// For work on tiles, one per thread, kept while the thread lives.
char* thread_room(int64_t bytes) {
    static thread_local Room room;
    return room.get(bytes);
}

void sum_groups(const Matrix& m, const Stage& s, const float* values, float* out) {
    for (int g = 0; g < s.groups; ++g) {
        const int first = g * s.group, last = first + s.group < m.columns ? first + s.group : m.columns;
        float sum = 0;
        for (int i = first; i < last; ++i) sum += values[i];
        out[g] = sum;
    }
}

// What one matrix of a call needs besides x: where its output goes and the sums that its offsets and low rank multiply.
struct Job {
    const Matrix* m;
    const Activations* x;
    float* group_sums[kMaxStages];
    float* low;          // [batch, rank]
    float* extra;        // [batch, rows], what stages that cover some rows add; null without such a stage
    const float* bias;
    void* y;
    int dtype;
    bool exact;
    int64_t first_tile;  // among the tiles of all jobs
};

int64_t scratch_bytes(int64_t batch) { return 64 * 4 + kRun * (kTableBytes + 2 * batch * kTile * 4); }

void add_outliers(const Job& job, int tile, float* y) {
    const Matrix& m = *job.m;
    const int32_t* starts = m.at<int32_t>(m.outlier_starts_at);
    if (!starts) return;
    const uint16_t* values = m.at<uint16_t>(m.outlier_values_at);
    const uint16_t* narrow = m.at<uint16_t>(m.outlier_columns_at);
    const int32_t* wide = m.at<int32_t>(m.outlier_columns_at);
    const int64_t width = int64_t(m.blocks) * kBlock;
    for (int r = 0; r < kTile && tile * kTile + r < m.rows; ++r) {
        const int row = tile * kTile + r;
        for (int64_t i = 0; i < job.x->batch; ++i) {
            float sum = 0;
            for (int e = starts[row]; e < starts[row + 1]; ++e) {
                sum += half_to_float(values[e]) * job.x->values[i * width + (m.columns <= 65536 ? narrow[e] : wide[e])];
            }
            y[i * kTile + r] += sum;
        }
    }
}

void add_low_rank(const Job& job, int tile, float* y) {
    const Matrix& m = *job.m;
    const float* b = m.at<float>(m.low_rank_b_at);
    for (int r = 0; b && r < kTile && tile * kTile + r < m.rows; ++r) {
        for (int64_t i = 0; i < job.x->batch; ++i) {
            float sum = 0;
            for (int k = 0; k < m.rank; ++k) sum += b[(int64_t(tile) * kTile + r) * m.rank + k] * job.low[i * m.rank + k];
            y[i * kTile + r] += sum;
        }
    }
}

void store_tile(const Job& job, int tile, const float* y) {
    const Matrix& m = *job.m;
    const int count = m.rows - tile * kTile < kTile ? m.rows - tile * kTile : kTile;
    for (int64_t i = 0; i < job.x->batch; ++i) {
        const int64_t at = i * m.rows + int64_t(tile) * kTile;
        for (int r = 0; r < count; ++r) {
            float value = y[i * kTile + r];
            if (job.extra) value += job.extra[at + r];
            value *= m.unit;
            if (job.bias) value += job.bias[tile * kTile + r];
            write_number(job.y, at + r, job.dtype, value);
        }
    }
}

// How many tiles advance together: several while every row of x takes part in one pass over the codes, one where codes are read
// again for further rows and had better stay in the first cache.
int run_of(int64_t batch) { return batch <= 8 ? kRun : 1; }

// All full stages and the other terms of a run of tiles of output rows.
void run_tiles(const Job& job, int tile, int count) {
    const Matrix& m = *job.m;
    const int64_t batch = job.x->batch, numbers = count * batch * kTile;
    char* at = thread_room(scratch_bytes(batch));
    int8_t* tables = take<int8_t>(at, kRun * kTableBytes);
    float* y = take<float>(at, kRun * batch * kTile);
    float* part = take<float>(at, kRun * batch * kTile);
    bool begun = false;
    for (int i = 0; i < m.stages; ++i) {
        const Stage& s = m.stage[i];
        if (s.row_ids_at) continue;
        const auto tiles = job.exact ? body().tiles_exact : body().tiles_int8;
        tiles(m, s, tile, count, *job.x, job.group_sums[i], tables, begun ? part : y);
        for (int64_t k = 0; begun && k < numbers; ++k) y[k] += part[k];
        begun = true;
    }
    if (!begun) std::memset(y, 0, size_t(4 * numbers));
    for (int t = 0; t < count; ++t, y += batch * kTile) {
        add_outliers(job, tile + t, y);
        add_low_rank(job, tile + t, y);
        store_tile(job, tile + t, y);
    }
}

// One tile of a stage that covers some of the rows: each of its rows is one row of the output.
void run_partial_tile(const Job& job, int number, int tile) {
    const Matrix& m = *job.m;
    const Stage& s = m.stage[number];
    const int64_t batch = job.x->batch;
    char* at = thread_room(scratch_bytes(batch));
    int8_t* tables = take<int8_t>(at, kTableBytes);
    float* y = take<float>(at, batch * kTile);
    (job.exact ? body().tiles_exact : body().tiles_int8)(m, s, tile, 1, *job.x, job.group_sums[number], tables, y);
    const int32_t* ids = m.at<int32_t>(s.row_ids_at);
    for (int r = 0; r < kTile && tile * kTile + r < s.rows; ++r) {
        for (int64_t i = 0; i < batch; ++i) job.extra[i * m.rows + ids[tile * kTile + r]] += y[i * kTile + r];
    }
}

// Everything of a job that depends on one row of x alone.
void make_sums(const Job& job, int64_t row) {
    const Matrix& m = *job.m;
    const float* values = job.x->values + row * m.blocks * kBlock;
    for (int i = 0; i < m.stages; ++i) {
        if (m.stage[i].needs_sums()) sum_groups(m, m.stage[i], values, job.group_sums[i] + row * m.stage[i].groups);
    }
    const float* a = m.at<float>(m.low_rank_a_at);
    for (int k = 0; a && k < m.rank; ++k) {
        float lanes[16] = {};
        const float* from = a + int64_t(k) * m.columns;
        int c = 0;
        for (; c + 16 <= m.columns; c += 16) {
            for (int i = 0; i < 16; ++i) lanes[i] += from[c + i] * values[c + i];
        }
        for (; c < m.columns; ++c) lanes[0] += from[c] * values[c];
        float sum = 0;
        for (float lane : lanes) sum += lane;
        job.low[row * m.rank + k] = sum;
    }
}

int64_t job_bytes(const Matrix& m, int64_t batch) {
    int64_t floats = int64_t(m.rank) * batch, partial = 0;
    for (int i = 0; i < m.stages; ++i) {
        floats += m.stage[i].needs_sums() ? m.stage[i].groups * batch : 0;
        partial |= m.stage[i].row_ids_at;
    }
    return 4 * (floats + (partial ? m.rows * batch : 0)) + 64 * (kMaxStages + 3);
}

void place_job(Job& job, char*& at) {
    const Matrix& m = *job.m;
    bool partial = false;
    for (int i = 0; i < m.stages; ++i) {
        job.group_sums[i] = m.stage[i].needs_sums() ? take<float>(at, m.stage[i].groups * job.x->batch) : nullptr;
        partial |= m.stage[i].row_ids_at != 0;
    }
    job.low = m.rank ? take<float>(at, m.rank * job.x->batch) : nullptr;
    job.extra = partial ? take<float>(at, m.rows * job.x->batch) : nullptr;
    if (partial) std::memset(job.extra, 0, size_t(4 * m.rows * job.x->batch));
}

// Whether the body in use multiplies -128; AVX2's products are of sizes and signs, and -128 has no opposite.
bool whole_range() { return std::strcmp(body().name, "avx2") != 0; }

// What Activations::bias is a multiple of in the body in use.
int32_t level_bias() {
    const float one[kBlock] = {127};
    int8_t code[kBlock];
    float scale;
    int32_t bias;
    body().round_row(one, 1, 1, code, &scale, &bias);
    return bias / 127;
}

}  // namespace

int32_t linear(const Matrix* const* matrices, int count, const void* x, int64_t batch, int dtype, const float* const* biases,
               void* const* ys, int mode, int threads) {
    int64_t bytes = 64, work = 0, tiles = 0;
    bool any_int8 = false;
    for (int i = 0; i < count; ++i) {
        const Matrix& m = *matrices[i];
        bytes += job_bytes(m, batch) + activation_bytes(batch, m.columns) + int64_t(sizeof(Job) + sizeof(Activations));
        work += int64_t(m.rows) * m.columns * batch * m.stages;
    }
    // Kept between calls where it is small, since fresh pages cost a fifth of a product of 64 rows of 2048.
    static thread_local Room kept;
    Room large;
    char* at = (bytes <= kKeep ? kept : large).get(bytes);
    std::unique_ptr<Job[]> jobs(new (std::nothrow) Job[size_t(count)]);
    std::unique_ptr<Activations[]> inputs(new (std::nothrow) Activations[size_t(count)]);
    if (!jobs || !inputs) return LOWBIT_E_MEMORY;
    for (int i = 0; i < count; ++i) {
        const int wanted = mode == LOWBIT_AUTO ? matrices[i]->auto_mode : mode;
        jobs[i].exact = wanted == LOWBIT_EXACT || !matrices[i]->has_int8;
        any_int8 |= !jobs[i].exact;
    }
    int made = 0;
    const Activations* plain = nullptr;
    int owners[64];
    for (int i = 0; i < count; ++i) {
        Job& job = jobs[i];
        job.m = matrices[i];
        const bool permuted = job.m->permutation_at != 0;
        if (permuted || !plain) {
            place_activations(at, batch, job.m->columns, any_int8, inputs[made]);
            if (!permuted) plain = &inputs[made];
            owners[made] = i;
            job.x = &inputs[made++];
        } else {
            job.x = plain;
        }
        job.bias = biases ? biases[i] : nullptr, job.y = ys[i], job.dtype = dtype == kCodes ? int(LOWBIT_F32) : dtype;
        job.first_tile = tiles, tiles += job.m->tiles;
        place_job(job, at);
    }
    if (threads > work / kWorkPerThread + 1) threads = int(work / kWorkPerThread + 1);
    parallel_for(batch, batch < 4 ? batch : 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            for (int k = 0; k < made; ++k) fill_activations(*matrices[owners[k]], x, dtype, row, inputs[k]);
            for (int i = 0; i < count; ++i) make_sums(jobs[i], row);
        }
    });
    for (int i = 0; i < count; ++i) {
        for (int s = 0; s < matrices[i]->stages; ++s) {
            if (!matrices[i]->stage[s].row_ids_at) continue;
            parallel_for(matrices[i]->stage[s].tiles, 1, threads, [&](int64_t first, int64_t last) {
                for (int64_t t = first; t < last; ++t) run_partial_tile(jobs[i], s, int(t));
            });
        }
    }
    const int run = run_of(batch);
    int64_t grain = tiles / (int64_t(threads) * 8);
    grain = grain > run ? grain / run * run : run;
    parallel_for(tiles, grain, threads, [&](int64_t first, int64_t last) {
        int i = count - 1;
        while (jobs[i].first_tile > first) --i;
        for (int64_t t = first; t < last;) {
            while (i + 1 < count && jobs[i + 1].first_tile <= t) ++i;
            const int64_t end = i + 1 < count && jobs[i + 1].first_tile < last ? jobs[i + 1].first_tile : last;
            const int together = int(end - t < run ? end - t : run);
            run_tiles(jobs[i], int(t - jobs[i].first_tile), together);
            t += together;
        }
    });
    return 0;
}

}  // namespace lowbit

using namespace lowbit;

namespace {

int check(const void* matrix, int64_t bytes, int32_t columns) {
    const Matrix* m = static_cast<const Matrix*>(matrix);
    if (bytes < int64_t(sizeof(Matrix)) || m->magic != kMagic || m->abi != LOWBIT_ABI_VERSION || m->bytes != bytes) return LOWBIT_E_MATRIX;
    return m->columns == columns ? 0 : LOWBIT_E_WIDTH;
}

}  // namespace

int32_t lowbit_linear(const void* matrix, int64_t bytes, const void* x, int64_t batch, int32_t columns, int32_t dtype,
                      const float* bias, void* y, int32_t mode, int32_t threads) try {
    if (const int wrong = check(matrix, bytes, columns)) return wrong;
    if (batch < 1) return 0;
    const Matrix* m = static_cast<const Matrix*>(matrix);
    return linear(&m, 1, x, batch, dtype, &bias, &y, mode, threads);
} catch (const std::exception&) {
    return LOWBIT_E_MEMORY;
}

int32_t lowbit_columns(const void* matrix, int64_t bytes, int64_t rows) {
    const Matrix* m = static_cast<const Matrix*>(matrix);
    return bytes >= int64_t(sizeof(Matrix)) && check(matrix, bytes, m->columns) == 0 && m->rows == rows ? m->columns : 0;
}

int32_t lowbit_linear_codes(const void* matrix, int64_t bytes, const int8_t* codes, int64_t batch, int32_t columns, float* y,
                            int32_t threads) try {
    if (const int wrong = check(matrix, bytes, columns)) return wrong;
    const Matrix* m = static_cast<const Matrix*>(matrix);
    const Stage& s = m->stage[0];
    if (m->stages != 1 || s.row_ids_at || s.groups != 1 || s.has_offset || s.tables != 1 || s.table_scale != 1 || !m->has_int8 ||
        m->rank || m->outlier_starts_at || m->permutation_at) {
        return LOWBIT_E_LAYOUT;
    }
    if (batch < 1) return 0;
    Codes x{codes, false, whole_range(), level_bias()};
    void* out = y;
    if (const int wrong = linear(&m, 1, &x, batch, kCodes, nullptr, &out, LOWBIT_INT8, threads)) return wrong;
    if (x.whole || !std::memchr(codes, 0x80, size_t(batch * columns))) return 0;
    std::unique_ptr<float[]> rest(new float[size_t(batch * m->rows)]);
    x.second = true, out = rest.get();
    if (const int wrong = linear(&m, 1, &x, batch, kCodes, nullptr, &out, LOWBIT_INT8, threads)) return wrong;
    for (int64_t i = 0; i < batch * m->rows; ++i) y[i] += rest[size_t(i)];
    return 0;
} catch (const std::exception&) {
    return LOWBIT_E_MEMORY;
}
