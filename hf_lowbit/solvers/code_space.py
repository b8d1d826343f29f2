"""Codes as real numbers over the whole range of the table: the variable of NUPES and of SignRound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.solvers.coding import Coding
from hf_lowbit.solvers.relaxation import ParameterGroup, Relaxation

# Latents start within this of their code, so that only a gradient that keeps its sign for a while moves a code. From up to
# 0.45 away, at 2 bits, 13 % of the codes of a block of the 4 M reference model changed in 200 steps, its training loss rose
# from 276 to 340 on the way, and less was gained than in 100 steps from 0.2 (1.7 % against 3.2 %).
EDGE = 0.2


class Lookup(torch.autograd.Function):
    """Levels of rounded positions, with a bounded slope by the position and the exact gradient by the table.

    The slope is the central difference of neighbouring levels: never zero and never infinite, where the derivative of a
    power law is one or the other at zero (weights notes 1.2).
    """

    @staticmethod
    def forward(ctx: Any, tables: Tensor, position: Tensor, ids: Tensor | None) -> Tensor:
        """Levels ``[n, in]`` of tables ``[tables, K]`` at positions ``[n, in]``; ``ids`` int64 ``[n]`` or None."""
        index = table_index(position.round().long(), tables, ids)
        ctx.save_for_backward(tables, index)
        return tables.flatten().index_select(0, index.flatten()).view(index.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients by tables and positions."""
        tables, index = ctx.saved_tensors
        (grad,) = grads
        by_table = by_position = None
        if ctx.needs_input_grad[0]:
            by_table = sum_by_level(grad, index, tables)
        if ctx.needs_input_grad[1]:
            padded = torch.cat([2 * tables[:, :1] - tables[:, 1:2], tables, 2 * tables[:, -1:] - tables[:, -2:-1]], 1)
            slope = (padded[:, 2:] - padded[:, :-2]) / 2
            by_position = grad * slope.flatten().index_select(0, index.flatten()).view(grad.shape)
        return by_table, by_position, None


class Mixture(torch.autograd.Function):
    """Neighbouring levels mixed by their shares, with the exact gradients by tables and shares."""

    @staticmethod
    def forward(ctx: Any, tables: Tensor, shares: Tensor, low: Tensor, ids: Tensor | None) -> Tensor:
        """Values ``[n, in]`` of shares ``[n, in, c]`` of the levels from ``low`` ``[n, in]`` on."""
        index, levels = levels_from(low, shares.shape[-1], tables, ids)
        ctx.save_for_backward(tables, shares, index, levels)
        return (shares * levels).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        """Gradients by tables and shares."""
        tables, shares, index, levels = ctx.saved_tensors
        grad = grads[0][..., None]
        by_table = sum_by_level(shares * grad, index, tables) if ctx.needs_input_grad[0] else None
        return by_table, levels * grad, None, None


def table_index(codes: Tensor, tables: Tensor, ids: Tensor | None) -> Tensor:
    """Index of each code ``[n, ...]`` into the flattened tables ``[tables, K]``, for ``ids`` int64 ``[n]`` or one table."""
    if ids is None:
        return codes
    return codes + (ids * tables.shape[1]).view(-1, *[1] * (codes.dim() - 1))


def levels_from(low: Tensor, count: int, tables: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Table indices and levels, both ``[n, in, count]``, of ``count`` consecutive codes from ``low`` ``[n, in]`` on."""
    index = table_index(low[..., None] + torch.arange(count), tables, ids)
    return index, tables.flatten().index_select(0, index.flatten()).view(index.shape)


def sum_by_level(grad: Tensor, index: Tensor, tables: Tensor) -> Tensor:
    """Sum of ``grad`` over the weights of each level, the shape of ``tables``; in float64, so the order has no say."""
    total = torch.bincount(index.flatten(), grad.flatten().double(), minlength=tables.numel())
    return total.view(tables.shape).float()


@torch.no_grad()
def position_of(coding: Coding, weight: Tensor) -> Tensor:
    """Where ``weight`` ``[n, in]`` lies among the levels, in codes: float32, level ``k`` at ``k``, linear in between.

    Groups of scale zero lie at their codes.
    """
    scale = coding.spread(coding.scale)
    scaled = weight if coding.offset is None else weight - coding.spread(coding.offset)
    scaled = torch.where(scale != 0, scaled / scale, 0.0)
    tables = coding.tables
    out = torch.empty_like(scaled)
    for number, table in enumerate(tables):
        rows = slice(None) if coding.ids is None else coding.ids == number
        right = torch.bucketize(scaled[rows].contiguous(), table).clamp(1, tables.shape[1] - 1)
        low, high = table[right - 1], table[right]
        share = torch.where(high > low, (scaled[rows] - low) / (high - low), 0.0)
        out[rows] = right - 1 + share.clamp(-0.5, 1.5)
    return torch.where(scale != 0, out, coding.codes.float())


@torch.no_grad()
def start_in_cells(coding: Coding, weight: Tensor) -> Tensor:
    """Positions as near to the weights' own as the starting codes allow: each inside the cell of its code."""
    codes = coding.codes.float()
    return codes + (position_of(coding, weight) - codes).clamp(-EDGE, EDGE)


class CodeSpace(Relaxation):
    """One real number per weight in units of codes, rounded in the forward pass, with :class:`Lookup`'s gradient.

    Attributes:
        position: float32 leaf ``[n, in]``.
        start: its starting value.
        reach: how far it may go from there, in codes.
    """

    reach = 2.0

    def __init__(self, coding: Coding, weight: Tensor, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(coding, weight, options, seed)
        self.start = start_in_cells(coding, weight)
        self.position = self.start.clone().requires_grad_()

    def levels(self, tables: Tensor, progress: float) -> Tensor:
        """Levels of the nearest codes, float32 ``[n, in]``."""
        levels: Tensor = Lookup.apply(tables, self.position, self.coding.ids)
        return levels

    def codes(self) -> Tensor:
        """Nearest codes, int64 ``[n, in]``."""
        return self.position.detach().round().long()

    def code_groups(self) -> list[ParameterGroup]:
        """The positions."""
        return [ParameterGroup([self.position], self.options["code_rate"])]

    @torch.no_grad()
    def project(self) -> None:
        """Keep positions on the table and within ``reach`` of their start: further ones fit the calibration text only."""
        lowest = (self.start - self.reach).clamp_min_(0)
        highest = (self.start + self.reach).clamp_max_(self.coding.tables.shape[1] - 1)
        self.position.clamp_(lowest, highest)
