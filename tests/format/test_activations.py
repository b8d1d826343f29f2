"""Rounding of activations: its laws, and a slow oracle for each granularity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowbit.errors import FormatError
from hf_lowbit.format.activations import ActivationLayout, Activations, ActivationSpec, numbers, pattern, step_and_zero
from hf_lowbit.format.hadamard import factor_of, rotate, unrotate


def sample(n: int = 37, tokens: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed)) * 3 + 0.7


def oracle(values: list[float], bits: int, symmetric: bool) -> list[float]:
    """One range, number by number."""
    low, high = min(0.0, *values), max(0.0, *values)
    if symmetric:
        top = (1 << (bits - 1)) - 1
        step = max(max(-low, high) / top, 1e-8)
        return [max(-top, min(top, round(v / step))) * step for v in values]
    step = max((high - low) / ((1 << bits) - 1), 1e-8)
    zero = round(-low / step)
    return [(max(0, min((1 << bits) - 1, round(v / step) + zero)) - zero) * step for v in values]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("per", ["token", "tensor", "group"])
def test_dynamic_rounding_is_the_oracles(per, bits, symmetric):
    x = sample()
    spec = ActivationSpec(bits, per, symmetric=symmetric, group_size=16)
    found = Activations(ActivationLayout(37, spec), {})(x)
    pieces = [x.flatten()] if per == "tensor" else list(x) if per == "token" else [g for row in x for g in row.split(16)]
    expected = torch.tensor([v for piece in pieces for v in oracle(piece.double().tolist(), bits, symmetric)])
    # A value on the border between two codes may go either way in float32.
    assert ((found.flatten() - expected).abs() > 1e-5).sum() <= 1


@given(
    st.integers(2, 8), st.sampled_from(["token", "tensor", "group"]), st.booleans(), st.integers(1, 70), st.integers(0, 9)
)
def test_rounding_keeps_zero_and_is_off_by_half_a_step_at_most(bits, per, symmetric, n, seed):
    x = sample(n, 3, seed)
    x[0, 0] = 0
    found = Activations(ActivationLayout(n, ActivationSpec(bits, per, symmetric=symmetric, group_size=8)), {})(x)
    reach = (x.amax().clamp_min(0) - x.amin().clamp_max(0)) if not symmetric else 2 * x.abs().amax()
    steps = ((1 << bits) - 1) if not symmetric else ((1 << bits) - 2)
    assert found[0, 0] == 0
    # The rounded zero point moves the range by up to half a step more.
    assert float((found - x).abs().max()) <= 1.001 * float(reach) / steps


def test_static_steps_clip_and_high_channels_have_their_own():
    x = sample(32)
    x[:, 5] *= 40
    spec = ActivationSpec(4, "tensor", static=True)
    rest = torch.arange(32) != 5
    parts = [(x[:, rest], 4), (x[:, 5:6], 8)]
    steps = [step_and_zero(part.amin().view(1), part.amax().view(1), spec, bits) for part, bits in parts]
    tensors = {
        "step": pattern(torch.cat([step for step, _ in steps])),
        "zero": torch.cat([zero for _, zero in steps]).to(torch.int32),
        "high": torch.tensor([5], dtype=torch.int32),
    }
    found = Activations(ActivationLayout(32, spec, high=1), tensors)(x)
    for (part, bits), where in zip(parts, (rest, ~rest), strict=True):
        expected = torch.tensor([oracle(part.flatten().double().tolist(), bits, False)]).view(part.shape)
        torch.testing.assert_close(found[:, where], expected.float(), rtol=0, atol=1e-4)
    assert Activations(ActivationLayout(32, spec, high=1), tensors)(x * 100).abs().max() < 2 * x.abs().max()


@pytest.mark.parametrize("n", [8, 12, 37, 96, 172])
def test_without_rounding_everything_is_a_linear_map_and_the_shift_cancels(n):
    x, draw = sample(n), torch.Generator().manual_seed(1)
    tensors = {"shift": pattern(torch.randn(n, generator=draw)), "divisor": pattern(torch.rand(n, generator=draw) + 0.5)}
    tensors |= {"member": torch.arange(n).int(), "target": torch.arange(n).flip(0).int()}
    tensors["coefficient"] = pattern(torch.rand(n, generator=draw))
    whole = Activations(ActivationLayout(n, None, True, True, True, n), tensors)
    torch.testing.assert_close(whole(x), whole.exact(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.exact(2 * x), 2 * whole.exact(x))
    merged = (x * numbers(tensors["coefficient"])).flip(-1)
    torch.testing.assert_close(whole.exact(x), rotate(merged / numbers(tensors["divisor"])))


@given(st.integers(1, 260))
def test_hadamard_rotations_of_any_size_are_orthogonal(n):
    order, block = factor_of(n)
    matrix = rotate(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(unrotate(matrix), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix[matrix != 0].abs(), torch.full((n * block,), block**-0.5, dtype=torch.float64))
    assert n % block == 0 and block % order == 0


def test_usual_widths_are_rotated_whole():
    assert {n: factor_of(n)[1] for n in (768, 3072, 4096, 9216, 13824, 14336, 18944)} == {
        n: n for n in (768, 3072, 4096, 9216, 13824, 14336, 18944)
    }


def test_a_layout_survives_json_and_a_malformed_one_is_refused():
    layout = ActivationLayout(64, ActivationSpec(6, "group", True, True, 32), True, False, True, 70, 8, 8)
    assert ActivationLayout.from_json(layout.to_json()) == layout
    assert layout.steps == 2 + 1
    with pytest.raises(FormatError, match="an activation layout is malformed"):
        ActivationLayout.from_json({"in_features": 3})
