"""Back to dense modules: what every low-bit module of a model stood for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lowbit.plugin.default_cache import HOOK
from hf_lowbit.plugin.experts import LowBitExperts, to_dense
from hf_lowbit.plugin.modules import LowBitEmbedding, LowBitLinear, LowBitTiedHead
from hf_lowbit.plugin.targets import retie_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantize_modules(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every low-bit module by the dense one it stood for, and tie what was tied."""
    tied = False
    for name, module in list(model.named_modules()):
        if isinstance(module, LowBitExperts):
            to_dense(module, dtype)
        elif isinstance(module, LowBitEmbedding):
            model.set_submodule(name, module.dense(dtype))
        elif isinstance(module, LowBitLinear):
            model.set_submodule(name, dense_linear(module, module.dense(dtype)))
        elif isinstance(module, LowBitTiedHead):
            head: Any = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            head.bias = module.bias
            model.set_submodule(name, head)
            tied = True
    if tied:
        retie_record(model)
    for name in ("push_to_hub", "_weight_conversions", HOOK):
        model.__dict__.pop(name, None)


def dense_linear(module: LowBitLinear, weight: Tensor) -> nn.Module:
    """The module a low-bit one replaced, around a weight in that module's own order of axes."""
    with torch.device("meta"):
        new: Any = Conv1D(module.out_features, module.in_features) if module.transposed else None
        new = new or nn.Linear(module.in_features, module.out_features, module.bias is not None)
    new.weight, new.bias = nn.Parameter(weight, requires_grad=False), module.bias
    return new
