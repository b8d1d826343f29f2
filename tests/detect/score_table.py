"""One row a score: what the laws and tests over all scores need to know of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """A score, and the same thing computed the slow way.

    Attributes:
        name: of the score.
        slow: from probabilities ``p`` and observer's ``q`` float64 ``[n, v]`` and the tokens that followed ``t`` ``[n]``.
    """

    name: str
    slow: Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def _at(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    return p[np.arange(len(t)), t]


def _ranks(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.array([sum(x > row[k] for x in row) + (sum(x == row[k] for x in row) - 1) / 2 for row, k in zip(p, t)])  # noqa: B905


def _entropies(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(1)


def _discrepancy(p: np.ndarray, q: np.ndarray, t: np.ndarray) -> float:
    variances = (p * np.log(p) ** 2).sum(1) - _entropies(p) ** 2
    return (np.log(_at(p, t)).sum() + _entropies(p).sum()) / np.sqrt(variances.sum()) / np.sqrt(len(t))


ROWS = [
    Row("spot", lambda p, q, t: 10 * (_ranks(p, t) / p.shape[1]).mean()),
    Row("log_rank", lambda p, q, t: np.log(_ranks(p, t) + 1).mean()),
    Row("lrr", lambda p, q, t: -np.log(_at(p, t)).sum() / np.log(_ranks(p, t) + 1).sum()),
    Row("likelihood", lambda p, q, t: np.log(_at(p, t)).mean()),
    Row("entropy", lambda p, q, t: _entropies(p).mean()),
    Row("fast_detectgpt", _discrepancy),
    Row("binoculars", lambda p, q, t: -np.log(_at(p, t)).mean() / -(q * np.log(p)).sum(1).mean()),
]
