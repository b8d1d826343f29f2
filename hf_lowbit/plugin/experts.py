"""Stacked experts: the host's own experts module, its 3-D weights replaced by low-bit stacks.

The host keeps all experts of a layer in parameters ``[experts, out, in]`` (or transposed). The module keeps its class,
attributes, activation and biases; only the stacks become low-bit and the forward decodes one expert at a time, so the
transient memory is one expert instead of the layer. On a GPU a few tokens take one launch per stack instead, which reads
each chosen expert as it is stored and never waits for the routing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_lowbit.kernels.triton_backend import Triton
from hf_lowbit.plugin.modules import LowBitModule

STACKS = ("gate_up_proj", "up_proj", "down_proj")
# Choices of experts, tokens times k, up to which each is a row of its own; beyond, experts are read once for many tokens.
MOST_CHOICES = 64
_CLASSES: dict[type, type] = {}


class LowBitExperts(LowBitModule):
    """Mixed into the class of a host's experts module by :func:`to_low_bit`."""

    act_fn: Any
    post_expert_norm: Any
    _apply_gate: Any
    num_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Route tokens ``[tokens, hidden]`` to their experts and sum the weighted outputs.

        Args:
            top_k_index: int64 ``[tokens, k]``, expert of each choice; an index past the last expert is skipped.
            top_k_weights: ``[tokens, k]``.
        """
        shape = hidden_states.shape
        hidden = hidden_states.reshape(-1, shape[-1])
        if self._grouped(top_k_index):
            return self._few_tokens(hidden, top_k_index, top_k_weights).to(hidden_states.dtype).view(shape)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:
                continue
            tokens, place = torch.where(top_k_index == expert)
            y = self._one_expert(hidden[tokens], expert) * top_k_weights[tokens, place, None]
            out = out.index_add(0, tokens, y.to(torch.float32))
        return out.to(hidden_states.dtype).view(shape)

    def _one_expert(self, x: Tensor, expert: int) -> Tensor:
        inner = self._stack_linear(x, self._first, expert)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        y = self._stack_linear(inner, "down_proj", expert)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _grouped(self, index: Tensor) -> bool:
        """Whether each choice of a token can be a row of one launch: few of them, no gradient, plain stacks on a GPU."""
        if index.numel() > MOST_CHOICES or torch.is_grad_enabled() or self.__dict__.get("_watched"):
            return False
        parameters = (self._first, "down_proj")
        if any(parameter not in self.layouts for parameter in parameters):  # while a block is being solved
            return False
        chosen = [self.prepared(parameter) for parameter in parameters]
        return all(isinstance(backend, Triton) and backend.groups(prepared) for backend, prepared in chosen)

    def _few_tokens(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same as the loop, float32 ``[tokens, hidden]``, without looking at the routing on the host."""
        chosen = index.reshape(-1)
        experts = chosen.clamp(max=self.num_experts - 1).to(torch.int32)
        x = hidden.repeat_interleave(index.shape[1], 0)
        inner = self._rows_by_expert(x, self._first, experts)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        y = self._rows_by_expert(inner, "down_proj", experts)
        y = self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y
        y = (y * weights.reshape(-1, 1)).to(torch.float32) * (chosen < self.num_experts)[:, None]
        return y.view(*index.shape, -1).sum(1)

    def _rows_by_expert(self, x: Tensor, parameter: str, experts: Tensor) -> Tensor:
        backend, prepared = self.prepared(parameter)
        y = backend.grouped(x.contiguous(), experts, prepared)
        bias = getattr(self, f"{parameter}_bias", None) if self.has_bias else None
        return y if bias is None else y + bias[experts].to(y.dtype)

    @property
    def _first(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def watch(self, parameter: str, sink: Callable[[int, Tensor], None]) -> RemovableHandle:
        """Tell ``sink`` the number of an expert and its inputs ``[tokens, in]`` at every use of a stack."""
        watched = self.__dict__.setdefault("_watched", OrderedDict())
        handle = RemovableHandle(watched)
        watched[handle.id] = (parameter, sink)
        return handle

    def _stack_linear(self, x: Tensor, parameter: str, expert: int) -> Tensor:
        for watched, sink in list(self.__dict__.get("_watched", {}).values()):
            if watched == parameter:
                sink(expert, x)
        if parameter in self.layouts:
            choice = self.choice(parameter)
            y = choice.backend.linear(x, choice.backend.prepare(self.lowbit(parameter).expert(expert)))
        else:  # while a block is being solved
            weight = getattr(self, parameter)[expert]
            y = nn.functional.linear(x, weight.T if self.is_transposed else weight)
        bias = getattr(self, f"{parameter}_bias", None) if self.has_bias else None
        return y if bias is None else y + bias[expert].to(y.dtype)

    def dense(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """One stack as the host's module holds it."""
        weight = self.lowbit(parameter).dequantize(dtype)
        return weight.transpose(1, 2).contiguous() if self.is_transposed else weight


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of the host's stacked experts, whose forward contract is known."""
    has_contract = all(hasattr(module, name) for name in ("has_gate", "is_transposed", "num_experts"))
    return has_contract and bool(stacks_of(module))


def stacks_of(module: nn.Module) -> list[str]:
    """Names of the 3-D weight parameters of an experts module."""
    return [name for name in STACKS if getattr(module._parameters.get(name), "ndim", 0) == 3]


def to_low_bit(module: Any) -> LowBitExperts:
    """Give an experts module the low-bit forward, in place; its stacks are replaced one by one by ``install``."""
    host = type(module)
    if host not in _CLASSES:
        _CLASSES[host] = type(f"LowBit{host.__name__}", (LowBitExperts, host), {})
    module.__class__ = _CLASSES[host]
    module.layouts = {}
    return module


def to_dense(module: LowBitExperts, dtype: torch.dtype) -> nn.Module:
    """Undo :func:`to_low_bit`: dense stacks in ``dtype`` and the host's own class."""
    for parameter, layout in module.layouts.items():
        dense = module.dense(parameter, dtype)
        for stored in layout.fields:
            del module._buffers[f"{parameter}_{stored}"]
        module.register_parameter(parameter, nn.Parameter(dense, requires_grad=False))
    module.__class__ = type(module).__bases__[1]
    module.__dict__.pop("layouts", None)
    module.__dict__.pop("_prepared", None)
    return module
