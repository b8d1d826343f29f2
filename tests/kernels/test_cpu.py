"""The compiled kernels against the exact product, in every instruction set this machine has, within the derived bounds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.errors import BadRequest, FormatError
from hf_lowbit.format import Layout, Levels, LowBitTensor, Stage
from hf_lowbit.kernels import cpu, cpu_library, ops, select

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason=str(cpu_library.trouble()))
ISAS = cpu_library.instruction_sets()
MODES = ("int8", "exact")
FAMILIES = {
    1: ("fitted", "uniform_zero_free"),
    2: ("fitted", "uniform"),
    3: ("fitted", "affine"),
    4: ("fitted", "normal_float", "uniform"),
    5: ("fitted", "affine"),
    6: ("fitted", "uniform"),
    7: ("fitted", "uniform"),
    8: ("fitted", "integer", "affine"),
}
# rows, columns, group, scale bits, offset or zero point: whole blocks and ragged ones, one row, one column, groups of 4.
SHAPES = [
    (53, 31, 31, 16, False),
    (16, 64, 32, 6, True),
    (37, 300, 64, 8, True),
    (5, 83, 83, 16, False),
    (33, 256, 8, 6, False),
    (48, 200, 48, 16, True),
    (1, 1, 1, 16, False),
    (20, 512, 128, 6, False),
    (35, 160, 32, 32, True),
    (21, 192, 64, 16, "zero"),
    (18, 100, 20, 32, "zero"),
]


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Run on one instruction set, then on the former again."""
    before = cpu_library.instruction_set()
    assert cpu_library.library().lowbit_set_isa(isa.encode())
    try:
        yield
    finally:
        cpu_library.library().lowbit_set_isa(before.encode())


@pytest.fixture(params=ISAS)
def isa(request) -> Iterator[str]:
    """Run a test once per instruction set."""
    with using(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Give torch its number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bounds(load_test_module):
    """The error analysis: tests/kernels/bounds.py."""
    return load_test_module("kernels/bounds.py")


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def backend() -> cpu.Cpu:
    return cpu.Cpu()


def simple(rows: int = 29, columns: int = 96, bits: int = 4, group: int = 32, **other) -> Layout:
    return Layout((rows, columns), (Stage(Levels("fitted", bits), group),), **other)


def check(bounds, record: LowBitTensor, x: torch.Tensor, batches=(None,), isas=(None,)) -> None:
    """Both modes, on the first ``batches`` rows of ``x``, on ``isas`` or the one in use."""
    prepared = backend().prepare(record)
    expected = bounds.exact_product(record, x)
    limits = {"int8": bounds.int8_bound(record, x), "exact": bounds.sum_bound(record, x)}
    for isa, mode, batch in product(isas, MODES, batches):
        with cpu.arithmetic(mode), using(isa or cpu_library.instruction_set()):
            found = backend().linear(x[:batch], prepared)
        assert found.dtype == x.dtype and found.shape == expected[:batch].shape
        assert ((found.double() - expected[:batch]).abs() <= limits[mode][:batch]).all(), (isa, mode, batch)


@pytest.mark.parametrize("bits", range(1, 9))
def test_product_within_the_bound(bits, records, bounds):
    for family, (rows, columns, group, scale_bits, offset) in product(FAMILIES[bits], SHAPES):
        for tables in (1, rows) if family == "fitted" else (1,):
            stage = Stage(Levels(family, bits), group, scale_bits, offset is True, tables, zero=offset == "zero")
            layout = Layout((rows, columns), (stage,), shift=-3, outliers=min(7, columns), permuted=columns > 100)
            assert backend().supports(layout, CPU).ok
            record = records.fill(layout, bits)
            check(bounds, record, gauss(19, columns, seed=bits), batches=(1, 3, 7, 19), isas=ISAS)


@given(st.data())
@settings(max_examples=60)
def test_any_layout_of_the_format_is_right_or_refused(records, bounds, data):
    layout = data.draw(records.layouts())
    verdict = backend().supports(layout, CPU)
    if not verdict.ok:
        assert len(layout.shape) == 3 or "quads" in verdict.reason
        return
    record = records.fill(layout, data.draw(st.integers(0, 99)))
    batch = data.draw(st.sampled_from([0, 1, 2, 5, 40]))
    check(bounds, record, gauss(batch, layout.in_features, seed=batch))


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_activations_of_any_float_dtype_shape_and_stride(isa, dtype, records, bounds):
    record = records.fill(simple(37, 53, 3, 53), 0)
    wide, tall = gauss(6, 106).to(dtype), gauss(53, 6).to(dtype)
    lead = [gauss(1, 53), gauss(0, 53), gauss(2, 3, 53), gauss(11, 53)]
    for x in (*[one.to(dtype) for one in lead], wide[:, ::2], tall.T, wide[::2, :53], gauss(53).to(dtype).expand(4, 53)):
        check(bounds, record, x)


def test_several_stages_some_of_them_for_some_rows(isa, records, bounds):
    stages = (
        Stage(Levels("fitted", 4), 32, 6, tables=43),
        Stage(Levels("uniform", 3), 16, 8, True),
        Stage(Levels("fitted", 2), 64, 16, rows=17),
        Stage(Levels("ternary", 2), 96, 16, rows=1),
    )
    record = records.fill(Layout((43, 96), stages, shift=2, outliers=9, rank=3, permuted=True), 5)
    for batch in (1, 4, 21):
        check(bounds, record, gauss(batch, 96))


def test_int8_is_far_closer_than_its_worst_case(isa, records, bounds):
    record = records.fill(simple(64, 1024), 0)
    x = gauss(8, 1024)
    with cpu.arithmetic("int8"):
        found = backend().linear(x, backend().prepare(record))
    expected = bounds.exact_product(record, x)
    # Rounding errors of Gaussian activations: a step of max / 127 over a spread of a step / sqrt(12).
    assert (found - expected).pow(2).mean().sqrt() < 0.012 * expected.pow(2).mean().sqrt()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 5, 20])
