"""The torch ops of the format: ``hf_lowbit::dequantize``, ``::linear`` and ``::embedding``.

Each takes the stored tensors of one ``LowBitTensor`` in layout order and the layout as JSON text, so one schema serves
every method, width and optional term. They trace under ``torch.compile`` (fake kernels give the shapes), and gradients
flow to the activations: the backward of ``linear`` decodes the weight again instead of keeping a dense copy alive.

The bodies are the reference arithmetic that defines correctness: decode to the dtype of the activations, then multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_lowbit.format.layout import parse_layout
from hf_lowbit.format.tensor import LowBitTensor

LIBRARY = torch.library.Library("hf_lowbit", "DEF")


def register(schema: str, body: Callable, fake: Callable, key: str = "CompositeExplicitAutograd") -> None:
    """Define the op ``schema`` names, with its body under a dispatch key and the fake kernel that gives its shapes."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, body, key)
    torch.library.register_fake(f"hf_lowbit::{name}", fake, lib=LIBRARY)


def rebuild(tensors: Sequence[Tensor], layout: str) -> LowBitTensor:
    """The record of an op's arguments."""
    parsed = parse_layout(layout)
    return LowBitTensor(parsed, dict(zip(parsed.fields, tensors, strict=True)))


def _dequantize(tensors: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return rebuild(tensors, layout).dequantize(dtype)


def _linear(x: Tensor, tensors: Sequence[Tensor], layout: str) -> Tensor:
    return torch.nn.functional.linear(x, rebuild(tensors, layout).dequantize(x.dtype))


def _embedding(ids: Tensor, tensors: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    record = rebuild(tensors, layout)
    unique, places = torch.unique(ids, return_inverse=True)
    return record.rows(unique).dequantize(dtype)[places]


def _fake_dequantize(tensors: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(parse_layout(layout).shape, dtype=dtype)


def _fake_linear(x: Tensor, tensors: Sequence[Tensor], layout: str) -> Tensor:
    out_features, in_features = parse_layout(layout).shape
    torch._check(x.shape[-1] == in_features, lambda: f"linear expects {in_features} inputs, got {x.shape[-1]}")
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_embedding(ids: Tensor, tensors: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(*ids.shape, parse_layout(layout).in_features, dtype=dtype)


def _keep_weight(ctx, inputs, output) -> None:
    _, tensors, ctx.layout = inputs
    ctx.save_for_backward(*tensors)


def _grad_to_input(ctx, grad: Tensor):
    tensors = list(ctx.saved_tensors)  # once: under gradient checkpointing each look unpacks them again
    weight = OPS.dequantize(tensors, ctx.layout, grad.dtype)
    return grad @ weight, [None] * len(tensors), None


register("dequantize(Tensor[] tensors, str layout, ScalarType dtype) -> Tensor", _dequantize, _fake_dequantize)
register("linear(Tensor x, Tensor[] tensors, str layout) -> Tensor", _linear, _fake_linear)
register("embedding(Tensor ids, Tensor[] tensors, str layout, ScalarType dtype) -> Tensor", _embedding, _fake_embedding)
torch.library.register_autograd("hf_lowbit::linear", _grad_to_input, setup_context=_keep_weight, lib=LIBRARY)

OPS = torch.ops.hf_lowbit
