"""Channels split and merged in front of one matrix, and low-rank corrections of it: what QLLM does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.transforms.algebra import Weights, digest
from hf_lowbit.transforms.graph import Reader
from hf_lowbit.transforms.intake import Before


@dataclass(frozen=True)
class Assembly:
    """Which input channels make up each one the matrix is given: int64 ``member``, ``target``, float64 ``coefficient``.

    A split channel is the one member of several targets, with the coefficient 1 / count; merged channels share a target.
    """

    member: Tensor
    target: Tensor
    coefficient: Tensor

    def columns(self, weight: Tensor) -> Tensor:
        """The matrix ``[.., in]`` that takes assembled inputs: each target has the sum of its members' columns."""
        return torch.zeros_like(weight).index_add(-1, self.target, weight[..., self.member])


@dataclass(frozen=True)
class Assemble:
    """Split and merge the input channels of one matrix at run time, which becomes ``matrix`` ``[out, in]``.

    Merging changes the function by what it averages. ``kept`` holds the matrix that was, once this step was applied.
    """

    place: Before
    assembly: Assembly | None
    matrix: Tensor
    kept: list[Tensor]

    def apply(self, weights: Weights) -> None:
        """Rewrite the matrix, keeping it for the way back.

        Raises:
            BadRequest: something else stands before the matrix already.
        """
        intake = self.place.intake
        axis, name = self.place.reader.axis, self.place.reader.weight
        if self.assembly is None:
            weights[name] = self.kept[0]
            intake.member = intake.target = intake.coefficient = None
            return
        if intake.rotated or intake.shift is not None or intake.divisor is not None or intake.member is not None:
            raise BadRequest(f"{name}: channels are split and merged before anything else is done to them.")
        self.kept[:] = [weights[name].to(torch.float32)]
        weights[name] = self.matrix.to(torch.float64).transpose(axis, -1)
        intake.member, intake.target = self.assembly.member, self.assembly.target
        intake.coefficient = self.assembly.coefficient

    def inverse(self) -> Assemble:
        """The matrix as it was, once this step was applied."""
        return replace(self, assembly=None)

    def describe(self) -> dict[str, str]:
        """Kind, matrix and a digest of the members."""
        numbers = torch.zeros(0) if self.assembly is None else torch.stack([self.assembly.member, self.assembly.target])
        return {"kind": "assemble", "site": self.place.reader.weight, "digest": digest(numbers)}


@dataclass(frozen=True)
class Correct:
    """Add a low-rank matrix ``left @ right`` (``[out, r]``, ``[r, in]``) to one matrix, which makes up for its rounding."""

    reader: Reader
    left: Tensor
    right: Tensor

    def apply(self, weights: Weights) -> None:
        """Add it."""
        change = (self.left.to(torch.float64) @ self.right.to(torch.float64)).transpose(self.reader.axis, -1)
        weights[self.reader.weight] = weights[self.reader.weight] + change

    def inverse(self) -> Correct:
        """Subtract it."""
        return replace(self, left=-self.left)

    def describe(self) -> dict[str, str]:
        """Kind, matrix and a digest of the factors."""
        factors = torch.cat([self.left.flatten(), self.right.flatten()])
        return {"kind": "correct", "site": self.reader.weight, "digest": digest(factors)}