def test_any_number_of_threads_gives_the_same_bytes(mode, batch, threads, records):
    stages = (Stage(Levels("fitted", 4), 32, 6, True), Stage(Levels("fitted", 2), 64, 16, rows=500))
    record = records.fill(Layout((1024, 1056), stages, outliers=50, rank=2), 0)
    x, found = gauss(batch, 1056), []
    for count in (1, 2, 7, 2):
        torch.set_num_threads(count)
        prepared = backend().prepare(record)
        with cpu.arithmetic(mode):
            found.append(backend().linear(x, prepared))
        assert torch.equal(backend().prepare(record).matrix, prepared.matrix)
    assert all(torch.equal(found[0], other) for other in found)


def test_concurrent_callers_do_not_disturb_each_other(threads, records):
    torch.set_num_threads(2)
    prepared = backend().prepare(records.fill(simple(2048, 512), 0))
    inputs = [gauss(1 + n % 3, 512, seed=n) for n in range(6)]
    expected = [backend().linear(x, prepared) for x in inputs]
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            if not torch.equal(backend().linear(inputs[number], prepared), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong and not any(caller.is_alive() for caller in callers)


def test_a_bias_is_added_before_rounding(records):
    prepared = backend().prepare(records.fill(simple(), 0))
    bias, x = gauss(29, seed=1), gauss(3, 96)
    assert torch.equal(backend().linear(x, prepared, bias), backend().linear(x, prepared) + bias)
    leaf = bias.clone().requires_grad_()
    backend().linear(x, prepared, leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full((29,), 3.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_the_result(isa, value, records):
    prepared, x = backend().prepare(records.fill(simple(), 0)), gauss(2, 96)
    x[1, 40] = value
    with cpu.arithmetic("int8"):
        found = backend().linear(x, prepared)
    assert found[0].isfinite().all() and not found[1].isfinite().any()


def test_tiny_and_huge_activations(isa, records, bounds):
    record = records.fill(simple(), 0)
    for scale in (0.0, 1e-30, 1e-42, 1e30):
        check(bounds, record, gauss(2, 96) * scale)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_rows_are_those_of_the_reference_bit_for_bit(dtype, records):
    stages = (Stage(Levels("fitted", 6), 32, 6, True, tables=40), Stage(Levels("uniform", 3), 16, 8, rows=9))
    for layout in (Layout((40, 75), stages, shift=-5, outliers=9, permuted=True), *[simple(bits=b) for b in range(1, 9)]):
        record = records.fill(layout, 3)
        prepared, dense = backend().prepare(record), record.dequantize(dtype)
        for ids in (torch.tensor([[3, 1], [3, 28]]), torch.tensor([], dtype=torch.int64), torch.tensor(7).int()):
            assert torch.equal(backend().embedding(ids, prepared, dtype), dense[ids.long()])


def test_auto_is_int8_where_that_is_far_below_the_coding_error(records):
    def auto(levels: Levels, content: torch.Tensor | None = None) -> str:
        record = records.fill(Layout((4, 64), (Stage(levels, 32),)), 0)
        if content is not None:
            record.tensors["levels"][:] = content.half().view(torch.int16)
        return {number: name for name, number in cpu.MODES.items()}[backend().prepare(record).auto]

    assert {auto(Levels("fitted", bits)) for bits in (1, 2, 3, 4)} == {"int8"}
    assert {auto(Levels("uniform", bits)) for bits in (5, 6, 7, 8)} == {"int8"}
    assert auto(Levels("fitted", 6), torch.linspace(-1, 1, 64)) == "int8"
    assert auto(Levels("fitted", 6), torch.cat([torch.linspace(-0.1, 0.1, 63), torch.ones(1)])) == "exact"
    assert auto(Levels("power", 8, exponent=0.7)) == "exact"


def test_the_mode_is_named_and_restored():
    with cpu.arithmetic("exact"):
        assert "exact" in backend().supports(simple(), CPU).reason
    assert "int8" in backend().supports(simple(), CPU).reason
    with pytest.raises(BadRequest, match=r"unknown CPU arithmetic 'exakt'\. Did you mean 'exact'"):
        cpu.set_arithmetic("exakt")


def test_what_is_not_supported_is_refused_with_the_reason(records):
    assert "experts" in backend().supports(Layout((2, 3, 8), simple().stages), CPU).reason
    odd = simple(group=30)
    assert backend().supports(odd, CPU) == (False, "groups of 30 are not whole quads of columns")
    assert select(odd, CPU).backend.name == "reference"
    with pytest.raises(BadRequest, match="groups of 30"):
        backend().prepare(records.fill(odd, 0))
    assert "stages" in backend().supports(Layout((4, 8), simple().stages * 9), CPU).reason
    assert backend().supports(simple(), torch.device("cuda")).reason == "the tensor is on cuda"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 95), r"has 96 inputs, the activations have shape \[2, 95\]"),
        (torch.ones(()), r"has 96 inputs, the activations have shape \[\]"),
        (torch.ones(2, 96, dtype=torch.float64), "take float32, bfloat16, float16 activations, got float64"),
        (torch.ones(2, 96, dtype=torch.int32), "got int32"),
    ],
)
def test_wrong_activations_never_reach_the_kernels(x, message, records):
    prepared = backend().prepare(records.fill(simple(), 0))
    with pytest.raises(BadRequest, match=message):
        backend().linear(x, prepared)


