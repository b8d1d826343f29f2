"""What stays at run time in front of single matrices: rewritings that no producer can take over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.activations import ActivationLayout, Activations, ActivationSpec, pattern
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
class Before:
    """The place in front of one matrix, where anything can be done to its inputs at run time."""

    intakes: Intakes
    reader: Reader

    @property
    def intake(self) -> Intake:
        """What is done there so far."""
        return self.intakes.of(self.reader)

    def channels(self) -> Intake:
        """The same, for what is done to single channels.

        Raises:
            BadRequest: its inputs are rotated already.
        """
        if self.intake.rotated:
            raise BadRequest(f"{self.reader.weight}: its inputs are rotated, so channels can no longer be told apart.")
        return self.intake

    def divide(self, factor: Tensor) -> None:
        """Divide inputs by ``factor``, float64 ``[in]``."""
        intake = self.channels()
        intake.divisor = factor if intake.divisor is None else intake.divisor * factor

    def subtract(self, offset: Tensor) -> None:
        """Subtract ``offset``, float64 ``[in]``, before rounding, and give it back after; a division comes later."""
        intake = self.channels()
        offset = offset if intake.divisor is None else offset * intake.divisor
        intake.shift = offset if intake.shift is None else intake.shift + offset
