"""Packed blocks of 64 tokens: codes of 2, 3 or 4 bits, a level table, scales and offsets.

    value[t, c] = scale * level[code[t, c]] + offset

with scale and offset per channel of the block (``channel``) or per token and group of channels (``token``). Levels are whole
numbers, so that keys multiply int8 queries exactly; scales and offsets are fp16.

Codes lie as the kernels read them, in parts of 4, 2 and 1 bits (3 bits are a part of 2 and one of 1):

keys     A 64-byte vector holds a quad of channels of 16 tokens, byte 4 r + j being channel j of token r. What a byte has
         room for beyond one code belongs to the next tiles of 16 tokens, then to the next quads.
values   A 32-bit word holds one channel of 32 / bits consecutive tokens, lowest bits first; words of all channels follow
         each other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.format.levels import Levels, assign, parse_levels
from hf_lowbit.format.packing import pack, unpack
from hf_lowbit.format.scales import F16_MAX
from hf_lowbit.kernels.packed_cache import BLOCK

PARTS = {2: (2,), 3: (2, 1), 4: (4,)}
LANES, QUAD = 16, 4
TILES = BLOCK // LANES
# Shares of the range that a search of scales tries, by bits.
SHRINK = {2: (1.0, 0.9, 0.8, 0.72, 0.64, 0.57), 3: (1.0, 0.92, 0.84, 0.77), 4: (1.0, 0.94, 0.88)}
# Least-squares steps after it.
REFITS = 2


class Coded(NamedTuple):
    """Quantized blocks ``[..., 64, dim]``: codes, and fp16 scale and offset that broadcast against them."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


@lru_cache(maxsize=32)
def level_table(levels: str, bits: int) -> Tensor:
    """The whole-number levels of a family, float32 ``[2**bits]`` ascending, at most 127 in magnitude."""
    family, mantissa = parse_levels(levels)
    table = Levels(family, bits, mantissa=mantissa).table()
    if torch.equal(table, table.round()):
        return table
    return (table * (127 / table.abs().max())).round()


def pack_keys(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., 64, dim]`` of keys to uint8 ``[..., 8 * dim * bits]``."""
    lead, dim = codes.shape[:-2], codes.shape[-1]
    grid = codes.reshape(-1, TILES, LANES, dim // QUAD, QUAD)
    return _packed(bits, grid, _key_order, lead)


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., 64, dim]`` of values to uint8 ``[..., 8 * dim * bits]``."""
    return _packed(bits, codes.reshape(-1, *codes.shape[-2:]), _value_order, codes.shape[:-2])


