"""What the Triton kernels need to know of a layout, and the small tensors they read beside the stored ones.

The kernels read the canonical record: codes of 1, 2, 4 and 8 bits and bit planes alike are whole 32-bit words, a row's one
after another, so nothing is repacked and nothing large exists twice. ``derive`` adds tables as float32 and as byte planes
(divided by a power of two, their unit, so that four products of one activation each cannot overflow fp16), the number of
each row's table where there are several, and scales of 6 bits as bytes: 0.25 bits a weight at groups of 32, 6 % of a 4-bit
matrix; nothing at 8- and 16-bit scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.format.layout import Layout, parse_layout, stage_field
from hf_lowbit.format.packing import SCALE_BLOCK, packed_width, unpack
from hf_lowbit.format.scales import WIDE, coded_width, group_count, groups_per_super, super_count
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.kernels.cpu_repack import check_indices, table_of_row

# Widths whose levels are permuted out of registers.
PERMUTED = (2, 3, 4)
DERIVED = ("table", "planes_float16", "planes_bfloat16", "unit", "table_of_row", "scale", "offset")
# Groups of a row that has only one: more than any row is long.
ONE_GROUP = 1 << 30
PLANE_BYTES = 16


class StagePlan(NamedTuple):
    """One stage as the kernels see it.

    Attributes:
        bits: of a code.
        unit, unit_words: columns and 32-bit words of a unit.
        rows: that the stage covers.
        words: of a row.
        units: of a row; the last may be partly padding.
        group: columns of a group.
        coded: whether scales are bytes under super-scales.
        scale_stride, supers, per_super: scales of a row as they lie, super-scales of a row, groups of one super-scale.
        offset: whether there are offsets.
        tables: level tables.
        subset: whether it covers some rows only.
    """

    bits: int
    unit: int
    unit_words: int
    rows: int
    words: int
    units: int
    group: int
    coded: bool
    scale_stride: int
    supers: int
    per_super: int
    offset: bool
    tables: int
    subset: bool


class Plan(NamedTuple):
    """A layout as the kernels see it; ``factor`` is ``2**shift``."""

    layout: Layout
    stages: tuple[StagePlan, ...]
    rows: int
    columns: int
    factor: float

    @property
    def simple(self) -> bool:
        """Whether one launch does it: one stage over all rows and nothing beside it but a bias."""
        layout = self.layout
        return len(self.stages) == 1 and not (self.stages[0].subset or layout.outliers or layout.rank or layout.permuted)


def unit_of(bits: int) -> int:
    """Columns that whole words hold."""
    return 32 // bits if bits in (2, 4, 8) else 32


@lru_cache(maxsize=4096)
def plan(text: str) -> Plan:
    """The plan of a layout's text; cached, since the ops carry layouts as text."""
    layout = parse_layout(text)
    stages = []
    columns = layout.in_features
    for stage in layout.stages:
        unit, groups = unit_of(stage.bits), group_count(columns, stage.group_size)
        coded = stage.scale_bits != 16
        stride = coded_width(groups, 8) if stage.scale_bits == 8 else groups
        stages.append(
            StagePlan(
                stage.bits, unit, unit * stage.bits // 32, stage.rows or layout.rows, packed_width(columns, stage.bits) // 4,
                -(-columns // unit), stage.group_size if groups > 1 else ONE_GROUP, coded, stride,
                super_count(groups, stage.group_size) if coded else 0, groups_per_super(stage.group_size), stage.offset,
                stage.tables, stage.rows is not None,
            )
        )  # fmt: skip
    return Plan(layout, tuple(stages), layout.rows, columns, 2.0**layout.shift)


def unsupported(layout: Layout) -> str | None:
    """Why the kernels cannot run a layout, or None."""
    for stage in layout.stages:
        if stage.zero or stage.scale_bits == WIDE:
            return "zero points" if stage.zero else "32-bit scales"
        if stage.group_size % unit_of(stage.bits) and stage.group_size < layout.in_features:
            unit = unit_of(stage.bits)
            return f"groups of {stage.group_size} are not whole units of {unit} columns, which {stage.bits} bits need"
    return None


def derive(tensor: LowBitTensor) -> list[Tensor]:
    """What ``DERIVED`` names, for each stage in turn; empty tensors where it does not apply.

    Raises:
        FormatError: a stored index points outside the matrix.
    """
    check_indices(tensor)
    out = []
    for number, stage in enumerate(tensor.layout.stages):
        table, fields = tensor.table(number).float().contiguous(), tensor.stage_tensors(number)
        nothing = table.new_empty(0)
        planes = [nothing, nothing, nothing]
        if stage.bits in PERMUTED:
            unit = unit_of_table(table)
            planes = [*(byte_planes(table / unit, dtype) for dtype in (torch.float16, torch.bfloat16)), unit]
        ids = table_of_row(tensor, stage, fields) if stage.tables > 1 else nothing
        groups = group_count(tensor.layout.in_features, stage.group_size)
        bytes_ = [nothing, nothing]
        if stage.scale_bits == 6:
            # Bytes hold a code plus 128, as stored codes of 8 bits do.
            for place, name in enumerate(["scale", "offset"][: 1 + stage.offset]):
                bytes_[place] = unpack(fields[name], 6, groups, SCALE_BLOCK).add_(128 - 32).contiguous()
        out += [table, *planes, ids.contiguous(), *bytes_]
    return out


def derived_bytes(layout: Layout) -> int:
    """Bytes of what :func:`derive` adds on the device."""
    total = 0
    for stage in layout.stages:
        rows, groups = stage.rows or layout.rows, group_count(layout.in_features, stage.group_size)
        total += 4 * stage.tables * 2**stage.bits
        total += 2 * 2 * PLANE_BYTES * stage.tables + 4 if stage.bits in PERMUTED else 0
        total += 4 * rows if stage.tables > 1 else 0
        total += (1 + stage.offset) * rows * groups if stage.scale_bits == 6 else 0
    return total


def unit_of_table(table: Tensor) -> Tensor:
    """The power of two, float32 ``[1]``, that brings levels to a quarter at most."""
    most = table.abs().max().clamp_min(2.0**-100)
    return torch.exp2(torch.ceil(torch.log2(most)) + 2).view(1)


def byte_planes(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels ``[tables, at most 16]`` as ``dtype``: their low bytes in four words and their high bytes in four more."""
    halves = table.to(dtype).view(torch.uint8).view(table.shape[0], table.shape[1], 2)
    padded = torch.nn.functional.pad(halves, (0, 0, 0, PLANE_BYTES - table.shape[1]))
    return padded.transpose(1, 2).contiguous().view(table.shape[0], 2 * PLANE_BYTES).view(torch.int32)


class StageTensors(NamedTuple):
    """Tensors of a stage under the names the kernels have for them; ``None`` where there is none."""

    codes: Tensor
    scale: Tensor
    scale_super: Tensor | None
    offset: Tensor | None
    offset_super: Tensor | None
    table: Tensor
    planes: dict[torch.dtype, Tensor]
    unit: Tensor
    table_of_row: Tensor | None
    row_ids: Tensor | None


def stage_tensors(plan_: Plan, number: int, stored: Sequence[Tensor], derived: Sequence[Tensor]) -> StageTensors:
    """Stored and derived tensors of a stage, fp16 patterns as fp16 and codes as words."""
    named = dict(zip(plan_.layout.fields, stored, strict=True))
    own = dict(zip(DERIVED, derived[len(DERIVED) * number :], strict=False))
    stage = plan_.layout.stages[number]

    def group_values(name: str) -> Tensor | None:
        found = named.get(stage_field(name, number))
        if found is None or stage.scale_bits == 8:
            return found
        return own[name] if stage.scale_bits == 6 else found.view(torch.float16)

    def supers(name: str) -> Tensor | None:
        found = named.get(stage_field(f"{name}_super", number))
        return None if found is None else found.view(torch.float16)

    scale = group_values("scale")
    assert scale is not None
    return StageTensors(
        named[stage_field("codes", number)].view(torch.int32), scale, supers("scale"), group_values("offset"),
        supers("offset"), own["table"],
        {torch.float16: own["planes_float16"], torch.bfloat16: own["planes_bfloat16"]}, own["unit"],
        own["table_of_row"] if stage.tables > 1 else None, named.get(stage_field("row_ids", number)),
    )  # fmt: skip
