"""Layouts: the exact JSON round trip, the stored tensors a layout implies, and the bytes the ledger counts."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowbit.errors import FormatError
from hf_lowbit.format import Field, Layout, Levels, Stage, ledger, parse_layout

PLAIN = Layout((6, 70), (Stage(Levels("uniform", 3), 32),))


@given(data=st.data())
def test_json_gives_the_same_layout_back(records, data):
    layout = data.draw(records.layouts())
    text = layout.dumps()
    assert parse_layout(text) == layout
    assert parse_layout(text).fields == layout.fields
    assert json.loads(text) == layout.to_json()


def test_json_text_of_a_layout():
    # Written into every file, so a change of this text is a change of the format.
    stage = Stage(Levels("power", 3, exponent=0.75), 32, scale_bits=6, offset=True)
    rest = Stage(Levels("fitted", 2), 70, tables=2, table_ids=True, rows=4)
    layout = Layout((6, 70), (stage, rest), shift=-9, method="powerquant", outliers=5, rank=2, permuted=True)
    assert layout.dumps() == (
        '{"shape":[6,70],"stages":['
        '{"bits":3,"levels":{"family":"power","exponent":0.75},"group_size":32,"scale_bits":6,"offset":true},'
        '{"bits":2,"levels":{"family":"fitted"},"group_size":70,"scale_bits":16,"tables":2,"table_ids":true,"rows":4}],'
        '"shift":-9,"method":"powerquant","outliers":5,"rank":2,"permuted":true}'
    )


def test_fields_of_a_plain_layout():
    # 70 codes are padded to 96, in bit planes of 3 bits; groups of 32 make three scales a row.
    assert PLAIN.fields == {"codes": Field(torch.uint8, (6, 36)), "scale": Field(torch.int16, (6, 3))}


def test_fields_of_a_layout_with_every_term():
    first = Stage(Levels("fitted", 4), 32, scale_bits=6, offset=True, tables=3)
    second = Stage(Levels("fitted", 1), 70, tables=9, table_ids=True, rows=4)
    layout = Layout((2, 3, 70), (first, second), outliers=5, rank=2, permuted=True)
    assert list(layout.fields.items()) == [
        ("codes", (torch.uint8, (6, 48))),
        ("scale", (torch.uint8, (6, 6))),
        ("scale_super", (torch.int16, (6, 1))),
        ("offset", (torch.uint8, (6, 6))),
        ("offset_super", (torch.int16, (6, 1))),
        ("levels", (torch.int16, (3, 16))),
        ("codes_1", (torch.uint8, (4, 12))),
        ("scale_1", (torch.int16, (4, 1))),
        ("levels_1", (torch.int16, (9, 2))),
        ("table_ids_1", (torch.uint8, (4,))),
        ("row_ids_1", (torch.int32, (4,))),
        ("permutation", (torch.int32, (70,))),
        ("outlier_values", (torch.int16, (5,))),
        ("outlier_columns", (torch.uint16, (5,))),
        ("outlier_starts", (torch.int32, (7,))),
        ("low_rank_a", (torch.int16, (2, 70))),
        ("low_rank_b", (torch.int16, (6, 2))),
    ]


@pytest.mark.parametrize(("width", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_outlier_columns_are_as_narrow_as_the_row_allows(width, dtype):
    layout = Layout((1, width), PLAIN.stages, outliers=1)
    assert layout.fields["outlier_columns"].dtype == dtype


@pytest.mark.parametrize(
    ("group_size", "width", "supers"),
    [(32, 256, 1), (32, 257, 2), (128, 512, 2), (100, 300, 2), (256, 512, 2), (300, 600, 2), (1024, 1000, 1)],
)
def test_one_super_scale_for_at_most_256_weights_or_one_group(group_size, width, supers):
    stage = Stage(Levels("uniform", 4), group_size, scale_bits=8)
    assert stage.fields(5, width)["scale_super"].shape == (5, supers)


@given(data=st.data())
def test_ledger_counts_every_stored_byte(records, data):
    layouts = data.draw(st.lists(records.layouts(), min_size=1, max_size=3))
    stored = sum(prod(shape) * dtype.itemsize for layout in layouts for dtype, shape in layout.fields.values())
    counted = ledger(layouts)
    assert counted.bytes == stored
    assert counted.numel == sum(prod(layout.shape) for layout in layouts)
    assert counted.bits_per_weight == 8 * stored / counted.numel


def test_ledger_by_kind():
    stage = Stage(Levels("fitted", 4), 32, scale_bits=6, offset=True)
    layout = Layout((8, 256), (stage, Stage(Levels("uniform", 2), 256)), outliers=10)
    assert ledger(layout).bytes_by_kind == {
        "codes": 8 * 128 + 8 * 64,
        "scale": 8 * (6 + 2) + 8 * 2,
        "offset": 8 * (6 + 2),
        "levels": 32,
        "outlier": 10 * 4 + 9 * 4,
    }


@pytest.mark.parametrize(("bits", "expected"), [(4, 4.25), (2, 2.25), (3, 3.25)])
def test_bits_per_weight_of_the_default_grouping(bits, expected):
    # Groups of 32 with 6-bit scales under one fp16 scale per 256 weights cost a quarter of a bit.
    layout = Layout((64, 256), (Stage(Levels("uniform", bits), 32, scale_bits=6),))
    assert ledger(layout).bits_per_weight == expected


def test_ledger_of_nothing():
    assert ledger([]).bytes == 0
    assert ledger([]).bits_per_weight == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "no stage"),
        ({"shape": [6]}, "impossible shape (6,)"),
        ({"shape": [0, 70]}, "impossible shape (0, 70)"),
        ({"shape": [1, 2, 3, 4]}, "impossible shape (1, 2, 3, 4)"),
        ({"colour": "red"}, "colour"),
        ({"stages": [{"bits": 3, "levels": {"family": "unifrom"}, "group_size": 32}]}, "Did you mean 'uniform'"),
        ({"stages": [{"bits": 9, "levels": {"family": "uniform"}, "group_size": 32}]}, "need 2 to 8 bits, got 9"),
        ({"stages": [{"bits": "3", "levels": {"family": "uniform"}, "group_size": 32}]}, "unreadable layout"),
        ({"stages": [{"bits": 3, "levels": {"family": "uniform"}, "group_size": 0}]}, "impossible stage"),
        ({"stages": [{"bits": 3, "levels": {"family": "uniform"}, "group_size": 32, "scale_bits": 7}]}, "impossible stage"),
        ({"stages": [{"bits": 3, "levels": {"family": "uniform"}, "group_size": 32, "tables": 0}]}, "impossible stage"),
        ({"stages": [{"bits": 3, "levels": {"family": "uniform"}}]}, "group_size"),
        ({"stages": ["plain"]}, "unreadable layout"),
        ({"stages": 7}, "unreadable layout"),
        ({"shape": None}, "unreadable layout"),
    ],
)
def test_impossible_layouts_are_refused(change, message):
    with pytest.raises(FormatError) as caught:
        Layout.from_json(PLAIN.to_json() | change)
    assert message in str(caught.value)


@pytest.mark.parametrize("missing", ["shape", "stages"])
def test_a_layout_needs_shape_and_stages(missing):
    values = PLAIN.to_json()
    del values[missing]
    with pytest.raises(FormatError, match=missing):
        Layout.from_json(values)


@pytest.mark.parametrize("values", [None, 3, "text", ["ab", "cde"]])
def test_what_is_no_json_object_is_refused(values):
    with pytest.raises(FormatError, match="unreadable layout"):
        Layout.from_json(values)
