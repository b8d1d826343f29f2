"""``Relaxation``: codes, scales and tables of one stage as numbers that gradients can move, and the way back to storage.

What differs between the methods that learn codes (NUPES, JLCM, SignRound, GSQ) is only how a code becomes differentiable.
Scales, offsets and fitted tables are the same in all of them and are kept here: each is its starting value plus a learned
step, rounded to what can be stored in the forward pass and passed straight through in the backward pass, so that the codes
are learned for the scales that will be stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.format.scales import round_f16
from hf_lowbit.solvers.coding import Coding, on_grid


@dataclass(frozen=True)
class ParameterGroup:
    """Leaf tensors that move at one rate.

    Attributes:
        parameters: float32 leaves.
        rate: learning rate at the start, in the unit of the parameters.
        shared: whether the optimizer scales all entries of the last axis alike (their sizes then carry meaning).
    """

    parameters: list[Tensor]
    rate: float
    shared: bool = False


class Relaxation(ABC):
    """The learnable form of one :class:`~hf_lowbit.solvers.coding.Coding`, which it starts at.

    Args:
        coding: the starting point; not changed.
        weight: float32 ``[n, in]``, the original weights in the same units (relative to ``2**shift``).
        options: the method's settings, all of them.
        seed: for relaxations that draw noise.
    """

    def __init__(self, coding: Coding, weight: Tensor, options: Mapping[str, Any], seed: int) -> None:
        self.coding, self.options = coding, options
        self.generator = torch.Generator().manual_seed(seed)
        learn = options["learn"]
        self.learns_scales, self.learns_tables = learn != "codes", learn == "all"
        self.scale_step = torch.zeros_like(coding.scale, requires_grad=self.learns_scales)
        self.offset_step = torch.zeros_like(coding.scale, requires_grad=self.learns_scales and coding.offset is not None)
        self.gap = coding.tables.diff().mean(-1, keepdim=True)  # unit of table steps
        self.table_step = torch.zeros_like(coding.tables, requires_grad=self.learns_tables and coding.stage.levels.stored)

    @abstractmethod
    def levels(self, tables: Tensor, progress: float) -> Tensor:
        """Differentiable levels of all weights, float32 ``[n, in]``, given the tables ``[tables, K]``.

        Args:
            progress: share of the steps done, 0 to 1, for what is annealed.
        """

    @abstractmethod
    def codes(self) -> Tensor:
        """Codes int64 ``[n, in]`` that the relaxation stands for now."""

    @abstractmethod
    def code_groups(self) -> list[ParameterGroup]:
        """What moves the codes."""

    def project(self) -> None:  # noqa: B027 - most relaxations have no bounds
        """Bring parameters back into their bounds after a step of the optimizer."""

    def tables(self) -> Tensor:
        """Level tables, float32 ``[tables, K]``, differentiable where they are learned."""
        return self.coding.tables + self.table_step * self.gap

    def weight(self, progress: float) -> Tensor:
        """Values of the stage, float32 ``[n, in]`` relative to ``2**shift``, differentiable."""
        values = self.levels(self.tables(), progress) * self._spread(self._scale())
        offset = self._offset()
        return values if offset is None else values + self._spread(offset)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Everything that is learned."""
        groups = [*self.code_groups()]
        scales = [step for step in (self.scale_step, self.offset_step) if step.requires_grad]
        if scales:
            groups.append(ParameterGroup(scales, self.options["scale_rate"]))
        if self.table_step.requires_grad:
            groups.append(ParameterGroup([self.table_step], self.options["table_rate"]))
        return groups

    @torch.no_grad()
    def harden(self) -> Coding:
        """The storable coding: codes, scales on their grid, ascending fp16 tables."""
        codes = self.codes()
        tables = round_f16(self.tables()) if self.coding.stage.levels.stored else self.coding.tables
        order = tables.argsort(dim=-1, stable=True)
        if not torch.equal(order, torch.arange(order.shape[1]).expand_as(order)):
            rank = order.argsort(dim=-1)
            tables = tables.gather(1, order)
            codes = rank[0][codes] if self.coding.ids is None else rank[self.coding.ids].gather(1, codes)
        return replace(self.coding, codes=codes, scale=self._scale(), offset=self._offset(), tables=tables)

    def _scale(self) -> Tensor:
        """Scales in storable values; a step is relative to the starting scale, so a group of zeros stays one."""
        wanted = self.coding.scale * (1 + self.scale_step)
        return _straight_through(on_grid(wanted, self.coding.step, self.coding.stage.scale_bits), wanted)

    def _offset(self) -> Tensor | None:
        """Offsets in storable values; a step is relative to the largest magnitude the group's scale reaches."""
        if self.coding.offset is None:
            return None
        wanted = self.coding.offset + self.offset_step * self.coding.scale * self.coding.tables.abs().max()
        return _straight_through(on_grid(wanted, self.coding.offset_step, self.coding.stage.scale_bits), wanted)

    def _spread(self, values: Tensor) -> Tensor:
        size, columns = self.coding.group_size, self.coding.codes.shape[1]
        return values[..., None].expand(*values.shape, size).reshape(len(values), -1)[:, :columns]


# (coding, original weights, options, seed) -> relaxation
RelaxationFactory = Callable[[Coding, Tensor, Mapping[str, Any], int], Relaxation]

RELAXATIONS: dict[str, RelaxationFactory] = {}


def relaxation(name: str) -> Callable[[type[Relaxation]], type[Relaxation]]:
    """Register the decorated class as the relaxation of solver ``name``."""

    def register(made: type[Relaxation]) -> type[Relaxation]:
        if name in RELAXATIONS:
            raise ValueError(f"relaxation {name!r} is registered twice")
        RELAXATIONS[name] = made
        return made

    return register


def _straight_through(stored: Tensor, wanted: Tensor) -> Tensor:
    """The stored value, with the gradient of the wanted one."""
    return wanted + (stored - wanted).detach() if wanted.requires_grad else stored
