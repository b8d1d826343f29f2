"""Two and more rows of activations: weights are decoded into a tile in natural order, which tensor cores multiply.

Up to 16 rows cost as much as one tile of 16, so small batches stay bound by the codes. Weights are rounded to the dtype of
the activations once, as a dense model holds them (levels of 2 to 4 bits without offsets: level, scale and product, each
rounded to that dtype); sums are float32. Splits along the inputs write sums of their own, which are added in a fixed order.
"""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton_decode import group_values, join_halves, load_planes, permuted_levels, table_levels


@triton.jit
def gemm_kernel(
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
    bias_ptr,
    out_ptr,
    batch,
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
    BIAS: tl.constexpr,
    PERMUTE: tl.constexpr,
    ASM: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """``out[split, m, row] = factor * sum_i x[m, i] * value[row, i]`` over the units of the split, plus ``bias``.

    ``WIDE`` computes the same in float32: Triton's interpreter has no arithmetic of bfloat16.
    """
    BLOCK_K: tl.constexpr = BLOCK_U * UNIT
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    stored = tl.minimum(row, rows - 1).to(tl.int64)
    table_of_row = row * 0
    if PER_ROW:
        table_of_row = tl.load(table_of_row_ptr + stored)
    if PERMUTE:
        planes = load_planes(planes_ptr, table_of_row, PER_ROW, ASM)
        # What the planes were divided by.
        whole = factor * tl.load(unit_ptr)
    else:
        whole = factor
    x_rows = x_ptr + tl.minimum(m, batch - 1).to(tl.int64)[:, None] * x_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * units_each
    last = tl.minimum(first + units_each, units)
    for start in range(first, last, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        inside = (unit < last)[None, :]
        words_ptr = codes_ptr + stored[:, None] * words + (unit * UNIT_WORDS)[None, :]
        group = ((unit * UNIT) // GROUP)[None, :]
        scale = group_values(
            scale_ptr, scale_super_ptr, stored[:, None], scale_stride, supers, group, per_super, inside, CODED
        )
        scale = scale * whole
        if PERMUTE and not OFFSET:
            half = scale.to(KIND).to(tl.int16, bitcast=True)
            weight = permuted_levels(words_ptr, inside, planes, BITS, KIND, ASM, join_halves(half, half))
        else:
            if PERMUTE:
                levels = permuted_levels(words_ptr, inside, planes, BITS, KIND, ASM).to(tl.float32)
            else:
                levels = table_levels(words_ptr, inside, table_ptr, table_of_row, BITS, UNIT, PER_ROW)
            weight = levels * scale[:, :, None]
            if OFFSET:
                offset = group_values(
                    offset_ptr, offset_super_ptr, stored[:, None], scale_stride, supers, group, per_super, inside, CODED
                )
                weight += (offset * factor)[:, :, None]
            weight = weight.to(KIND)
        weight = tl.reshape(weight, (BLOCK_N, BLOCK_K))
        column = start * UNIT + tl.arange(0, BLOCK_K)
        seen = (column < columns) & (column < last * UNIT)
        x = tl.load(x_rows + column[None, :], mask=seen[None, :] & (m < batch)[:, None], other=0.0)
        if WIDE:
            total = tl.dot(x.to(tl.float32), tl.trans(weight).to(tl.float32), total)
        else:
            total = tl.dot(x, tl.trans(weight), total)
    if BIAS:
        total += tl.load(bias_ptr + row, mask=valid, other=0.0).to(tl.float32)[None, :]
    place = row
    if SUBSET:
        place = tl.load(row_ids_ptr + row, mask=valid, other=0)
    where = (split * batch + m).to(tl.int64)[:, None] * out_rows + place[None, :]
    tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=valid[None, :] & (m < batch)[:, None])
