"""Paired statistics: what a change of model does to a score, judged document by document."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

RESAMPLES = 2000
# Aggregations over texts (BLEU and its kin) take milliseconds each.
RESAMPLES_OF_TEXTS = 100
SEED = 0

Aggregate = Callable[[list[Any]], float]
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """A score beside a reference's on the same documents.

    Attributes:
        score, reference: aggregated over all documents.
        recovery: what is left of the reference's score, in percent (its inverse where lower is better); None for 0.
        difference: ``score - reference``.
        interval: 95 % bootstrap interval of the difference, documents drawn in pairs; None for a single document and
            where it is not finite.
        only_score, only_reference: documents that only one of them got right; None for scores other than right or wrong.
        p_value: of McNemar's exact test that both are right equally often; None likewise.
    """

    score: float
    reference: float
    recovery: float | None
    difference: float
    interval: Interval
    only_score: int | None = None
    only_reference: int | None = None
    p_value: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare(
    ours: Sequence[Any], theirs: Sequence[Any], aggregate: Aggregate, higher_is_better: bool = True, seed: int = SEED
) -> Comparison:
    """Compare two models' values on the same documents, in the same order.

    Args:
        ours, theirs: a value per document: a number, or what ``aggregate`` takes.
        aggregate: values -> score.
        higher_is_better: which way the score points.
        seed: of the bootstrap.

    Raises:
        ValueError: the lengths differ.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} documents cannot be paired.")
    score, reference = aggregated(aggregate, ours), aggregated(aggregate, theirs)
    part, whole = (score, reference) if higher_is_better else (reference, score)
    interval = bootstrap(
        lambda drawn: aggregated(aggregate, [ours[i] for i in drawn]) - aggregated(aggregate, [theirs[i] for i in drawn]),
        ours,
        seed,
    )
    recovery = 100 * part / whole if whole and math.isfinite(whole) else None
    found = Comparison(score, reference, recovery, score - reference, interval)
    if not (is_right_or_wrong(ours) and is_right_or_wrong(theirs)):
        return found
    pairs = list(zip(ours, theirs, strict=True))
    first, second = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return replace(found, only_score=first, only_reference=second, p_value=mcnemar(first, second))


def mcnemar(first: int, second: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    Args:
        first, second: documents that only the first or only the second got right (McNemar 1947; the exact binomial form).
    """
    from scipy.stats import binomtest

    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def bootstrap(statistic: Callable[[Sequence[int]], float], values: Sequence[Any], seed: int = SEED) -> Interval:
    """95 % percentile interval of ``statistic(indices)`` over documents drawn with replacement (Efron 1979)."""
    import numpy as np
    from scipy.stats import bootstrap as resample

    if len(values) < 2 or not math.isfinite(statistic(range(len(values)))):
        return None
    texts = any(isinstance(part, str) for part in (values[0] if isinstance(values[0], list | tuple) else values[:1]))
    found = resample(
        (np.arange(len(values)),),
        statistic,
        n_resamples=RESAMPLES_OF_TEXTS if texts else RESAMPLES,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def interval_of(values: Sequence[Any], aggregate: Aggregate, seed: int = SEED) -> Interval:
    """95 % bootstrap interval of one model's score."""
    return bootstrap(lambda drawn: aggregated(aggregate, [values[i] for i in drawn]), values, seed)


def aggregated(aggregate: Aggregate, values: Sequence[Any]) -> float:
    """The score of some documents; infinity where a perplexity is more than a float holds."""
    try:
        return float(aggregate(list(values)))
    except OverflowError:
        return math.inf


def is_right_or_wrong(values: Sequence[Any]) -> bool:
    """Whether each document counts 0 or 1."""
    return all(not isinstance(value, list | tuple | str) and value in (0, 1) for value in values)
