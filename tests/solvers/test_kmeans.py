"""Weighted k-means in one dimension: as good as an exhaustive dynamic programme, and what is left of it when binned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowbit.solvers import kmeans
from hf_lowbit.solvers.kmeans import weighted_kmeans


def drawn(rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of two widths, and weights that span decades."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, length, generator=random) * (1 + 3 * (torch.rand(rows, length, generator=random) < 0.1))
    return values, torch.randn(rows, length, generator=random).square() ** 2


def codes_of(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, values)


def objective(values: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of each row, float64 ``[n]``."""
    error = values.double() - levels.gather(1, codes_of(values, levels)).double()
    return (weights.double() * error.square()).sum(1)


def exhaustive(values: list[float], weights: list[float], count: int) -> float:
    """Least error of one row with at most ``count`` levels, by the O(count n^2) recursion."""
    pairs = sorted(zip(values, weights, strict=True))

    def cost(first: int, last: int) -> float:
        mass = sum(w for _, w in pairs[first:last])
        mean = sum(v * w for v, w in pairs[first:last]) / mass if mass else 0.0
        return sum(w * (v - mean) ** 2 for v, w in pairs[first:last])

    costs = {(i, j): cost(i, j) for j in range(len(pairs) + 1) for i in range(j)}
    best = [0.0] + [float("inf")] * len(pairs)
    for _ in range(count):
        best = [min([best[j]] + [best[i] + costs[i, j] for i in range(j)]) for j in range(len(best))]
    return best[-1]


def lloyd(values: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Levels after 50 alternations of assignment and weighted mean."""
    for _ in range(50):
        codes, zeros = codes_of(values, levels), torch.zeros_like(levels)
        mass = zeros.scatter_add(1, codes, weights)
        means = zeros.scatter_add(1, codes, weights * values) / mass
        levels = torch.where(mass > 0, means, levels).sort(1).values
    return levels


@given(
    pairs=st.lists(
        st.tuples(st.integers(-20, 20), st.sampled_from([0.0, 0.01, 1.0, 1.0, 2.5, 300.0])), min_size=1, max_size=13
    ),
    count=st.integers(1, 6),
)
def test_equals_the_exhaustive_recursion(pairs, count):
    values, weights = ([float(pair[k]) for pair in pairs] for k in (0, 1))
    if not any(weights):
        weights = [1.0] * len(weights)  # a row of no weight counts all alike
    rows = torch.tensor([values, values]), torch.tensor([[pair[1] for pair in pairs], weights])
    levels = weighted_kmeans(*rows, count)
    assert levels.shape == (2, count) and (levels.diff(dim=1) >= 0).all() and torch.equal(levels[0], levels[1])
    found = float(objective(rows[0], rows[1], levels)[1])
    assert found == pytest.approx(exhaustive(values, weights, count), rel=1e-5, abs=1e-8 * sum(weights))


@pytest.mark.parametrize("length", [7, 8, 9, 64, 65])
def test_equals_the_exhaustive_recursion_on_longer_rows(length):
    values, weights = drawn(3, length)
    found = objective(values, weights, weighted_kmeans(values, weights, 8))
    for row in range(3):
        least = exhaustive(values[row].tolist(), weights[row].tolist(), 8)
        assert float(found[row]) == pytest.approx(least, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("count", [2, 3, 8, 16])
@pytest.mark.parametrize("bins", [2048, 128])
def test_never_worse_than_lloyd(monkeypatch, count, bins):
    monkeypatch.setattr(kmeans, "BINS", bins)
    values, weights = drawn(6, 1000)
    found = objective(values, weights, weighted_kmeans(values, weights, count))
    ordered = values.sort(1).values
    starts = [ordered[:, torch.linspace(0, 999, count + 2)[1:-1].long()]]
    starts += [values[:, k * count : (k + 1) * count].sort(1).values for k in range(5)]
    slack = 1e-6 if bins > 1000 else 1e-4
    for start in starts:
        assert (found <= (1 + slack) * objective(values, weights, lloyd(values, weights, start))).all()


def test_bins_cost_next_to_nothing(monkeypatch):
    values, weights = drawn(4, 2000)
    monkeypatch.setattr(kmeans, "BINS", 2000)
    exact = objective(values, weights, weighted_kmeans(values, weights, 16))
    monkeypatch.setattr(kmeans, "BINS", 256)
    binned = objective(values, weights, weighted_kmeans(values, weights, 16))
    assert (binned >= (1 - 1e-6) * exact).all() and (binned <= 1.003 * exact).all()


def test_equal_weights_are_plain_kmeans():
    values, _ = drawn(4, 300)
    plain = weighted_kmeans(values, torch.ones_like(values), 8)
    assert torch.allclose(weighted_kmeans(values, torch.full_like(values, 0.37), 8), plain, atol=1e-6)
    assert torch.equal(weighted_kmeans(values, torch.zeros_like(values), 8), plain)
    codes = codes_of(values, plain)
    means = torch.stack(
        [torch.stack([row[code == k].mean() for k in range(8)]) for row, code in zip(values, codes, strict=True)]
    )
    assert torch.allclose(means, plain, atol=1e-5)


@pytest.mark.parametrize("length", [20, 5000])
def test_as_many_levels_as_values_leave_no_error(length):
    random = torch.Generator().manual_seed(1)
    # Two of the values are closer than a bin is wide.
    distinct = torch.tensor([-7.0, -1.5, 0.0, 0.25, 0.26, 3.0, 40.0])
    values = distinct[torch.randint(0, 7, (3, length), generator=random)]
    weights = torch.rand(3, length, generator=random) + 0.01
    for count in (7, 8, 16):
        levels = weighted_kmeans(values, weights, count)
        assert (levels.gather(1, codes_of(values, levels)) - values).abs().max() <= 1e-5
        assert (levels.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("length", [300, 3000])
@pytest.mark.parametrize("factor", [2.0**-60, 0.3, 7e20])
def test_codes_do_not_depend_on_the_unit_of_the_weights(length, factor):
    values, weights = drawn(3, length)
    plain = codes_of(values, weighted_kmeans(values, weights, 8))
    assert torch.equal(codes_of(values, weighted_kmeans(values, weights * factor, 8)), plain)


@pytest.mark.parametrize("length", [100, 3000])
def test_values_of_no_weight_do_not_matter(length):
    values, weights = drawn(2, length)
    weights[:, ::7] = 0
    moved = values.clone()
    moved[:, ::7] = torch.where(torch.arange(len(moved[0, ::7])) % 2 == 0, 1e6, -1e6)
    levels = weighted_kmeans(moved, weights, 8)
    assert torch.equal(levels, weighted_kmeans(values, weights, 8))
    assert levels.abs().max() <= values.abs().max()


def test_rows_do_not_depend_on_their_company(monkeypatch):
    values, weights = drawn(9, 200)
    together = weighted_kmeans(values, weights, 8)
    monkeypatch.setattr(kmeans, "HELD", 1)
    assert torch.equal(weighted_kmeans(values, weights, 8), together)
