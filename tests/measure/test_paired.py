"""Paired statistics: known values, symmetry, and intervals as wide as theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="scipy is not installed: pip install 'hf-lowbit[eval]'")

from hf_lowbit.measure import paired

RIGHT = st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=2, max_size=30)


def mean(values):
    return sum(values) / len(values)


def perplexity(values):
    return math.exp(-mean(values))


def per_byte(values):
    """As lm-eval aggregates pairs of log-likelihood and bytes."""
    first, second = zip(*values, strict=True)
    return math.exp(-sum(first) / sum(second))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(0, 0, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 5, 2 / 32), (5, 5, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_test(first, second, expected):
    assert paired.mcnemar(first, second) == pytest.approx(expected, rel=1e-12)


def test_the_same_answers_differ_by_nothing():
    found = paired.compare([1, 0, 1, 1], [1, 0, 1, 1], mean)
    assert (found.difference, found.interval, found.recovery, found.p_value) == (0, (0, 0), 100, 1)
    assert (found.only_score, found.only_reference) == (0, 0)


@settings(max_examples=10)
@given(RIGHT)
def test_exchanging_the_models_turns_every_sign(pairs):
    ours, theirs = zip(*pairs, strict=True)
    there, back = paired.compare(ours, theirs, mean), paired.compare(theirs, ours, mean)
    assert there.difference == -back.difference
    assert there.p_value == back.p_value
    assert (there.only_score, there.only_reference) == (back.only_reference, back.only_score)
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=0.02)
    assert there.interval[0] <= there.difference <= there.interval[1]


def test_the_interval_is_as_wide_as_the_normal_approximation_says():
    draw = np.random.default_rng(1)
    theirs = draw.integers(0, 2, 400)
    ours = np.where(draw.random(400) < 0.2, 1 - theirs, theirs)
    found = paired.compare(ours.tolist(), theirs.tolist(), mean)
    error = np.std(ours - theirs) / math.sqrt(400)
    assert found.interval == pytest.approx((found.difference - 1.96 * error, found.difference + 1.96 * error), abs=0.01)
    mixed = draw.permutation(400)  # the same two scores, but no longer document by document
    unpaired = paired.compare(ours[mixed].tolist(), theirs.tolist(), mean)
    assert unpaired.difference == pytest.approx(found.difference)
    assert unpaired.interval[1] - unpaired.interval[0] > 1.4 * (found.interval[1] - found.interval[0])


def test_the_seed_decides_the_interval():
    ours, theirs = np.random.default_rng(2).normal(size=(2, 50)).tolist()
    first, again = (paired.compare(ours, theirs, mean, seed=3) for _ in range(2))
    assert first == again
    assert first.interval != paired.compare(ours, theirs, mean, seed=4).interval


def test_a_perplexity_has_an_interval_and_no_p_value():
    ours, theirs = [(-40.0, 20), (-9.0, 10), (-30.0, 30)], [(-20.0, 20), (-5.0, 10), (-15.0, 30)]
    found = paired.compare(ours, theirs, per_byte, higher_is_better=False)
    assert found.score == pytest.approx(math.exp(79 / 60))
    assert found.recovery == pytest.approx(100 * math.exp(40 / 60) / math.exp(79 / 60))
    assert found.p_value is None and found.only_score is None
    assert 0 < found.interval[0] < found.difference < found.interval[1]


def test_a_perplexity_beyond_floats_is_infinite():
    found = paired.compare([-1e6, -1e6], [-1.0, -1.0], perplexity, higher_is_better=False)
    assert found.score == math.inf
    assert found.recovery is None or found.recovery == 0


def test_edges():
    assert paired.compare([1], [0], mean).interval is None
    assert paired.compare([0, 0], [0, 0], mean).recovery is None
    with pytest.raises(ValueError, match="2 and 3 documents cannot be paired"):
        paired.compare([1, 0], [1, 0, 1], mean)
