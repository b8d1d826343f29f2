"""The small kernels: decoded rows, outliers, and the sum of what several launches left."""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton_decode import group_values, table_levels


@triton.jit
def rows_kernel(
    ids_ptr,
    codes_ptr,
    scale_ptr,
    scale_super_ptr,
    offset_ptr,
    offset_super_ptr,
    table_ptr,
    table_of_row_ptr,
    out_ptr,
    first,
    rows,
    columns,
    words,
    units,
    scale_stride,
    supers,
    per_super,
    factor,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    CODED: tl.constexpr,
    OFFSET: tl.constexpr,
    PER_ROW: tl.constexpr,
    PICK: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """``out[n] = value[ids[n]]``, or ``value[first + n]`` without ``PICK``; in the arithmetic of ``LowBitTensor``.

    A number outside the matrix gives a row of NaN: a kernel cannot raise.
    """
    n = tl.program_id(0)
    row = (first + n).to(tl.int64)
    if PICK:
        row = tl.load(ids_ptr + n).to(tl.int64)
    known = (row >= 0) & (row < rows)
    stored = tl.where(known, row, 0) + tl.zeros((1,), tl.int64)
    table_of_row = tl.zeros((1,), tl.int32)
    if PER_ROW:
        table_of_row = tl.load(table_of_row_ptr + stored)
    unit = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    inside = (unit < units)[None, :]
    words_ptr = codes_ptr + stored[:, None] * words + (unit * UNIT_WORDS)[None, :]
    levels = table_levels(words_ptr, inside, table_ptr, table_of_row, BITS, UNIT, PER_ROW)
    group = ((unit * UNIT) // GROUP)[None, :]
    scale = group_values(scale_ptr, scale_super_ptr, stored[:, None], scale_stride, supers, group, per_super, inside, CODED)
    value = levels * scale[:, :, None]
    if OFFSET:
        offset = group_values(
            offset_ptr, offset_super_ptr, stored[:, None], scale_stride, supers, group, per_super, inside, CODED
        )
        value += offset[:, :, None]
    value = tl.where(known, value * factor, float("nan"))
    column = unit[None, :, None] * UNIT + tl.arange(0, UNIT)[None, None, :]
    place = n.to(tl.int64) * columns + column
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def outlier_kernel(x_ptr, values_ptr, columns_ptr, starts_ptr, out_ptr, x_stride, out_rows, factor, BLOCK: tl.constexpr):
    """``out[m, row] = factor * sum over the row's outliers of value * x[m, column]``, float32; one program each."""
    row, m = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < last
        value = tl.load(values_ptr + entry, mask=inside, other=0.0).to(tl.float32)
        column = tl.load(columns_ptr + entry, mask=inside, other=0).to(tl.int32)
        total += value * tl.load(x_ptr + m * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * out_rows + row, tl.sum(total, 0) * factor)


@triton.jit
def finish_kernel(parts_ptr, bias_ptr, out_ptr, count, size, rows, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """``out = parts[0] + parts[1] + ... + bias`` in that order, float32 to the dtype of ``out``."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts_ptr + part * size + place, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + place % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)
