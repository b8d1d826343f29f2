// The kernels on random records of many shapes, in buffers of exactly their size: under AddressSanitizer and UBSan, and for
// processors that are not at hand, under an emulator.
//
// The portable body is held against a product in double precision made here from the stored arrays: coarsely in int8, since the
// Python tests hold the exact bounds. Every other body is held against the portable one, from which only the order of float
// sums may tell it.
//
// Arguments: the instruction sets to run, all that this processor has if none is named.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "body.h"
#include "half.h"
#include "lowbit_cpu.h"
#include "packed_cache.h"

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

void choose(const std::string& isa) {
    if (lowbit_set_isa(isa.c_str())) return;
    std::printf("%s is not among the instruction sets of this build and processor: %s\n", isa.c_str(), lowbit_isas());
    std::exit(1);
}

// One number per row and group: fp16, float, or int8 (stored as unsigned) under an fp16 factor for every kPerSuper groups.
struct Groups {
    static constexpr int kPerSuper = 2;
    std::vector<uint16_t> halves, supers;
    std::vector<uint8_t> coded;
    std::vector<float> values;
    bool wide;

    Groups(int rows, int groups, int bits, float size) : values(size_t(rows) * size_t(groups)), wide(bits == 32) {
        const bool with_codes = bits == 8;
        const int of_row = (groups + kPerSuper - 1) / kPerSuper, width = (groups + 7) / 8 * 8;
        if (with_codes) {
            for (int i = 0; i < rows * of_row; ++i) supers.push_back(lowbit::float_to_half(unit() * size / 127));
            for (int i = 0; i < rows * width; ++i) coded.push_back(uint8_t(draw(256)));
        }
        for (int r = 0; r < rows; ++r) {
            for (int g = 0; g < groups; ++g) {
                if (wide) {
                    values[size_t(r * groups + g)] = unit() * size / 3;
                    continue;
                }
                if (!with_codes) halves.push_back(lowbit::float_to_half(unit() * size));
                values[size_t(r * groups + g)] =
                    with_codes ? float(coded[size_t(r * width + g)] - 128) * lowbit::half_to_float(supers[size_t(r * of_row + g / kPerSuper)])
                               : lowbit::half_to_float(halves.back());
            }
        }
    }
    const void* stored() const { return wide ? static_cast<const void*>(values.data()) : coded.empty() ? static_cast<const void*>(halves.data()) : coded.data(); }
};

struct Shape {
    int rows, columns, bits, group, tables, scale_bits;
    bool offsets, zeros, linear_levels;

    int groups() const { return (columns + group - 1) / group; }
};

Shape draw_shape(int bits, int most_columns) {
    Shape s{};
    s.rows = 1 + int(draw(70)), s.columns = 1 + int(draw(uint32_t(most_columns))), s.bits = bits;
    const int groups[] = {8, 32, 48, 64, s.columns};
    s.group = groups[draw(5)], s.tables = draw(2) ? 1 : 3;
    s.offsets = draw(2) != 0, s.linear_levels = draw(3) == 0;
    const int widths[] = {8, 16, 32};
    s.scale_bits = widths[draw(3)], s.zeros = draw(3) == 0;
    return s;
}

// One stage, with its dense values.
struct Record {
    int rows, columns, bits;
    Groups scale, offset;
    std::vector<uint8_t> codes;
    std::vector<int8_t> zeros;
    std::vector<uint16_t> values;
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

