"""Rewritings that stay at run time, in front of one matrix: what its producer cannot take over.

Each is a step as those of :mod:`hf_lowbit.transforms.algebra`: the matrix takes the inverse, so the function stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.activations import ActivationLayout, Activations, ActivationSpec, pattern
from hf_lowbit.format.hadamard import rotate, unrotate
from hf_lowbit.transforms.algebra import Weights, digest
from hf_lowbit.transforms.graph import Reader


@dataclass
class Intake:
    """What is done to the inputs of one matrix before they are rounded, in this order.

    Attributes:
        in_features: its inputs.
        member, target, coefficient: int64, int64 and float64 ``[m]``: input ``member`` times ``coefficient`` is added to
            channel ``target``; None leaves all channels in place.
        shift: float64 ``[in]`` subtracted, and given back after rounding.
        divisor: float64 ``[in]``.
        rotated: whether a Hadamard rotation follows.
        high: int64, channels that get more bits.
        high_bits: how many.
    """

    in_features: int
    member: Tensor | None = None
    target: Tensor | None = None
    coefficient: Tensor | None = None
    shift: Tensor | None = None
    divisor: Tensor | None = None
    rotated: bool = False
    high: Tensor | None = None
    high_bits: int = 8

    def activations(self, spec: ActivationSpec | None) -> Activations:
        """The stored form, without static steps."""
        tensors: dict[str, Tensor] = {}
        for name in ("shift", "divisor", "coefficient"):
            if (values := getattr(self, name)) is not None:
                tensors[name] = pattern(values)
        for name in ("member", "target", "high"):
            if (values := getattr(self, name)) is not None:
                tensors[name] = values.to(torch.int32)
        members = 0 if self.member is None else len(self.member)
        layout = ActivationLayout(
            self.in_features, spec, self.shift is not None, self.divisor is not None, self.rotated, members,
            0 if self.high is None else len(self.high), self.high_bits,
        )  # fmt: skip
        return Activations(layout, tensors)


class Intakes(dict[str, Intake]):
    """Weight name -> its intake; made on first use."""

    def of(self, reader: Reader) -> Intake:
        """The intake of a reader."""
        return self.setdefault(reader.weight, Intake(len(reader.columns)))


@dataclass(frozen=True)
class Divide:
    """Divide the inputs of one matrix by ``factor``, float64 ``[in]``, at run time."""

    intakes: Intakes
    reader: Reader
    factor: Tensor

    def apply(self, weights: Weights) -> None:
        """Rewrite the matrix and note the division.

        Raises:
            BadRequest: its inputs are rotated already.
        """
        intake = self.intakes.of(self.reader)
        _unrotated(intake, self.reader)
        factor = self.factor.to(torch.float64)
        weight = weights[self.reader.weight]
        weights[self.reader.weight] = (weight.transpose(self.reader.axis, -1) * factor).transpose(self.reader.axis, -1)
        intake.divisor = factor if intake.divisor is None else intake.divisor * factor

    def inverse(self) -> Divide:
        """Divide by the reciprocals."""
        return replace(self, factor=1 / self.factor.to(torch.float64))

    def describe(self) -> dict[str, str]:
        """Kind, matrix and a digest of the factors."""
        return {"kind": "divide", "site": self.reader.weight, "digest": digest(self.factor)}


@dataclass(frozen=True)
class Subtract:
    """Subtract ``offset``, float64 ``[in]``, from the inputs of one matrix before rounding, and give it back after."""

    intakes: Intakes
    reader: Reader
    offset: Tensor

    def apply(self, weights: Weights) -> None:
        """Note the shift, in the units of the inputs before a division.

        Raises:
            BadRequest: its inputs are rotated already.
        """
        intake = self.intakes.of(self.reader)
        _unrotated(intake, self.reader)
        offset = self.offset.to(torch.float64)
        offset = offset if intake.divisor is None else offset * intake.divisor
        intake.shift = offset if intake.shift is None else intake.shift + offset

    def inverse(self) -> Subtract:
        """Shift back."""
        return replace(self, offset=-self.offset)

    def describe(self) -> dict[str, str]:
        """Kind, matrix and a digest of the offsets."""
        return {"kind": "subtract", "site": self.reader.weight, "digest": digest(self.offset)}


@dataclass(frozen=True)
class Rotate:
    """Rotate the inputs of one matrix by a Hadamard matrix at run time."""

    intakes: Intakes
    reader: Reader
    back: bool = False

    def apply(self, weights: Weights) -> None:
        """Rewrite the matrix and note the rotation.

        Raises:
            BadRequest: its inputs are rotated already.
        """
        intake = self.intakes.of(self.reader)
        if intake.rotated != self.back:
            raise BadRequest(f"{self.reader.weight}: its inputs are {'not ' * self.back}rotated already.")
        turn = unrotate if self.back else rotate
        axis = self.reader.axis
        weights[self.reader.weight] = turn(weights[self.reader.weight].transpose(axis, -1)).transpose(axis, -1)
        intake.rotated = not self.back

    def inverse(self) -> Rotate:
        """Rotate back."""
        return replace(self, back=not self.back)

    def describe(self) -> dict[str, str]:
        """Kind and matrix."""
        return {"kind": "rotate", "site": self.reader.weight, "digest": "hadamard"}


def _unrotated(intake: Intake, reader: Reader) -> None:
    if intake.rotated:
        raise BadRequest(f"{reader.weight}: its inputs are rotated, so channels can no longer be told apart.")


@dataclass(frozen=True)
class Widen:
    """Round some input channels of one matrix, int64 ``channels``, to more bits; none of them takes it back."""

    intakes: Intakes
    reader: Reader
    channels: Tensor
    bits: int = 8

    def apply(self, weights: Weights) -> None:
        """Note the channels."""
        intake = self.intakes.of(self.reader)
        intake.high, intake.high_bits = (self.channels if len(self.channels) else None), self.bits

    def inverse(self) -> Widen:
        """All channels alike."""
        return replace(self, channels=self.channels[:0])

    def describe(self) -> dict[str, str]:
        """Kind, matrix and a digest of the channels."""
        return {"kind": "widen", "site": self.reader.weight, "digest": digest(self.channels)}


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
    """Split and merge the input channels of one matrix at run time. Merging changes the function by what it averages."""

    intakes: Intakes
    reader: Reader
    assembly: Assembly | None
    before: list[Tensor]

    def apply(self, weights: Weights) -> None:
        """Rewrite the matrix, keeping it for the way back.

        Raises:
            BadRequest: something else stands before the matrix already.
        """
        intake = self.intakes.of(self.reader)
        axis, name = self.reader.axis, self.reader.weight
        if self.assembly is None:
            weights[name] = self.before[0]
            intake.member = intake.target = intake.coefficient = None
            return
        if intake.rotated or intake.shift is not None or intake.divisor is not None or intake.member is not None:
            raise BadRequest(f"{name}: channels are split and merged before anything else is done to them.")
        weight = weights[name]
        self.before[:] = [weight.to(torch.float32)]
        weights[name] = self.assembly.columns(weight.transpose(axis, -1)).transpose(axis, -1)
        intake.member, intake.target = self.assembly.member, self.assembly.target
        intake.coefficient = self.assembly.coefficient

    def inverse(self) -> Assemble:
        """The matrix as it was, once this step was applied."""
        return replace(self, assembly=None)

    def describe(self) -> dict[str, str]:
        """Kind, matrix and a digest of the members."""
        numbers = torch.zeros(0) if self.assembly is None else torch.stack([self.assembly.member, self.assembly.target])
        return {"kind": "assemble", "site": self.reader.weight, "digest": digest(numbers)}


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
