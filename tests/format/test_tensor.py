"""``LowBitTensor``: what it refuses, and decoding with every optional term against a slow independent formula."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.errors import FormatError
from hf_lowbit.format import Layout, Levels, LowBitTensor, Spec, Stage, ledger, tensor
from hf_lowbit.solvers import solve

STAGE = Stage(Levels("uniform", 4), 32)
FITTED = Levels("fitted", 3)
# Each optional term alone, so that a failure names it; the random layouts below mix them.
TERMS = {
    "plain": Layout((5, 64), (STAGE,)),
    "ragged": Layout((5, 37), (STAGE,)),
    "group-wider-than-row": Layout((5, 20), (STAGE,)),
    "shift-up": Layout((5, 37), (STAGE,), shift=11),
    "shift-down": Layout((5, 37), (STAGE,), shift=-20),
    "offset": Layout((5, 37), (Stage(Levels("affine", 4), 32, offset=True),)),
    "offset-coded": Layout((5, 600), (Stage(Levels("affine", 5), 32, scale_bits=6, offset=True),)),
    "scale-8": Layout((3, 600), (Stage(Levels("integer", 2), 100, scale_bits=8),)),
    "fitted": Layout((5, 37), (Stage(FITTED, 16),)),
    "tables-by-block": Layout((6, 37), (Stage(FITTED, 16, tables=3),)),
    "tables-by-id": Layout((7, 37), (Stage(FITTED, 16, tables=4, table_ids=True),)),
    "stack": Layout((3, 4, 37), (Stage(FITTED, 16, tables=3),)),
    "residual": Layout((5, 37), (STAGE, Stage(Levels("ternary", 2), 16), Stage(FITTED, 37, scale_bits=8))),
    "residual-of-some-rows": Layout((9, 37), (STAGE, Stage(Levels("integer", 2), 16, rows=4))),
    "residual-of-some-rows-by-block": Layout((9, 37), (STAGE, Stage(FITTED, 16, tables=3, rows=4))),
    "residual-of-some-rows-by-id": Layout((9, 37), (STAGE, Stage(FITTED, 16, tables=3, table_ids=True, rows=4))),
    "permutation": Layout((5, 37), (STAGE,), permuted=True),
    "outliers": Layout((5, 37), (STAGE,), outliers=11),
    "low-rank": Layout((5, 37), (STAGE,), rank=3),
    "all": Layout((2, 3, 37), (Stage(FITTED, 16, 6, True, 2), Stage(FITTED, 8, rows=2)), 3, "", 7, 2, True),
}  # fmt: skip


def assert_decodes(records, record: LowBitTensor) -> None:
    expected = records.slow_values(record)
    found = record.dequantize()
    assert found.dtype == torch.float32 and found.shape == expected.shape
    # The slow values are float64: float32 sums of a few terms may differ in their last digits.
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", TERMS)
def test_decoding_of_each_term(records, name):
    assert_decodes(records, records.fill(TERMS[name], seed=1))


@settings(max_examples=60)
@given(data=st.data())
def test_decoding_of_any_record(records, data):
    record = records.fill(data.draw(records.layouts()), data.draw(st.integers(0, 99)))
    assert_decodes(records, record)
    # Rows are decoded in blocks; where a block ends must not show.
    with mock.patch.object(tensor, "DECODE_BLOCK", 2 * record.layout.in_features):
        assert_decodes(records, record)


@pytest.mark.parametrize("name", TERMS)
def test_codes_scales_offsets_and_tables_are_those_of_the_formula(records, name):
    record = records.fill(TERMS[name], seed=2)
    plain = Layout(TERMS[name].shape, TERMS[name].stages[:1], shift=TERMS[name].shift)
    only = LowBitTensor(plain, {field: record.tensors[field] for field in plain.fields})
    stage, rows = plain.stages[0], plain.rows
    groups = torch.arange(plain.in_features) // stage.group_size
    owner = record.tensors["table_ids"].long() if stage.table_ids else torch.arange(rows) * stage.tables // rows
    levels = record.table()[owner].gather(1, record.codes().long())
    values = levels * record.scales()[:, groups]
    if stage.offset:
        values = values + record.offsets()[:, groups]
    else:
        assert record.offsets() is None
    assert torch.allclose(values.view(plain.shape), only.dequantize(), rtol=1e-6, atol=0)


@settings(max_examples=40)
@given(data=st.data())
def test_rows_are_rows_of_the_whole(records, data):
    layout = data.draw(records.layouts(subsets=False))
    record = records.fill(layout, 3)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, layout.rows - 1), max_size=8)), dtype=torch.int64)
    picked = record.rows(ids)
    assert picked.shape == (len(ids), layout.in_features)
    assert torch.equal(picked.dequantize(), record.dequantize().view(-1, layout.in_features)[ids])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_may_repeat_and_come_in_any_order(records, dtype):
    record = records.fill(TERMS["outliers"], 4)
    ids = torch.tensor([4, 0, 4, 4, 2], dtype=dtype)
    assert torch.equal(record.rows(ids).dequantize(), record.dequantize()[ids.long()])


def test_rows_of_a_term_that_covers_some_rows_are_refused(records):
    with pytest.raises(NotImplementedError, match="decode the whole tensor"):
        records.fill(TERMS["residual-of-some-rows"], 0).rows(torch.tensor([0]))


@pytest.mark.parametrize("method", ["codebook", "halfquad", "rtn"])
def test_an_expert_is_one_matrix_of_the_stack(method):
    weight = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0))
    record = solve(weight, Spec(method=method, outliers=0.02, residual_terms=2))
    for number in range(3):
        expert = record.expert(number)
        assert expert.shape == (8, 40)
        assert torch.equal(expert.dequantize(), record.dequantize()[number])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_arithmetic_is_float32_whatever_the_dtype(records, dtype):
    record = records.fill(TERMS["all"], 5)
    assert torch.equal(record.dequantize(dtype), record.dequantize().to(dtype))


@settings(max_examples=30)
@given(data=st.data())
def test_empty_records_have_the_dtypes_and_shapes_of_real_ones(records, data):
    layout = data.draw(records.layouts())
    real, empty = records.fill(layout, 6), LowBitTensor.empty(layout)
    assert empty.device.type == "meta" and empty.shape == real.shape == layout.shape
    assert list(empty.tensors) == list(real.tensors)
    for name, stored in real.tensors.items():
        assert (empty.tensors[name].dtype, empty.tensors[name].shape) == (stored.dtype, stored.shape)
    assert real.to("meta").tensors.keys() == real.tensors.keys()


def test_ledger_counts_the_bytes_of_every_solver(case):
    row, bits = case
    weight = torch.randn(6, 75, generator=torch.Generator().manual_seed(bits))
    for changes in ({}, {"scale_bits": 6, "outliers": 0.02, "residual_terms": 2}):
        record = row.solve(weight, row.spec(bits, **changes))
        assert ledger(record.layout).bytes == sum(stored.nbytes for stored in record.tensors.values())


def without(name: str) -> dict:
    tensors = dict(LowBitTensor.empty(TERMS["outliers"]).tensors)
    del tensors[name]
    return tensors


@pytest.mark.parametrize("name", TERMS["outliers"].fields)
def test_a_missing_tensor_is_refused(name):
    with pytest.raises(FormatError, match=f"^stored tensor '{name}' is missing.$"):
        LowBitTensor(TERMS["outliers"], without(name))


def test_a_superfluous_tensor_is_refused():
    tensors = LowBitTensor.empty(TERMS["plain"]).tensors | {"colour": torch.zeros(1)}
    with pytest.raises(FormatError, match=r"^stored tensor 'colour' is not part of the layout \(codes, scale\).$"):
        LowBitTensor(TERMS["plain"], tensors)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("scale", torch.empty(5, 2, dtype=torch.float16), "should be torch.int16 [5, 2], found torch.float16 [5, 2]"),
        ("scale", torch.empty(5, 3, dtype=torch.int16), "should be torch.int16 [5, 2], found torch.int16 [5, 3]"),
        ("codes", torch.empty(5, 31, dtype=torch.uint8), "should be torch.uint8 [5, 32], found torch.uint8 [5, 31]"),
        ("outlier_columns", torch.empty(11, dtype=torch.int32), "should be torch.uint16 [11], found torch.int32 [11]"),
    ],
)  # fmt: skip
def test_another_dtype_or_shape_is_refused(name, tensor, message):
    with pytest.raises(FormatError) as caught:
        LowBitTensor(TERMS["outliers"], without(name) | {name: tensor})
    assert str(caught.value) == f"stored tensor {name!r} {message}."
