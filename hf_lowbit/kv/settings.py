"""``CacheSettings``: what a mixed-precision cache keeps at which precision. Frozen, checked, an exact JSON round trip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.levels import Levels, parse_levels
from hf_lowbit.kernels.packed_cache import BLOCK

# The attention function that reads packed caches, and its mask, in the host's registries.
ATTENTION = "lowbit_kv"
# Newest tokens in 16 bits.
TAIL = 32
# Widths of rows kept token by token, and of packed blocks.
ROW_BITS = (8, 16)
BLOCK_BITS = (2, 3, 4)
FORMATS = ("channel", "token")
IMPORTANCE = ("auto", "exact", "strided", "window", "keys")
FITS = ("search", "range")


@dataclass(frozen=True)
class Tier:
    """One precision below the highest: bits of keys and of values, and its share of the tokens."""

    key_bits: int
    value_bits: int
    share: float

    @property
    def packed(self) -> bool:
        """Whether it holds packed blocks rather than rows of 8 bits."""
        return self.key_bits in BLOCK_BITS


@dataclass(frozen=True)
class CacheSettings:
    """How a :class:`~hf_lowbit.kv.cache.LowBitCache` stores keys and values.

    Attributes:
        high_bits: 8, or 16 for the dtype of the model (float16 for float32 unless all are kept so): the important tokens.
        low_bits: 2, 3, 4 or 8: all others; a pair gives keys and values widths of their own.
        important: share of the tokens kept at ``high_bits``, sinks and recent ones included; 1.0 keeps all of them.
        recent: newest tokens that stay important; what ``crop`` can always take back.
        sinks: first tokens that always stay important.
        recent_bits: 8 or 16 for all of them; None keeps the newest 32 at 16 and the others at ``high_bits``, since what a
            token says of itself and its neighbours weighs most.
        tiers: more than one lower tier, as ``(bits, share)`` pairs; replaces ``low_bits``. What shares leave of 1 is
            important.
        key_format, value_format: ``channel`` is a scale per channel of a block of 64 tokens (KIVI, arXiv 2402.02750),
            ``token`` one per token and group of channels.
        levels: a family of :mod:`hf_lowbit.format.levels` for packed blocks; ``affine`` is uniform.
        group: channels per scale of the ``token`` formats; None is the whole head.
        fit: ``search`` chooses scale and offset for the least squared error, ``range`` spans smallest to largest value; a
            pair is for keys and for values. Values that stick out are clipped by a search in token after token, which does
            not cancel where attention is spread.
        center: subtract the mean of the first prompt, channel by channel, from all keys and values
            (:mod:`hf_lowbit.kv.center`).
        balance: divide queries and multiply keys of low tiers by a factor per channel (MiKV, arXiv 2402.18096); None does
            so for ``token`` keys.
        hadamard: store low tiers rotated by a Hadamard matrix (QuaRot, arXiv 2404.00456); the width of a head is a power of
            2.
        importance: how attention to tokens of a prompt is counted: ``exact``, by a ``strided`` sample of its queries, by a
            ``window`` of its last ones, from ``keys`` alone, or ``auto`` by length.
        decay: a query ``n`` tokens before the newest counts ``decay**n``; 1.0 counts all alike.
        protect: that many first and last layers keep all tokens important.
        layers: number of a layer -> settings that differ there.

    Raises:
        BadRequest: a value out of range or an unknown name.
    """

    high_bits: int = 8
    low_bits: int | tuple[int, int] = 3
    important: float = 0.05
    recent: int = 128
    sinks: int = 4
    recent_bits: int | None = None
    tiers: tuple[tuple[int, float], ...] | None = None
    key_format: str = "channel"
    value_format: str = "token"
    levels: str = "affine"
    group: int | None = None
    fit: str | tuple[str, str] = ("search", "range")
    center: bool = True
    balance: bool | None = None
    hadamard: bool = False
    importance: str = "auto"
    decay: float = 0.95
    protect: int = 0
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _one_of("high_bits", self.high_bits, ROW_BITS)
        if self.recent_bits is not None:
            _one_of("recent_bits", self.recent_bits, ROW_BITS)
        _share("important", self.important)
        for name, least in (("recent", 0), ("sinks", 0), ("protect", 0)):
            _whole(name, getattr(self, name), least)
        if self.group is not None:
            _whole("group", self.group, 1)
        for name, known in (("key_format", FORMATS), ("value_format", FORMATS), ("importance", IMPORTANCE)):
            if getattr(self, name) not in known:
                raise BadRequest(unknown_name(name, getattr(self, name), known))
        if isinstance(self.low_bits, Sequence):
            object.__setattr__(self, "low_bits", tuple(self.low_bits))
        if not isinstance(self.fit, str):
            object.__setattr__(self, "fit", tuple(self.fit))
        for fit in self.fits:
            if fit not in FITS:
                raise BadRequest(unknown_name("fit", fit, FITS))
        if not isinstance(self.decay, (int, float)) or not 0 < self.decay <= 1:
            raise BadRequest(f"decay is a weight above 0 and up to 1, got {self.decay!r}.")
        if self.tiers is not None:
            object.__setattr__(self, "tiers", tuple((bits, float(share)) for bits, share in self.tiers))
        for tier in self.lower:
            _check_tier(tier, self)
        for number, change in self.layers.items():
            self._changed(number, change)

    @property
    def lower(self) -> tuple[Tier, ...]:
        """The tiers below the highest, most bits first; none where every token stays important."""
        if self.tiers is not None:
            found = [Tier(bits, bits, share) for bits, share in self.tiers if share > 0]
            if sum(tier.share for tier in found) > 1 + 1e-9:
                raise BadRequest(f"the shares of tiers={self.tiers} add up to more than 1; what they leave is important.")
            return tuple(sorted(found, key=lambda tier: -tier.key_bits))
        if self.important >= 1 or self.low_bits == self.high_bits or self.low_bits == (self.high_bits,) * 2:
            return ()
        key_bits, value_bits = self.low_bits if isinstance(self.low_bits, tuple) else (self.low_bits,) * 2
        return (Tier(key_bits, value_bits, 1 - self.important),)

    @property
    def fits(self) -> tuple[str, ...]:
        """How scales of keys and of values are chosen."""
        return (self.fit,) * 2 if isinstance(self.fit, str) else self.fit

    @property
    def tail_bits(self) -> int:
        """Bits of the newest tokens."""
        return self.recent_bits or 16

    @property
    def tail(self) -> int:
        """How many tokens stay at these bits."""
        return min(TAIL, self.recent) if self.recent_bits is None else self.recent

    @property
    def exact(self) -> bool:
        """Whether every token stays in the dtype of the model."""
        return not self.lower and self.high_bits == self.tail_bits == 16

    @property
    def balanced(self) -> bool:
        """Whether low tiers hold keys balanced against queries."""
        return self.key_format == "token" if self.balance is None else self.balance

    def most_high(self, length: int) -> int:
        """Largest number of tokens of a sequence of ``length`` held above the lower tiers."""
        if not self.lower:
            return length
        share = 1 - sum(tier.share for tier in self.lower)
        return max(math.ceil(round(share * length, 6)), self.sinks + self.recent + BLOCK * len(self.lower))

    def for_layer(self, number: int, count: int) -> CacheSettings:
        """What holds for layer ``number`` of ``count``."""
        out = self
        if number < self.protect or number >= count - self.protect:
            out = replace(out, important=1.0, tiers=None)
        for key in (number, str(number)):
            if key in self.layers:
                out = out._changed(number, self.layers[key])  # type: ignore[index]
        return replace(out, layers={}, protect=0)

    def check_head(self, dim: int) -> None:
        """Refuse a width of heads these settings cannot store.

        Raises:
            BadRequest: naming the width and what it must divide by.
        """
        packed = any(tier.packed for tier in self.lower)
        if packed and dim % 8:
            raise BadRequest(
                f"packed blocks need heads of a multiple of 8 numbers, this model's have {dim}; use low_bits=8."
            )
        if self.group is not None and dim % self.group:
            raise BadRequest(
                f"group={self.group} does not divide the model's heads of {dim} numbers; use a divisor or None."
            )
        if self.hadamard and dim & (dim - 1):
            raise BadRequest(f"hadamard=True needs heads whose width is a power of 2, this model's have {dim}.")

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = asdict(self)
        values["layers"] = {str(number): dict(change) for number, change in self.layers.items()}
        for name in ("low_bits", "tiers", "fit"):
            if isinstance(values[name], tuple):
                values[name] = [list(item) if isinstance(item, tuple) else item for item in values[name]]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CacheSettings:
        """Inverse of :meth:`to_json`; an unknown key is refused with the nearest name."""
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                raise BadRequest(unknown_name("KV cache setting", key, known))
        return cls(**values)

    def _changed(self, number: Any, change: Mapping[str, Any]) -> CacheSettings:
        if not str(number).isdigit() or not isinstance(change, Mapping) or {"layers", "protect"} & set(change):
            raise BadRequest(f"layers must map numbers of layers to settings, got {number!r}: {change!r}.")
        plain = {name: value for name, value in self.__dict__.items() if name not in ("layers", "protect")}
        return CacheSettings.from_json(plain | dict(change))


def _check_tier(tier: Tier, settings: CacheSettings) -> None:
    for name, bits in (("key", tier.key_bits), ("value", tier.value_bits)):
        if bits not in (*BLOCK_BITS, 8) or bits >= settings.high_bits:
            low = ", ".join(str(b) for b in (*BLOCK_BITS, 8) if b < settings.high_bits)
            raise BadRequest(f"low tiers take {low} bits under high_bits={settings.high_bits}, got {bits} for {name}s.")
    if (tier.key_bits == 8) != (tier.value_bits == 8):
        raise BadRequest(f"8 bits for one of keys and values only ({tier.key_bits}, {tier.value_bits}) is not supported.")
    _share("a tier's share", tier.share)
    for bits in {tier.key_bits, tier.value_bits} - {8}:
        family, mantissa = parse_levels(settings.levels)
        if family in ("fitted", "power", "power_zero_free"):
            raise BadRequest(
                f"levels {settings.levels!r} need numbers fitted to a matrix; use affine, nf or uniform_zero_free."
            )
        Levels(family, bits, mantissa=mantissa)


def _one_of(name: str, value: object, known: Sequence[int]) -> None:
    if value not in known or isinstance(value, bool):
        raise BadRequest(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}.")


def _share(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise BadRequest(f"{name} is a share of the tokens, 0 to 1, got {value!r}.")


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadRequest(f"{name} must be a whole number of at least {least}, got {value!r}.")
