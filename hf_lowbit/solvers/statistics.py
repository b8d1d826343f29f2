"""``Statistics``: what calibration gathered about the inputs of one matrix. Mergeable, savable, independent of the weights.

Sums are kept in fixed point (int64), so that they are exact and the order in which batches or processes contribute cannot
change a bit of them; :class:`Statistics` holds their means in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_lowbit.errors import LowBitError

# Fixed-point sums leave this many bits for later batches to be larger than the first one.
HEADROOM = 24
# Values converted at a time: a Gram matrix of 8,192 inputs whole would take 1.5 GB of float64 temporaries.
PIECE = 1 << 20


@dataclass(frozen=True)
class Statistics:
    """Means over the tokens one matrix saw.

    Attributes:
        count: tokens.
        gram: float32 ``[in, in]``, mean of ``x x^T``, where ``x`` are the inputs behind the quantized prefix.
        cross: float32 ``[in, in]``, mean of ``x0 x^T``, where ``x0`` are the same tokens' inputs in the original model; None
            where there is no prefix or it is not to be made up for.
        mean: float32 ``[in]``.
        largest: float32 ``[in]``, largest magnitude.
        sensitivity: float32 ``[out, in]``, diagonal of the Fisher matrix of the model's loss; None where not asked for.
    """

    count: int
    gram: Tensor
    mean: Tensor
    largest: Tensor
    cross: Tensor | None = None
    sensitivity: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """Mean squared input per channel, float32 ``[in]``: the weight of a squared error in that column."""
        return self.gram.diagonal()

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets of tokens together, up to float32 rounding."""
        total = self.count + other.count
        share = other.count / total if total else 0.0

        def mix(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.lerp(a, b, share)

        mixed = {name: mix(getattr(self, name), getattr(other, name)) for name in ("gram", "mean", "cross", "sensitivity")}
        largest = torch.maximum(self.largest, other.largest)
        return replace(self, count=total, largest=largest, **mixed)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"count": str(self.count)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Inverse of :meth:`save`."""
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file handle, not a dict
            return cls(count=int(file.metadata()["count"]), **tensors)


def pooled(parts: Iterable[Statistics]) -> Statistics | None:
    """All parts merged; None of none."""
    total: Statistics | None = None
    for part in parts:
        total = part if total is None else total.merge(part)
    return total


class ExactSum:
    """A sum of float32 tensors of one shape that does not depend on their order.

    Values are rounded once to a fixed-point grid of 2**-38 of the first addend's largest magnitude and added as int64.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.exponent: int | None = None
        self._reach = 0.0  # no element of the sum is larger

    def fix_grid(self, largest: float) -> None:
        """Choose the grid from the largest magnitude a first addend has; every process must be given the same number.

        A first addend of zeros says nothing: the grid is then that of ones.
        """
        self.exponent = 62 - HEADROOM - int(torch.frexp(torch.tensor(largest if largest > 0 else 1.0)).exponent)

    def add(self, value: Tensor) -> None:
        """Add one tensor.

        Raises:
            LowBitError: NaN, infinity, or a sum 2**23 times larger than the first addend.
        """
        top = float(torch.linalg.vector_norm(value, float("inf")))
        if self.exponent is None:
            self.fix_grid(top)
        assert self.exponent is not None
        if not (self._reach + top) * 2.0**self.exponent < 2.0**61:
            raise LowBitError(
                f"calibration inputs reach {top}, far beyond those of the first batch: the model overflows on this text. "
                "Use other calibration text, or a checkpoint whose activations are finite."
            )
        self._reach += top
        if self.total is None:
            self.total = torch.zeros(value.shape, dtype=torch.int64)
        scale = 2.0**self.exponent
        flat, into = value.reshape(-1), self.total.view(-1)
        for start in range(0, len(flat), PIECE):
            into[start : start + PIECE] += (flat[start : start + PIECE].double() * scale).round_().to(torch.int64)

    def mean(self, count: int) -> Tensor:
        """The sum over ``count``, float32."""
        assert self.total is not None and self.exponent is not None
        out = torch.empty(self.total.shape)
        into, fixed, scale = out.view(-1), self.total.view(-1), 2.0**-self.exponent / max(count, 1)
        for start in range(0, len(into), PIECE):
            into[start : start + PIECE] = fixed[start : start + PIECE].double() * scale
        return out
