"""How the inputs of a matrix are rewritten and rounded: one layout, a few small tensors, and the arithmetic they stand for.

An input ``x`` ``[.., in]`` goes through, in this order and each where asked for: channels split and merged (QLLM), a shift
and a division per channel, a Hadamard rotation, rounding to integers. The matrix was rewritten to take the result. The
shift is given back after rounding, so ``Q(t(x - z)) + t(z)`` reaches the matrix and no bias has to be made for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, FormatError, unknown_name
from hf_lowbit.format.hadamard import rotate
from hf_lowbit.format.layout import Field

PER = ("token", "tensor", "group")
SMALLEST_STEP = 1e-8


@dataclass(frozen=True)
class ActivationSpec:
    """How activations are rounded.

    Attributes:
        bits: 4, 6 or 8 (2 to 8 work).
        per: one step for each ``token``, for the whole ``tensor``, or for each ``group`` of channels of a token.
        static: steps are found on calibration text and stored; else each input gives its own.
        symmetric: zero maps to the middle code; else to a zero point.
        group_size: channels of a group.
    """

    bits: int = 8
    per: str = "token"
    static: bool = False
    symmetric: bool = False
    group_size: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise BadRequest(
                f"activation_bits must be a whole number from 2 to 8 (4, 6 and 8 are usual), got {self.bits!r}."
            )
        if self.per not in PER:
            raise BadRequest(unknown_name("activation granularity", self.per, PER))
        for name in ("static", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise BadRequest(f"activation setting {name!r} must be true or false, got {getattr(self, name)!r}.")
        if not isinstance(self.group_size, int) or self.group_size < 8:
            raise BadRequest(f"activation group_size must be a whole number of 8 or more, got {self.group_size!r}.")
        if self.static and self.per == "token":
            raise BadRequest("a step per token cannot be static: it is the token's own. Use per='tensor' or per='group'.")

    @classmethod
    def parse(cls, value: Any) -> ActivationSpec | None:
        """From a number of bits, or a mapping of this class's attributes; None stays None."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return cls(bits=value)
        known = [entry.name for entry in fields(cls)]
        for key in value:
            if key not in known:
                raise BadRequest(unknown_name("activation setting", key, known))
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """All attributes as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class ActivationLayout:
    """What is done to the inputs of one matrix; together with the tensors :attr:`fields` names it is all there is.

    Attributes:
        in_features: inputs of the matrix.
        spec: rounding; None rounds nothing.
        shifted, scaled: whether there are a shift and a division per channel.
        rotated: whether a Hadamard rotation follows.
        members: input channels that are split or merged, counted as often as they are read; 0 where none is.
        high: channels rounded to ``high_bits`` with steps of their own instead.
        high_bits: bits of those.
    """

    in_features: int
    spec: ActivationSpec | None = None
    shifted: bool = False
    scaled: bool = False
    rotated: bool = False
    members: int = 0
    high: int = 0
    high_bits: int = 8

    @property
    def steps(self) -> int:
        """Stored steps: none unless static."""
        if self.spec is None or not self.spec.static:
            return 0
        low = self.in_features - self.high
        groups = -(-low // self.spec.group_size) if self.spec.per == "group" else 1
        return groups + (-(-self.high // self.spec.group_size) if self.spec.per == "group" else 1 if self.high else 0)

    @property
    def fields(self) -> dict[str, Field]:
        """Stored tensors. Numbers are float32 held as int32 bit patterns, which no cast of a model touches."""
        n, whole = self.in_features, torch.int32
        sizes = {"shift": n * self.shifted, "divisor": n * self.scaled, "step": self.steps, "zero": self.steps}
        sizes |= {"member": self.members, "target": self.members, "coefficient": self.members, "high": self.high}
        return {name: Field(whole, (size,)) for name, size in sizes.items() if size}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ActivationLayout:
        """Inverse of :meth:`to_json`.

        Raises:
            FormatError: malformed.
        """
        try:
            spec = values["spec"]
            return cls(**{**values, "spec": None if spec is None else ActivationSpec(**spec)})
        except (TypeError, KeyError, BadRequest) as error:
            raise FormatError(f"an activation layout is malformed ({error}).") from error


def pattern(values: Tensor) -> Tensor:
    """float32 numbers as the int32 bit patterns that are stored."""
    return values.detach().to(torch.float32).contiguous().view(torch.int32)


def numbers(stored: Tensor) -> Tensor:
    """Inverse of :func:`pattern`."""
    return stored.view(torch.float32)


@dataclass(frozen=True)
class Activations:
    """A layout and its tensors."""

    layout: ActivationLayout
    tensors: Mapping[str, Tensor]

    def rewritten(self, x: Tensor) -> Tensor:
        """``x`` ``[.., in]`` before rounding, its shift taken off."""
        return self._turned(
            self._merged(x) - numbers(self.tensors["shift"]).to(x) if self.layout.shifted else self._merged(x)
        )

    def __call__(self, x: Tensor, steps: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What reaches the matrix for inputs ``[.., in]``, in their dtype; rounded as it would be on integer hardware.

        Args:
            steps: (step, zero point) ``[steps]`` in the place of the stored ones, to learn them: gradients then pass
                rounding but not clipping, and reach the steps (LSQ+, arXiv 2004.09576). Without, they pass as if nothing
                were rounded.
        """
        y = self.rewritten(x.float())
        if steps is not None:
            y = self.rounded(y, steps)
        elif self.layout.spec is not None:
            y = y + (self.rounded(y) - y).detach() if y.requires_grad else self.rounded(y)
        if self.layout.shifted:
            y = y + self._turned(numbers(self.tensors["shift"]).to(y))
        return y.to(x.dtype)

    def exact(self, x: Tensor) -> Tensor:
        """The same without rounding: the linear map that the matrix was rewritten for."""
        return self._turned(self._merged(x))

    def rounded(self, y: Tensor, steps: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Rewritten inputs ``[.., in]`` rounded to integers and back, with the stored steps unless told."""
        spec, high = self.layout.spec, self.layout.high
        assert spec is not None
        if steps is None and "step" in self.tensors:
            steps = numbers(self.tensors["step"]), self.tensors["zero"]
        if not high:
            return _round(y, spec, spec.bits, steps)
        places = self.tensors["high"].long()
        low = torch.ones(y.shape[-1], dtype=torch.bool, device=y.device)
        low[places] = False
        out = torch.empty_like(y)
        cut = self.low_steps
        first, last = (None, None) if steps is None else ((steps[0][:cut], steps[1][:cut]), (steps[0][cut:], steps[1][cut:]))
        out[..., low] = _round(y[..., low], spec, spec.bits, first)
        out[..., places] = _round(y[..., places], spec, self.layout.high_bits, last)
        return out

    def steps(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Steps and zero points ``[steps]`` for the lowest and highest value of each part, in the order they are stored."""
        spec, cut = self.layout.spec, self.low_steps
        assert spec is not None
        parts = ((slice(None, cut), spec.bits), (slice(cut, None), self.layout.high_bits))
        found = [step_and_zero(low[part], high[part], spec, bits) for part, bits in parts]
        return torch.cat([step for step, _ in found]), torch.cat([zero for _, zero in found])

    @property
    def low_steps(self) -> int:
        """Stored steps of the channels that do not get more bits; those of the others follow."""
        spec, high = self.layout.spec, self.layout.high
        if spec is None or not self.layout.steps or not high:
            return self.layout.steps
        return self.layout.steps - (-(-high // spec.group_size) if spec.per == "group" else 1)

    def parts(self, y: Tensor) -> list[Tensor]:
        """Rewritten inputs ``[n, in]`` cut into what has a static step each, in the order the steps are stored."""
        spec = self.layout.spec
        assert spec is not None
        chosen = [y]
        if self.layout.high:
            low = torch.ones(y.shape[-1], dtype=torch.bool, device=y.device)
            low[self.tensors["high"].long()] = False
            chosen = [y[..., low], y[..., self.tensors["high"].long()]]
        return [part for one in chosen for part in (one.split(spec.group_size, -1) if spec.per == "group" else (one,))]

    def _merged(self, x: Tensor) -> Tensor:
        if not self.layout.members:
            return x
        taken = x[..., self.tensors["member"].long()] * numbers(self.tensors["coefficient"]).to(x)
        return torch.zeros_like(x).index_add(-1, self.tensors["target"].long(), taken)

    def _turned(self, x: Tensor) -> Tensor:
        x = x / numbers(self.tensors["divisor"]).to(x) if self.layout.scaled else x
        return rotate(x) if self.layout.rotated else x


def _nearest(x: Tensor) -> Tensor:
    """Rounded, for gradients the identity; the sum is exact, since ``round(x) - x`` is."""
    return x + (torch.round(x) - x).detach() if x.requires_grad else torch.round(x)


def _round(y: Tensor, spec: ActivationSpec, bits: int, steps: tuple[Tensor, Tensor] | None) -> Tensor:
    """Round ``y`` ``[.., n]``; static steps and zeros are ``[1]`` or one for each group."""
    grouped, n = spec.per == "group", y.shape[-1]
    if grouped:
        padding = -n % spec.group_size
        y = torch.nn.functional.pad(y, (0, padding)).unflatten(-1, (-1, spec.group_size))
    step, zero = steps_of(y, spec, bits) if steps is None else steps
    if steps is not None and grouped:
        step, zero = step[:, None], zero[:, None]
    codes = _nearest(y / step) + zero
    low, top = (1 - (1 << (bits - 1)), (1 << (bits - 1)) - 1) if spec.symmetric else (0, (1 << bits) - 1)
    out = (codes.clamp(low, top) - zero) * step
    return out.flatten(-2)[..., :n] if grouped else out


def steps_of(y: Tensor, spec: ActivationSpec, bits: int) -> tuple[Tensor, Tensor]:
    """Steps and zero points of an input's own range: per tensor ``[1]``, else along the last axis, kept."""
    if spec.per == "tensor":
        return step_and_zero(y.amin().view(1), y.amax().view(1), spec, bits)
    return step_and_zero(y.amin(-1, keepdim=True), y.amax(-1, keepdim=True), spec, bits)


def step_and_zero(low: Tensor, high: Tensor, spec: ActivationSpec, bits: int) -> tuple[Tensor, Tensor]:
    """Step and whole zero point for ranges that are widened to hold 0."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    if spec.symmetric:
        step = torch.maximum(-low, high) / ((1 << (bits - 1)) - 1)
        return step.clamp_min(SMALLEST_STEP), torch.zeros_like(step)
    step = ((high - low) / ((1 << bits) - 1)).clamp_min(SMALLEST_STEP)
    return step, _nearest(-low / step)
