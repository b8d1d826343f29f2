"""Appending to the host's ``DynamicCache`` in place.

The host's own update concatenates, which copies the whole cache for every token: 2 MB a layer behind 500 tokens of a 1 B
Llama, a tenth of what its weights take. Here a layer's keys and values become views of larger buffers with room for more.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Room made beyond what is there: half as much again, and at least this many tokens.
LEAST_ROOM = 256


class Room:
    """Buffers behind the keys and values of one cache layer.

    Attributes:
        owner: the layer; a copy of it starts a room of its own.
        filled: tokens written. A layer that holds fewer has been cropped, and gets a new room: what is written is never
            written over, since others may still look at it.
    """

    def __init__(self, owner: Any, more: int) -> None:
        self.owner: weakref.ref[Any] = weakref.ref(owner)
        self.filled = owner.keys.shape[2]
        size = self.filled + more + max(LEAST_ROOM, self.filled // 2)
        self.keys, self.values = (self._wider(tensor, size) for tensor in (owner.keys, owner.values))

    @staticmethod
    def _wider(tensor: Tensor, size: int) -> Tensor:
        batch, heads, length, dim = tensor.shape
        out = tensor.new_empty(batch, heads, size, dim)
        out[:, :, :length] = tensor
        return out

    def __reduce__(self) -> tuple:
        """Copies and pickles of a cache go without: what they share with the original they must not write to."""
        return type(None), ()

    def holds(self, layer: Any, more: int) -> bool:
        """Whether ``layer`` still is what was written here, with room for ``more`` tokens."""
        owner = self.owner()
        return (
            owner is not None
            and owner is layer
            and layer.keys.shape[2] == layer.values.shape[2] == self.filled
            and self.filled + more <= self.keys.shape[2]
            and all(
                tensor.data_ptr() == buffer.data_ptr() and tensor.stride() == buffer.stride() and len(tensor) == len(buffer)
                for tensor, buffer in ((layer.keys, self.keys), (layer.values, self.values))
            )
        )

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens ``[batch, heads, n, dim]`` behind the others; returns views of all of them."""
        start, self.filled = self.filled, self.filled + keys.shape[2]
        self.keys[:, :, start : self.filled] = keys
        self.values[:, :, start : self.filled] = values
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


def appended(cache: Any, keys: Tensor, values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Put new ``keys`` and ``values`` ``[batch, heads, n, dim]`` into layer ``number`` of ``cache``; returns all of them.

    Caches and layers other than the host's plain dynamic ones are asked to update themselves.
    """
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False) and number < len(cache.layers)
    layer: Any = cache.layers[number] if plain else None
    if (
        type(layer) is not DynamicLayer
        or not layer.is_initialized
        or layer.keys.dim() != 4
        or layer.keys.dtype != keys.dtype
    ):
        found: tuple[Tensor, Tensor] = cache.update(keys, values, number)
        return found
    more, room = keys.shape[2], getattr(layer, "lowbit_room", None)
    if room is None or not room.holds(layer, more):
        room = layer.lowbit_room = Room(layer, more)
    layer.keys, layer.values = room.append(keys, values)
    return layer.keys, layer.values
