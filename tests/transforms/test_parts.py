"""Laws of single transforms: what splitting, merging, bases and searches promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowbit.format.activations import ActivationLayout, Activations, ActivationSpec
from hf_lowbit.transforms.outlier_suppression_plus import search as search_threshold
from hf_lowbit.transforms.qllm import assemble, fit, merging_cost
from hf_lowbit.transforms.registry import Extremes, RangeBench
from hf_lowbit.transforms.resq import basis
from hf_lowbit.transforms.rotations import keeping_ones, random_hadamard, random_orthogonal, residual_rotation
from hf_lowbit.transforms.token_wise_clipping import clipped, coarse, fine


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 30), st.integers(1, 2))
def test_splitting_keeps_the_output_and_bounds_the_largest_value(seed, outliers):
    x, weight = draw(9, 24, seed=seed), draw(5, 24, seed=seed + 1)
    x[:, :outliers] *= 10
    largest = x.abs().amax(0)
    threshold = float(largest.max()) / 2.5
    counts = torch.ceil(largest / threshold).clamp_min(1).long()
    # Twins, so that merging costs nothing either.
    x[:, 12:] = x[:, 11:12]
    cost = torch.ones(24, 24)
    cost[11:, 11:] = 0
    found = assemble(counts, cost)
    assert found is not None
    given_ = torch.zeros_like(x).index_add(-1, found.target, x[:, found.member] * found.coefficient.float())
    assert int(counts.max()) == 3
    assert given_.abs().max() <= threshold * 1.0001
    torch.testing.assert_close(given_ @ found.columns(weight).T, x @ weight.T, rtol=1e-4, atol=1e-4)
    assert found.target.max() == 23


def test_the_cost_of_merging_is_what_the_best_matrix_for_the_mean_still_loses():
    x, weight = draw(400, 6), draw(7, 6, seed=1)
    x[:, 4] = x[:, 1] + x[:, 2] + 0.4 * x[:, 4]
    mean = (x[:, 1] + x[:, 4]) / 2
    left = torch.cat([x[:, [0, 2, 3, 5]], mean[:, None]], 1)
    y = x @ weight.T
    best = torch.linalg.lstsq(left, y).solution
    expected = (left @ best - y).pow(2).sum()
    torch.testing.assert_close(merging_cost(x, [weight])[1, 4].float(), expected, rtol=0.05, atol=0)
    changed = x.clone()
    changed[:, 1] = changed[:, 4] = mean
    assert ((changed - x) @ weight.T).pow(2).sum() > 5 * expected  # what the plain mean loses


def test_a_fit_finds_the_matrix_that_made_the_outputs():
    x, weight = draw(300, 12), draw(5, 12, seed=1)
    torch.testing.assert_close(fit(x, x @ weight.T, weight + draw(5, 12, seed=2)), weight, rtol=0, atol=0.01)
    assert torch.equal(fit(0 * x, 0 * x @ weight.T, weight), weight)


def test_where_too_many_would_have_to_merge_nothing_is_done():
    assert assemble(torch.full((8,), 3), torch.ones(8, 8)) is None


@pytest.mark.parametrize("size", [12, 48, 50, 64, 172])
def test_rotations_are_orthogonal_and_keep_what_they_should(size):
    for matrix in (random_hadamard(size, 0), random_orthogonal(size, 0), residual_rotation(size, True, 0)):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), rtol=0, atol=1e-10)
    ones = torch.ones(size).double()
    torch.testing.assert_close(residual_rotation(size, True, 3) @ ones, ones, rtol=0, atol=1e-10)
    assert float((residual_rotation(size, False, 3) @ ones - ones).abs().max()) > 0.1
    assert torch.equal(keeping_ones(torch.zeros(0, 0)), torch.ones(1, 1).double())


def test_the_last_directions_of_a_basis_hold_the_variance():
    x = draw(500, 32) * torch.linspace(0.1, 5, 32) @ random_orthogonal(32, 4).float()
    for count in (0, 4, 32):
        matrix = basis([x], count, 1)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(32).double(), rtol=0, atol=1e-10)
    energy = (x.double() @ basis([x], 4, 1)).pow(2).sum(0)
    assert energy[-4:].sum() / energy.sum() > 0.9 * x.double().svd().S[:4].pow(2).sum() / x.double().pow(2).sum()


class Bench:
    """Rounds activations to 4 bits per tensor and leaves matrices alone."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.spec, self._matrix = ActivationSpec(4, "tensor"), matrix

    def matrices(self, site: object) -> list[torch.Tensor]:
        return [self._matrix]

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Site:
    """16 channels that nothing can fold."""

    size, producer = 16, None