def unpack_keys(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Inverse of :func:`pack_keys`."""

    def undo(codes: Tensor, part: int) -> Tensor:
        tiles, quads = min(8 // part, TILES), max(1, 8 // part // TILES)
        # tile groups, quad groups, lanes, channels of a quad, quads, tiles
        grid = codes.reshape(-1, TILES // tiles, dim // QUAD // quads, LANES, QUAD, quads, tiles)
        return grid.permute(0, 1, 6, 3, 2, 5, 4).reshape(-1, BLOCK, dim)

    return _unpacked(packed, bits, dim, undo)


def unpack_values(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Inverse of :func:`pack_values`."""

    def undo(codes: Tensor, part: int) -> Tensor:
        return codes.reshape(-1, BLOCK * part // 32, dim, 32 // part).transpose(2, 3).reshape(-1, BLOCK, dim)

    return _unpacked(packed, bits, dim, undo)


def _key_order(grid: Tensor, part: int) -> Tensor:
    blocks, _, _, quads_all, _ = grid.shape
    tiles, quads = min(8 // part, TILES), max(1, 8 // part // TILES)
    split = grid.reshape(blocks, TILES // tiles, tiles, LANES, quads_all // quads, quads, QUAD)
    return split.permute(0, 1, 4, 3, 6, 5, 2).flatten(1)


def _value_order(codes: Tensor, part: int) -> Tensor:
    blocks, _, dim = codes.shape
    return codes.reshape(blocks, BLOCK * part // 32, 32 // part, dim).transpose(2, 3).flatten(1)


def _packed(bits: int, codes: Tensor, order, lead: torch.Size) -> Tensor:
    out, low = [], 0
    for part in PARTS[bits]:
        out.append(pack(order((codes >> low) & ((1 << part) - 1), part), part))
        low += part
    return torch.cat(out, -1).reshape(*lead, -1)


def _unpacked(packed: Tensor, bits: int, dim: int, undo) -> Tensor:
    lead, flat = packed.shape[:-1], packed.reshape(-1, packed.shape[-1])
    codes, low, at = torch.zeros(len(flat), BLOCK, dim, dtype=torch.uint8, device=packed.device), 0, 0
    for part in PARTS[bits]:
        width = BLOCK * dim * part // 8
        codes |= undo(unpack(flat[:, at : at + width], part, BLOCK * dim), part) << low
        low, at = low + part, at + width
    return codes.reshape(*lead, BLOCK, dim)


def encode(x: Tensor, bits: int, levels: str, by_channel: bool, group: int, fit: str) -> Coded:
    """Quantize blocks.

    Args:
        x: float32 ``[..., 64, dim]``.
        by_channel: one scale per channel of a block; else one per token and ``group`` channels.
        fit: ``range`` or ``search`` (:class:`~hf_lowbit.kv.settings.CacheSettings`).

    Returns:
        Codes uint8 like ``x``; scale and offset fp16 ``[..., 1, dim]`` or ``[..., 64, dim / group]``.
    """
    table = level_table(levels, bits).to(x.device)
    shape = x.shape
    grouped = x.transpose(-1, -2) if by_channel else x.reshape(*shape[:-1], shape[-1] // group, group)
    grouped = grouped.contiguous()
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale, offset = _span(low, high, table, 1.0)
    if fit == "search":
        scale, offset = _searched(grouped, low, high, table, SHRINK[bits], scale, offset)
    scale, offset = (stored.clamp(-F16_MAX, F16_MAX).to(torch.float16) for stored in (scale, offset))
    codes = _nearest(_unscaled(grouped, scale, offset), table).to(torch.uint8)
    if by_channel:
        return Coded(codes.transpose(-1, -2), scale.transpose(-1, -2), offset.transpose(-1, -2))
    return Coded(codes.reshape(shape), scale[..., 0], offset[..., 0])


def decode(coded: Coded, bits: int, levels: str, by_channel: bool) -> Tensor:
    """float32 ``[..., 64, dim]`` of what :func:`encode` returned."""
    codes, scale, offset = coded
    values = level_table(levels, bits).to(codes.device)[codes.to(torch.int32)]
    if not by_channel:
        grouped = values.unflatten(-1, (scale.shape[-1], -1))
        return (grouped * scale[..., None].float() + offset[..., None].float()).flatten(-2)
    return values * scale.float() + offset.float()


def _unscaled(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    scale = scale.float()
    return torch.where(scale > 0, (x - offset.float()) / scale, 0.0)


def _span(low: Tensor, high: Tensor, table: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Scale and offset that put the table's ends on a share of the range around its middle."""
    scale = (high - low) * (share / float(table[-1] - table[0]))
    return scale, (high + low) / 2 - scale * float(table[-1] + table[0]) / 2


def _searched(
    x: Tensor, low: Tensor, high: Tensor, table: Tensor, shares: tuple[float, ...], scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of the range with the least squared error, then least squares for the codes it gives."""
    best = _error(x, scale, offset, table)
    for share in shares[1:]:
        tried = _span(low, high, table, share)
        error = _error(x, *tried, table)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, tried[0], scale), torch.where(better, tried[1], offset)
    for _ in range(REFITS):
        levels = _rounded(_unscaled(x, scale, offset), table)
        mean, center = levels.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
        spread = ((levels - mean) ** 2).sum(-1, keepdim=True)
        slope = ((levels - mean) * (x - center)).sum(-1, keepdim=True) / spread.clamp_min(1e-12)
        slope = torch.where(spread > 0, slope, scale)
        tried = slope, center - slope * mean
        error = _error(x, *tried, table)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, tried[0], scale), torch.where(better, tried[1], offset)
    return scale, offset


def _error(x: Tensor, scale: Tensor, offset: Tensor, table: Tensor) -> Tensor:
    levels = _rounded(_unscaled(x, scale, offset), table)
    return levels.mul_(scale).add_(offset).sub_(x).square_().sum(-1, keepdim=True)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Codes of the nearest levels; evenly spaced ones are rounded to, which is many times as fast as looking them up."""
    if (step := _even_step(table)) is None:
        return assign(values, table)
    return values.sub(table[0]).div_(step).round_().clamp_(0, len(table) - 1)


def _rounded(values: Tensor, table: Tensor) -> Tensor:
    """The nearest levels themselves."""
    if (step := _even_step(table)) is None:
        return table[assign(values, table)]
    return _nearest(values, table).mul_(step).add_(table[0])


def _even_step(table: Tensor) -> float | None:
    steps = table.diff()
    return float(steps[0]) if bool((steps == steps[0]).all()) else None
