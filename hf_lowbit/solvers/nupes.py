"""``nupes``: power-law levels whose codes and exponent are learned together by gradient descent.

NUPES (arXiv 2308.05600) learns each code over the whole range instead of rounding up or down, since every weight's cell
moves when the exponent does. How it is kept stable is reconstructed (weights notes 1.2): the forward power is never
differentiated because the variable is the code itself, its slope is the gap between its two levels, and the exponent is
bounded and comes to rest before the codes do. Between two levels a weight follows a staircase that steepens to the hard one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.calibrated import GRAM_OPTIONS
from hf_lowbit.solvers.code_space import CodeSpace, Mixture
from hf_lowbit.solvers.coding import Coding
from hf_lowbit.solvers.powerquant import powerquant
from hf_lowbit.solvers.reconstruct import LEARN_OPTIONS
from hf_lowbit.solvers.registry import solver
from hf_lowbit.solvers.relaxation import ParameterGroup, relaxation
from hf_lowbit.solvers.rows import Rows

# Holds every exponent powerquant can start from.
EXPONENTS = (0.35, 1.35)
# The exponent moves all weights of a matrix at once, so it rests while the codes settle on the last of its values.
FREEZE = 0.7
# Of the staircase between two levels, from nearly straight to nearly hard. At 2 bits 100 steps lowered the loss of a block
# of the 4 M reference model by 6 % on held-out text, where rounding passed straight through gained 3 %.
STEEPNESS = (1.5, 300.0)


@solver(
    "nupes",
    families=("power", "power_zero_free"),
    summary="power-law levels; codes, exponent and scales learned against the outputs of each block",
    evidence="block",
    options={**GRAM_OPTIONS, **LEARN_OPTIONS},
)
def nupes(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Exponent and scales of ``powerquant``, which is also what is left of it without calibration."""
    return powerquant(rows, spec)


def power_table(grid: Tensor, exponent: Tensor) -> Tensor:
    """``sign(u) |u|**(1/a)`` for ``grid`` u ``[K]`` in -1 .. 1; by ``a`` the gradient at u = 0 is exactly 0."""
    size = grid.abs()
    logarithm = torch.where(size > 0, size, 1.0).log()
    return torch.where(size > 0, grid.sign() * (logarithm / exponent).exp(), 0.0)


@relaxation("nupes")
class PowerCodes(CodeSpace):
    """Positions over the whole range, and an exponent ``a = low + (high - low) sigmoid(theta)``.

    Attributes:
        theta: float32 leaf, scalar.
    """

    def __init__(self, coding: Coding, weight: Tensor, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(coding, weight, options, seed)
        levels = coding.stage.levels
        assert levels.exponent is not None
        low, high = EXPONENTS
        share = min(max((levels.exponent - low) / (high - low), 0.01), 0.99)
        self.grid = Levels(levels.family, levels.bits, exponent=1.0).table()
        flat = levels.bits == 1 or not (self.grid.abs() % 1).any()  # levels at 0 and 1 only are the same for any exponent
        self.theta = torch.tensor(math.log(share / (1 - share)), requires_grad=self.learns_tables and not flat)
        self.settled: float | None = None

    @property
    def exponent(self) -> Tensor:
        """The exponent now, differentiable."""
        return EXPONENTS[0] + (EXPONENTS[1] - EXPONENTS[0]) * self.theta.sigmoid()

    def tables(self) -> Tensor:
        """The generated table, float32 ``[1, K]``."""
        return power_table(self.grid, self.exponent)[None] if self.theta.requires_grad else self.coding.tables

    def levels(self, tables: Tensor, progress: float) -> Tensor:
        """Levels under a staircase that steepens, float32 ``[n, in]``; late on without a gradient for the exponent."""
        steepness = STEEPNESS[0] * (STEEPNESS[1] / STEEPNESS[0]) ** progress
        low = self.position.detach().floor().clamp_(0, tables.shape[1] - 2)
        within = torch.tanh(steepness * (self.position - low - 0.5)) / (2 * math.tanh(steepness / 2))
        shares = torch.stack([0.5 - within, 0.5 + within], -1)
        levels: Tensor = Mixture.apply(tables.detach() if progress > FREEZE else tables, shares, low.long(), self.coding.ids)
        return levels

    def code_groups(self) -> list[ParameterGroup]:
        """The positions, and the exponent."""
        exponent = [ParameterGroup([self.theta], self.options["table_rate"])] if self.theta.requires_grad else []
        return [*super().code_groups(), *exponent]

    @torch.no_grad()
    def harden(self) -> Coding:
        """The storable coding, its exponent in the stage."""
        coding = super().harden()
        if not self.theta.requires_grad:
            return replace(coding, tables=self.coding.tables)
        levels = replace(coding.stage.levels, exponent=round(float(self.exponent), 4))
        return replace(coding, stage=replace(coding.stage, levels=levels), tables=levels.table()[None])