    explicit Record(const Shape& s)
        : rows(s.rows), columns(s.columns), bits(s.bits), scale(rows, s.groups(), s.scale_bits, 1), offset(rows, s.groups(), s.scale_bits, 0.1f) {
        codes.resize(size_t(rows) * size_t((columns + 31) / 32 * 4 * bits));
        for (auto& byte : codes) byte = uint8_t(draw(256));
        for (int i = 0; s.zeros && i < rows * s.groups(); ++i) zeros.push_back(int8_t(int(draw(3)) - 1));
        const int entries = 1 << bits;
        for (int i = 0; i < s.tables * entries; ++i) levels.push_back(s.linear_levels ? float(i % entries - entries / 2) : unit());
        // Tables that differ from row to row, or only every four rows.
        const int alike = draw(2) ? 4 : 1;
        for (int i = 0; i < rows; ++i) table_of_row.push_back(i % alike ? table_of_row.back() : int32_t(draw(uint32_t(s.tables))));
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
                const size_t at = size_t(i * s.groups() + k / s.group);
                const float level = levels[size_t(table_of_row[size_t(i)] << bits) + size_t(code(i, k))];
                dense[size_t(i) * columns + k] = (level - (s.zeros ? zeros[at] : 0)) * scale.values[at];
                if (s.offsets) dense[size_t(i) * columns + k] += offset.values[at];
            }
            for (int e = starts[size_t(i)]; e < starts[size_t(i) + 1]; ++e) {
                dense[size_t(i) * columns + outlier_columns[size_t(e)]] += lowbit::half_to_float(values[size_t(e)]);
            }
        }
        stage.codes = codes.data(), stage.levels = levels.data();
        stage.scale = scale.stored(), stage.scale_super = scale.supers.data();
        if (s.offsets) stage.offset = offset.stored(), stage.offset_super = offset.supers.data();
        if (s.zeros) stage.zero = zeros.data();
        stage.table_of_row = s.tables > 1 ? table_of_row.data() : nullptr;
        stage.rows = rows, stage.bits = bits, stage.group_size = s.group, stage.tables = s.tables;
        stage.scale_bits = s.scale_bits, stage.per_super = Groups::kPerSuper;
        source.stages = &stage, source.stage_count = 1, source.rows = rows, source.columns = columns;
        source.outliers = int32_t(values.size());
        source.outlier_values = values.data(), source.outlier_columns = outlier_columns.data();
        source.outlier_starts = starts.data();
    }
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};

using Prepared = std::unique_ptr<void, Free>;

Prepared prepare(const Record& record, int threads) {
    const int64_t bytes = lowbit_prepared_bytes(&record.source);
    Prepared matrix(std::aligned_alloc(64, size_t(bytes)));
    if (!bytes || lowbit_prepare(&record.source, matrix.get(), bytes, threads)) fail("prepare", record.rows, record.bits, 0, 0);
    return matrix;
}

std::vector<float> product(const Record& record, const Prepared& matrix, const std::vector<float>& x, int batch, int mode, int threads) {
    std::vector<float> y(size_t(batch) * record.rows);
    const int64_t bytes = lowbit_prepared_bytes(&record.source);
    if (lowbit_linear(matrix.get(), bytes, x.data(), batch, record.columns, LOWBIT_F32, nullptr, y.data(), mode, threads)) {
        fail("linear", record.rows, record.bits, 0, 0);
    }
    return y;
}

void check_product(const Record& record, const std::vector<std::string>& isas, int batch, int mode, int threads) {
    const Prepared matrix = prepare(record, threads);
    std::vector<float> x(size_t(batch) * record.columns);
    for (auto& value : x) value = unit();
    choose("portable");
    const std::vector<float> plain = product(record, matrix, x, batch, mode, threads);
    // Sums of sizes, under which no cancelling between level and offset hides.
    float top = 1;
    for (float level : record.levels) top = std::fmax(top, std::fabs(level));
    for (int m = 0; m < batch; ++m) {
        for (int r = 0; r < record.rows; ++r) {
            double wanted = 0;
            for (int c = 0; c < record.columns; ++c) {
                wanted += double(x[size_t(m) * record.columns + c]) * record.dense[size_t(r) * record.columns + c];
            }
            const double found = plain[size_t(m * record.rows + r)];
            if (!(std::fabs(found - wanted) <= (mode == LOWBIT_EXACT ? 1e-5 : 0.05) * top * record.columns)) {
                fail("product", m, r, found, wanted);
            }
        }
    }
    for (const std::string& isa : isas) {
        choose(isa);
        const std::vector<float> found = product(record, matrix, x, batch, mode, threads);
        for (size_t i = 0; i < found.size(); ++i) {
            if (std::fabs(found[i] - plain[i]) <= 1e-6 * top * record.columns) continue;
            std::printf("%s, %d bits, mode %d, %d columns, batch %d: ", isa.c_str(), record.bits, mode, record.columns, batch);
            fail("not as portable", int(i) / record.rows, int(i) % record.rows, found[i], plain[i]);
        }
    }
}

