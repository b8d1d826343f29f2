// The C ABI of the CPU kernels: what Python calls through ctypes, and what a fused op in C++ may call directly.
//
// A prepared matrix is one flat block of memory that starts with `lowbit::Matrix` (matrix.h) and holds offsets, no
// pointers: it may be copied, moved or kept in any 64-byte aligned buffer, and several threads may read it at once.
// Every function that can fail returns 0 or one of the LOWBIT_E codes; none throws and none prints.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define LOWBIT_EXPORT extern "C" __declspec(dllexport)
#else
#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Raised by one whenever a signature, a struct or the prepared form changes; Python refuses a library of another version.
#define LOWBIT_ABI_VERSION 4

enum LowbitDtype { LOWBIT_F32 = 0, LOWBIT_BF16 = 1, LOWBIT_F16 = 2 };
enum LowbitMode { LOWBIT_AUTO = 0, LOWBIT_INT8 = 1, LOWBIT_EXACT = 2 };
enum LowbitError { LOWBIT_E_MATRIX = 1, LOWBIT_E_WIDTH = 2, LOWBIT_E_MEMORY = 3, LOWBIT_E_LAYOUT = 4 };

// One stored stage. All pointers are to row-major stored tensors (hf_lowbit/format); null where the stage lacks the field.
struct LowbitStageSource {
    const uint8_t* codes;
    const void* scale;             // fp16 or float [rows, groups], or packed 8- or 6-bit codes
    const uint16_t* scale_super;   // fp16 [rows, supers]
    const void* offset;
    const uint16_t* offset_super;
    const float* levels;           // [tables, 2**bits], true values
    const int32_t* table_of_row;   // [rows] or null where there is one table
    const int32_t* row_ids;        // [rows] or null where all rows of the matrix are covered
    const int8_t* zero;            // [rows, groups] or null
    int32_t rows, bits, group_size, scale_bits, tables, per_super;
};

struct LowbitSource {
    const LowbitStageSource* stages;
    const int32_t* permutation;    // [columns] or null
    const uint16_t* outlier_values;
    const void* outlier_columns;   // uint16, or int32 for more than 65536 columns
    const int32_t* outlier_starts; // [rows + 1]
    const uint16_t* low_rank_a;    // fp16 [rank, columns]
    const uint16_t* low_rank_b;    // fp16 [rows, rank]
    int32_t rows, columns, stage_count, outliers, rank, shift;
};

LOWBIT_EXPORT int32_t lowbit_abi_version();
// Name of the instruction set in use: the best one this processor has, or the one HF_LOWBIT_CPU_ISA names.
LOWBIT_EXPORT const char* lowbit_isa();
// The instruction sets this build holds and this processor can run, best first, separated by blanks.
LOWBIT_EXPORT const char* lowbit_isas();
// Use another one from now on, for tests; 0 if it is not to be had.
LOWBIT_EXPORT int32_t lowbit_set_isa(const char* name);

// Bytes of the prepared form, 0 if the layout is not supported.
LOWBIT_EXPORT int64_t lowbit_prepared_bytes(const LowbitSource* source);
// Fill `out` (64-byte aligned, `bytes` long) with the prepared form.
LOWBIT_EXPORT int32_t lowbit_prepare(const LowbitSource* source, void* out, int64_t bytes, int32_t threads);
// The mode LOWBIT_AUTO means for this matrix.
LOWBIT_EXPORT int32_t lowbit_auto_mode(const void* matrix);

// Columns of a prepared matrix of `rows` rows in a buffer of `bytes`; 0 if it is none.
LOWBIT_EXPORT int32_t lowbit_columns(const void* matrix, int64_t bytes, int64_t rows);

// y = x @ W.T (+ bias).
//   matrix: a prepared form, `bytes` long; x: [batch, columns] contiguous, of `dtype`; y: [batch, rows], likewise;
//   bias: float [rows] or null. The result does not depend on `threads`.
LOWBIT_EXPORT int32_t lowbit_linear(const void* matrix, int64_t bytes, const void* x, int64_t batch, int32_t columns,
                                    int32_t dtype, const float* bias, void* y, int32_t mode, int32_t threads);
// y[m, r] = scale[r] * sum over i of codes[m, i] * level[r, i], for inputs that were rounded already and a matrix of one stage with
// one scale per row, integer levels and nothing else (LOWBIT_E_LAYOUT otherwise).
//   codes: int8 [batch, columns] contiguous; y: float [batch, rows]. Sums of 32 columns are whole numbers; beyond them float32
//   holds whole numbers to 2**24, which at 4 bits is more than 16,000 columns can bring.
LOWBIT_EXPORT int32_t lowbit_linear_codes(const void* matrix, int64_t bytes, const int8_t* codes, int64_t batch, int32_t columns,
                                          float* y, int32_t threads);
// Rows `ids` of the dense matrix, [count, columns] of `dtype`, bit for bit what the reference decodes.
LOWBIT_EXPORT int32_t lowbit_rows(const void* matrix, int64_t bytes, const int64_t* ids, int64_t count, int32_t dtype, void* out,
                                  int32_t threads);
