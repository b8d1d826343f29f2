"""From a level table and a rule for scales to the stored fields of one stage, block by block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.packing import pack
from hf_lowbit.format.scales import encode
from hf_lowbit.solvers.rows import Rows
from hf_lowbit.solvers.scale_search import codes_of, search_scales, store_scales

# (values [n, groups, group_size], importance, table [K]) -> scale [n, groups, 1]
ScaleRule = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def empty_fields(rows: Rows, stage: Stage) -> dict[str, Tensor]:
    """Uninitialised stored tensors of a stage."""
    fields = stage.fields(rows.rows, rows.in_features)
    return {name: torch.empty(f.shape, dtype=f.dtype, device=rows.weight.device) for name, f in fields.items()}


def put_codes(fields: dict[str, Tensor], rows: Rows, stage: Stage, span: tuple[int, int], codes: Tensor) -> None:
    """Pack codes ``[n, groups, group_size]`` of a span of rows; codes of padding are dropped."""
    start, stop = span
    fields["codes"][start:stop] = pack(codes.flatten(1)[:, : rows.in_features], stage.bits)


def encode_searched(rows: Rows, stage: Stage, tables: Tensor, signed: bool) -> dict[str, Tensor]:
    """Fields of a stage whose scales are searched for the given tables, float32 ``[tables, K]``."""
    fields = empty_fields(rows, stage)
    for start, stop, number in rows.spans():
        table = tables[number if len(tables) > 1 else 0]
        values, importance = rows.block(start, stop)
        scale = search_scales(values, table, importance, signed)
        kept, stored = store_scales(values, scale, table, importance, stage.group_size, stage.scale_bits)
        for name, tensor in stored.items():
            fields[name][start:stop] = tensor
        put_codes(fields, rows, stage, (start, stop), codes_of(values, kept, table))
    return fields


def encode_ruled(rows: Rows, stage: Stage, rule: ScaleRule) -> dict[str, Tensor]:
    """Fields of a stage whose scales follow a closed rule, rounded to their nearest stored value."""
    fields = empty_fields(rows, stage)
    table = stage.levels.table()
    for start, stop, _ in rows.spans():
        values, importance = rows.block(start, stop)
        scale = rule(values, importance, table).squeeze(-1)
        kept, fields["scale"][start:stop], supers = encode(scale, stage.group_size, stage.scale_bits)
        if supers is not None:
            fields["scale_super"][start:stop] = supers
        put_codes(fields, rows, stage, (start, stop), codes_of(values, kept[..., None], table))
    return fields


def encode_affine(rows: Rows, stage: Stage, rule: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Fields of a stage with offsets; ``rule(values, top_code)`` gives scale and offset, ``[n, groups, 1]`` each."""
    fields = empty_fields(rows, stage)
    table = stage.levels.table()
    for start, stop, _ in rows.spans():
        values, _ = rows.block(start, stop)
        kept = {}
        for name, wanted in zip(("scale", "offset"), rule(values, 2**stage.bits - 1), strict=True):
            kept[name], fields[name][start:stop], supers = encode(wanted.squeeze(-1), stage.group_size, stage.scale_bits)
            if supers is not None:
                fields[f"{name}_super"][start:stop] = supers
        codes = codes_of(values - kept["offset"][..., None], kept["scale"][..., None], table)
        put_codes(fields, rows, stage, (start, stop), codes)
    return fields