void check_rows(const Record& record, int threads) {
    const Prepared matrix = prepare(record, threads);
    std::vector<int64_t> ids{record.rows - 1, 0};
    std::vector<float> rows(2 * size_t(record.columns));
    const int64_t bytes = lowbit_prepared_bytes(&record.source);
    if (lowbit_rows(matrix.get(), bytes, ids.data(), 2, LOWBIT_F32, rows.data(), threads)) fail("rows", 0, 0, 0, 0);
    for (int c = 0; c < record.columns; ++c) {
        const float wanted = record.dense[size_t(record.rows - 1) * record.columns + c];
        if (std::fabs(rows[size_t(c)] - wanted) > 1e-5 * std::fmax(1, std::fabs(wanted))) fail("row", c, record.bits, rows[size_t(c)], wanted);
    }
}

// The new tokens of one sequence over its cache, causal, by every body.
void check_attention(const std::vector<std::string>& isas, int dtype) {
    lowbit::Attention a{};
    a.dtype = dtype, a.batch = 1, a.tokens = 1 + int(draw(3)), a.kv_heads = 1 + int(draw(3)), a.heads = a.kv_heads * (1 + int(draw(3)));
    a.dim = 16 * (1 + int(draw(6))), a.length = a.tokens + draw(40), a.scale = 0.3f, a.causal = true;
    a.key_head = a.value_head = a.length * a.dim, a.key_token = a.value_token = a.dim;
    std::vector<float> queries(size_t(a.tokens * a.heads * a.dim)), cache[2], out(queries.size()), scratch(size_t(lowbit::attention_scratch(a)));
    std::vector<uint16_t> narrow[2];
    for (auto& value : queries) value = unit();
    for (int i = 0; i < 2; ++i) {
        for (int64_t k = 0; k < a.kv_heads * a.length * a.dim; ++k) {
            narrow[i].push_back(lowbit::float_to_bfloat(unit()));
            cache[i].push_back(lowbit::bfloat_to_float(narrow[i].back()));
        }
    }
    a.queries = queries.data(), a.out = out.data();
    a.keys = dtype ? static_cast<const void*>(narrow[0].data()) : cache[0].data();
    a.values = dtype ? static_cast<const void*>(narrow[1].data()) : cache[1].data();
    for (const std::string& isa : isas) {
        choose(isa);
        for (int h = 0; h < a.kv_heads; ++h) lowbit::body().attend_head(a, 0, h, scratch.data());
        for (int t = 0; t < a.tokens; ++t) {
            for (int h = 0; h < a.heads; ++h) {
                const size_t q = size_t((t * a.heads + h) * a.dim), from = size_t(h / (a.heads / a.kv_heads) * a.length * a.dim);
                std::vector<double> mixed(size_t(a.dim), 0.0);
                double total = 0;
                for (int64_t k = 0; k < a.length - a.tokens + t + 1; ++k) {
                    double score = 0;
                    for (int i = 0; i < a.dim; ++i) score += double(queries[q + i]) * cache[0][from + k * a.dim + i];
                    total += std::exp(a.scale * score);
                    for (int i = 0; i < a.dim; ++i) mixed[size_t(i)] += std::exp(a.scale * score) * cache[1][from + k * a.dim + i];
                }
                for (int i = 0; i < a.dim; ++i) {
                    const double wanted = mixed[size_t(i)] / total;
                    if (!(std::fabs(out[q + i] - wanted) <= 1e-5)) fail(("attention, " + isa).c_str(), h, i, out[q + i], wanted);
                }
            }
        }
    }
}