def test_the_threshold_search_shrinks_the_outlier_and_hardly_the_others():
    even, weight = draw(200, 16), draw(8, 16, seed=1)
    odd = even.clone()
    odd[:, 3] = odd[:, 3] * 50 + 70
    for x, wanted in ((even, False), (odd, True)):
        low, high = x.amin(0), x.amax(0)
        factor, centred = search_threshold(Bench(weight), Site(), x, low, high, (low + high) / 2, 20)
        assert factor is not None
        if not wanted:
            assert float(factor.max()) < 2
            continue
        assert centred
        assert int(factor.argmax()) == 3
        assert float(factor[3]) > 10 * float(factor[4:].max())


def test_clipping_drops_the_tokens_beyond_the_quantile():
    seen = Extremes(-torch.arange(100.0)[:, None], 2 * torch.arange(100.0)[:, None])
    low, high = clipped(seen, 0.9)
    assert (float(low), float(high)) == (-89.0, 178.0)
    low, high = clipped(seen, 1.0)
    assert (float(low), float(high)) == (-99.0, 198.0)


class OneTensor(RangeBench):
    """Heavy-tailed numbers rounded to 4 bits in one range; the loss is that of the numbers themselves."""

    def __init__(self) -> None:
        self.x = draw(64, 32) * draw(64, 32, seed=1).abs().exp()
        super().__init__({"x": Extremes(self.x.amin(1, keepdim=True), self.x.amax(1, keepdim=True))}, 4)
        self.quantizer = Activations(ActivationLayout(32, ActivationSpec(4, "tensor", static=True)), {})

    def set(self, ranges):
        self.ranges = ranges

    def loss(self):
        return float(self.error(self.ranges, 0))

    def batches(self):
        return 1

    def error(self, ranges, batch):
        return (self.quantizer(self.x, self.quantizer.steps(*ranges["x"])) - self.x).pow(2).mean()


def test_learned_ranges_are_near_the_best_of_all_and_better_than_the_coarse():
    bench = OneTensor()
    ranges, least = coarse(bench, 0.01)
    bench.set(fine(bench, ranges, 200, 0.02))
    found = bench.loss()
    ends = torch.linspace(0.5, float(bench.x.abs().max()), 40)
    tried = []
    for low in ends:
        for high in ends:
            bench.set({"x": (-low[None], high[None])})
            tried.append(bench.loss())
    assert found < 0.98 * least
    assert found < 1.03 * min(tried)


def test_gradients_of_steps_are_those_of_lsq_plus():
    x = (draw(50) * 4).requires_grad_()
    step, zero = torch.tensor([0.3], requires_grad=True), torch.tensor([6.0], requires_grad=True)
    quantizer = Activations(ActivationLayout(50, ActivationSpec(4, "tensor", static=True)), {})
    weight = draw(50, seed=2)
    (quantizer(x, (step, zero)) * weight).sum().backward()
    scaled = (x / step).detach()
    code = scaled.round() + 6
    inside = (code >= 0) & (code <= 15)
    assert 0 < int(inside.sum()) < 50
    slope = torch.where(inside, scaled.round() - scaled, code.clamp(0, 15) - 6)
    torch.testing.assert_close(step.grad, (slope * weight).sum()[None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(zero.grad, (torch.where(inside, 0.0, -0.3) * weight).sum()[None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, weight * inside, rtol=1e-4, atol=1e-4)
