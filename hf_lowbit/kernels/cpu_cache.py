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

from hf_lowbit.errors import BadRequest
from hf_lowbit.kernels import cpu, cpu_library, ops
from hf_lowbit.kernels.cpu_repack import checked, loaded

MOST_ROWS, MOST_BLOCKS = 8, 4
INT8 = 3
HEAD_STEP, MOST_DIM = 16, 1024
# Integers that describe a store of rows and one of blocks in the op's ``layout``.
ROW_FIELDS = ("kind", "length", "first", "low", "positions")
BLOCK_FIELDS = ("key_bits", "value_bits", "keys_by_channel", "values_by_channel")


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


def trouble(dim: int) -> str | None:
    """Why the kernel cannot serve heads of ``dim`` numbers here, or None."""
    if (reason := missing()) is not None:
        return reason
    return None if dim % HEAD_STEP == 0 and dim <= MOST_DIM else f"heads of {dim} numbers, not a multiple of {HEAD_STEP}"


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


def _attend(
    queries: Tensor,
    turned: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    mask: Tensor | None,
    scale: float,
    weights: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of the last tokens of a sequence.

    Args:
        queries, turned: float32 ``[batch, heads, n, dim]``, dim contiguous, for rows and for low tiers.
        tensors: of each store of rows keys and values (with scales at 8 bits, then positions if there are any), then of
            each tier of blocks codes, scales and offsets of keys, those of values, positions, and the two level tables.
        layout: heads of keys, length of the sequence, number of row stores, of block tiers, then their fields.
        mask: bool or float ``[batch, 1, n, length]`` of any strides.
        weights: whether weights of the rows that are not low are wanted.

    Returns:
        Output float32 ``[batch, n, heads, dim]`` and weights ``[batch, heads of keys, n, rows]`` (empty where not wanted).
    """
    batch, all_heads, tokens, dim = queries.shape
    heads, length, row_count, block_count, *fields = layout
    cache = _Cache(
        row_count=row_count, block_count=block_count, batch=batch, heads=heads, group=all_heads // heads, tokens=tokens
    )
    cache.dim, cache.length, cache.scale, cache.threads = dim, length, scale, torch.get_num_threads()
    cache.queries, cache.turned = queries.data_ptr(), turned.data_ptr()
    cache.query_strides[:], cache.turned_strides[:] = queries.stride()[:3], turned.stride()[:3]
    rest, asked = _fill(cache, list(tensors), fields, (batch, heads, dim))
    if rest or queries.shape != turned.shape or queries.dtype != torch.float32 or all_heads % heads:
        raise BadRequest("the kernel of the packed cache was given tensors that do not fit its layout.")
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        cache.mask, cache.mask_kind = mask.data_ptr(), 1 if mask.dtype == torch.bool else 2
        cache.mask_strides[:] = mask.stride(0), mask.stride(2), mask.stride(3)
    out = torch.empty(batch, tokens, all_heads, dim)
    found = torch.empty(batch, heads, tokens, asked if weights else 0)
    cache.out, cache.weights = out.data_ptr(), found.data_ptr() if weights and asked else None
    checked(loaded().lowbit_kv_attend(ctypes.byref(cache)))
    return out, found


def _fill(cache: _Cache, tensors: list[Tensor], fields: list[int], shape: tuple[int, int, int]) -> tuple[list[Tensor], int]:
    """Point the struct at the tensors; returns those left over and how many rows there are weights for."""
    batch, heads, dim = shape
    asked = 0
    for number in range(cache.row_count):
        kind, length, first, low, has_positions = fields[5 * number : 5 * number + 5]
        rows, keys = cache.rows[number], tensors[0]
        if keys.shape[:2] != (batch, heads) or keys.shape[3] != dim or length > keys.shape[2]:
            raise BadRequest(f"rows {list(keys.shape)} do not fit {batch} sequences of {heads} heads of {dim} numbers.")
        rows.keys, rows.values, rows.room = keys.data_ptr(), tensors[1].data_ptr(), keys.shape[2]
        rows.kind, rows.length, rows.first, rows.low = kind, length, first, low
        del tensors[:2]
        if kind == INT8:
            rows.key_scale, rows.value_scale = tensors[0].data_ptr(), tensors[1].data_ptr()
            del tensors[:2]
        if has_positions:
            positions = tensors.pop(0)
            rows.positions, rows.position_room = positions.data_ptr(), positions.shape[2]
            rows.wide = int(positions.dtype == torch.int32)
        asked += 0 if low else length
    fields = fields[5 * cache.row_count :]
    for number in range(cache.block_count):
        blocks = cache.blocks[number]
        names = ("keys", "key_scale", "key_offset", "values", "value_scale", "value_offset", "positions")
        if tensors[0].shape[:2] != (batch, heads) or tensors[0].shape[3] != 8 * dim * fields[4 * number]:
            raise BadRequest(f"packed keys {list(tensors[0].shape)} do not fit heads of {dim} numbers.")
        blocks.count, blocks.wide = tensors[0].shape[2], int(tensors[6].dtype == torch.int32)
        for name, tensor in zip((*names, "key_levels", "value_levels"), tensors[:9], strict=True):
            setattr(blocks, name, tensor.data_ptr())
        for name, value in zip(BLOCK_FIELDS, fields[4 * number : 4 * number + 4], strict=True):
            setattr(blocks, name, value)
        del tensors[:9]
    return tensors, asked


def _fake(
    queries: Tensor,
    turned: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    mask: Tensor | None,
    scale: float,
    weights: bool,
) -> tuple[Tensor, Tensor]:
    batch, all_heads, tokens, dim = queries.shape
    rows = [layout[4 + 5 * number : 9 + 5 * number] for number in range(layout[2])]
    asked = sum(row[1] for row in rows if not row[3]) if weights else 0
    return queries.new_empty(batch, tokens, all_heads, dim), queries.new_empty(batch, layout[0], tokens, asked)


ops.register(
    "cpu_kv_attend(Tensor queries, Tensor turned, Tensor[] tensors, int[] layout, Tensor? mask, float scale, bool weights)"
    " -> (Tensor, Tensor)",
    _attend,
    _fake,
    "CPU",
)
attend = ops.OPS.cpu_kv_attend
