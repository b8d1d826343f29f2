"""One row of activations: a stream over the codes, multiplied as they come, with no tensor core in between.

A program takes ``BLOCK_N`` rows of the matrix and walks along them ``BLOCK_U`` units at a time. Levels of 2 to 4 bits come
in pairs of 16-bit floats and are multiplied so, two in an instruction, in sums of four that are then added in float32: 3.5,
3.8 and 5.1 instructions a weight, where widening each level first took 5.5, 5.8 and 6.8 (``eval/gpu_static.py`` counts them
in the compiled code). Rows of activations need not share a matrix: with ``EXPERTS`` each has the number of its own in a
stack, so a few tokens of a mixture of experts are one launch.
"""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton_decode import group_values, load_planes, paired_sums, permuted_levels, table_levels


@triton.jit
def gemv_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    scale_super_ptr,
    offset_ptr,
    offset_super_ptr,
    table_ptr,
    planes_ptr,
    unit_ptr,
    table_of_row_ptr,
    row_ids_ptr,
    expert_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    words,
    units,
    units_each,
    scale_stride,
    supers,
    per_super,
    factor,
    x_stride,
    out_rows,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    CODED: tl.constexpr,
    OFFSET: tl.constexpr,
    PER_ROW: tl.constexpr,
    SUBSET: tl.constexpr,
    EXPERTS: tl.constexpr,
    BIAS: tl.constexpr,
    PERMUTE: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """``out[split, m, row] = factor * sum_i x[m, i] * value[row, i]`` over the units of the split, plus ``bias``.

    ``rows`` are those of one matrix, ``units_each`` the units of a split, ``out`` float32 or of the dtype of ``x``.
    """
    part, m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = part * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < rows
    stored = tl.minimum(row, rows - 1).to(tl.int64)
    if EXPERTS:
        stored += tl.load(expert_ptr + m).to(tl.int64) * rows
    table_of_row = row * 0
    if PER_ROW:
        table_of_row = tl.load(table_of_row_ptr + stored)
    if PERMUTE:
        planes = load_planes(planes_ptr, table_of_row, PER_ROW, ASM)
        # What the planes were divided by.
        whole = tl.load(unit_ptr)
    else:
        whole = 1.0
    x_row = x_ptr + m * x_stride
    total = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
    first = split * units_each
    last = tl.minimum(first + units_each, units)
    for start in range(first, last, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        inside = unit < last
        column = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
        x = tl.load(x_row + column, mask=inside[:, None] & (column < columns), other=0.0)
        words_ptr = codes_ptr + stored[:, None] * words + (unit * UNIT_WORDS)[None, :]
        if PERMUTE and x.dtype != tl.float32:
            sums = paired_sums(words_ptr, inside[None, :], planes, x.to(tl.int16, bitcast=True), BITS, x.dtype, ASM)
        elif PERMUTE:
            levels = permuted_levels(words_ptr, inside[None, :], planes, BITS, tl.float16, ASM).to(tl.float32)
            sums = tl.sum(levels * x[None, :, :], 2)
        else:
            levels = table_levels(words_ptr, inside[None, :], table_ptr, table_of_row, BITS, UNIT, PER_ROW)
            sums = tl.sum(levels * x.to(tl.float32)[None, :, :], 2)
        group = ((unit * UNIT) // GROUP)[None, :]
        scale = group_values(
            scale_ptr, scale_super_ptr, stored[:, None], scale_stride, supers, group, per_super, inside[None, :], CODED
        )
        total += sums * scale
        if OFFSET:
            offset = group_values(
                offset_ptr, offset_super_ptr, stored[:, None], scale_stride, supers, group, per_super, inside[None, :], CODED
            )
            total += (offset / whole) * tl.sum(x.to(tl.float32), 1)[None, :]
    y = tl.sum(total, 1) * (factor * whole)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=valid, other=0.0).to(tl.float32)
    place = row
    if SUBSET:
        place = tl.load(row_ids_ptr + row, mask=valid, other=0)
    where = (split * tl.num_programs(1) + m) * out_rows + place
    tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=valid)
