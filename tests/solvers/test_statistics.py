"""Statistics of inputs: exact sums, in any order, in any number of parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.errors import BadRequest, LowBitError
from hf_lowbit.format import Spec
from hf_lowbit.solvers import Statistics, solve
from hf_lowbit.solvers.statistics import ExactSum, pooled


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(x: torch.Tensor, original: torch.Tensor | None = None) -> Statistics:
    cross = None if original is None else original.T @ x / len(x)
    return Statistics(len(x), x.T @ x / len(x), x.mean(0), x.abs().amax(0), cross, x.square()[:4])


def summed(parts, largest: float) -> ExactSum:
    total = ExactSum()
    total.fix_grid(largest)
    for part in parts:
        total.add(part)
    return total


@settings(max_examples=40)
@given(seed=st.integers(0, 999), count=st.integers(1, 12), sizes=st.lists(st.integers(-12, 5), min_size=12, max_size=12))
def test_a_sum_does_not_depend_on_the_order(seed, count, sizes):
    parts = [gauss(5, seed=seed + k) * 10.0 ** sizes[k] for k in range(count)]
    largest = max(float(part.abs().max()) for part in parts)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    one, other = summed(parts, largest), summed([parts[k] for k in order], largest)
    assert torch.equal(one.total, other.total)
    halves = [summed(parts[: count // 2], largest), summed(parts[count // 2 :], largest)]
    assert torch.equal(one.total, sum(half.total for half in halves if half.total is not None))
    plain = torch.stack([part.double() for part in parts]).sum(0)
    assert (one.mean(1).double() - plain).abs().max() <= count * largest * 2.0**-37 + plain.abs().max() * 2.0**-23


def test_sums_of_numbers_on_the_grid_are_those_of_float64():
    parts = [gauss(64, 64, seed=seed).mul(256).round().div(256) for seed in range(50)]
    exact = torch.stack(parts).double().sum(0)
    assert torch.equal(summed(parts, 4.0).mean(1), exact.float())
    assert torch.equal(summed(parts, 4.0).mean(50), (exact / 50).float())


def test_sums_survive_a_first_addend_of_zero():
    assert torch.equal(summed([torch.zeros(3), torch.ones(3)], 0.0).mean(2), torch.full((3,), 0.5))
    alone = ExactSum()
    alone.add(torch.zeros(3))
    alone.add(torch.ones(3))
    assert torch.equal(alone.mean(2), torch.full((3,), 0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_a_sum_refuses_what_it_cannot_hold(bad):
    total = summed([torch.ones(3)], 1.0)
    with pytest.raises(LowBitError, match=r"calibration inputs reach .* far beyond those of the first batch"):
        total.add(torch.tensor([0.0, bad, 1.0]))
    assert torch.equal(total.mean(1), torch.ones(3))


def test_a_sum_of_many_large_addends_is_refused_before_it_wraps():
    total, addend = summed([], 1.0), torch.full((2,), 2.0**22)
    with pytest.raises(LowBitError, match="far beyond"):
        for _ in range(9):
            total.add(addend)
            assert (total.total > 0).all()


def test_merging_the_halves_gives_the_whole():
    x, original = gauss(90, 16), gauss(90, 16, seed=1)
    whole = Statistics(90, x.T @ x / 90, x.mean(0), x.abs().amax(0), original.T @ x / 90)
    parts = [statistics(x[s], original[s]) for s in (slice(0, 20), slice(20, 50), slice(50, 90))]
    for merged in (pooled(parts), pooled(reversed(parts)), parts[0].merge(parts[1].merge(parts[2]))):
        assert merged.count == 90
        for name in ("gram", "mean", "largest", "cross"):
            torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    assert pooled([]) is None


def test_merging_with_what_saw_nothing_changes_nothing():
    some, none = statistics(gauss(9, 4)), Statistics(0, torch.zeros(4, 4), torch.zeros(4), torch.zeros(4))
    merged = some.merge(none)
    assert merged.count == 9 and torch.equal(merged.gram, some.gram) and torch.equal(merged.largest, some.largest)
    assert none.merge(none).count == 0 and torch.equal(none.merge(none).gram, none.gram)


@pytest.mark.parametrize("full", [True, False])
def test_save_and_load_are_exact(full, tmp_path):
    some = statistics(gauss(9, 4), gauss(9, 4, seed=1) if full else None)
    if not full:
        some = Statistics(some.count, some.gram.T, some.mean, some.largest)
    some.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert again.count == some.count
    for name in ("gram", "mean", "largest", "cross", "sensitivity"):
        one, other = getattr(some, name), getattr(again, name)
        assert (one is None and other is None) or torch.equal(one, other)


def test_importance_is_the_diagonal_of_the_gram_matrix():
    x = gauss(50, 8)
    torch.testing.assert_close(statistics(x).importance, x.square().mean(0))


def test_statistics_of_another_size_or_number_are_refused():
    spec, made = Spec(method="gptq"), statistics(gauss(9, 32))
    for weight, given_, message in (
        (gauss(8, 64), [made], "the weight has 64 inputs, its statistics are of 32"),
        (gauss(2, 8, 32), [made], "a stack of 2 matrices needs as many statistics, got 1"),
        (gauss(8, 32), [], "'gptq' fits codes to calibration data and was given none"),
    ):
        with pytest.raises(BadRequest, match=message):
            solve(weight, spec, statistics=given_)
