"""What the attention kernels read of a packed KV cache: stores of rows and tiers of blocks, as the arguments of one op.

The tensors are those of ``hf_lowbit/kv`` as they are stored. An op takes them as one list and their description as whole
numbers; :func:`flatten` and :func:`parse` are each other's inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.kernels import ops

# Tokens of one packed block: a scale of a per-channel format serves that many of them.
BLOCK = 64
# Heads are whole multiples of so many numbers.
HEAD_STEP = 16
MOST_ROWS, MOST_BLOCKS = 8, 4
ROW_FIELDS, BLOCK_FIELDS = 4, 4
BLOCK_TENSORS = 9


class Rows(NamedTuple):
    """Tokens kept row by row, of which the first ``length`` slots of ``room`` count.

    Attributes:
        keys, values: ``[batch, heads, room, dim]``, int8 or floats.
        key_scale, value_scale: fp16 ``[batch, heads, room]`` of int8 rows, else None.
        positions: int16 or int32 ``[batch, heads, room]``, or None where they follow each other from ``first``.
        low: whether they are in the coordinates of low tiers.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    positions: Tensor | None
    length: int
    first: int
    low: bool


class Blocks(NamedTuple):
    """Packed blocks of 64 tokens (``hf_lowbit/kv/blocks.py``).

    Attributes:
        keys, values: uint8 ``[batch, heads, blocks, 8 * dim * bits]``.
        key_scale, key_offset, value_scale, value_offset: fp16 ``[batch, heads, blocks, dim]`` where they go by channel, else
            ``[batch, heads, blocks, 64, 1]``.
        positions: int16 or int32 ``[batch, heads, blocks, 64]``.
        key_levels, value_levels: level tables in the form the kernel wants.
    """

    keys: Tensor
    key_scale: Tensor
    key_offset: Tensor
    values: Tensor
    value_scale: Tensor
    value_offset: Tensor
    positions: Tensor
    key_levels: Tensor
    value_levels: Tensor
    key_bits: int
    value_bits: int
    keys_by_channel: bool
    values_by_channel: bool

    @property
    def size(self) -> int:
        """Blocks held."""
        return self.keys.shape[2]


class Parts(NamedTuple):
    """A whole layer: ``heads`` of keys, ``length`` of the sequence, newest tokens included."""

    heads: int
    length: int
    rows: tuple[Rows, ...]
    blocks: tuple[Blocks, ...]

    @property
    def asked(self) -> int:
        """Rows whose weights can be asked for: those that are not low."""
        return sum(rows.length for rows in self.rows if not rows.low)


def unfit(dim: int, most: int) -> str | None:
    """Why a kernel for heads of up to ``most`` numbers cannot serve heads of ``dim``, or None."""
    if dim % HEAD_STEP == 0 and dim <= most:
        return None
    return f"heads of {dim} numbers, not a multiple of {HEAD_STEP} up to {most}"


def flatten(parts: Parts) -> tuple[list[Tensor], list[int]]:
    """The tensors and the layout of an op."""
    tensors: list[Tensor] = []
    layout = [parts.heads, parts.length, len(parts.rows), len(parts.blocks)]
    for rows in parts.rows:
        tensors += [tensor for tensor in rows[:5] if tensor is not None]
        layout += [rows.length, rows.first, int(rows.low), int(rows.positions is not None)]
    for blocks in parts.blocks:
        for value in blocks:
            (tensors if isinstance(value, Tensor) else layout).append(value)  # type: ignore[arg-type]
    return tensors, layout


def parse(queries: Tensor, turned: Tensor, tensors: Sequence[Tensor], layout: Sequence[int]) -> Parts:
    """The parts that :func:`flatten` took apart.

    Raises:
        BadRequest: tensors that do not fit the layout or the queries; a kernel would read beyond them.
    """
    batch, all_heads, _, dim = queries.shape
    try:
        parts = _unflatten(iter(tensors), iter(layout))
    except (StopIteration, TypeError, ValueError):  # too few
        parts = None
    if parts is None or queries.dtype != torch.float32 or queries.shape != turned.shape or all_heads % parts.heads:
        raise BadRequest("the kernel of the packed cache was given tensors that do not fit its layout.")
    held = (batch, parts.heads)
    for rows in parts.rows:
        keys = rows.keys.shape
        if keys[:2] != held or keys[3] != dim or rows.length > keys[2] or rows.values.shape != keys:
            raise BadRequest(f"rows {list(keys)} do not fit {batch} sequences of {parts.heads} heads of {dim} numbers.")
    for blocks in parts.blocks:
        for side, bits in ((blocks.keys, blocks.key_bits), (blocks.values, blocks.value_bits)):
            if side.shape != (*held, blocks.size, 8 * dim * bits):
                raise BadRequest(f"packed blocks {list(side.shape)} do not fit heads of {dim} numbers of {bits} bits.")
    return parts


def _unflatten(tensors: Iterator[Tensor], numbers: Iterator[int]) -> Parts | None:
    """The parts, as far as their number goes; None where something is left over."""
    heads, length, row_count, block_count = islice(numbers, 4)
    rows, blocks = [], []
    for _ in range(min(row_count, MOST_ROWS)):
        filled, first, low, positions = islice(numbers, ROW_FIELDS)
        keys, values = islice(tensors, 2)
        key_scale, value_scale = islice(tensors, 2) if keys.dtype == torch.int8 else (None, None)
        where = next(tensors) if positions else None
        rows.append(Rows(keys, values, key_scale, value_scale, where, filled, first, bool(low)))
    for _ in range(min(block_count, MOST_BLOCKS)):
        key_bits, value_bits, keys_by_channel, values_by_channel = islice(numbers, BLOCK_FIELDS)
        found: list[Any] = list(islice(tensors, BLOCK_TENSORS))
        found += [key_bits, value_bits, bool(keys_by_channel), bool(values_by_channel)]
        blocks.append(Blocks(*found))
    left_over = next(tensors, None) is not None or next(numbers, None) is not None
    return None if left_over else Parts(heads, length, tuple(rows), tuple(blocks))


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
    rows = [layout[4 + ROW_FIELDS * number :] for number in range(layout[2])]
    asked = sum(row[0] for row in rows if not row[2]) if weights else 0
    return queries.new_empty(batch, tokens, all_heads, dim), queries.new_empty(batch, layout[0], tokens, asked)


def register(name: str, body: Callable[..., tuple[Tensor, Tensor]], key: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make a body the op ``hf_lowbit::name``: attention of the last tokens of a sequence over its whole cache.

    Args of the op:
        queries, turned: float32 ``[batch, heads, n, dim]``, dim contiguous, for rows and for low tiers.
        tensors, layout: from :func:`flatten`.
        mask: bool or float ``[batch, 1, n, length]`` of any strides, or None for causal.
        scale: of scores.
        weights: whether weights of the rows that are not low are wanted.

    The op returns its output float32 ``[batch, n, heads, dim]`` and weights ``[batch, heads of keys, n, rows]`` (of no rows
    where not wanted), averaged over the heads that share keys.
    """
    ops.register(
        f"{name}(Tensor queries, Tensor turned, Tensor[] tensors, int[] layout, Tensor? mask, float scale, bool weights)"
        " -> (Tensor, Tensor)",
        body,
        _fake,
        key,
    )
    return getattr(ops.OPS, name)
