"""``halfquad``: asymmetric integers whose offset is fitted under a robust norm by half-quadratic splitting (HQQ).

Minimises ``sum |w - w_hat|^p`` with p = 0.7 over the zero point of each group, the scale staying min-max, as HQQ's
public code does (weights notes 18.5). Groups that end no better than they began keep their start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.encode import encode_affine
from hf_lowbit.solvers.registry import solver
from hf_lowbit.solvers.rows import Rows
from hf_lowbit.solvers.rtn import min_max

NORM = 0.7
STEPS = 20
BETA_START = 10.0
BETA_GROWTH = 1.01


@solver("halfquad", families=("affine",), summary="asymmetric integers, offset fitted under a robust norm (HQQ-like)")
def halfquad(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Min-max scales, then half-quadratic refinement of the offset of every group."""
    stage = Stage(Levels("affine", spec.bits), rows.group_size, spec.scale_bits, offset=True)
    return stage, encode_affine(rows, stage, fit_offset)


def fit_offset(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and offset ``[n, groups, 1]`` for codes ``0 .. top``."""
    scale, low = min_max(values, top)
    step = torch.where(scale > 0, scale, 1.0)
    unit = values / step  # all norms below are in steps, which makes one beta fit every group
    zero = -low / step
    best_zero, best_error = zero, _error(unit, zero, top)
    beta = BETA_START
    for _ in range(STEPS):
        codes = (unit + zero).round().clamp(0, top)
        rest = unit - (codes - zero)
        shrunk = rest.sign() * torch.relu(rest.abs() - rest.abs().clamp_min(1e-6).pow(NORM - 1) / beta)
        zero = (codes - (unit - shrunk)).mean(-1, keepdim=True)
        error = _error(unit, zero, top)
        better = error < best_error
        best_zero, best_error = torch.where(better, zero, best_zero), torch.where(better, error, best_error)
        beta *= BETA_GROWTH
    return scale, torch.where(scale > 0, -best_zero * step, low)


def _error(unit: Tensor, zero: Tensor, top: int) -> Tensor:
    codes = (unit + zero).round().clamp(0, top)
    return (unit - (codes - zero)).abs().pow(NORM).mean(-1, keepdim=True)
