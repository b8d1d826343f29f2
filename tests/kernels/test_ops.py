"""Backends and torch ops: parity with a dense product, tracing, gradients, and the choice among backends."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import linear

from hf_lowbit import LowBitLinear
from hf_lowbit.errors import BadRequest, FallbackError
from hf_lowbit.format import Layout, LowBitTensor, Spec
from hf_lowbit.kernels import Backend, Choice, Verdict, backends, cpu, ops, register_backend, select
from hf_lowbit.kernels.reference import Reference
from hf_lowbit.solvers import solve

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of x, in, out: primes, one row, no row, one output, one input; then more than one leading axis.
SHAPES = [((7,), 53, 31), ((1,), 64, 96), ((0,), 37, 5), ((3,), 41, 1), ((2,), 1, 3), ((2, 3), 75, 11), ((), 53, 31)]
FOR_CPU = [backend for backend in backends() if backend.devices is None or "cpu" in backend.devices]
every_backend = pytest.mark.parametrize("backend", FOR_CPU, ids=lambda backend: backend.name)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for the CPU needs a C++ compiler")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Without rounded activations: their bound is tests/kernels/test_cpu.py's subject."""
    with cpu.arithmetic("exact"):
        yield


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(rows: int, columns: int, **settings) -> LowBitTensor:
    return solve(gauss(rows, columns), Spec(**({"method": "rtn", "group_size": 32} | settings)))


def assert_close_to_dense(found: torch.Tensor, x: torch.Tensor, record: LowBitTensor) -> None:
    """Within the rounding of the dtype of ``x``, which the decoded weight takes too, summed over the inputs."""
    weight = record.dequantize().double()
    expected = linear(x.double(), weight)
    assert found.dtype == x.dtype and found.shape == expected.shape
    # Each product is off by two roundings at most, and the sum by one more.
    bound = linear(x.double().abs(), weight.abs()) * 3 * torch.finfo(x.dtype).eps + 1e-6
    assert ((found.double() - expected).abs() <= bound).all()


@every_backend
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_dense_product(backend, bits, dtype):
    for lead, columns, rows in SHAPES:
        record = quantized(rows, columns, bits=bits)
        assert backend.supports(record.layout, CPU).ok or backend.name != "reference"
        if backend.supports(record.layout, CPU).ok:
            x = gauss(*lead, columns, seed=bits).to(dtype)
            assert_close_to_dense(backend.linear(x, backend.prepare(record)), x, record)


