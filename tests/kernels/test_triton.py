"""The Triton kernels against the exact product, within derived bounds: in Triton's interpreter, or by `make test-gpu`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from hf_lowbit.errors import BadRequest, FallbackError, FormatError
from hf_lowbit.format import Layout, Levels, LowBitTensor, Stage
from hf_lowbit.format.ledger import ledger
from hf_lowbit.kernels import backends, ops, select, triton_backend
from hf_lowbit.kernels.triton_backend import Triton
from hf_lowbit.kernels.triton_configs import Config, choose, gemm_rule, gemv_rule
from hf_lowbit.kernels.triton_plan import PERMUTED, byte_planes, derived_bytes, plan, unsupported

CUDA = torch.device("cuda")
# In Triton's interpreter, or as compiled by an emulator (test_triton_emulated.py).
ON_CPU = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("EMULATE_PTX") == "1"
DEVICE = torch.device("cpu") if ON_CPU else CUDA
runs = pytest.mark.skipif(
    find_spec("triton") is None or not (ON_CPU or torch.cuda.is_available()),
    reason="needs Triton, and its interpreter (TRITON_INTERPRET=1) or a GPU",
)
WIDTHS = (2, 3, 4, 8)
LEVEL = 2.0**-11
FAMILIES = dict(
    enumerate(["uniform_zero_free", "uniform", "affine", "normal_float", "affine", "power", "uniform", "integer"], 1)
)


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def simple(rows: int = 21, columns: int = 96, bits: int = 4, group: int = 32, **other) -> Layout:
    return Layout((rows, columns), (Stage(Levels("fitted", bits), group),), **other)


@pytest.fixture(scope="session")
def bounds(load_test_module):
    """The error analysis of sums: tests/kernels/bounds.py."""
    return load_test_module("kernels/bounds.py")


def near_one(record: LowBitTensor) -> LowBitTensor:
    """The record with the shift that brings its largest weight near one, so that no product leaves the range of fp16."""
    largest = float(record.dequantize().abs().max())
    return LowBitTensor(replace(record.layout, shift=-round(math.log2(largest))), record.tensors)


def moved(record: LowBitTensor) -> LowBitTensor:
    return record.to(DEVICE)


def roundings(record: LowBitTensor, x: torch.Tensor) -> float:
    """What products may be off by, as a share of their magnitudes."""
    if x.dtype == torch.float32:
        return LEVEL
    eps = torch.finfo(x.dtype).eps
    if x.numel() > x.shape[-1]:  # level, scale and product
        return max(LEVEL, 1.5 * eps)
    # A level and the four sums it is part of; what is looked up is exact.
    return 2.5 * eps if any(stage.bits in PERMUTED for stage in record.layout.stages) else LEVEL


def check(bounds, record: LowBitTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """The product on the device, against float64, within the roundings of the kernels and of their sums."""
    prepared = Triton().prepare(moved(record))
    there = None if bias is None else bias.to(DEVICE)
    found = Triton().linear(x.to(DEVICE), prepared, there).cpu().double()
    expected = bounds.exact_product(record, x)
    eps = torch.finfo(x.dtype).eps
    rounding = roundings(record, x)
    terms = x.double().abs() @ bounds.magnitude(record).T
    limit = terms * (rounding + eps) + bounds.sum_bound(record, x) + 1e-6 * terms
    if bias is not None:
        expected, limit = expected + bias.double(), limit + eps * (bias.double().abs() + expected.abs())
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= limit).all(), float(((found - expected).abs() / limit).max())


@runs
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_product_within_the_bound(bits, dtype, records, bounds):
    shapes = [(9, 53, 64, 16, False), (4, 128, 64, 8, True), (5, 96, 32, 6, bits == 4)]
    for number, (rows, columns, group, scale_bits, offset) in enumerate(shapes):
        family = "fitted" if number != 1 else FAMILIES[bits]
        exponent = 0.7 if family == "power" else None
        stage = Stage(Levels(family, bits, exponent), group, scale_bits, offset)
        record = records.fill(Layout((rows, columns), (stage,), shift=-3), bits)
        for batch in (1, 3):
            check(bounds, record, gauss(batch, columns, seed=bits).to(dtype))


@runs
@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_family_scale_and_batch(bits, records, bounds):
    shapes = [(53, 31, 31, 16, False), (37, 300, 64, 8, True), (33, 256, 32, 6, False), (1, 1, 1, 16, False)]
    shapes.append((130, 512, 128, 6, True))
    for (rows, columns, group, scale_bits, offset), family in product(shapes, ("fitted", FAMILIES[bits])):
        for tables in (1, rows) if family == "fitted" else (1,):
            stage = Stage(Levels(family, bits, 0.7 if family == "power" else None), group, scale_bits, offset, tables)
            record = near_one(records.fill(Layout((rows, columns), (stage,)), bits))
            for batch, dtype in product((1, 2, 17, 40), (torch.float16, torch.bfloat16)):
                check(bounds, record, gauss(batch, columns, seed=bits).to(dtype))


@runs
@pytest.mark.parametrize("batch", [1, 3])
def test_every_optional_term(batch, records, bounds):
    stages = (
        Stage(Levels("fitted", 4), 32, 6, tables=23),
        Stage(Levels("uniform", 3), 32, 8, True),
        Stage(Levels("fitted", 2), 64, 16, rows=7),
        Stage(Levels("fitted", 8), 96, 16, tables=2, table_ids=True),
    )
    record = records.fill(Layout((23, 96), stages, shift=2, outliers=9, rank=3, permuted=True), 5)
    check(bounds, record, gauss(batch, 96).half(), gauss(23, seed=3).half())


@runs
def test_a_split_of_the_columns_is_summed_in_order(records, bounds, monkeypatch):
    from hf_lowbit.kernels import triton_launch

    record = records.fill(simple(rows=11, columns=160, bits=2), 0)
    for batch in (1, 4):
        monkeypatch.setattr(triton_launch, "choose", lambda *args: Config(16, 16, 32, 4, 1, 3))
        check(bounds, record, gauss(batch, 160).half(), gauss(11, seed=1).half())


@runs
def test_large_batches_and_float32_decode_the_matrix(records, bounds, monkeypatch):
    from hf_lowbit.kernels import triton_launch

    monkeypatch.setattr(triton_launch, "DENSE_FROM", 4)
    monkeypatch.setattr(triton_launch, "DENSE_WEIGHTS", 1000)
    record = records.fill(simple(9, 75, 3, 75), 0)
    for x in (gauss(6, 75).half(), gauss(1, 75)):
        check(bounds, record, x, gauss(9, seed=1).to(x.dtype))
    check(bounds, records.fill(simple(outliers=5), 0), gauss(3, 96), gauss(21, seed=1))


@runs
def test_large_activations_and_levels_do_not_overflow(records):
    """Four products of the largest fp16 numbers, whose sums stay below it only because tables are divided by their unit."""
    record = records.fill(Layout((3, 32), (Stage(Levels("fitted", 4), 32),), shift=-12), 0)
    record.tensors["levels"] = torch.linspace(-900, 900, 16).half().view(torch.int16).view_as(record.tensors["levels"])
    x = torch.full((1, 32), 60000.0).half()
    found = Triton().linear(x.to(DEVICE), Triton().prepare(moved(record))).cpu().double()
    expected = x.double() @ record.dequantize(torch.float64).T
    assert expected.abs().max() < 65504 and found.isfinite().all()
    terms = x.double().abs() @ record.dequantize(torch.float64).abs().T
    assert ((found - expected).abs() <= 3 * 2.0**-10 * terms).all()


@runs
def test_activations_of_any_shape_and_stride(records, bounds):
    record = records.fill(simple(17, 53, 4, 64), 0)
    wide, tall = gauss(4, 106).half(), gauss(53, 4).half()
    for x in (gauss(53).half(), gauss(0, 53).half(), gauss(2, 0, 53).half(), gauss(2, 1, 53).half(), wide[:, ::2], tall.T):
        check(bounds, record, x)
    check(bounds, record, gauss(53).half().expand(3, 53))


@runs
@pytest.mark.parametrize("bits", (2, 3, 4, 6, 8))
def test_rows_are_those_of_the_reference_bit_for_bit(bits, records):
    layout = Layout((21, 75), (Stage(Levels("fitted", bits), 32, 6, tables=3),), shift=-5)
    record = records.fill(layout, 3)
    prepared, dense = Triton().prepare(moved(record)), record.dequantize(torch.float16)
    for ids in (torch.tensor([[3, 1], [3, 20]]), torch.tensor([], dtype=torch.int64), torch.tensor(7).int()):
        assert torch.equal(Triton().embedding(ids.to(DEVICE), prepared, torch.float16).cpu(), dense[ids.long()])


@runs
def test_a_row_that_is_not_there_is_not_a_number(records):
    prepared = Triton().prepare(moved(records.fill(simple(), 0)))
    found = Triton().embedding(torch.tensor([0, 21, -1], device=DEVICE), prepared, torch.float16)
    assert found[0].isfinite().all() and found[1:].isnan().all()


@runs
def test_rows_of_a_matrix_with_more_terms_come_from_the_reference(records):
    record = records.fill(simple(outliers=5, permuted=True), 0)
    found = Triton().embedding(torch.tensor([3, 1], device=DEVICE), Triton().prepare(moved(record)), torch.float32)
    assert torch.equal(found.cpu(), record.dequantize()[[3, 1]])


@runs
def test_each_row_by_its_own_matrix_of_a_stack(records):
    record = records.fill(Layout((3, 19, 64), (Stage(Levels("fitted", 4), 32, 6, tables=3),)), 0)
    x, experts = gauss(4, 64).half(), torch.tensor([2, 0, 2, 1], dtype=torch.int32)
    found = Triton().grouped(x.to(DEVICE), experts.to(DEVICE), Triton().prepare(moved(record))).cpu().double()
    chosen, columns = record.dequantize().double()[experts.long()], x.double()[..., None]
    expected = (chosen @ columns)[..., 0]
    limit = 3 * torch.finfo(x.dtype).eps * (chosen.abs() @ columns.abs())[..., 0]
    assert ((found - expected).abs() <= limit + 1e-3).all()
    empty = Triton().grouped(x[:0].to(DEVICE), experts[:0].to(DEVICE), Triton().prepare(moved(record)))
    assert empty.shape == (0, 19)


@runs
def test_gradients_are_those_of_the_decoded_matrix(records):
    record = records.fill(simple(), 0)
    x = gauss(2, 3, 96).to(DEVICE).half().requires_grad_()
    bias = gauss(21).to(DEVICE).half().requires_grad_()
    Triton().linear(x, Triton().prepare(moved(record)), bias).sum().backward()
    expected = record.dequantize(torch.float16).double().sum(0)
    assert ((x.grad.cpu().double() - expected).abs() <= 0.02 * record.dequantize().double().abs().sum(0)).all()
    assert torch.equal(bias.grad.cpu(), torch.full((21,), 6.0).half())


@runs
def test_ops_keep_the_rules_of_torch(records):
    prepared = Triton().prepare(moved(records.fill(simple(bits=2), 0)))
    x = gauss(3, 96).to(DEVICE).half()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x, *prepared, gauss(21).to(DEVICE).half())
    torch.library.opcheck(ops.OPS.triton_linear.default, arguments, test_utils=checks)
    ids = torch.tensor([[1, 12]], device=DEVICE)
    torch.library.opcheck(ops.OPS.triton_rows.default, (ids, *prepared, torch.float16), test_utils=checks)


@runs
def test_the_same_call_gives_the_same_bytes(records):
    record = records.fill(Layout((9, 96), (Stage(Levels("fitted", 4), 32), Stage(Levels("fitted", 8), 32)), outliers=20), 0)
    prepared = Triton().prepare(moved(record))
    for batch in (1, 5):
        x = gauss(batch, 96).to(DEVICE).half()
        assert torch.equal(Triton().linear(x, prepared), Triton().linear(x, prepared))


@runs
@pytest.mark.skipif(ON_CPU, reason="CUDA graphs need a GPU")
def test_calls_can_be_captured_in_a_graph(records):
    prepared = Triton().prepare(moved(records.fill(simple(512, 1024, group=64), 0)))
    for batch in (1, 16):
        x = gauss(batch, 1024).to(DEVICE).half()
        expected = Triton().linear(x, prepared)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = Triton().linear(x, prepared)
        graph.replay()
        assert torch.equal(found, expected)


@runs
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 95).half(), r"has 96 inputs, the activations have shape \[2, 95\]"),
        (torch.ones(2, 96, dtype=torch.int32), "take float16, bfloat16, float32 activations, got int32"),
        (torch.ones(2, 96, device="meta").half(), "the activations are on meta: move one of them there"),
    ],
)
def test_wrong_activations_never_reach_the_kernels(x, message, records):
    prepared = Triton().prepare(moved(records.fill(simple(), 0)))
    x = x if x.is_meta else x.to(DEVICE)
    with pytest.raises(BadRequest, match=message):
        triton_backend._linear(x, *prepared, None)


@runs
def test_wrong_biases_and_stacks_are_refused(records):
    prepared = Triton().prepare(moved(records.fill(simple(), 0)))
    x = torch.ones(2, 96, device=DEVICE).half()
    with pytest.raises(BadRequest, match=r"21 outputs, the bias has shape \[20\]"):
        Triton().linear(x, prepared, torch.ones(20, device=DEVICE))
    with pytest.raises(BadRequest, match="the bias is on meta"):
        triton_backend._linear(x, *prepared, torch.ones(21, device="meta"))
    stack = Triton().prepare(moved(records.fill(Layout((2, 3, 96), simple().stages), 0)))
    with pytest.raises(BadRequest, match="a stack of matrices is multiplied by `triton_grouped`"):
        Triton().linear(x, stack)
    with pytest.raises(BadRequest, match="takes a plain stack"):
        Triton().grouped(x, torch.zeros(2, dtype=torch.int32, device=DEVICE), prepared)


@runs
def test_float64_takes_the_reference_road(records):
    record = records.fill(simple(), 0)
    x = gauss(2, 96).double().to(DEVICE)
    found = Triton().linear(x, Triton().prepare(moved(record)))
    assert torch.equal(found, torch.nn.functional.linear(x, moved(record).dequantize(torch.float64)))


def test_byte_planes_hold_the_table():
    table = gauss(2, 16)
    planes = byte_planes(table, torch.float16)
    low, high = planes[:, :4].contiguous().view(torch.uint8), planes[:, 4:].contiguous().view(torch.uint8)
    halves = (high.int() * 256 + low.int()).to(torch.int16).view(torch.float16)
    assert torch.equal(halves, table.half())


class TestSelection:
    """What refuses a matrix, with the reasons a user reads; a GPU is only pretended."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        """A CUDA device of capability 9.0, and Triton."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(triton_backend, "find_spec", lambda name: object())
        monkeypatch.setattr(triton_backend, "capability", lambda device: (9, 0))
        monkeypatch.setattr(triton_backend, "_name", lambda device: "Pretended 100")
        return monkeypatch

    def test_a_gpu_takes_triton_and_never_the_cpu_kernels(self, gpu):
        choice = select(simple(), CUDA, strict=True)
        assert (choice.backend.name, choice.reason, choice.refused) == ("triton", "Pretended 100", ())

    def test_a_cpu_never_hears_of_triton(self):
        assert "triton" not in dict(select(simple(group=30), torch.device("cpu")).refused)
        assert [b.name for b in backends()] == ["cpu", "triton", "reference"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda patch: patch.setattr(triton_backend, "find_spec", lambda name: None), "Triton is not installed"),
            (
                lambda patch: patch.setattr(triton_backend, "capability", lambda device: (7, 5)),
                "Pretended 100 has compute capability 7.5, the kernels need 8.0",
            ),
            (lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False), "torch finds no CUDA device"),
        ],
    )
    def test_what_is_missing_falls_back_with_the_reason_or_is_an_error(self, gpu, change, message):
        change(gpu)
        choice = select(simple(), CUDA)
        assert choice.backend.name == "reference" and message in dict(choice.refused)["triton"]
        with pytest.raises(FallbackError, match=message):
            select(simple(), CUDA, strict=True)

    @pytest.mark.parametrize(("part", "why"), [({"zero": True}, "zero points"), ({"scale_bits": 32}, "32-bit scales")])
    def test_what_other_tools_alone_write_is_refused(self, gpu, part, why):
        layout = simple()
        odd = replace(layout, stages=(replace(layout.stages[0], **part),))
        assert unsupported(odd) == why and select(odd, CUDA).backend.name == "reference"

    def test_groups_that_are_no_whole_units_are_refused(self, gpu):
        odd = simple(group=30)
        assert unsupported(odd) == "groups of 30 are not whole units of 8 columns, which 4 bits need"
        assert select(odd, CUDA).backend.name == "reference"
        assert unsupported(simple(group=96)) is None and unsupported(simple(columns=30, group=30)) is None