// Rows and packed blocks of a cache in buffers of exactly their size, by every body and the portable one.
struct PackedCache {
    std::vector<std::vector<uint8_t>> bytes;
    std::vector<std::vector<uint16_t>> halves;
    std::vector<float> levels, queries;
    LowbitKv kv{};

    const uint8_t* codes(int64_t count) {
        bytes.emplace_back(size_t(count));
        for (auto& byte : bytes.back()) byte = uint8_t(draw(256));
        return bytes.back().data();
    }
    const uint16_t* numbers(int64_t count, float size) {
        halves.emplace_back();
        for (int64_t i = 0; i < count; ++i) halves.back().push_back(lowbit::float_to_half(unit() * size));
        return halves.back().data();
    }

    PackedCache() {
        kv.batch = 1 + int(draw(2)), kv.heads = 1 + int(draw(2)), kv.group = 1 + int(draw(5)), kv.tokens = 1 + int(draw(2));
        kv.dim = 16 * (1 + int(draw(6))), kv.scale = 0.2f, kv.threads = 1 + int(draw(3));
        const int64_t heads = int64_t(kv.batch) * kv.heads;
        for (int i = 0; i < 16; ++i) levels.push_back(float(i - 8));
        for (LowbitBlocks& s : kv.blocks) {
            s.key_bits = 2 + int(draw(3)), s.value_bits = 2 + int(draw(3)), s.count = draw(3);
            s.keys_by_channel = draw(2) != 0, s.values_by_channel = draw(2) != 0;
            s.keys = codes(heads * s.count * 8 * kv.dim * s.key_bits), s.values = codes(heads * s.count * 8 * kv.dim * s.value_bits);
            const int64_t keys = heads * s.count * (s.keys_by_channel ? kv.dim : 64), values = heads * s.count * (s.values_by_channel ? kv.dim : 64);
            s.key_scale = numbers(keys, 0.2f), s.key_offset = numbers(keys, 0.5f);
            s.value_scale = numbers(values, 0.2f), s.value_offset = numbers(values, 0.5f);
            s.key_levels = s.value_levels = levels.data();
            kv.length += 64 * s.count;
        }
        kv.block_count = kLowbitMaxBlocks;
        for (int kind : {int(LOWBIT_F16), lowbit::kRowInt8}) {
            LowbitRows& r = kv.rows[kv.row_count++];
            r.kind = kind, r.length = kv.tokens + draw(90), r.room = r.length, r.first = kv.length;
            const int64_t count = heads * r.room * kv.dim;
            r.keys = kind == LOWBIT_F16 ? static_cast<const void*>(numbers(count, 1)) : codes(count);
            r.values = kind == LOWBIT_F16 ? static_cast<const void*>(numbers(count, 1)) : codes(count);
            r.key_scale = numbers(heads * r.room, 0.01f), r.value_scale = numbers(heads * r.room, 0.01f);
            kv.length += r.length;
        }
        for (int64_t i = 0; i < heads * kv.group * kv.tokens * kv.dim; ++i) queries.push_back(unit());
        kv.queries = kv.turned = queries.data();
        kv.query_token = kv.dim, kv.query_head = kv.tokens * kv.dim, kv.query_batch = kv.query_head * kv.heads * kv.group;
        kv.turned_token = kv.query_token, kv.turned_head = kv.query_head, kv.turned_batch = kv.query_batch;
    }

    std::vector<float> attend(const std::string& isa) {
        choose(isa);
        std::vector<float> out(queries.size());
        kv.out = out.data();
        if (lowbit_kv_attend(&kv)) fail("packed cache", kv.dim, kv.group, 0, 0);
        return out;
    }
};

