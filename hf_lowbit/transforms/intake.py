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
