"""Lower tiers of one layer: append-only, so that no token is quantized twice.

What a tier stores is not the key itself but ``rotate(key * balance)``; queries are divided and rotated likewise. Both are
frozen when the first tokens arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.kernels.packed_cache import BLOCK
from hf_lowbit.kv import blocks
from hf_lowbit.kv.rows import RowStore
from hf_lowbit.kv.settings import CacheSettings, Tier

# Largest factor a channel of keys is multiplied or divided by.
MOST_BALANCE = 100.0


@dataclass
class Frame:
    """The change of coordinates of low tiers.

    Attributes:
        balance: float32 ``[batch, heads, dim]``, or None: keys are multiplied by it.
        hadamard: whether keys and values are then rotated.
    """

    balance: Tensor | None = None
    hadamard: bool = False

    def keys(self, keys: Tensor) -> Tensor:
        """Keys ``[batch, heads, n, dim]`` as tiers store them."""
        keys = keys.float()
        if self.balance is not None:
            keys = keys * self.balance[:, :, None]
        return self.rotated(keys)

    def keys_back(self, stored: Tensor) -> Tensor:
        """Inverse of :meth:`keys`."""
        keys = self.rotated(stored)
        return keys if self.balance is None else keys / self.balance[:, :, None]

    def queries(self, queries: Tensor) -> Tensor:
        """Queries ``[batch, heads, n, dim]`` to multiply stored keys by."""
        return self.rotated(queries if self.balance is None else queries / self.balance[:, :, None])

    def rotated(self, x: Tensor) -> Tensor:
        """The Hadamard transform over the last axis, orthogonal and its own inverse; ``x`` where there is none."""
        return x @ hadamard(x.shape[-1]).to(x) if self.hadamard else x

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor."""
        self.balance = None if self.balance is None else change(self.balance)


def hadamard(dim: int) -> Tensor:
    """Sylvester's matrix of a power of 2, scaled to be orthogonal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / dim**0.5


def balance_of(queries: Tensor, keys: Tensor) -> Tensor:
    """Factors ``[batch, heads, dim]`` after which queries and keys have the same largest magnitude in each channel.

    Args:
        queries, keys: ``[batch, heads, n, dim]``, queries of all heads that share the keys along ``n``.
    """
    most_query, most_key = queries.abs().amax(2).float(), keys.abs().amax(2).float()
    factor = (most_query / most_key).sqrt().nan_to_num(1.0, posinf=1.0)
    return torch.where((most_query > 0) & (most_key > 0), factor, 1.0).clamp(1 / MOST_BALANCE, MOST_BALANCE)


class BlockTier:
    """Packed blocks of 64 tokens.

    Attributes:
        tier: bits and share.
        count: blocks held.
        tensors: ``[batch, heads, blocks, ...]``: ``key`` and ``value`` codes (uint8), their ``_scale`` and ``_offset``
            (fp16), and ``position`` (int16 or int32) ``[batch, heads, blocks, 64]``.
    """

    def __init__(self, tier: Tier, settings: CacheSettings, dim: int, tensors: dict[str, Tensor] | None = None) -> None:
        self.tier, self.settings, self.dim = tier, settings, dim
        self.tensors: dict[str, Tensor] = tensors or {}

    @property
    def count(self) -> int:
        """Blocks held."""
        return self.tensors["key"].shape[2] if self.tensors else 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.count * BLOCK

    def sides(self) -> tuple[tuple[str, int, bool], ...]:
        """Of keys and of values: name, bits, whether a scale serves a channel."""
        keys, values = self.settings.key_format == "channel", self.settings.value_format == "channel"
        return ("key", self.tier.key_bits, keys), ("value", self.tier.value_bits, values)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Quantize and add whole blocks: stored keys and values ``[batch, heads, 64 n, dim]``, and their positions."""
        new = {"position": positions.unflatten(2, (-1, BLOCK))}
        packers = {"key": blocks.pack_keys, "value": blocks.pack_values}
        group = self.settings.group or self.dim
        for (name, bits, by_channel), x, fit in zip(self.sides(), (keys, values), self.settings.fits, strict=True):
            x = x.float().unflatten(2, (-1, BLOCK))
            coded = blocks.encode(x, bits, self.settings.levels, by_channel, group, fit)
            new[name] = packers[name](coded.codes, bits)
            for part, stored in (("scale", coded.scale), ("offset", coded.offset)):
                new[f"{name}_{part}"] = stored.squeeze(-2) if by_channel else stored
        self.tensors = {
            name: torch.cat([self.tensors[name].to(tensor.dtype), tensor], 2) if self.tensors else tensor.contiguous()
            for name, tensor in new.items()
        }

    def dense(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Stored keys and values of blocks ``first .. last``, float32 ``[batch, heads, 64 n, dim]``."""
        unpackers, found = {"key": blocks.unpack_keys, "value": blocks.unpack_values}, []
        for name, bits, by_channel in self.sides():
            part = {key: self.tensors[name + key][:, :, first:last] for key in ("", "_scale", "_offset")}
            scale, offset = part["_scale"], part["_offset"]
            if by_channel:
                scale, offset = scale[..., None, :], offset[..., None, :]
            coded = blocks.Coded(unpackers[name](part[""], bits, self.dim), scale, offset)
            found.append(blocks.decode(coded, bits, self.settings.levels, by_channel).flatten(2, 3))
        return found[0], found[1]

    def slabs(self, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Stored keys, values and positions (int64), some blocks at a time."""
        step = max(1, tokens // BLOCK)
        for first in range(0, self.count, step):
            keys, values = self.dense(first, first + step)
            yield keys, values, self.tensors["position"][:, :, first : first + step].flatten(2).long()

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor."""
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}


class RowTier:
    """A lower tier of 8 bits: rows as the important ones of that width."""

    def __init__(self, tier: Tier, dtype: torch.dtype) -> None:
        self.tier, self.store = tier, RowStore(8, dtype)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.store.length

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, with their room."""
        return self.store.tensors

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """As :meth:`BlockTier.append`, of any number of tokens."""
        if self.store.tensors:
            self.store.tensors["position"] = self.store.tensors["position"].to(positions.dtype)
        self.store.append(keys, values, position=positions)

    def slabs(self, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As :meth:`BlockTier.slabs`."""
        for first in range(0, self.length, tokens):
            last = min(first + tokens, self.length)
            yield *self.store.dense(first, last), self.store.tensors["position"][:, :, first:last].long()

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor."""
        self.store.apply(change)