void check_packed(const std::vector<std::string>& isas) {
    PackedCache cache;
    const std::vector<float> plain = cache.attend("portable");
    for (const std::string& isa : isas) {
        const std::vector<float> found = cache.attend(isa);
        for (size_t i = 0; i < found.size(); ++i) {
            if (!(std::fabs(found[i] - plain[i]) <= 2e-5)) fail(("packed cache, " + isa).c_str(), cache.kv.dim, int(i), found[i], plain[i]);
        }
    }
}

// Inputs that were rounded elsewhere, -128 among them: whole numbers, the same on each.
void check_codes(const std::vector<std::string>& isas, int bits, int batch, int threads) {
    Shape shape = draw_shape(bits, 300);
    shape.group = shape.columns, shape.tables = 1, shape.offsets = false, shape.linear_levels = true;
    shape.scale_bits = 16, shape.zeros = false;
    Record record(shape);
    record.source.outliers = 0;
    const Prepared matrix = prepare(record, threads);
    std::vector<int8_t> codes(size_t(batch) * record.columns);
    for (auto& code : codes) code = draw(4) ? int8_t(draw(256)) : int8_t(-128);
    std::vector<float> y(size_t(batch) * record.rows);
    for (const std::string& isa : isas) {
        choose(isa);
        const int64_t bytes = lowbit_prepared_bytes(&record.source);
        if (lowbit_linear_codes(matrix.get(), bytes, codes.data(), batch, record.columns, y.data(), threads)) fail("codes", bits, 0, 0, 0);
        for (int m = 0; m < batch; ++m) {
            for (int r = 0; r < record.rows; ++r) {
                int64_t sum = 0, sizes = 0;
                for (int k = 0; k < record.columns; ++k) {
                    const int64_t one = int64_t(codes[size_t(m * record.columns + k)]) * (record.code(r, k) - (1 << bits) / 2);
                    sum += one, sizes += std::abs(one);
                }
                const float wanted = float(sum) * record.scale.values[size_t(r)], found = y[size_t(m * record.rows + r)];
                if (!(std::fabs(found - wanted) <= 2e-7f * float(sizes) * std::fabs(record.scale.values[size_t(r)]))) fail(("codes, " + isa).c_str(), bits, r, found, wanted);
            }
        }
    }
}

// Several callers at once, whose calls want the same workers.
void check_callers() {
    Shape shape{};
    shape.rows = 300, shape.columns = 1024, shape.bits = 4, shape.group = 32, shape.tables = 1, shape.offsets = true, shape.scale_bits = 16;
    const Record shared(shape);
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&shared] {
            const Prepared matrix = prepare(shared, 2);
            const std::vector<float> x(4 * 1024, 0.5f);
            for (int k = 0; k < 20; ++k) product(shared, matrix, x, 4, LOWBIT_INT8, 3);
        });
    }
    for (auto& caller : callers) caller.join();
}

}  // namespace

int main(int count, char** names) {
    std::vector<std::string> isas(names + 1, names + count);
    if (isas.empty()) {
        std::istringstream all(lowbit_isas());
        for (std::string name; all >> name;) isas.push_back(name);
    }
    int products = 0;
    for (int bits = 1; bits <= 8; ++bits) {
        for (int k = 0; k < 16; ++k) {
            const Record record(draw_shape(bits, k % 4 ? 200 : 600));
            for (int mode : {LOWBIT_INT8, LOWBIT_EXACT}) check_product(record, isas, 1 + int(draw(9)), mode, 1 + int(draw(4))), ++products;
            check_rows(record, 1 + int(draw(4)));
        }
    }
    for (int k = 0; k < 64; ++k) check_codes(isas, 1 + k % 8, 1 + int(draw(12)), 1 + int(draw(4)));
    for (int k = 0; k < 10; ++k) check_attention(isas, k % 2);
    for (int k = 0; k < 40; ++k) check_packed(isas);
    choose(isas[0]);
    check_callers();
    std::printf("%d products on each of", products);
    for (const std::string& isa : isas) std::printf(" %s", isa.c_str());
    std::printf(": no error\n");
}
