"""Rows of keys and values kept token by token: in the dtype of the model, or as int8 under one fp16 scale a row.

A store is a mapping of names to tensors ``[batch, heads, room, ...]`` of which the first ``length`` slots are filled; what
goes with a token (its score, its position) lies beside its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_lowbit.format.scales import F16_MAX
from hf_lowbit.kernels import cpu, cpu_cache

LEAST_ROOM = 16
LIMIT = 127
# Below this a row is zero: fp16 has no smaller scale.
LEAST_SCALE = 2.0**-24


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[..., dim]`` as int8 codes and fp16 scales ``[...]``: symmetric, largest magnitude at 127.

    Coding what was decoded gives the same codes again.
    """
    wide = x.float()
    scale = (wide.abs().amax(-1) / LIMIT).clamp_max(F16_MAX).to(torch.float16)
    known = scale.float()[..., None]
    codes = torch.where(known > 0, wide / known.clamp_min(LEAST_SCALE), 0.0).round().clamp(-LIMIT, LIMIT)
    return codes.to(torch.int8), scale


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if dtype != torch.float16 or x.dtype == dtype else x.clamp(-F16_MAX, F16_MAX).to(dtype)


class RowStore:
    """Keys and values of one layer, a slot a token and head.

    Attributes:
        bits: 8 or 16.
        dtype: of rows of 16 bits.
        endless: whether it grows for ever, and so makes room by halves.
        length: slots filled.
        tensors: ``key``, ``value`` ``[batch, heads, room, dim]``, at 8 bits ``key_scale`` and ``value_scale``
            ``[batch, heads, room]``, and whatever else was appended.
    """

    def __init__(
        self, bits: int, dtype: torch.dtype, tensors: dict[str, Tensor] | None = None, endless: bool = False
    ) -> None:
        self.bits, self.dtype, self.endless = bits, dtype, endless
        self.tensors: dict[str, Tensor] = tensors or {}
        self.length = next(iter(self.tensors.values())).shape[2] if self.tensors else 0

    def encoded(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Rows as this store holds them."""
        if self.bits == 16:
            return {"key": _cast(keys, self.dtype), "value": _cast(values, self.dtype)}
        key, key_scale = to_int8(keys)
        value, value_scale = to_int8(values)
        return {"key": key, "key_scale": key_scale, "value": value, "value_scale": value_scale}

    def append(self, keys: Tensor, values: Tensor, **beside: Tensor) -> None:
        """Add rows ``[batch, heads, n, dim]`` with what lies beside them ``[batch, heads, n]``."""
        count = keys.shape[2]
        if not self.tensors or self.length + count > self.tensors["key"].shape[2] or not self._round_into(keys, values):
            self.append_encoded(self.encoded(keys, values) | beside)
            return
        for name, tensor in beside.items():
            self.tensors[name][:, :, self.length : self.length + count] = tensor
        self.length += count

    def _round_into(self, keys: Tensor, values: Tensor) -> bool:
        """Round rows straight into free slots; False where the compiled kernel cannot."""
        if self.bits != 8 or keys.device.type != "cpu" or keys.dtype not in cpu.DTYPES or cpu_cache.missing():
            return False
        for name, x in (("key", keys), ("value", values)):
            cpu_cache.round_rows(x, self.tensors[name], self.tensors[f"{name}_scale"], self.length)
        return True

    def append_encoded(self, new: dict[str, Tensor]) -> None:
        """Add slots as :meth:`encoded` and :meth:`gather` give them."""
        count = next(iter(new.values())).shape[2]
        self.make_room(new, count)
        for name, tensor in new.items():
            self.tensors[name][:, :, self.length : self.length + count] = tensor
        self.length += count

    def make_room(self, like: dict[str, Tensor], count: int) -> None:
        """Have room for ``count`` more slots of such tensors and some to spare."""
        if self.tensors and self.length + count <= next(iter(self.tensors.values())).shape[2]:
            return
        room = self.length + count + (max(LEAST_ROOM, self.length // 2) if self.endless else LEAST_ROOM)
        for name, tensor in like.items():
            wider = tensor.new_empty(*tensor.shape[:2], room, *tensor.shape[3:])
            if self.length:
                wider[:, :, : self.length] = self.tensors[name][:, :, : self.length]
            self.tensors[name] = wider

    def filled(self) -> dict[str, Tensor]:
        """Views of the filled slots."""
        return {name: tensor[:, :, : self.length] for name, tensor in self.tensors.items()}

    def dense(self, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of slots as numbers: float32 at 8 bits, views of the rows at 16."""
        last = self.length if last is None else last
        part = {name: tensor[:, :, first:last] for name, tensor in self.tensors.items()}
        if self.bits == 16:
            return part["key"], part["value"]
        key = part["key"].float() * part["key_scale"].float()[..., None]
        return key, part["value"].float() * part["value_scale"].float()[..., None]

    def gather(self, slots: Tensor) -> dict[str, Tensor]:
        """Slots ``[batch, heads, n]``, each head its own."""
        return gather(self.filled(), slots)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` slots."""
        self.length = length

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor."""
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}


def gather(tensors: dict[str, Tensor], slots: Tensor) -> dict[str, Tensor]:
    """Pick slots ``[batch, heads, n]`` of tensors ``[batch, heads, room, ...]``."""
    out = {}
    for name, tensor in tensors.items():
        index = slots if tensor.dim() == 3 else slots[..., None].expand(*slots.shape, tensor.shape[3])
        out[name] = tensor.gather(2, index)
    return out


def joined(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Slots of several stores of one kind, one after another."""
    found = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in found], 2) for name in found[0]} if found else {}
