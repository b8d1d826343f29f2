// The kernels on random records of many shapes, in buffers of exactly their size, for AddressSanitizer and UBSan.
//
// Results are held against a product in double precision made here from the stored arrays: the check is coarse, since the
// Python tests hold the exact bounds; what counts is that no byte outside a buffer is read or written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "half.h"
#include "lowbit_cpu.h"

namespace {

uint32_t state = 1;
uint32_t draw(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}
float unit() { return float(draw(2001)) / 1000.0f - 1.0f; }

void fail(const char* what, int a, int b, double found, double wanted) {
    std::printf("%s: %d %d found %g wanted %g\n", what, a, b, found, wanted);
    std::exit(1);
}

// One stage of fp16 scales, offsets and fitted tables, with its dense values.
struct Record {
    int rows, columns, bits, group, groups;
    std::vector<uint8_t> codes;
    std::vector<uint16_t> scale, offset, values;
    std::vector<uint16_t> outlier_columns;
    std::vector<float> levels, dense;
    std::vector<int32_t> table_of_row, starts;
    LowbitStageSource stage{};
    LowbitSource source{};

    int code(int row, int column) const {
        const int width = (columns + 31) / 32 * 4 * bits;
        const uint8_t* from = codes.data() + row * width;
        if (8 % bits == 0) return from[column * bits / 8] >> (column * bits % 8) & ((1 << bits) - 1);
        int out = 0;
        for (int p = 0; p < bits; ++p) {
            out |= (from[column / 32 * 4 * bits + 4 * p + column % 32 / 8] >> (column % 8) & 1) << p;
        }
        return out;
    }

    Record(int r, int c, int b, int g, int tables, bool offsets) : rows(r), columns(c), bits(b), group(g) {
        groups = (columns + group - 1) / group;
        codes.resize(size_t(rows) * size_t((columns + 31) / 32 * 4 * bits));
        for (auto& byte : codes) byte = uint8_t(draw(256));
        for (int i = 0; i < rows * groups; ++i) {
            scale.push_back(lowbit::float_to_half(unit()));
            offset.push_back(lowbit::float_to_half(unit() * 0.1f));
        }
        for (int i = 0; i < tables << bits; ++i) levels.push_back(unit());
        for (int i = 0; i < rows; ++i) table_of_row.push_back(int32_t(draw(uint32_t(tables))));
        starts.push_back(0);
        for (int i = 0; i < rows; ++i) {
            for (int k = int(draw(3)); k > 0; --k) {
                values.push_back(lowbit::float_to_half(unit()));
                outlier_columns.push_back(uint16_t(draw(uint32_t(columns))));
            }
            starts.push_back(int32_t(values.size()));
        }
        dense.assign(size_t(rows) * columns, 0.0f);
        for (int i = 0; i < rows; ++i) {
            for (int k = 0; k < columns; ++k) {
                const size_t at = size_t(i) * groups + k / group;
                const float level = levels[size_t(tables > 1 ? table_of_row[size_t(i)] << bits : 0) + size_t(code(i, k))];
                dense[size_t(i) * columns + k] = level * lowbit::half_to_float(scale[at]);
                if (offsets) dense[size_t(i) * columns + k] += lowbit::half_to_float(offset[at]);
            }
            for (int e = starts[size_t(i)]; e < starts[size_t(i) + 1]; ++e) {
                dense[size_t(i) * columns + outlier_columns[size_t(e)]] += lowbit::half_to_float(values[size_t(e)]);
            }
        }
        stage.codes = codes.data(), stage.scale = scale.data(), stage.levels = levels.data();
        stage.offset = offsets ? offset.data() : nullptr;
        stage.table_of_row = tables > 1 ? table_of_row.data() : nullptr;
        stage.rows = rows, stage.bits = bits, stage.group_size = group, stage.scale_bits = 16, stage.tables = tables;
        stage.per_super = 1;
        source.stages = &stage, source.stage_count = 1, source.rows = rows, source.columns = columns;
        source.outliers = int32_t(values.size());
        source.outlier_values = values.data(), source.outlier_columns = outlier_columns.data();
        source.outlier_starts = starts.data();
    }
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};

void run(const Record& record, int batch, int mode, int threads) {
    const int64_t bytes = lowbit_prepared_bytes(&record.source);
    std::unique_ptr<void, Free> matrix(std::aligned_alloc(64, size_t(bytes)));
    if (!bytes || lowbit_prepare(&record.source, matrix.get(), bytes, threads)) fail("prepare", record.rows, record.bits, 0, 0);
    std::vector<float> x(size_t(batch) * record.columns), y(size_t(batch) * record.rows);
    for (auto& value : x) value = unit();
    if (lowbit_linear(matrix.get(), bytes, x.data(), batch, record.columns, LOWBIT_F32, nullptr, y.data(), mode, threads)) {
        fail("linear", record.rows, record.bits, 0, 0);
    }
    for (int m = 0; m < batch; ++m) {
        for (int r = 0; r < record.rows; ++r) {
            double wanted = 0, size = 0;
            for (int c = 0; c < record.columns; ++c) {
                const double term = double(x[size_t(m) * record.columns + c]) * record.dense[size_t(r) * record.columns + c];
                wanted += term, size += std::fabs(term);
            }
            const double found = y[size_t(m) * record.rows + r];
            // Coarse: a level's rounding is a share of the largest level, not of its own.
            if (!(std::fabs(found - wanted) <= (mode == LOWBIT_EXACT ? 1e-4 : 0.05) * (size + record.columns * 0.5) + 1e-5)) {
                fail("product", m, r, found, wanted);
            }
        }
    }
    std::vector<int64_t> ids{record.rows - 1, 0};
    std::vector<float> rows(2 * size_t(record.columns));
    if (lowbit_rows(matrix.get(), bytes, ids.data(), 2, LOWBIT_F32, rows.data(), threads)) fail("rows", 0, 0, 0, 0);
    for (int c = 0; c < record.columns; ++c) {
        const float wanted = record.dense[size_t(record.rows - 1) * record.columns + c];
        if (std::fabs(rows[size_t(c)] - wanted) > 1e-5) fail("row", c, record.bits, rows[size_t(c)], wanted);
    }
}

}  // namespace

