"""Products in whole numbers are what the simulation gives, and refusals name what is in the way."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.errors import BadRequest, LowBitError
from hf_lowbit.format import Spec
from hf_lowbit.format.activations import ActivationLayout, ActivationSpec, pattern, step_and_zero
from hf_lowbit.kernels import cpu, cpu_library, integer
from hf_lowbit.kernels.cpu_repack import repack
from hf_lowbit.plugin.modules import ActivationQuantizer, LowBitLinear
from hf_lowbit.solvers import solve

IN, OUT = 45, 19
pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason=str(cpu_library.trouble()))


@pytest.fixture(params=cpu_library.instruction_sets())
def isa(request):
    before = cpu_library.instruction_set()
    assert cpu_library.library().lowbit_set_isa(request.param.encode())
    yield request.param
    cpu_library.library().lowbit_set_isa(before.encode())


def layer(bits=8, spec=None, shifted=False, high=0, rotated=False, **more):
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(OUT, IN, generator=draw)
    record = solve(weight, Spec(method="rtn", bits=bits, **({"group_size": -1, "scale_bits": 16} | more)))
    module = LowBitLinear.from_tensor(record, torch.randn(OUT, generator=draw))
    layout = ActivationLayout(IN, spec or ActivationSpec(), shifted=shifted, rotated=rotated, high=high)
    tensors = {"shift": pattern(torch.randn(IN, generator=draw))} if shifted else {}
    if high:
        tensors["high"] = torch.arange(high, dtype=torch.int32) * 3
    if layout.steps:
        step, zero = step_and_zero(torch.full((layout.steps,), -2.0), torch.full((layout.steps,), 3.0), layout.spec, 8)
        tensors |= {"step": pattern(step), "zero": zero.int()}
    module.activation = ActivationQuantizer(layout, tensors)
    return module


CASES = [
    {},
    {"bits": 4},
    {"spec": ActivationSpec(4)},
    {"spec": ActivationSpec(8, symmetric=True)},
    {"spec": ActivationSpec(8, "tensor")},
    {"spec": ActivationSpec(8, "tensor", static=True)},
    {"bits": 4, "spec": ActivationSpec(4), "high": 6},
    {"shifted": True, "rotated": True, "levels": "integer"},
    {"bits": 2, "spec": ActivationSpec(6), "shifted": True, "high": 5, "levels": "uniform_zero_free"},
]


FAMILIES = [
    (8, "uniform"),
    (8, "integer"),
    (7, "uniform"),
    (6, "uniform_zero_free"),
    (5, "integer"),
    (4, "uniform"),
    (2, "integer"),
]


@pytest.mark.parametrize(("bits", "levels"), FAMILIES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 45), (3, 200), (11, 96)])
def test_products_of_codes_are_those_of_whole_numbers(isa, bits, levels, tokens, width):
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(OUT, width, generator=draw)
    weight[:, :9] = weight.abs().amax() * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, -1])  # the ends of the range
    record = solve(weight, Spec(method="rtn", bits=bits, levels=levels, group_size=-1, scale_bits=16))
    codes = torch.randint(-128, 128, (tokens, width), generator=draw, dtype=torch.int8)
    codes[:, :4] = -128
    whole = record.table()[0][record.codes().long()].to(torch.int64)
    expected = (codes.long() @ whole.T).double() * record.scales().double()[:, 0]
    found = cpu.linear_codes(codes, repack(record), OUT)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_codes_of_another_width_or_matrix_are_refused():
    record = solve(torch.randn(OUT, 64), Spec(method="rtn", bits=4, group_size=32))
    with pytest.raises(BadRequest, match=r"int8 codes \[n, 64\] on the CPU, got torch.int8 \[2, 63\]"):
        cpu.linear_codes(torch.zeros(2, 63, dtype=torch.int8), repack(record), OUT)
    with pytest.raises(LowBitError, match="the layout is not supported"):
        cpu.linear_codes(torch.zeros(2, 64, dtype=torch.int8), repack(record), OUT)


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_whole_numbers_give_what_the_simulation_gives(isa, settings, tokens):
    x = torch.randn(2, tokens, IN, generator=torch.Generator().manual_seed(8)) + 0.4
    module = layer(**settings)
    assert module.simulated is None
    with torch.no_grad():
        found = module(x)
        assert isinstance(module.prepared()[1], integer.IntegerMatrix)
        with integer.simulated():
            plain = layer(**settings)
            expected = plain(x)
            assert not isinstance(plain.prepared()[1], integer.IntegerMatrix)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, x.new_zeros(found.shape))


def test_gradients_pass_as_if_nothing_were_rounded():
    module, x = layer(), torch.randn(3, IN, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.lowbit().dequantize().sum(0).expand(3, -1))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"spec": ActivationSpec(8, "group", group_size=8)}, "a step per group"),
        ({"group_size": 8}, "more than one scale per row"),
        ({"levels": "normal_float", "bits": 4}, "no integers"),
        ({"levels": "affine"}, "or offsets"),
        ({"outliers": 0.05}, "outliers"),
    ],
)
def test_what_cannot_be_multiplied_in_whole_numbers_is_simulated_and_said(settings, reason):
    module = layer(**settings)
    assert reason in module.simulated
    assert torch.isfinite(module(torch.randn(2, IN))).all()
