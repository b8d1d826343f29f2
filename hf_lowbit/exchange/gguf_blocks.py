"""GGUF's block types: which of them holds a record exactly, and the bytes of its blocks.

Blocks of 32: ``Q4_0``, ``Q5_0``, ``Q8_0`` are ``d * q``, ``Q4_1`` and ``Q5_1`` are ``d * q + m``, with fp16 ``d`` and ``m``.
Blocks of 256: ``Q6_K`` is ``d * sc * q`` with an int8 ``sc`` per 16 weights, ``Q4_K`` is ``d * sc * q - dmin * m`` with
6-bit ``sc`` and ``m`` per 32: where scales are coded under super-scales, they are these codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.exchange.grid import Grid, exactly, grid_of
from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.exchange.writing import Target, register
from hf_lowbit.format.packing import SCALE_BLOCK, unpack
from hf_lowbit.format.scales import from_f16_bits, group_count, groups_per_super, spread_super
from hf_lowbit.format.tensor import LowBitTensor

SCALES = "blocks have fp16 scales: --scale-bits 16."


class Block(NamedTuple):
    """One block type: weights and bytes of a block, and the encoder of a grid into bytes ``[rows, blocks, bytes]``."""

    name: str
    weights: int
    bytes: int
    encode: Callable[[LowBitTensor, Grid], Tensor]


def block_of(record: LowBitTensor) -> tuple[str, Tensor]:
    """The smallest block type that holds a record exactly, and its bytes, uint8 ``[rows, bytes of a row]``.

    Raises:
        Misfit: none does; of the reasons, that of the type that comes nearest.
    """
    grid = grid_of(record)
    reasons: list[Misfit] = []
    kinds = PLAIN if record.layout.stages[0].scale_bits >= 16 else CODED
    for block in kinds[grid.offset is not None]:
        try:
            if grid.values.shape[1] % block.weights:
                raise Misfit(
                    "the number of columns", grid.values.shape[1], f"{block.name} needs a multiple of {block.weights}."
                )
            return block.name, block.encode(record, grid).flatten(1)
        except Misfit as misfit:
            reasons.append(misfit)
    raise reasons[-1]


def _grouped(grid: Grid, size: int) -> Tensor:
    """Values ``[rows, groups, size]``, where every group of the record is a whole number of groups of ``size``."""
    if grid.group_size % size:
        raise Misfit("group_size", grid.group_size, f"it must be a multiple of {size}: --group-size 32.")
    return grid.values.view(len(grid.values), -1, size)


def _within(values: Tensor, low: int, high: int, name: str) -> Tensor:
    if int(values.min()) < low or int(values.max()) > high:
        raise Misfit(
            "levels", f"whole numbers from {int(values.min())} to {int(values.max())}", f"{name} holds {low} .. {high}."
        )
    return values


def _halves(values: Tensor, field: str) -> Tensor:
    """fp16 numbers as bytes, uint8 ``[.., 2]``."""
    return exactly(values, torch.float16, field, SCALES)[..., None].contiguous().view(torch.uint8)


def _scaled(name: str, low: int, high: int, bits: int) -> Callable[[LowBitTensor, Grid], Tensor]:
    """Encoder of ``d * q``, ``q`` from ``low`` to ``high``."""

    def encode(record: LowBitTensor, grid: Grid) -> Tensor:
        if grid.zero is not None:
            raise Misfit("zero point", "there", "blocks have none.")
        q = _within(_grouped(grid, 32), low, high, name)
        scale = _halves(grid.spread(grid.scale, 32), "scale")
        if bits == 8:
            return torch.cat((scale, q.to(torch.int8).view(torch.uint8)), -1)
        return torch.cat((scale, *_nibbles((q - low).to(torch.uint8), bits)), -1)

    return encode


def _affine(name: str, bits: int) -> Callable[[LowBitTensor, Grid], Tensor]:
    """Encoder of ``d * q + m``, ``q`` from 0."""

    def encode(record: LowBitTensor, grid: Grid) -> Tensor:
        assert grid.offset is not None
        if grid.zero is not None:
            raise Misfit("zero point", "there", "blocks have none.")
        q = _within(_grouped(grid, 32), 0, (1 << bits) - 1, name)
        heads = [_halves(grid.spread(v, 32), field) for v, field in ((grid.scale, "scale"), (grid.offset, "offset"))]
        return torch.cat((*heads, *_nibbles(q.to(torch.uint8), bits)), -1)

    return encode


def _nibbles(q: Tensor, bits: int) -> list[Tensor]:
    """Codes ``[.., 32]``: their fifth bits as 4 bytes, if there are any, and low halves with codes 16 apart in a byte."""
    low = q & 15
    body = low[..., :16] | (low[..., 16:] << 4)
    if bits == 4:
        return [body]
    lanes = (q >> 4).unflatten(-1, (4, 8))
    places = torch.arange(8, dtype=torch.uint8)
    return [(lanes << places).sum(-1).to(torch.uint8), body]


def _coded(record: LowBitTensor, name: str, most: int) -> tuple[Tensor, Tensor]:
    """Codes of scales or offsets ``[rows, blocks of 256, groups]`` and super-scales ``[rows, blocks]``, shift included."""
    layout, stage, fields = record.layout, record.layout.stages[0], record.stage_tensors(0)
    size = stage.group_size
    if size > 256 or 256 % size:
        raise Misfit("group_size", size, "it must divide 256, the weights under a super-scale.")
    groups = group_count(layout.in_features, size)
    codes = unpack(fields[name], stage.scale_bits, groups, SCALE_BLOCK).to(torch.int16) - (1 << (stage.scale_bits - 1))
    supers = torch.ldexp(from_f16_bits(fields[f"{name}_super"]), torch.tensor(layout.shift))
    if int(codes.abs().max()) > most:
        raise Misfit("scale_bits", stage.scale_bits, f"scale codes beyond {most} do not fit.")
    assert groups_per_super(size) == 256 // size and spread_super(supers, groups, size).shape == codes.shape
    return codes.view(layout.rows, -1, 256 // size), supers


def _q6_k(record: LowBitTensor, grid: Grid) -> Tensor:
    """``d * sc * q``: 128 bytes of low nibbles, 64 of high bit pairs, 16 of ``sc``, ``d``."""
    if grid.zero is not None:
        raise Misfit("zero point", "there", "blocks have none.")
    _grouped(grid, 16)
    q = (_within(grid.values, -32, 31, "Q6_K") + 32).to(torch.uint8).view(len(grid.values), -1, 2, 4, 32)
    codes, supers = _coded(record, "scale", 127)
    sc = codes.repeat_interleave(16 // codes.shape[-1], -1).to(torch.int8).view(torch.uint8)
    low, high = q & 15, q >> 4
    ql = torch.cat((low[..., 0, :] | (low[..., 2, :] << 4), low[..., 1, :] | (low[..., 3, :] << 4)), -1)
    qh = high[..., 0, :] | (high[..., 1, :] << 2) | (high[..., 2, :] << 4) | (high[..., 3, :] << 6)
    return torch.cat((ql.flatten(-2), qh.flatten(-2), sc, _halves(supers / grid.factor, "scale_super")), -1)


def _q4_k(record: LowBitTensor, grid: Grid) -> Tensor:
    """``d * sc * q - dmin * m``: ``d``, ``dmin``, 12 bytes of ``sc`` and ``m``, 128 bytes of nibbles."""
    _grouped(grid, 32)
    if grid.zero is not None:
        raise Misfit("zero point", "there", "blocks have none.")
    q, (sc, d) = grid.values, _coded(record, "scale", 31)
    if grid.offset is None:
        # Symmetric levels: m = sc under dmin = 8 d puts the middle at code 8, and the sign of a scale goes to its codes.
        q = _within(q, -8, 7, "Q4_K")
        flip = grid.spread((sc < 0).flatten(1), 32).repeat_interleave(32, -1)
        q = torch.where(flip, -q, q)
        if int(q.max()) > 7:
            raise Misfit("scale", "negative beside a level of -8", "Q4_K has none: --levels uniform.")
        q, sc = q + 8, sc.abs()
        m, dmin = sc, 8 * d
    else:
        m, dmin = _coded(record, "offset", 31)
        m = -m
        if int(sc.min()) < 0 or int(m.min()) < 0:
            raise Misfit("offset", "above 0 in a group", "Q4_K subtracts it; Q4_1 holds any: --scale-bits 16.")
        q = _within(q, 0, 15, "Q4_K")
    per = 8 // sc.shape[-1]
    sc, m = (v.repeat_interleave(per, -1).to(torch.uint8) for v in (sc, m))
    heads = (_halves(d / grid.factor, "scale_super"), _halves(dmin / grid.factor, "offset_super"))
    if grid.offset is not None:
        heads = (heads[0], _halves(dmin, "offset_super"))
    last = (sc[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)
    first = [v[..., :4] | ((v[..., 4:] >> 4) << 6) for v in (sc, m)]
    nibbles = q.to(torch.uint8).view(len(q), -1, 4, 2, 32)
    body = (nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)).flatten(-2)
    return torch.cat((*heads, *first, last, body), -1)


# Without offsets and with them, smallest first; the reason of the widest is what users are told.
PLAIN = (
    (
        Block("Q4_0", 32, 18, _scaled("Q4_0", -8, 7, 4)),
        Block("Q5_0", 32, 22, _scaled("Q5_0", -16, 15, 5)),
        Block("Q8_0", 32, 34, _scaled("Q8_0", -128, 127, 8)),
    ),
    (Block("Q4_1", 32, 20, _affine("Q4_1", 4)), Block("Q5_1", 32, 24, _affine("Q5_1", 5))),
)
CODED = ((Block("Q4_K", 256, 144, _q4_k), Block("Q6_K", 256, 210, _q6_k)), (Block("Q4_K", 256, 144, _q4_k),))

register(
    Target(
        "gguf",
        "Llama, Mistral, Qwen2, Qwen3; whole-number levels in blocks of 32 with fp16 scales, or of 256 with coded ones",
        "--method rtn --levels uniform --group-size 32 --scale-bits 16",
    )
)