def test_wrong_matrices_never_reach_the_kernels(records):
    prepared, x = backend().prepare(records.fill(simple(), 0)), torch.ones(1, 96)
    for matrix in (prepared.matrix[:-64], prepared.matrix[64:], torch.zeros(10, dtype=torch.uint8), prepared.matrix.float()):
        with pytest.raises(BadRequest, match="prepared matrix"):
            ops.OPS.cpu_linear(x, matrix, 29, 0, None)
    with pytest.raises(BadRequest, match="no prepared matrix of 30 rows"):
        ops.OPS.cpu_linear(x, prepared.matrix, 30, 0, None)
    with pytest.raises(BadRequest, match=r"29 outputs, the bias has shape \[28\]"):
        ops.OPS.cpu_linear(x, prepared.matrix, 29, 0, torch.ones(28))
    with pytest.raises(IndexError, match=r"row numbers must lie in 0 .. 28, got 0 .. 29"):
        ops.OPS.cpu_rows(torch.tensor([0, 29]), prepared.matrix, 29, 96, torch.float32)
    with pytest.raises(IndexError):
        ops.OPS.cpu_rows(torch.tensor([-1]), prepared.matrix, 29, 96, torch.float32)


@pytest.mark.parametrize(
    ("name", "content"),
    [("permutation", 96), ("outlier_columns", 96), ("outlier_starts", 1), ("row_ids_1", 29), ("table_ids", 3)],
)
def test_damaged_indices_are_refused_when_prepared(name, content, records):
    stages = (Stage(Levels("fitted", 4), 32, tables=3, table_ids=True), Stage(Levels("uniform", 2), 32, rows=4))
    record = records.fill(Layout((29, 96), stages, outliers=5, permuted=True), 0)
    record.tensors[name][0 if name == "outlier_starts" else -1] = content
    with pytest.raises(FormatError, match="table" if name == "table_ids" else name):
        backend().prepare(record)


def test_ops_keep_the_rules_of_torch(records):
    record = records.fill(simple(outliers=4), 0)
    prepared = backend().prepare(record)
    x = gauss(3, 96)
    torch.library.opcheck(ops.OPS.cpu_linear.default, (x, prepared.matrix, 29, 1, None))
    torch.library.opcheck(ops.OPS.cpu_linear.default, (x.bfloat16(), prepared.matrix, 29, 2, gauss(29)))
    torch.library.opcheck(ops.OPS.cpu_rows.default, (torch.tensor([[1, 12]]), prepared.matrix, 29, 96, torch.float32))
    arguments = (x.requires_grad_(), prepared.matrix, 29, 2, None, prepared.tensors, prepared.layout)
    torch.library.opcheck(ops.OPS.cpu_linear_train.default, arguments)


def test_the_prepared_form_is_about_as_large_as_the_file():
    from hf_lowbit.format.ledger import ledger

    for bits, group, scale_bits in product((2, 3, 4, 6), (32, 64), (16, 8, 6)):
        layout = Layout((512, 2048), (Stage(Levels("fitted", bits), group, scale_bits),))
        empty = LowBitTensor.empty(layout, "cpu")
        assert backend().prepare(empty).matrix.numel() < 1.05 * ledger(layout).bytes + 4096
