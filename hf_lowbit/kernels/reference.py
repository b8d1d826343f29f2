"""The reference backend: decode, then multiply. It always works and defines what every other backend must return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.format.layout import Layout
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.kernels import ops
from hf_lowbit.kernels.select import Backend, Verdict, register_backend


class Stored(NamedTuple):
    """The arguments of the torch ops: stored tensors in layout order, and the layout's text."""

    tensors: list[Tensor]
    layout: str


def stored(tensor: LowBitTensor) -> Stored:
    """The arguments of the torch ops for a record."""
    return Stored([tensor.tensors[name] for name in tensor.layout.fields], tensor.layout.dumps())


class Reference(Backend):
    """``F.linear`` on the decoded weight, on any device, in the dtype of the activations."""

    name = "reference"

    def supports(self, layout: Layout, device: torch.device) -> Verdict:
        """Always."""
        return Verdict(True, "always works")

    def prepare(self, tensor: LowBitTensor) -> Stored:
        """The record itself: nothing is repacked."""
        return stored(tensor)

    def linear(self, x: Tensor, prepared: Stored, bias: Tensor | None = None) -> Tensor:
        """``hf_lowbit::linear``, and the bias added in the dtype of the result."""
        y = ops.OPS.linear(x, prepared.tensors, prepared.layout)
        return y if bias is None else y + bias.to(y.dtype)

    def embedding(self, ids: Tensor, prepared: Stored, dtype: torch.dtype) -> Tensor:
        """``hf_lowbit::embedding``."""
        return ops.OPS.embedding(ids, prepared.tensors, prepared.layout, dtype)


REFERENCE = Reference()
register_backend(REFERENCE)
