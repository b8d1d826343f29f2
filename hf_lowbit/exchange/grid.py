"""Records whose values are whole numbers times group scales, as those numbers: what other formats can hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.format.layout import Layout
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.tensor import LowBitTensor

INTEGER_LEVELS = "levels are whole numbers times the scale in uniform, integer, affine, uniform_zero_free, ternary and float"


@dataclass(frozen=True)
class Grid:
    """``scale[o, g] * (values[o, j] - zero[o, g]) + offset[o, g]``, with logical column ``order[j]`` at column ``j``.

    Attributes:
        values: int16 ``[out, in]``.
        low, high: the range the levels span, whether used or not.
        factor: a power of two: the record's scales are these times it.
        scale: float32 ``[out, groups]``.
        zero: int16 ``[out, groups]`` or None.
        offset: float32 ``[out, groups]`` or None.
        group_size: columns per scale.
        order: int32 ``[in]`` or None.
    """

    values: Tensor
    low: int
    high: int
    factor: float
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    group_size: int
    order: Tensor | None

    def spread(self, values: Tensor, size: int) -> Tensor:
        """One value per group of this grid to one per ``size`` columns, which divide a group."""
        return values.repeat_interleave(-(-self.group_size // size), dim=-1)[:, : -(-self.values.shape[1] // size)]


def check_plain(layout: Layout, permuted: bool = False) -> None:
    """Refuse what only this project's format holds.

    Args:
        permuted: whether the other format can hold a permutation of columns.

    Raises:
        Misfit: naming the first such field.
    """
    stage = layout.stages[0]
    stacked = len(layout.shape) != 2
    for field, found, bad, allowed in (
        ("the shape", list(layout.shape), stacked, "stacks of experts can be exported as dense alone."),
        ("residual_terms", len(layout.stages), len(layout.stages) > 1, "it must be 1."),
        ("outliers", layout.outliers, layout.outliers > 0, "there must be none: --outliers 0."),
        ("the rank of the low-rank term", layout.rank, layout.rank > 0, "there must be none."),
        ("the order of columns", "permuted", layout.permuted and not permuted, "it must be the given one."),
        ("levels", stage.levels.family, integer_levels(stage.levels) is None, f"{INTEGER_LEVELS}: --levels uniform."),
    ):
        if bad:
            raise Misfit(field, found, allowed)


def integer_levels(levels: Levels) -> tuple[Tensor, float] | None:
    """The table as whole numbers below 2**15 (int16), and the power of two it was multiplied by; None if that cannot be."""
    if levels.stored:
        return None
    table = levels.table()
    for power in range(12):
        whole = table * 2.0**power
        if bool((whole == whole.round()).all()) and float(whole.abs().max()) < 1 << 15:
            return whole.to(torch.int16), 2.0**power
    return None


def grid_of(record: LowBitTensor, permuted: bool = False) -> Grid:
    """The whole numbers of a record.

    Raises:
        Misfit: it has none, or something beside them.
    """
    layout = record.layout
    check_plain(layout, permuted)
    stage, fields = layout.stages[0], record.stage_tensors(0)
    found = integer_levels(stage.levels)
    assert found is not None
    table, factor = found
    zero = None
    if stage.zero:
        zero = fields["zero"].to(torch.int16) * int(factor)
    size = min(stage.group_size, layout.in_features)
    return Grid(
        table[record.codes().long()],
        int(table.min()),
        int(table.max()),
        factor,
        record.scales() / factor,
        zero,
        record.offsets(),
        size,
        record.tensors.get("permutation"),
    )


def with_zero_points(grid: Grid) -> Grid:
    """The same with offsets turned into zero points, which must be whole numbers of steps.

    Raises:
        Misfit: they are not.
    """
    if grid.offset is None:
        return grid
    steps = torch.where(grid.scale != 0, -grid.offset / grid.scale, 0.0).round()
    if not torch.equal(-steps * grid.scale, grid.offset) or float(steps.abs().max()) >= 1 << 14:
        raise Misfit("offset", "no whole number of steps", "zero points must be whole: --levels uniform or integer.")
    own = torch.zeros_like(steps) if grid.zero is None else grid.zero.float()
    return Grid(
        *(grid.values, grid.low, grid.high, grid.factor, grid.scale, (own + steps).to(torch.int16), None, grid.group_size),
        grid.order,
    )


def signed_bits(grid: Grid) -> tuple[int, int]:
    """Bits that signed integers need for a grid's levels and zero points, and what is subtracted of both first.

    Levels that start at 0 are moved down by half their range; nothing else is.
    """
    for bits in range(2, 9):
        half = 1 << (bits - 1)
        moved = half if grid.low >= 0 else 0
        if grid.low - moved >= -half and grid.high - moved <= half - 1:
            return bits, moved
    raise Misfit("levels", f"whole numbers from {grid.low} to {grid.high}", "they must fit 8 bits.")


def exactly(values: Tensor, dtype: torch.dtype, field: str, allowed: str) -> Tensor:
    """Values in another dtype, or a refusal where it cannot hold them.

    Raises:
        Misfit: naming the field.
    """
    out = values.to(dtype)
    if not torch.equal(out.to(torch.float32), values.to(torch.float32)):
        raise Misfit(field, f"not exact in {str(dtype).removeprefix('torch.')}", allowed)
    return out
