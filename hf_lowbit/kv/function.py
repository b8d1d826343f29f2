"""The attention function that reads packed caches, and its mask, under one name in the host's two registries.

Given plain keys and values it is the host's own ``sdpa``. Without an entry for the mask the host would pass none, and
padding would be lost in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_lowbit.kv.packed import Packed
from hf_lowbit.kv.settings import ATTENTION

# What the kernels do not know; the host's function then gets decoded keys and values, and says what it thinks of it.
UNKNOWN = ("position_bias", "softcap", "s_aux", "sinks", "output_attentions")


@torch.compiler.disable
def _read(
    module: torch.nn.Module,
    query: Tensor,
    key: Packed,
    value: Packed,
    mask: Tensor | None,
    scale: float | None,
    kwargs: dict,
) -> tuple[Tensor, None]:
    def stock(keys: Tensor, values: Tensor) -> Tensor:
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scale, **kwargs)[0]

    known = not kwargs.get("dropout") and kwargs.get("is_causal", getattr(module, "is_causal", True)) in (True, None)
    if not known or any(kwargs.get(name) is not None and kwargs.get(name) is not False for name in UNKNOWN):
        return stock(key.dense(), value.dense()), None
    return key.layer.attend(query, mask, scale or query.shape[-1] ** -0.5, module, stock), None


def lowbit_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed cache, or the host's ``sdpa`` over plain tensors. Arguments and result as the host's."""
    if isinstance(key, Packed):
        return _read(module, query, key, value, attention_mask, scaling, kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def register() -> None:
    """Make the host know function and mask by their name."""
    AttentionInterface.register(ATTENTION, lowbit_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
