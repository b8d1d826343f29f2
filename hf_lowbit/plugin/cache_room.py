"""Appending to the host's ``DynamicCache`` in place.

The host's own update concatenates, which copies the whole cache for every token: 2 MB a layer behind 500 tokens of a 1 B
Llama, a tenth of what its weights take. Here a layer's keys and values become views of larger buffers with room for more.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Room made beyond what is there: half as much again, and at least this many tokens.
LEAST_ROOM = 256


class Room:
    """Buffers behind the keys and values of one cache layer.

    Attributes:
        owner: the layer; a copy of it starts a room of its own.
        filled: tokens written. A layer whose tensors are not the views last given to it has been cropped or reordered, and
            gets a new room: what is written is never written over, since others may still look at it.
    """

    def __init__(self, owner: Any, more: int) -> None:
        self.owner: Any = weakref.ref(owner)
        self.filled = owner.keys.shape[2]
        self.size = self.filled + more + max(LEAST_ROOM, self.filled // 2)
        self.keys, self.values = (self._wider(tensor) for tensor in (owner.keys, owner.values))
        self.given = owner.keys, owner.values

    def _wider(self, tensor: Tensor) -> Tensor:
        batch, heads, length, dim = tensor.shape
        out = tensor.new_empty(batch, heads, self.size, dim)
        out[:, :, :length] = tensor
        return out

    def __reduce__(self) -> tuple:
        """Copies and pickles of a cache go without: what they share with the original they must not write to."""
        return type(None), ()

    def holds(self, layer: Any, more: int) -> bool:
        """Whether ``layer`` still is what was given to it here, with room for ``more`` tokens."""
        keys, values = self.given
        return self.owner() is layer and layer.keys is keys and layer.values is values and self.filled + more <= self.size

    def grown(self, more: int) -> tuple[Tensor, Tensor]:
        """Views of all tokens with ``more`` free places behind them; :meth:`give` makes them the layer's."""
        length = self.filled + more
        return self.keys.narrow(2, 0, length), self.values.narrow(2, 0, length)

    def give(self, keys: Tensor, values: Tensor) -> None:
        """Make what :meth:`grown` returned, now filled, what the layer holds."""
        layer: Any = self.owner()
        self.filled, self.given = keys.shape[2], (keys, values)
        layer.keys, layer.values = keys, values


def room_in(cache: Any, number: int, batch: int, more: int, dtype: torch.dtype) -> Room | None:
    """Room for ``more`` tokens of ``batch`` sequences behind those of layer ``number``; None unless it is plain."""
    if type(cache) is not DynamicCache or number >= len(cache.layers) or getattr(cache, "offloading", False):
        return None
    layer: Any = cache.layers[number]
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return None
    room: Room | None = getattr(layer, "lowbit_room", None)
    if room is None or not room.holds(layer, more):
        keys = layer.keys
        if keys.dim() != 4 or keys.device.type != "cpu" or keys.shape[2] != layer.values.shape[2]:
            return None
        room = layer.lowbit_room = Room(layer, more)
    return room if room.keys.dtype == room.values.dtype == dtype and len(room.keys) == batch else None
