"""The zero-shot scores: each a function of the means of the token statistics of one text.

A new score is one function of :class:`Means` under ``@score(...)``, and a row in ``tests/detect/score_table.py``. All of
them come out of the same forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_lowbit.detect.token_statistics import STATISTICS
from hf_lowbit.errors import BadRequest, unknown_name

# The score verdicts rest on unless another is asked for: the best on average over the cross-model rows of eval/detection.py.
DEFAULT = "fast_detectgpt"


class Means:
    """Means of the token statistics over the scored tokens of a text, one attribute for each of ``STATISTICS``.

    Each is a float64 array ``[...]``: a scalar for one text, a vector over resamples or over prefixes.
    """

    originality: np.ndarray
    log_rank: np.ndarray
    log_probability: np.ndarray
    entropy: np.ndarray
    variance: np.ndarray
    cross_entropy: np.ndarray

    def __init__(self, values: np.ndarray) -> None:
        for column, name in enumerate(STATISTICS):
            setattr(self, name, values[..., column])


@dataclass(frozen=True)
class Score:
    """A score and how to read it.

    Attributes:
        name: what ``--score`` takes.
        title: for people.
        sign: 1 if larger values mean a machine, -1 if smaller ones do.
        pair: whether it needs a second model (the observer).
        compute: means to values, of the same shape.
    """

    name: str
    title: str
    sign: int
    pair: bool
    compute: Callable[[Means], np.ndarray]


SCORES: dict[str, Score] = {}


def score(name: str, title: str, sign: int, pair: bool = False) -> Callable[[Callable], Callable]:
    """Register a function of :class:`Means` as a score."""

    def register(compute: Callable[[Means], np.ndarray]) -> Callable[[Means], np.ndarray]:
        SCORES[name] = Score(name, title, sign, pair, compute)
        return compute

    return register


def get_score(name: str) -> Score:
    """The score of that name.

    Raises:
        BadRequest: there is none, with the nearest name.
    """
    if name not in SCORES:
        raise BadRequest(unknown_name("score", name, SCORES))
    return SCORES[name]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotient that stays finite where a text is predicted perfectly and both ends vanish."""
    return above / np.maximum(below, 1e-3)


@score("spot", "SPOT originality", -1)
def spot(means: Means) -> np.ndarray:
    """Mean normalised rank times ten, 0 to 10 (SPOT, arXiv 2405.20505): 0 where every token was the first choice."""
    return 10 * means.originality


@score("log_rank", "log-rank", -1)
def log_rank(means: Means) -> np.ndarray:
    """Mean of ``ln(rank + 1)``."""
    return means.log_rank


@score("lrr", "log-likelihood to log-rank ratio", 1)
def lrr(means: Means) -> np.ndarray:
    """Mean negative log-likelihood over mean log-rank (DetectLLM, arXiv 2306.05540)."""
    return _ratio(-means.log_probability, means.log_rank)


@score("likelihood", "log-likelihood", 1)
def likelihood(means: Means) -> np.ndarray:
    """Mean log-probability, nats per token."""
    return means.log_probability


@score("entropy", "entropy", -1)
def entropy(means: Means) -> np.ndarray:
    """Mean entropy of the predictions, nats per token: what the text leads the detector to expect."""
    return means.entropy


@score("fast_detectgpt", "Fast-DetectGPT", 1)
def fast_detectgpt(means: Means) -> np.ndarray:
    """Log-likelihood above its expectation, in standard deviations of one token (arXiv 2310.05130, analytic form).

    The paper's statistic grows with the square root of the number of tokens; it is divided out, so that texts of one
    length bin compare.
    """
    return _ratio(means.log_probability + means.entropy, np.sqrt(means.variance))


@score("binoculars", "Binoculars", -1, pair=True)
def binoculars(means: Means) -> np.ndarray:
    """Mean negative log-likelihood over mean cross-entropy of observer and model (arXiv 2401.12070).

    Both means are over the same scored tokens.
    """
    return _ratio(-means.log_probability, means.cross_entropy)
