"""What the low-bit cache is compared with: KIVI, eviction after H2O and SnapKV, transformers' own quantized cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer

from hf_lowbit.kv import LowBitCache
from hf_lowbit.kv.holdings import Holdings
from hf_lowbit.kv.layer import LowBitLayer
from hf_lowbit.kv.report import formula
from hf_lowbit.kv.tiers import BlockTier

GROUP = 32


def fake(x: Tensor, bits: int, axis: int) -> Tensor:
    """Round-to-nearest between smallest and largest value along ``axis``, back to numbers."""
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8).half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low.half().float()


class KiviLayer(DynamicLayer):
    """KIVI (arXiv 2402.02750): keys by channel in groups of 32 tokens, values by token, the newest tokens as they are.

    Quantized once and held as numbers: fidelity is what it is for, bytes are counted by its formula.
    """

    bits, residual, by_channel = 2, GROUP, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the host's; a prompt is attended to before it is quantized."""
        if not self.is_initialized:
            self.done = self.done_values = 0
        keys, values = (tensor.clone() for tensor in super().update(key_states, value_states))
        length, dim = keys.shape[2], keys.shape[3]
        ripe = (length - self.done) // self.residual * self.residual
        if ripe > 0:
            part = slice(self.done, self.done + ripe)
            if self.by_channel:
                groups = self.keys[:, :, part].unflatten(2, (-1, GROUP))
                self.keys[:, :, part] = fake(groups, self.bits, 3).flatten(2, 3)
            else:
                self.keys[:, :, part] = fake(self.keys[:, :, part], self.bits, 3)
            self.done += ripe
        if length - self.residual > self.done_values:
            part, group = slice(self.done_values, length - self.residual), min(GROUP, dim)
            groups = self.values[:, :, part].unflatten(3, (-1, group))
            self.values[:, :, part] = fake(groups, self.bits, 4).flatten(3, 4)
            self.done_values = length - self.residual
        if key_states.shape[2] > 8:
            return keys, values
        return self.keys, self.values

    def bits_per_element(self) -> float:
        """Codes, fp16 scales and zeros, and the newest tokens in 16 bits."""
        return self.bits_of(self.keys.shape[2], self.done, self.done_values, self.keys.shape[3])

    def bits_of(self, length: int, keys: int, values: int, dim: int) -> float:
        """As many of ``length`` tokens quantized."""
        group = min(GROUP, dim)
        key_bits = keys * (self.bits + 32 / (GROUP if self.by_channel else dim)) + (length - keys) * 16
        return (key_bits + values * (self.bits + 32 / group) + (length - values) * 16) / (2 * length)


def kivi(config: Any, bits: int, residual: int = GROUP) -> DynamicCache:
    """A cache of such layers."""
    kind = type("Kivi", (KiviLayer,), {"bits": bits, "residual": residual})
    cache = DynamicCache(config=config)
    cache.layers = [kind() for _ in cache.layers]
    return cache


def rounded(config: Any, bits: int) -> DynamicCache:
    """Keys and values rounded between smallest and largest of each token and head, the 32 newest as they are."""
    cache = kivi(config, bits)
    for layer in cache.layers:
        layer.by_channel = False
    return cache


class Dropped(BlockTier):
    """A tier that keeps nothing."""

    dropped = 0

    @property
    def length(self) -> int:
        """Tokens that were evicted."""
        return self.dropped

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Forget them."""
        self.dropped += keys.shape[2]


class EvictingLayer(LowBitLayer):
    """Important and newest tokens as they are, the others gone."""

    def _holdings(self, batch: int, heads: int, dim: int) -> Holdings:
        held = super()._holdings(batch, heads, dim)
        held.tiers = [Dropped(tier, self.settings, dim) for tier in self.settings.lower]
        return held


def evicting(config: Any, method: str, keep: float, recent: int) -> LowBitCache:
    """H2O (accumulated attention) or SnapKV (attention of the prompt's last queries), ``keep`` of all tokens in 16 bits."""
    importance = {"H2O": "exact", "SnapKV": "window"}[method]
    exact = {"high_bits": 16, "recent_bits": 16, "center": False}
    cache = LowBitCache(config, important=keep, recent=recent, importance=importance, decay=1.0, **exact)
    cache.layers = [EvictingLayer(layer.settings, layer.positions) for layer in cache.layers]
    return cache


def quanto(config: Any, bits: int, residual: int = 128) -> QuantizedCache:
    """transformers' QuantizedCache with the quanto backend and, but for the newest tokens, its own defaults."""
    return QuantizedCache(backend="quanto", config=config, nbits=bits, residual_length=residual)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors an object holds, those of tensor subclasses by their parts.

    Numbers of 32 bits count as of 16, which is what a model in 16 bits would have here.
    """
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            return sum(tensor_bytes(getattr(value, name)) for name in names)
        return value.numel() * (2 if value.is_floating_point() else value.element_size())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item) for item in value)
    return sum(tensor_bytes(item) for item in vars(value).values()) if hasattr(value, "__dict__") else 0


def bits_per_element(cache: Any, tokens: int, config: Any, batch: int = 1) -> float:
    """Measured bits per key or value number of any of these caches."""
    if isinstance(cache, LowBitCache):
        return cache.report().bits
    if isinstance(cache.layers[0], KiviLayer):
        return cache.layers[0].bits_per_element()
    if type(cache) is DynamicCache:
        return 8.0 * cache.layers[0].keys.element_size()
    elements = 2 * batch * len(cache.layers) * config.num_key_value_heads * config.head_dim * tokens
    return 8 * sum(tensor_bytes(list(vars(layer).values())) for layer in cache.layers) / elements


def bits_at(cache: Any, tokens: int, dim: int) -> float:
    """Bits per number by formula, for longer contexts than the measured ones."""
    first = cache.layers[0]
    if isinstance(first, EvictingLayer):
        return 16 * cache.settings.important
    if isinstance(cache, LowBitCache):
        return formula(cache.settings, dim, tokens, 2)
    if isinstance(first, KiviLayer):
        return first.bits_of(tokens, tokens - first.residual, tokens - first.residual, dim)
    bits = first.nbits + 32 / first.q_group_size
    return bits + (16 - bits) * first.residual_length / tokens
