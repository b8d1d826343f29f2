"""Decoding through fused layers: decoder blocks whose structure is known run as one C++ op for one to eight tokens.

Eager Transformers spends about a millisecond a layer on calls around small matrices, as much as the matrices take. Here the
``forward`` of each proven layer is replaced on the instance by one that hands small inputs to
:class:`~hf_lowbit.kernels.cpu_layer.FusedLayer` and everything else (prompts, training, compiling, hooks, adapters, devices,
attention weights asked for) to the layer's own forward. Cache, masks and positions stay the host's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from hf_lowbit.kernels import cpu
from hf_lowbit.kernels.cpu_layer import DTYPES, FusedLayer, Shape
from hf_lowbit.kv.packed import Packed
from hf_lowbit.kv.settings import ATTENTION
from hf_lowbit.plugin.cache_room import room_in
from hf_lowbit.plugin.modules import LowBitLinear, written

_LOG = logging.getLogger(__name__)
# Decoder layers whose forward is known: pre-norm, rotary attention of grouped heads, SiLU MLP.
PROVEN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_PLACES = tuple((owner, part) for owner, _, part in (name.rpartition(".") for name in (*PROJECTIONS, *NORMS)))
MOST_TOKENS = 8
# Largest difference from the stock forward, as a share of what the layer adds to its input, in exact arithmetic, where only
# the order of sums differs.
TOLERANCE = 1e-3
SWITCH = "HF_LOWBIT_FUSED"


def fuse(model: nn.Module) -> str:
    """Put fused layers in place where they apply; returns what was done or why not."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"off: {SWITCH}=0"
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ in PROVEN]
    if not layers:
        return f"none of the model's blocks is one of {', '.join(PROVEN)}"
    for layer in layers:
        if (reason := unfit(layer)) is not None:
            return reason
    for layer in layers:
        layer.forward = FusedForward(layer)
    for layer in (layers[0], layers[-1]):
        if (error := check(layer)) > TOLERANCE:
            unfuse(model)
            _LOG.warning(
                "hf-lowbit: fused layers differ from the stock forward by %.2g of what a layer adds; not used.", error
            )
            return f"the self-check differed by {error:.2g}"
    for found in fused_layers(model):
        found.calls = 0
    return f"{len(layers)} layers"


