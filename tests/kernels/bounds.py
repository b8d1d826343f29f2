"""How far the CPU kernels may be from the exact product, from the error analysis in ``hf_lowbit/kernels/cpu.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.format import LowBitTensor
from hf_lowbit.format.scales import group_count

BLOCK = 32


def exact_product(record: LowBitTensor, x: Tensor) -> Tensor:
    """``x @ W.T`` in float64."""
    return x.double() @ record.dequantize().double().T


def sum_bound(record: LowBitTensor, x: Tensor) -> Tensor:
    """What a float32 sum over the inputs, in any order, and the rounding to the dtype of ``x`` may lose, ``[..., rows]``."""
    terms = x.double().abs() @ magnitude(record).T
    steps = record.layout.in_features // 4 + 16 * len(record.layout.stages)
    return terms * (torch.finfo(torch.float32).eps * steps + torch.finfo(x.dtype).eps) + 1e-30


def magnitude(record: LowBitTensor) -> Tensor:
    """Sum over the terms of a weight of their sizes, float64 ``[rows, in]``: sums may cancel, roundings do not."""
    total = torch.zeros(record.layout.rows, record.layout.in_features, dtype=torch.float64)
    for number in range(len(record.layout.stages)):
        rows, scale, levels = _stage(record, number)
        total[rows] += (scale * levels).abs()
        if record.layout.stages[number].zero:
            zeros = record.stage_tensors(number)["zero"].double()
            total[rows] += (scale * _spread(record, number, zeros)).abs()
        offsets = record.offsets(number)
        if offsets is not None:
            total[rows] += _spread(record, number, offsets.double()).abs()
    # What is left of the weight beside the stages are outliers and the low-rank term.
    total = _unpermute(record, total)
    return 2 * total + record.dequantize().double().abs()


def int8_bound(record: LowBitTensor, x: Tensor) -> Tensor:
    """The bound of the ``int8`` mode, ``[..., rows]``, float64."""
    flat = x.double().reshape(-1, x.shape[-1])
    stored = flat[:, record.tensors["permutation"].long()] if record.layout.permuted else flat
    padded = torch.nn.functional.pad(stored, (0, -stored.shape[-1] % BLOCK))
    step = padded.view(flat.shape[0], padded.shape[-1] // BLOCK, BLOCK).abs().amax(-1) / 127
    half = (step / 2 * (1 + 1e-5)).repeat_interleave(BLOCK, dim=-1)[:, : stored.shape[-1]]
    bound = torch.zeros(flat.shape[0], record.layout.rows, dtype=torch.float64)
    for number in range(len(record.layout.stages)):
        rows, scale, levels = _stage(record, number)
        bound[:, rows] += half @ (scale * levels).abs().T
        bound[:, rows] += (stored.abs() + half) @ (scale.abs() * _level_error(record, number)).T
    return bound.view(*x.shape[:-1], record.layout.rows) + sum_bound(record, x)


def _level_error(record: LowBitTensor, number: int) -> float:
    """At most half a step of the coarsest int8 table that may be chosen; nothing for tables of small integers."""
    table, few = record.table(number).double(), record.layout.stages[number].bits <= 3
    if table.abs().max() <= (63 if few else 127) and torch.equal(table, table.round()):
        return 0.0
    return float(table.abs().max()) / (32 if few else 64) / 2


def _stage(record: LowBitTensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a stage, and its scales and levels per weight in stored order, float64 ``[rows of the stage, in]``."""
    stage, fields, layout = record.layout.stages[number], record.stage_tensors(number), record.layout
    rows = fields["row_ids"].long() if stage.rows is not None else torch.arange(layout.rows)
    table = record.table(number).double()
    ids = fields["table_ids"].long() if stage.table_ids else rows * stage.tables // layout.rows
    codes = record.codes(number).long()
    levels = table[0][codes] if table.shape[0] == 1 else table[ids[:, None], codes]
    return rows, _spread(record, number, record.scales(number).double()), levels


def _spread(record: LowBitTensor, number: int, values: Tensor) -> Tensor:
    stage = record.layout.stages[number]
    assert values.shape[-1] == group_count(record.layout.in_features, stage.group_size)
    return values.repeat_interleave(stage.group_size, dim=-1)[:, : record.layout.in_features]


def _unpermute(record: LowBitTensor, values: Tensor) -> Tensor:
    if not record.layout.permuted:
        return values
    out = torch.empty_like(values)
    out[:, record.tensors["permutation"].long()] = values
    return out
