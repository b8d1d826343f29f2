"""The compiled kernel of the packed KV cache: ``hf_lowbit::cpu_kv_attend``, and rounding of new rows.

The op takes the stored tensors as they are (``cpu/packed_cache.h``, ``hf_lowbit/kv``). Keys stored as integers are
multiplied by queries rounded to int8, off by at most 1/254 of a query's largest magnitude (folded with the scales of a
block where those go by channel); everything else is float32. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from hf_lowbit.kernels import cpu, cpu_library, packed_cache
from hf_lowbit.kernels.cpu_repack import checked, loaded
from hf_lowbit.kernels.packed_cache import MOST_BLOCKS, MOST_ROWS, Blocks, Rows

# ``kRowInt8`` of ``cpu/packed_cache.h``.
INT8 = 3
MOST_DIM = 1024


class _Rows(ctypes.Structure):
    """``LowbitRows`` of ``cpu/packed_cache.h``."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "key_scale", "value_scale", "positions")),
        *((name, c_int64) for name in ("length", "room", "first", "position_room")),
        *((name, c_int32) for name in ("kind", "wide", "low")),
    )


class _Blocks(ctypes.Structure):
    """``LowbitBlocks``."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "key_scale", "key_offset", "value_scale", "value_offset")),
        *((name, c_void_p) for name in ("positions", "key_levels", "value_levels")),
        ("count", c_int64),
        *((name, c_int32) for name in ("key_bits", "value_bits", "keys_by_channel", "values_by_channel", "wide")),
    )


class _Cache(ctypes.Structure):
    """``LowbitKv``."""

    _fields_ = (
        ("rows", _Rows * MOST_ROWS),
        ("blocks", _Blocks * MOST_BLOCKS),
        *((name, c_int32) for name in ("row_count", "block_count", "batch", "heads", "group", "tokens", "dim")),
        ("length", c_int64),
        ("scale", c_float),
        ("queries", c_void_p),
        ("turned", c_void_p),
        ("query_strides", c_int64 * 3),
        ("turned_strides", c_int64 * 3),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 3),
        *((name, c_int32) for name in ("mask_kind", "threads")),
        ("out", c_void_p),
        ("weights", c_void_p),
    )


def trouble(device: torch.device, dim: int) -> str | None:
    """Why the kernel cannot serve heads of ``dim`` numbers here, or None."""
    return missing() or packed_cache.unfit(dim, MOST_DIM)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why there are no compiled kernels, or None."""
    return cpu_library.trouble()


def round_rows(x: Tensor, codes: Tensor, scales: Tensor, at: int) -> None:
    """Write rows as int8 codes and fp16 scales, as ``hf_lowbit.kv.rows.to_int8`` gives them.

    Args:
        x: ``[batch, heads, n, dim]``.
        codes, scales: contiguous ``[batch, heads, room, dim]`` and ``[batch, heads, room]``; slots ``at .. at + n`` are
            written.
    """
    batch, heads, tokens, dim = x.shape
    x = x.contiguous()
    checked(
        loaded().lowbit_kv_round(
            x.data_ptr(),
            cpu.DTYPES[x.dtype],
            batch * heads,
            tokens,
            dim,
            codes.data_ptr(),
            scales.data_ptr(),
            codes.shape[2],
            at,
        )
    )


def levels(table: Tensor) -> Tensor:
    """A level table as the kernel takes it: float32 ``[2**bits]`` of whole numbers."""
    return table


def _attend(
    queries: Tensor,
    turned: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    mask: Tensor | None,
    scale: float,
    weights: bool,
) -> tuple[Tensor, Tensor]:
    batch, all_heads, tokens, dim = queries.shape
    parts = packed_cache.parse(queries, turned, tensors, layout)
    heads = parts.heads
    cache = _Cache(row_count=len(parts.rows), block_count=len(parts.blocks), batch=batch, heads=heads, tokens=tokens)
    cache.group, cache.dim, cache.length, cache.scale = all_heads // heads, dim, parts.length, scale
    cache.threads = torch.get_num_threads()
    cache.queries, cache.turned = queries.data_ptr(), turned.data_ptr()
    cache.query_strides[:], cache.turned_strides[:] = queries.stride()[:3], turned.stride()[:3]
    for number, rows in enumerate(parts.rows):
        _fill_rows(cache.rows[number], rows)
    for number, blocks in enumerate(parts.blocks):
        _fill_blocks(cache.blocks[number], blocks)
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        cache.mask, cache.mask_kind = mask.data_ptr(), 1 if mask.dtype == torch.bool else 2
        cache.mask_strides[:] = mask.stride(0), mask.stride(2), mask.stride(3)
    out = torch.empty(batch, tokens, all_heads, dim)
    asked = parts.asked if weights else 0
    found = torch.empty(batch, heads, tokens, asked)
    cache.out, cache.weights = out.data_ptr(), found.data_ptr() if asked else None
    checked(loaded().lowbit_kv_attend(ctypes.byref(cache)))
    return out, found


def _fill_rows(to: _Rows, rows: Rows) -> None:
    to.keys, to.values, to.room = rows.keys.data_ptr(), rows.values.data_ptr(), rows.keys.shape[2]
    to.kind = INT8 if rows.keys.dtype == torch.int8 else cpu.DTYPES[rows.keys.dtype]
    to.length, to.first, to.low = rows.length, rows.first, int(rows.low)
    if rows.key_scale is not None and rows.value_scale is not None:
        to.key_scale, to.value_scale = rows.key_scale.data_ptr(), rows.value_scale.data_ptr()
    if rows.positions is not None:
        to.positions, to.position_room = rows.positions.data_ptr(), rows.positions.shape[2]
        to.wide = int(rows.positions.dtype == torch.int32)


def _fill_blocks(to: _Blocks, blocks: Blocks) -> None:
    for name, value in blocks._asdict().items():
        setattr(to, name, value.data_ptr() if isinstance(value, Tensor) else int(value))
    to.count, to.wide = blocks.size, int(blocks.positions.dtype == torch.int32)


attend = packed_cache.register("cpu_kv_attend", _attend, "CPU")