@pytest.mark.parametrize(
    ("name", "content"), [("permutation", 96), ("outlier_columns", 96), ("row_ids_1", 29), ("table_ids", 3)]
)
def test_damaged_indices_are_refused_when_prepared(name, content, records):
    stages = (Stage(Levels("fitted", 4), 32, tables=3, table_ids=True), Stage(Levels("uniform", 2), 32, rows=4))
    record = records.fill(Layout((29, 96), stages, outliers=5, permuted=True), 0)
    record.tensors[name][-1] = content
    with pytest.raises(FormatError, match="table" if name == "table_ids" else name):
        Triton().prepare(record)


def test_a_shape_nobody_tuned_has_a_configuration():
    for rows, columns, bits in product((1, 7, 512, 4096, 128256), (1, 53, 896, 14336), range(1, 9)):
        stage = plan(Layout((rows, columns), (Stage(Levels("fitted", bits), columns),)).dumps()).stages[0]
        for batch in (1, 2, 16, 17, 512, 5000):
            config = choose(stage, columns, batch, "a card nobody tuned", 100)
            assert config == (gemv_rule if batch == 1 else gemm_rule)(stage, columns, batch, 100)
            for value in (config.block_m, config.block_n, config.warps):
                assert value >= 1 and value & (value - 1) == 0
            units = max(1, config.block_k // stage.unit)
            assert units & (units - 1) == 0 and config.split >= 1
            assert batch == 1 or (config.block_m >= 16 and units * stage.unit >= 16)


def test_what_is_added_is_counted_and_small(records):
    for bits, scale_bits, tables in product((2, 3, 4, 6, 8), (16, 8, 6), (1, 5)):
        layout = Layout((40, 256), (Stage(Levels("fitted", bits), 32, scale_bits, True, tables),))
        prepared = Triton().prepare(records.fill(layout, 0))
        assert sum(t.numel() * t.element_size() for t in prepared.derived) == derived_bytes(layout)
        held = {id(t) for t in prepared.tensors}
        assert all(id(t) not in held for t in prepared.derived)


def test_an_8b_model_occupies_its_packed_size_and_a_tenth_at_most():
    """Llama 3 8B at the defaults: 4 bits inside blocks, 6 for table and head, groups of 32, 6-bit scales."""
    hidden, inner, heads = 4096, 14336, 1024
    block = [*[(hidden, hidden), (heads, hidden), (inner, hidden)] * 2, (hidden, inner)]
    layouts = [Layout(shape, (Stage(Levels("fitted", 4), 32, 6),)) for shape in block] * 32
    layouts += [Layout((128256, hidden), (Stage(Levels("fitted", 6), 32, 6),))] * 2
    packed = sum(ledger(layout).bytes for layout in layouts)
    # While scales of one matrix are expanded, the bit planes' lanes and their sum exist beside them: nine bytes a scale.
    largest = max(9 * layout.rows * layout.in_features // 32 for layout in layouts)
    peak = packed + sum(derived_bytes(layout) for layout in layouts) + largest
    assert packed > 4e9 and peak <= 1.1 * packed


def test_importing_the_backends_imports_no_kernel():
    code = "import hf_lowbit.kernels, sys; print('hf_lowbit.kernels.triton_gemv' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