int main() {
    const std::string isas = lowbit_isas();
    int runs = 0;
    for (size_t at = 0; at < isas.size();) {
        const size_t end = isas.find(' ', at) == std::string::npos ? isas.size() : isas.find(' ', at);
        lowbit_set_isa(isas.substr(at, end - at).c_str());
        at = end + 1;
        for (int bits = 1; bits <= 8; ++bits) {
            for (int k = 0; k < 12; ++k) {
                const int columns = 1 + int(draw(200)), rows = 1 + int(draw(70));
                const int groups[] = {8, 32, 48, 64, columns};
                const Record record(rows, columns, bits, groups[draw(5)], draw(2) ? 1 : 3, draw(2) != 0);
                for (int mode : {LOWBIT_INT8, LOWBIT_EXACT}) run(record, 1 + int(draw(9)), mode, 1 + int(draw(4))), ++runs;
            }
        }
    }
    const Record shared(300, 1024, 4, 32, 1, true);
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&shared] {
            const int64_t bytes = lowbit_prepared_bytes(&shared.source);
            std::unique_ptr<void, Free> matrix(std::aligned_alloc(64, size_t(bytes)));
            lowbit_prepare(&shared.source, matrix.get(), bytes, 2);
            std::vector<float> x(4 * 1024, 0.5f), y(4 * 300);
            for (int k = 0; k < 20; ++k) lowbit_linear(matrix.get(), bytes, x.data(), 4, 1024, 0, nullptr, y.data(), 1, 3);
        });
    }
    for (auto& caller : callers) caller.join();
    std::printf("%d products on %s: no error\n", runs, isas.c_str());
}
