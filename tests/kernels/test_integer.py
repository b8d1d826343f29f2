"""Products in whole numbers are what the simulation gives, and refusals name what is in the way."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.format import Spec
from hf_lowbit.format.activations import ActivationLayout, ActivationSpec, pattern, step_and_zero
from hf_lowbit.kernels import integer
from hf_lowbit.plugin.modules import ActivationQuantizer, LowBitLinear
from hf_lowbit.solvers import solve

IN, OUT = 45, 19


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


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_whole_numbers_give_what_the_simulation_gives(settings, tokens):
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