@every_backend
@pytest.mark.parametrize(
    "settings",
    [
        {"levels": "affine", "bits": 3},
        {"method": "codebook", "scale_bits": 16, "bits": 3},
        {"method": "codebook", "outliers": 0.05, "residual_terms": 2, "bits": 2},
        {"method": "powerquant", "group_size": -1, "scale_bits": 8, "bits": 5},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_linear_with_optional_terms(backend, settings):
    record = quantized(29, 83, **settings)
    if backend.supports(record.layout, CPU).ok:
        x = gauss(5, 83)
        assert_close_to_dense(backend.linear(x, backend.prepare(record)), x, record)


@every_backend
def test_linear_of_strided_activations(backend):
    record = quantized(31, 53)
    prepared = backend.prepare(record)
    wide, tall = gauss(6, 106), gauss(53, 6)
    for x in (wide[:, ::2], tall.T, wide[::2, :53], gauss(53).expand(4, 53)):
        assert not x.is_contiguous()
        assert_close_to_dense(backend.linear(x, prepared), x, record)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_to_the_activations(backend, dtype):
    record = quantized(31, 53, method="codebook")
    prepared = backend.prepare(record)
    x = gauss(2, 5, 53).to(dtype).requires_grad_()
    grad = gauss(2, 5, 31, seed=1).to(dtype)
    backend.linear(x, prepared).backward(grad)
    assert x.grad.dtype == dtype
    weight = record.dequantize().double()
    bound = (grad.double().abs() @ weight.abs()) * 3 * torch.finfo(dtype).eps + 1e-6
    assert ((x.grad.double() - grad.double() @ weight).abs() <= bound).all()


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", [[[3, 1], [3, 30]], [0], [], 7], ids=str)
def test_embedding_gives_rows_of_the_dense_matrix(backend, dtype, ids):
    record = quantized(31, 53, method="codebook", outliers=0.03)
    ids = torch.tensor(ids, dtype=torch.int64)
    found = backend.embedding(ids, backend.prepare(record), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, record.dequantize(dtype)[ids])


@pytest.mark.parametrize(
    "settings", [{}, {"method": "codebook", "outliers": 0.05, "residual_terms": 2}], ids=["plain", "all"]
)
@pytest.mark.parametrize("grad", [False, True])
def test_ops_keep_the_rules_of_torch(settings, grad):
    tensors, layout = Reference().prepare(quantized(13, 40, **settings))
    x = gauss(3, 40).requires_grad_(grad)
    torch.library.opcheck(ops.OPS.linear.default, (x, tensors, layout))
    torch.library.opcheck(ops.OPS.dequantize.default, (tensors, layout, torch.bfloat16))
    torch.library.opcheck(ops.OPS.embedding.default, (torch.tensor([[1, 12], [1, 0]]), tensors, layout, torch.float32))


def test_dequantize_op_gives_the_record_of_its_arguments():
    record = solve(gauss(3, 8, 40), Spec(method="rtn"))
    tensors, layout = Reference().prepare(record)
    assert torch.equal(ops.OPS.dequantize(tensors, layout, torch.float32), record.dequantize())


def test_a_wrong_width_is_refused_while_tracing():
    tensors, layout = Reference().prepare(quantized(13, 40))
    with pytest.raises(RuntimeError, match="linear expects 40 inputs, got 39"):
        ops.OPS.linear(torch.empty(2, 39, device="meta"), [tensor.to("meta") for tensor in tensors], layout)


@needs_compiler
def test_compiled_linear_layer_matches_the_eager_one():
    torch._dynamo.reset()
    bias = gauss(48, seed=3)
    layer = LowBitLinear.from_tensor(quantized(48, 64, method="codebook", outliers=0.02), bias)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 48
    compiled = torch.compile(lambda x: layer(x).relu() + 1, fullgraph=True)
    eager_x, compiled_x = gauss(5, 64).requires_grad_(), gauss(5, 64).requires_grad_()
    eager, found = layer(eager_x).relu() + 1, compiled(compiled_x)
    assert torch.allclose(found, eager, atol=1e-5)
    assert_close_to_dense(layer(eager_x).detach() - bias, eager_x.detach(), layer.lowbit())
    eager.sum().backward()
    found.sum().backward()
    assert torch.allclose(compiled_x.grad, eager_x.grad, atol=1e-5)


class Picky(Backend):
    """A backend that takes narrow matrices only and multiplies like the reference one."""

    name = "picky"

    def supports(self, layout: Layout, device: torch.device) -> Verdict:
        return Verdict(layout.in_features <= 40, "narrow" if layout.in_features <= 40 else "wider than 40")

    def prepare(self, tensor: LowBitTensor):
        return Reference().prepare(tensor)

    def linear(self, x, prepared, bias=None):
        return Reference().linear(x, prepared, bias)

    def embedding(self, ids, prepared, dtype):
        return Reference().embedding(ids, prepared, dtype)


@pytest.fixture
def table(monkeypatch) -> Iterator[list[str]]:
    """Names of a table with the picky backend before the reference one, undone afterwards."""
    # By its module, since the name hf_lowbit.kernels.select is the function.
    monkeypatch.setattr(sys.modules[register_backend.__module__], "_TABLE", [Reference()])
    register_backend(Picky(), before="reference")
    yield [backend.name for backend in backends()]


def chosen(choice: Choice) -> tuple:
    return choice.backend.name, choice.reason, choice.refused, choice.fell_back


def test_the_reference_backend_is_last_and_takes_everything(records):
    assert backends()[-1].name == "reference"
    for layout in (quantized(3, 40).layout, records.fill(Layout((3, 9), quantized(3, 9).layout.stages, rank=2), 0).layout):
        assert backends()[-1].supports(layout, CPU) == (True, "always works")


def test_the_first_backend_that_can_is_chosen(table):
    assert table == ["picky", "reference"]
    assert chosen(select(quantized(3, 40).layout, CPU)) == ("picky", "narrow", (), False)


def test_a_refusal_falls_through_with_its_reason(table):
    choice = select(quantized(3, 41).layout, CPU)
    assert chosen(choice) == ("reference", "always works", (("picky", "wider than 40"),), True)


def test_strict_makes_a_fallback_an_error(table):
    assert select(quantized(3, 40).layout, CPU, strict=True).backend.name == "picky"
    with pytest.raises(FallbackError) as caught:
        select(quantized(3, 41).layout, CPU, strict=True)
    message = "strict: a faster backend refused a tensor of shape (3, 41) (picky: wider than 40)."
    assert str(caught.value) == message


def test_one_backend_can_be_asked_for(table):
    assert chosen(select(quantized(3, 40).layout, CPU, only="reference")) == ("reference", "always works", (), False)
    with pytest.raises(BadRequest) as caught:
        select(quantized(3, 41).layout, CPU, only="picky")
    assert str(caught.value) == "no backend runs a tensor of shape (3, 41) on cpu (picky: wider than 40)."


def test_an_unknown_backend_is_refused_with_the_nearest_name(table):
    with pytest.raises(BadRequest, match=r"unknown backend 'referense'\. Did you mean 'reference'"):
        select(quantized(3, 40).layout, CPU, only="referense")


def test_a_backend_is_registered_once_and_last_unless_told(table):
    with pytest.raises(ValueError, match="backend 'picky' is registered twice"):
        register_backend(Picky())
    other = Picky()
    other.name = "other"
    register_backend(other)
    assert [backend.name for backend in backends()] == ["picky", "reference", "other"]
    assert select(quantized(3, 41).layout, CPU).backend.name == "reference"


def test_changing_the_listed_backends_leaves_the_table_alone(table):
    backends().clear()
    assert [backend.name for backend in backends()] == table
