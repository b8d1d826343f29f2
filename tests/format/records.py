"""Random low-bit records with every optional term, and a slow decoder that shares no code with the package.

The decoder reads the stored bytes with Python integers and floats, one weight at a time, from the text of the format:
it is the second opinion against which ``dequantize`` is held.
"""

from __future__ import annotations

import struct
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from hf_lowbit.format import Layout, Levels, LowBitTensor, Stage

GENERATED = (
    Levels("uniform", 4),
    Levels("uniform_zero_free", 1),
    Levels("integer", 3),
    Levels("affine", 5),
    Levels("power", 6, exponent=0.7),
    Levels("power_zero_free", 2, exponent=0.9),
    Levels("normal_float", 4),
    Levels("qlora", 4),
    Levels("float", 7, mantissa=3),
    Levels("power_of_two", 3),
    Levels("ternary", 2),
    Levels("uniform", 8),
)


@st.composite
def stages(draw: st.DrawFn, rows: int, subsets: bool) -> Stage:
    """A stage for a matrix of ``rows`` rows; ``subsets`` allows one that covers only some of them."""
    fitted = draw(st.booleans())
    levels = Levels("fitted", draw(st.integers(1, 8))) if fitted else draw(st.sampled_from(GENERATED))
    table_ids = fitted and draw(st.booleans())
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    return Stage(
        levels=levels,
        group_size=draw(st.sampled_from([8, 16, 24, 100, 256])),
        scale_bits=draw(st.sampled_from([32, 16, 8, 6])),
        offset=draw(st.booleans()),
        tables=draw(st.integers(1, 4) if table_ids else st.sampled_from(divisors)) if fitted else 1,
        table_ids=table_ids,
        rows=draw(st.none() | st.integers(1, rows)) if subsets else None,
        zero=draw(st.booleans()),
    )


@st.composite
def layouts(draw: st.DrawFn, subsets: bool = True) -> Layout:
    """Any layout of a small matrix or stack."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 70)) | st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 40)))
    rows = prod(shape[:-1])
    return Layout(
        shape=shape,
        stages=tuple(draw(st.lists(stages(rows, subsets), min_size=1, max_size=3))),
        shift=draw(st.integers(-12, 12)),
        method=draw(st.sampled_from(["", "codebook"])),
        outliers=draw(st.integers(0, 9)),
        rank=draw(st.integers(0, 3)),
        permuted=draw(st.booleans()),
    )


def fill(layout: Layout, seed: int) -> LowBitTensor:
    """A record of ``layout`` whose stored tensors hold random, legal content."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in layout.fields.items():
        if dtype == torch.int16:
            value = torch.randn(shape, generator=generator).half().view(torch.int16)
        elif name.startswith(("scale", "offset")) and dtype == torch.int32:
            value = torch.randn(shape, generator=generator).view(torch.int32)
        else:
            value = torch.randint(0, 256, shape, generator=generator).to(dtype)
        tensors[name] = value
    for number, stage in enumerate(layout.stages):
        suffix = f"_{number}" if number else ""
        if stage.table_ids:
            name = f"table_ids{suffix}"
            tensors[name] = torch.randint(0, stage.tables, tensors[name].shape, generator=generator).to(torch.uint8)
        if stage.rows is not None:
            picked = torch.randperm(layout.rows, generator=generator)[: stage.rows]
            tensors[f"row_ids{suffix}"] = picked.sort().values.to(torch.int32)
    if layout.permuted:
        tensors["permutation"] = torch.randperm(layout.in_features, generator=generator).to(torch.int32)
    if layout.outliers:
        columns = torch.randint(0, layout.in_features, (layout.outliers,), generator=generator)
        rows = torch.randint(0, layout.rows, (layout.outliers,), generator=generator).sort().values
        starts = [int((rows < row).sum()) for row in range(layout.rows + 1)]
        tensors["outlier_columns"] = columns.to(torch.int32).to(torch.uint16)
        tensors["outlier_starts"] = torch.tensor(starts, dtype=torch.int32)
    return LowBitTensor(layout, tensors)


def half(pattern: int) -> float:
    """The number an fp16 bit pattern (as signed int16) stands for."""
    return struct.unpack("<e", struct.pack("<h", pattern))[0]


def code_at(row: bytes, index: int, bits: int, block: int) -> int:
    """Code ``index`` of one packed row: fields of a little-endian number, or bit planes for 3, 5, 6 and 7 bits."""
    if bits in (1, 2, 4, 8):
        return int.from_bytes(row, "little") >> (index * bits) & ((1 << bits) - 1)
    start, within = index // block * block * bits // 8, index % block
    planes = [row[start + plane * block // 8 :][: block // 8] for plane in range(bits)]
    return sum((int.from_bytes(plane, "little") >> within & 1) << number for number, plane in enumerate(planes))


def slow_values(record: LowBitTensor) -> Tensor:
    """Every value of a record by the formula of the format, float64 in the logical shape."""
    layout = record.layout
    out = [[0.0] * layout.in_features for _ in range(layout.rows)]
    content = {name: tensor.tolist() for name, tensor in record.tensors.items()}
    for number, stage in enumerate(layout.stages):
        suffix = f"_{number}" if number else ""
        fields = {name.removesuffix(suffix): value for name, value in content.items() if name.endswith(suffix)}
        for slot, row in enumerate(fields["row_ids"] if stage.rows is not None else range(layout.rows)):
            table = _table(fields, stage, slot, row, layout.rows)
            for column in range(layout.in_features):
                code = code_at(bytes(fields["codes"][slot]), column, stage.bits, 32)
                zero = fields["zero"][slot][column // stage.group_size] if stage.zero else 0
                value = (table[code] - zero) * _group_value(fields, "scale", stage, slot, column)
                value += _group_value(fields, "offset", stage, slot, column) if stage.offset else 0.0
                out[row][column] += value
    for row in range(layout.rows):
        for column in range(layout.in_features):
            for term in range(layout.rank):
                out[row][column] += half(content["low_rank_b"][row][term]) * half(content["low_rank_a"][term][column])
        if layout.outliers:
            for entry in range(content["outlier_starts"][row], content["outlier_starts"][row + 1]):
                out[row][content["outlier_columns"][entry]] += half(content["outlier_values"][entry])
    if layout.permuted:
        places = content["permutation"]
        out = [[line[places.index(column)] for column in range(layout.in_features)] for line in out]
    return (torch.tensor(out, dtype=torch.float64) * 2.0**layout.shift).view(layout.shape)


def _table(fields: dict, stage: Stage, slot: int, row: int, rows: int) -> list[float]:
    if not stage.levels.stored:
        return stage.levels.table().tolist()
    number = fields["table_ids"][slot] if stage.table_ids else row * stage.tables // rows
    return [half(pattern) for pattern in fields["levels"][number]]


def _group_value(fields: dict, name: str, stage: Stage, slot: int, column: int) -> float:
    group = column // stage.group_size
    if stage.scale_bits == 16:
        return half(fields[name][slot][group])
    if stage.scale_bits == 32:
        return struct.unpack("<f", struct.pack("<i", fields[name][slot][group]))[0]
    code = code_at(bytes(fields[name][slot]), group, stage.scale_bits, 8) - 2 ** (stage.scale_bits - 1)
    per_super = max(1, 256 // stage.group_size)
    return code * half(fields[f"{name}_super"][slot][group // per_super])
