"""From a level table and a rule for scales to the stored fields of one stage, block by block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.packing import pack
from hf_lowbit.format.scales import encode
from hf_lowbit.solvers.parallel import in_parallel
from hf_lowbit.solvers.rows import Rows
from hf_lowbit.solvers.scale_search import codes_of, search_scales, store_scales

# Rows start .. stop, and the number of their level table.
Span = tuple[int, int, int]
# (values [n, groups, group_size], importance, table [K]) -> scale [n, groups, 1]
ScaleRule = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def empty_fields(rows: Rows, stage: Stage) -> dict[str, Tensor]:
    """Uninitialised stored tensors of a stage."""
    fields = stage.fields(rows.rows, rows.in_features)
    return {name: torch.empty(f.shape, dtype=f.dtype, device=rows.weight.device) for name, f in fields.items()}


def put_codes(fields: dict[str, Tensor], rows: Rows, stage: Stage, span: Span, codes: Tensor) -> None:
    """Pack codes ``[n, groups, group_size]`` of a span of rows; codes of padding are dropped."""
    start, stop, _ = span
    fields["codes"][start:stop] = pack(codes.flatten(1)[:, : rows.in_features], stage.bits)


def put_group_values(fields: dict[str, Tensor], name: str, stage: Stage, span: Span, values: Tensor) -> Tensor:
    """Store scales or offsets ``[n, groups, 1]`` of a span at their nearest stored value, which is returned."""
    start, stop, _ = span
    kept, fields[name][start:stop], supers = encode(values.squeeze(-1), stage.group_size, stage.scale_bits)
    if supers is not None:
        fields[f"{name}_super"][start:stop] = supers
    return kept[..., None]


def encode_searched(rows: Rows, stage: Stage, tables: Tensor, signed: bool) -> dict[str, Tensor]:
    """Fields of a stage whose scales are searched for the given tables, float32 ``[tables, K]``."""
    fields = empty_fields(rows, stage)

    def encode_span(span: Span) -> None:
        start, stop, number = span
        table = tables[number if len(tables) > 1 else 0]
        values, importance = rows.block(start, stop)
        scale = search_scales(values, table, importance, signed)
        kept, stored = store_scales(values, scale, table, importance, stage.group_size, stage.scale_bits)
        for name, tensor in stored.items():
            fields[name][start:stop] = tensor
        put_codes(fields, rows, stage, span, codes_of(values, kept, table))

    in_parallel(encode_span, rows.spans())
    return fields


def encode_ruled(rows: Rows, stage: Stage, rule: ScaleRule) -> dict[str, Tensor]:
    """Fields of a stage whose scales follow a closed rule, rounded to their nearest stored value."""
    fields = empty_fields(rows, stage)
    table = stage.levels.table()

    def encode_span(span: Span) -> None:
        values, importance = rows.block(*span[:2])
        kept = put_group_values(fields, "scale", stage, span, rule(values, importance, table))
        put_codes(fields, rows, stage, span, codes_of(values, kept, table))

    in_parallel(encode_span, rows.spans())
    return fields


def encode_affine(rows: Rows, stage: Stage, rule: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Fields of a stage with offsets; ``rule(values, top_code)`` gives scale and offset, ``[n, groups, 1]`` each."""
    fields = empty_fields(rows, stage)
    table = stage.levels.table()

    def encode_span(span: Span) -> None:
        values, _ = rows.block(*span[:2])
        scale, offset = rule(values, 2**stage.bits - 1)
        scale = put_group_values(fields, "scale", stage, span, scale)
        offset = put_group_values(fields, "offset", stage, span, offset)
        put_codes(fields, rows, stage, span, codes_of(values - offset, scale, table))

    in_parallel(encode_span, rows.spans())
    return fields