def unfuse(model: nn.Module) -> None:
    """Give every layer its own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.forward


def fused_layers(model: nn.Module) -> Iterator[FusedForward]:
    """The fused forwards in place."""
    for module in model.modules():
        found = module.__dict__.get("forward")
        if isinstance(found, FusedForward):
            yield found


def unfit(layer: Any) -> str | None:
    """Why a proven layer cannot be fused, or None."""
    if "forward" in layer.__dict__ and not isinstance(layer.__dict__["forward"], FusedForward):
        return "something else has replaced the layers' forward"
    _, _, *parts = _parts(layer)
    for name, module in zip(PROJECTIONS, parts, strict=False):
        if not isinstance(module, LowBitLinear) or "weight" not in getattr(module, "layouts", {}):
            return f"{name} is in high precision"
        if module.activation is not None:
            return f"{name} rewrites or rounds its inputs"
        if module.choice().backend.name != cpu.Cpu.name:
            return f"{name} does not run on the CPU kernels"
    attention = layer.self_attn
    if attention.config._attn_implementation not in ("sdpa", "eager", ATTENTION):
        return f"attention {attention.config._attn_implementation!r}"
    if attention.config.hidden_act != "silu":
        return f"activation {attention.config.hidden_act!r}"
    return shape_of(layer).unfit


@torch.no_grad()
def check(layer: Any) -> float:
    """Largest difference between fused and stock forward of a layer, as a share of the largest change the layer makes.

    Three tokens without a cache, then one behind them, in exact arithmetic and float32 whatever the model's dtype.
    """
    draw = torch.Generator().manual_seed(0)
    shape = shape_of(layer)
    hidden = torch.randn(1, 4, shape.hidden, generator=draw)
    angles = torch.rand(1, 4, shape.dim // 2, generator=draw).repeat(1, 1, 2) * 6
    hides = torch.full((3, 3), torch.finfo(torch.float32).min).triu(1)[None, None]
    results = []
    for forward in (type(layer).forward.__get__(layer), layer.forward):
        cache, parts = DynamicCache(), []
        for tokens, mask in ((slice(0, 3), hides), (slice(3, 4), None)):
            positions = angles[:, tokens].cos(), angles[:, tokens].sin()
            with cpu.arithmetic("exact"):
                parts.append(forward(hidden[:, tokens], mask, past_key_values=cache, position_embeddings=positions))
        results.append(torch.cat(parts, 1))
    stock, ours = results
    change = (stock - hidden).abs().max().clamp_min(1e-30)
    return float((ours - stock).abs().max() / change)


def shape_of(layer: Any) -> Shape:
    """Sizes of a proven layer."""
    attention, dim = layer.self_attn, layer.self_attn.head_dim
    heads, kv_heads = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
    return Shape(attention.q_proj.in_features, heads, kv_heads, dim, layer.mlp.gate_proj.out_features)


class FusedForward:
    """Stands in for the ``forward`` of one decoder layer.

    Attributes:
        calls: how often the fused op ran since it was put in place.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.calls = 0
        self._made: _Made | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the layer's own forward."""
        layer = self.layer
        applies = self._applies(hidden_states, attention_mask, past_key_values, position_embeddings, kwargs)
        made = self._fused() if applies else None
        if made is None or position_embeddings is None:
            return type(layer).forward(
                layer, hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
        self.calls += 1
        number, (batch, tokens, _) = layer.self_attn.layer_idx, hidden_states.shape
        room = room_in(past_key_values, number, batch, tokens, hidden_states.dtype)
        if room is not None:
            keys, values = room.grown(tokens)
            out = made.whole(hidden_states, *position_embeddings, keys, values, attention_mask)
            room.give(keys, values)
            return out
        queries, keys, values = made.start(hidden_states, *position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, number)
            if isinstance(keys, Packed):
                mixed = keys.layer.attend_few(queries, attention_mask, layer.self_attn)
                return made.output(hidden_states, mixed)
        return made.finish(hidden_states, queries, keys, values, attention_mask)

    def _applies(
        self, hidden: Tensor, mask: Tensor | None, cache: Any, positions: tuple[Tensor, Tensor] | None, kwargs: dict
    ) -> bool:
        if torch.is_grad_enabled() or self.layer.training or torch.compiler.is_compiling():
            return False
        if hidden.dim() != 3 or not 1 <= hidden.shape[0] * hidden.shape[1] <= MOST_TOKENS:
            return False
        if hidden.dtype not in DTYPES or hidden.device.type != "cpu" or positions is None or kwargs.get("output_attentions"):
            return False
        attention = self.layer.self_attn
        if positions[0].dim() != 3 or positions[0].shape[-1] != attention.head_dim:
            return False
        if mask is not None:
            return mask.dim() == 4 and mask.shape[1] == 1
        if hidden.shape[1] == 1:
            return True
        # Eager attention hides nothing by itself, and what tokens see of earlier ones is for the host to say.
        eager = attention.config._attn_implementation == "eager"
        return not eager and (cache is None or not cache.get_seq_length(attention.layer_idx))

    def _fused(self) -> FusedLayer | None:
        """The op over the layer's present modules and tensors, made again when any was replaced or written to.

        None where a part has hooks, or is no longer what can be fused.
        """
        made = self._made
        if made is None or not made.stands():
            made = self._made = _Made(self.layer, None if unfit(self.layer) else self._make())
        return None if any(made.hooks) else made.op

    def _make(self) -> FusedLayer:
        _, _, *parts = _parts(self.layer)
        linears, norms = parts[: len(PROJECTIONS)], parts[len(PROJECTIONS) :]
        return FusedLayer(
            shape_of(self.layer),
            [linear.prepared()[1] for linear in linears],
            [linear.bias for linear in linears],
            [None if norm is None else norm.weight for norm in norms],
            [0.0 if norm is None else norm.variance_epsilon for norm in norms],
            self.layer.self_attn.scaling,
        )

    def __getstate__(self) -> dict:
        return {"layer": self.layer, "calls": 0, "_made": None}


class _Made:
    """An op, and what it was made of.

    Attributes:
        op: the fused layer, or None where the layer could not be fused.
        hooks: of every part, as they are now.
    """

    def __init__(self, layer: Any, op: FusedLayer | None) -> None:
        attention, mlp, *parts = _parts(layer)
        present = [part for part in (attention, mlp, *parts) if part is not None]
        self.op = op
        self.hooks = [hooks for part in present for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        owners = {"": layer, "self_attn": attention, "mlp": mlp}
        places = [
            (layer._modules, "self_attn"),
            (layer._modules, "mlp"),
            *((owners[o]._modules, part) for o, part in _PLACES),
        ]
        for part in present:
            places += [(part._buffers, "weight_codes"), (part._parameters, "weight"), (part._parameters, "bias")]
        self._found = [(place, name, place.get(name)) for place, name in places]
        codes = [part._buffers.get("weight_codes") for part in present]
        self._codes = [tensor for tensor in codes if written(tensor) is not None]
        self._writes = [tensor._version for tensor in self._codes]

    def stands(self) -> bool:
        """Whether all of it still is in its place, and no codes were written to."""
        for place, name, found in self._found:
            if place.get(name) is not found:
                return False
        return [tensor._version for tensor in self._codes] == self._writes


def _parts(layer: Any) -> list[Any]:
    """Attention, MLP, then what PROJECTIONS and NORMS name; None for norms that are not there."""
    attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    owners = {"": layer, "self_attn": attention, "mlp": mlp}
    return [attention, mlp, *(owners[owner]._modules.get(name) for owner, name in _PLACES)]
