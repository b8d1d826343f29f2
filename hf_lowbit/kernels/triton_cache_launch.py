"""Launches of attention over a packed cache: one a part, one that joins their results, one for weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hf_lowbit.kernels.packed_cache import BLOCK, Blocks, Parts, Rows
from hf_lowbit.kernels.triton_attend import blocks_kernel, join_kernel, rows_kernel, weights_kernel
from hf_lowbit.kernels.triton_configs import RESIDENT, power_of_two
from hf_lowbit.kernels.triton_launch import device_of, given, interpreted, on_device

# Sums a program holds, of queries and channels: with twice as many they spill. Blocks that are worth a program of their own.
MOST_SUMS, LEAST_STEPS = 4096, 2
WEIGHTS_BLOCK = 256


class Shape(NamedTuple):
    """Sizes of a call: programs' heads are ``batch * heads``, queries those of all heads that share keys."""

    batch: int
    heads: int
    tokens: int
    queries: int
    dim: int

    @property
    def block_m(self) -> int:
        """Queries of a program; tensor cores take 16 at least."""
        return max(16, min(MOST_SUMS // self.block_d, power_of_two(self.queries)))

    @property
    def block_d(self) -> int:
        """Channels of a program."""
        return power_of_two(self.dim)

    @property
    def warps(self) -> int:
        """Of a program; four hold 2,048 sums beside a tile of keys or values."""
        return 4 if self.block_m * self.block_d <= MOST_SUMS // 2 else 8

    @property
    def tiles(self) -> int:
        """Programs for the queries of a head of keys."""
        return triton.cdiv(self.queries, self.block_m)


def splits(steps: int, programs: int, multiprocessors: int) -> tuple[int, int]:
    """Parts of ``steps`` pieces so that the card is full of ``programs`` for each part, and the pieces of a part."""
    count = max(1, min(RESIDENT * multiprocessors // programs, steps // LEAST_STEPS))
    each = triton.cdiv(steps, count)
    return triton.cdiv(steps, each), each


def attend(
    queries: Tensor, turned: Tensor, parts: Parts, mask: Tensor | None, scale: float, weights: bool
) -> tuple[Tensor, Tensor]:
    """What ``packed_cache.register`` promises."""
    batch, all_heads, tokens, dim = queries.shape
    shape = Shape(batch, parts.heads, tokens, all_heads // parts.heads * tokens, dim)
    device, asked = queries.device, parts.asked if weights else 0
    _, multiprocessors, asm = device_of(device.index)
    programs = batch * parts.heads * shape.tiles
    cut = [splits(triton.cdiv(rows.length, BLOCK), programs, multiprocessors) for rows in parts.rows]
    cut += [splits(blocks.size, programs, multiprocessors) for blocks in parts.blocks]
    slots = sum(count for count, _ in cut)
    sums = torch.empty(slots, batch * parts.heads, shape.queries, dim, device=device)
    top, total = torch.empty(2, slots, batch * parts.heads, shape.queries, device=device).unbind()
    raw = torch.empty(batch * parts.heads, shape.queries, asked, device=device)
    call = Call(
        shape, queries.contiguous(), turned.contiguous(), mask_of(mask), scale, raw, (sums, top, total), parts.length
    )
    y = torch.empty(batch, tokens, all_heads, dim, device=device)
    normalizer = torch.empty(batch * parts.heads, shape.queries, device=device)
    found = torch.empty(batch, parts.heads, tokens, asked, device=device)
    with on_device(queries):
        slot = at = 0
        for rows, (count, each) in zip(parts.rows, cut, strict=False):
            call.rows(rows, slot, count, each * BLOCK, at)
            slot, at = slot + count, at + (0 if rows.low else rows.length)
        for blocks, (count, each) in zip(parts.blocks, cut[len(parts.rows) :], strict=True):
            call.blocks(blocks, slot, count, each, asm)
            slot += count
        join_kernel[(batch * parts.heads, shape.queries)](
            sums, top, total, y, normalizer, parts.heads, tokens, shape.queries, dim, slots, SLOTS=power_of_two(slots),
            BLOCK_D=shape.block_d, num_warps=1,
        )  # fmt: skip
        if asked:
            weights_kernel[(batch * parts.heads * tokens, triton.cdiv(asked, WEIGHTS_BLOCK))](
                raw, normalizer, found, tokens, shape.queries, asked, BLOCK=WEIGHTS_BLOCK, num_warps=4
            )
    return y, found


class Mask(NamedTuple):
    """A mask as kernels read it, its strides over sequences, queries and keys, and its kind: 0 none, 1 bool, 2 float."""

    tensor: Tensor | None
    strides: tuple[int, int, int]
    kind: int


def mask_of(mask: Tensor | None) -> Mask:
    """A mask bool or float ``[batch, 1, n, length]``, or None."""
    if mask is None:
        return Mask(None, (0, 0, 0), 0)
    kind = 1 if mask.dtype == torch.bool else 2
    tensor = mask.view(torch.int8) if kind == 1 else mask.float()
    return Mask(tensor, (tensor.stride(0), tensor.stride(2), tensor.stride(3)), kind)


class Call(NamedTuple):
    """What all launches of a call share."""

    shape: Shape
    queries: Tensor
    turned: Tensor
    mask: Mask
    scale: float
    raw: Tensor
    results: tuple[Tensor, Tensor, Tensor]
    length: int

    def rows(self, rows: Rows, slot: int, count: int, each: int, raw_at: int) -> None:
        """Launch over a store of rows, ``each`` of them a program."""
        shape, mask = self.shape, self.mask
        where = rows.positions
        rows_kernel[(count, shape.batch * shape.heads, shape.tiles)](
            self.turned if rows.low else self.queries, rows.keys, rows.values, given(rows.key_scale, rows.keys),
            given(rows.value_scale, rows.keys), given(where, rows.keys), given(mask.tensor, rows.keys), self.raw,
            *self.results, shape.heads, shape.tokens, shape.queries, shape.dim, self.scale, *mask.strides, rows.length,
            rows.first, rows.keys.shape[2], 0 if where is None else where.shape[2], each, self.length, slot, raw_at,
            self.raw.shape[2], INT8=rows.key_scale is not None, POSITIONS=where is not None, MASK=mask.kind,
            CAUSAL=shape.tokens > 1, RAW=self.raw.numel() > 0 and not rows.low, **self._constants(),
        )  # fmt: skip

    def blocks(self, blocks: Blocks, slot: int, count: int, each: int, asm: bool) -> None:
        """Launch over a tier of blocks, ``each`` of them a program."""
        shape, mask = self.shape, self.mask
        blocks_kernel[(count, shape.batch * shape.heads, shape.tiles)](
            self.turned, blocks.keys.view(torch.int32), blocks.values.view(torch.int32), blocks.key_scale, blocks.key_offset,
            blocks.value_scale, blocks.value_offset, blocks.key_levels, blocks.value_levels, blocks.positions,
            given(mask.tensor, blocks.keys), *self.results, shape.heads, shape.tokens, shape.queries, shape.dim, self.scale,
            *mask.strides, blocks.size, each, slot, KEY_BITS=blocks.key_bits, VALUE_BITS=blocks.value_bits,
            KEYS_BY_CHANNEL=blocks.keys_by_channel, VALUES_BY_CHANNEL=blocks.values_by_channel, MASK=mask.kind, ASM=asm,
            **self._constants(),
        )  # fmt: skip

    def _constants(self) -> dict[str, Any]:
        return {
            "WIDE": interpreted(), "BLOCK_M": self.shape.block_m, "BLOCK_D": self.shape.block_d,
            "num_warps": self.shape.warps, "num_stages": 1,
        }  # fmt: skip
