"""What a cache holds: bytes counted from its tensors, bits per element by layer and tier, what was moved down when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_lowbit.kernels.packed_cache import BLOCK
from hf_lowbit.kv import kernel
from hf_lowbit.kv.layer import LowBitLayer
from hf_lowbit.kv.settings import ATTENTION, CacheSettings, Tier

if TYPE_CHECKING:
    from hf_lowbit.kv.cache import LowBitCache


@dataclass(frozen=True)
class TierReport:
    """One precision of one layer.

    Attributes:
        name: ``important``, ``recent`` or ``low``.
        key_bits, value_bits: of a code.
        tokens: held of every sequence and head.
        bytes: of codes, scales, offsets, positions and scores, room for more tokens included.
        elements: numbers stored, keys and values.
    """

    name: str
    key_bits: int
    value_bits: int
    tokens: int
    bytes: int
    elements: int

    @property
    def bits(self) -> float:
        """Bits per element, everything counted."""
        return 8 * self.bytes / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class LayerReport:
    """One layer: its tiers, bytes beside them, and ``moves`` as ``(length, bits, tokens)``; ``fallback`` is a stock kind."""

    number: int
    tokens: int
    bytes: int
    elements: int
    tiers: tuple[TierReport, ...] = ()
    moves: tuple[tuple[int, int, int], ...] = ()
    attention: str = ""
    fallback: str | None = None
    important_by_head: tuple[float, ...] = ()

    @property
    def bits(self) -> float:
        """Bits per element."""
        return 8 * self.bytes / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Report:
    """The whole cache; ``str`` of it is a table."""

    layers: tuple[LayerReport, ...]
    attention: str
    tokens: int
    bytes: int = field(init=False)
    elements: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes", sum(layer.bytes for layer in self.layers))
        object.__setattr__(self, "elements", sum(layer.elements for layer in self.layers))

    @property
    def bits(self) -> float:
        """Bits per key or value number, every tensor counted."""
        return 8 * self.bytes / self.elements if self.elements else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.tokens} tokens, {self.bytes:,} bytes, {self.bits:.2f} bits per element ({self.bits / 16:.1%} of fp16)"
        ]
        lines.append(f"attention: {self.attention}")
        heads = f"{'layer':>5}  {'tier':<10} {'bits k/v':>8} {'tokens':>7} {'bytes':>12} {'bits/element':>12}"
        lines.append(f"{heads}  moved down at length")
        for layer in self.layers:
            if layer.fallback:
                lines.append(f"{layer.number:>5}  {'stock: ' + layer.fallback:<27} {layer.bytes:>12,} {layer.bits:>12.2f}")
            for number, tier in enumerate(layer.tiers):
                moves = ", ".join(
                    f"{length} ({tokens})" for length, bits, tokens in layer.moves[-4:] if bits == tier.key_bits
                )
                lines.append(
                    f"{layer.number if number == 0 else '':>5}  {tier.name:<10} {f'{tier.key_bits}/{tier.value_bits}':>8} "
                    f"{tier.tokens:>7} {tier.bytes:>12,} {tier.bits:>12.2f}  {moves if tier.name == 'low' else ''}".rstrip()
                )
        return "\n".join(lines)


def report(cache: LowBitCache) -> Report:
    """Look through a cache."""
    layers = [
        _low_bit(number, layer) if isinstance(layer, LowBitLayer) else _stock(number, layer, cache.fallbacks.get(number, ""))
        for number, layer in enumerate(cache.layers)
    ]
    name = cache.config._attn_implementation
    attention = f"{name}: the cache is decoded whole at every step; use {ATTENTION!r} (model.set_attn_implementation)"
    if name == ATTENTION and cache.low_bit_layers():
        attention = f"{ATTENTION}, {layers[min(cache.low_bit_layers())].attention}"
    return Report(tuple(layers), attention, max((layer.tokens for layer in layers), default=0))


def formula(settings: CacheSettings, dim: int, tokens: int, dtype_bytes: int) -> float:
    """Bits per element a cache of ``tokens`` should take, from its settings alone (Spec: notes B1).

    Rows take 16 bits, or 8 and ``16 / dim`` for a scale, packed blocks their bits and 32 for each group. A
    position takes 16 bits (32 beyond 32,768 tokens), a score of a row 32, both shared by the ``2 * dim`` numbers of a
    token. The share of important tokens is what :meth:`~hf_lowbit.kv.settings.CacheSettings.most_high` allows, in whole
    blocks.
    """
    if settings.exact:
        return 8.0 * dtype_bytes
    over = tokens - settings.most_high(tokens)
    packed = max(0, -(-over // BLOCK)) * BLOCK
    newest = min(settings.tail, tokens - packed) if settings.tail_bits != settings.high_bits else 0
    position = (16 if tokens <= 1 << 15 else 32) / (2 * dim)
    score = 32 / (2 * dim) if settings.lower else 0.0
    bits = newest * (_row_bits(settings.tail_bits, dim) + score)
    bits += (tokens - packed - newest) * (_row_bits(settings.high_bits, dim) + score + position)
    low = sum(tier.share for tier in settings.lower)
    bits += packed * sum(tier.share / low * (_tier_bits(tier, settings, dim) + position) for tier in settings.lower)
    return bits / tokens


def _row_bits(bits: int, dim: int) -> float:
    return 8 + 16 / dim if bits == 8 else 16.0


def _tier_bits(tier: Tier, settings: CacheSettings, dim: int) -> float:
    if not tier.packed:
        return _row_bits(8, dim)
    group = settings.group or dim
    sides = ((tier.key_bits, settings.key_format), (tier.value_bits, settings.value_format))
    return sum(bits + 32 / (BLOCK if kind == "channel" else group) for bits, kind in sides) / 2


def _nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def _low_bit(number: int, layer: LowBitLayer) -> LayerReport:
    batch, heads, tokens, dim = layer.shape
    held = layer.held
    each = 2 * batch * heads * dim
    tiers = []
    for name, store in (("important", held.kept), ("recent", held.recent)):
        if store.length or store.tensors:
            size = _nbytes(store.tensors.values())
            tiers.append(TierReport(name, store.bits, store.bits, store.length, size, each * store.length))
    for tier in held.tiers:
        if tier.length:
            size = _nbytes(tier.tensors.values())
            tiers.append(TierReport("low", tier.tier.key_bits, tier.tier.value_bits, tier.length, size, each * tier.length))
    beside = [held.starts, held.frame.balance, held.pending, *layer.center.tensors().values(), *(layer.incoming or ())]
    total = sum(tier.bytes for tier in tiers) + _nbytes(beside)
    reason = kernel.refusal(held) if layer.is_initialized else None
    attention = "compiled kernel" if reason is None else f"torch ({reason})"
    share = held.kept.length / tokens if tokens else 0.0
    return LayerReport(
        number, tokens, total, each * tokens, tuple(tiers), tuple(held.moves), attention, None, (share,) * heads
    )


def _stock(number: int, layer: Any, kind: str) -> LayerReport:
    held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    states = [value for name in ("conv_states", "recurrent_states") for value in (getattr(layer, name, None) or {}).values()]
    keys = getattr(layer, "keys", None)
    elements = 2 * keys.numel() if keys is not None else 0
    tokens = layer.get_seq_length() if hasattr(layer, "get_seq_length") and keys is not None else 0
    return LayerReport(number, tokens, _nbytes([*held, *states]), elements, fallback=kind)
