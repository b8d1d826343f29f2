"""Norms told by what they compute: RMS norms with gain ``w`` or ``1 + w``, and layer norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Half-precision norms round their result to 8 bits of mantissa (bfloat16), and their weight before.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Norm:
    """What is known of a norm.

    Attributes:
        weight, bias: parameter names; the gain is ``plus + weight``.
        plus: 0, or 1 (Gemma).
        centred: whether it takes the mean away (a layer norm).
    """

    weight: str
    bias: str | None
    plus: int
    centred: bool


@torch.no_grad()
def norm_of(module: nn.Module, name: str) -> Norm | None:
    """What norm a module is, by trying it on random inputs; None for anything else."""
    parameters = dict(module.named_parameters())
    weight, bias = parameters.get("weight"), parameters.get("bias")
    known = set(parameters) <= {"weight", "bias"} and weight is not None and weight.dim() == 1
    if not known or weight is None or not weight.is_floating_point() or weight.is_meta:
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) + 0.5
    try:
        y = module(x.to(weight))
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    gain, offset = weight.detach().cpu().float(), 0.0 if bias is None else bias.detach().cpu().float()
    for centred in (False, True):
        u = x - x.mean(-1, keepdim=True) if centred else x
        u = u / u.pow(2).mean(-1, keepdim=True).sqrt()
        for plus in (0, 1):
            expected = u * (gain + plus) + offset
            if (y.cpu().float() - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1e-6):
                return Norm(f"{name}.weight", None if bias is None else f"{name}.bias", plus, centred)
    return None
