"""An update of low rank as part of a low-bit record, and how far a matrix is from another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.scales import to_f16_bits
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.plugin.modules import LowBitLinear

# Largest magnitude of a stored factor, with room below fp16's 65504.
LARGEST = 2.0**15


class Factors(NamedTuple):
    """An update ``b @ a``.

    Attributes:
        b: float32 ``[out, r]``.
        a: float32 ``[r, in]``.
    """

    b: Tensor
    a: Tensor


def with_low_rank(record: LowBitTensor, update: Factors) -> LowBitTensor:
    """``record + b @ a``; the codes and all else are shared, the factors rounded to fp16.

    Both factors of a component are brought to like size by a power of two, so that rounding costs at most 2**-10 of each
    product: no other error is made.

    Raises:
        BadRequest: an update that is not finite, or a stack of matrices.
    """
    layout = record.layout
    if len(layout.shape) != 2:
        raise BadRequest(f"a stack of {layout.shape[0]} matrices takes no low-rank update.")
    b, a = update.b.to(record.device), update.a.to(record.device)
    sizes_b, sizes_a = b.abs().amax(0), a.abs().amax(1)
    if not bool(torch.isfinite(sizes_b).all() and torch.isfinite(sizes_a).all()):
        raise BadRequest("the adapter holds NaN or infinity; it was not merged.")
    used = (sizes_b > 0) & (sizes_a > 0)
    b, a, sizes_b, sizes_a = b[:, used], a[used], sizes_b[used], sizes_a[used]
    if not b.shape[1]:
        return record
    step = ((sizes_a.log2() - sizes_b.log2() + layout.shift) / 2).round()
    b, a = torch.ldexp(b, step - layout.shift), torch.ldexp(a, -step[:, None])
    if max(float(b.abs().max()), float(a.abs().max())) > LARGEST:
        raise BadRequest("the adapter is larger than fp16 factors can hold; use how='dense'.")
    if layout.permuted:
        a = a[:, record.tensors["permutation"].long()]
    tensors = dict(record.tensors)
    low_a, low_b = to_f16_bits(a), to_f16_bits(b)
    if layout.rank:
        low_a, low_b = torch.cat([tensors["low_rank_a"], low_a]), torch.cat([tensors["low_rank_b"], low_b], 1)
    tensors |= {"low_rank_a": low_a.contiguous(), "low_rank_b": low_b.contiguous()}
    return LowBitTensor(replace(layout, rank=layout.rank + b.shape[1]), tensors)


def refuse_intake(base: LowBitLinear, what: str) -> None:
    """Refuse a layer that rewrites or rounds its inputs.

    Args:
        what: would see them rewritten or rounded, or would not.

    Raises:
        BadRequest: it does.
    """
    if base.activation is not None:
        raise BadRequest(
            f"the layer rewrites or rounds its inputs ({base.activation.extra_repr()}), and {what}. "
            "Leave a LoRA beside the layer, or merge it with how='dense'."
        )


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error ``|found - wanted| / |wanted|`` of a matrix."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))


def total(rows: Iterable[Mapping], error: str, norm: str = "norm") -> float:
    """Relative Frobenius error over all matrices of rows that hold each one's, and its norm."""
    squares = [((row[error] * row[norm]) ** 2, row[norm] ** 2) for row in rows]
    above, below = (sum(column) for column in zip(*squares, strict=True)) if squares else (0.0, 1.0)
    return (above / below) ** 0.5 if below else 0.0
