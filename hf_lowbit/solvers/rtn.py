"""``rtn``: round to the nearest level with scales that just reach the largest weight. The baseline the others must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import Levels, parse_levels
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.encode import encode_affine, encode_ruled
from hf_lowbit.solvers.registry import solver
from hf_lowbit.solvers.rows import Rows

FIXED = ("uniform", "uniform_zero_free", "integer", "affine", "normal_float", "qlora", "float", "power_of_two")


def fixed_levels(spec: Spec, default: str) -> Levels:
    """The level family of a spec that needs no fitted number; a float without mantissa bits gets the usual split."""
    family, mantissa = parse_levels(spec.levels or default)
    if family == "float" and mantissa is None:
        mantissa = max(0, (spec.bits - 1) // 2)
    return Levels(family, spec.bits, mantissa=mantissa)


@solver("rtn", families=FIXED, summary="round to nearest, absmax scales; levels=affine is the asymmetric one")
def rtn(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Absolute-maximum (symmetric) or min-max (``affine``) scales, then the nearest level.

    One bit has no level beside zero in ``uniform``, so its default is ``uniform_zero_free``.
    """
    levels = fixed_levels(spec, "uniform" if spec.bits > 1 else "uniform_zero_free")
    affine = levels.family == "affine"
    stage = Stage(levels, rows.group_size, spec.scale_bits, offset=affine)
    if affine:
        return stage, encode_affine(rows, stage, min_max)
    return stage, encode_ruled(rows, stage, reach_end if levels.family == "integer" else reach)


def reach(values: Tensor, importance: Tensor | None, table: Tensor) -> Tensor:
    """The scale at which the top level equals the largest magnitude of the group."""
    return values.abs().amax(-1, keepdim=True) / table.abs().max()


def reach_end(values: Tensor, importance: Tensor | None, table: Tensor) -> Tensor:
    """The scale, of either sign, at which the lowest level equals the weight of largest magnitude."""
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    return largest / table[0]


def min_max(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and offset that map codes ``0 .. top`` onto the range of the group."""
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    return (high - low) / top, low
