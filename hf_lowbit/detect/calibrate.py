"""Makes a calibration from the token statistics of people's texts, cut to the lengths it is to serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_lowbit.detect.calibration import Bin, Calibration, needed, six_digits, threshold
from hf_lowbit.detect.profile import common_words, features, ranges
from hf_lowbit.detect.scores import SCORES, Means
from hf_lowbit.detect.scoring import Tokens
from hf_lowbit.errors import BadRequest

# Lower ends of the length bins, in tokens. Below the first no verdict is given: of texts of 60 tokens that the embedded
# model sampled at temperature 0.7 the default score finds 96 % at 1 % false positives, of 40 tokens 85 % and of 30 tokens
# 62 % (eval/results/detection_own_embedded.json).
EDGES = (60, 100, 200, 400)
# Texts of the last bin are cut at so many times its lower end.
LAST = 2.0
# What a length within a bin is drawn with: fractions that stay evenly spread however many are taken.
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Sample:
    """A text to calibrate on: cleaned, its tokens one by one, and which source it came from."""

    text: str
    tokens: Tokens
    group: int


@dataclass(frozen=True)
class _Cut:
    """One text cut to a length of the bin."""

    scores: dict[str, float]
    features: dict[str, float]
    group: int


def make_calibration(
    human: Sequence[Sample],
    machine: Sequence[Sample],
    detector: Mapping[str, Any],
    fpr: float,
    fnr: float,
    language: str,
    source: str,
) -> Calibration:
    """Thresholds for every length bin that has enough human texts.

    Raises:
        BadRequest: none has.
    """
    least = needed(fpr)
    lengths = [len(sample.tokens.values) for sample in human]
    if sum(length >= EDGES[0] for length in lengths) < least:
        raise BadRequest(
            f"fpr={fpr:g} takes at least {least:,} human texts of {EDGES[0]} tokens or more; {len(human):,} were given, "
            f"{sum(length >= EDGES[0] for length in lengths):,} of them long enough. Give more or ask for a larger fpr."
        )
    common = common_words(sample.text for sample in human)
    pair = bool(len(human[0].tokens.values) and np.isfinite(human[0].tokens.values[-1, -1]))
    bins = []
    for low, high in zip(EDGES, (*EDGES[1:], None), strict=True):
        found = _cut_to(human, low, high, common, pair)
        if len(found) >= least:
            made = _cut_to(machine, low, high, common, pair)
            bins.append(_bin(low, high, found, made, fpr))
    return Calibration(dict(detector), fpr, fnr, language, source, common, bins)


def _bin(low: int, high: int | None, human: Sequence[_Cut], machine: Sequence[_Cut], fpr: float) -> Bin:
    names = list(human[0].scores)
    groups = [cut.group for cut in human]
    thresholds = {name: threshold([cut.scores[name] for cut in human], groups, fpr) for name in names}
    of_human = {name: sorted(cut.scores[name] for cut in human) for name in names}
    of_machine = {name: sorted(cut.scores[name] for cut in machine) for name in names if machine}
    return Bin(low, high, of_human, of_machine, thresholds, ranges([cut.features for cut in human]))


def _cut_to(samples: Sequence[Sample], low: int, high: int | None, common: Sequence[str], pair: bool) -> list[_Cut]:
    """The texts of at least ``low`` tokens, each cut to a length of the bin; lengths are spread evenly over it."""
    end = high or int(LAST * low)
    out: list[_Cut] = []
    for sample in samples:
        available = len(sample.tokens.values)
        if available >= low:
            length = low + int((len(out) * GOLDEN + 0.5) % 1 * (min(available, end - 1) - low + 1))
            out.append(_cut(sample, length, common, pair))
    return out


def _cut(sample: Sample, length: int, common: Sequence[str], pair: bool) -> _Cut:
    values = sample.tokens.values[:length]
    means = Means(values[np.isfinite(values[:, 0])].astype(np.float64).mean(0))
    scores = {s.name: six_digits(s.sign * float(s.compute(means))) for s in SCORES.values() if pair or not s.pair}
    text = sample.text[: sample.tokens.spans[length - 1, 1]]
    found = features(text, length, -float(means.log_probability), common)
    return _Cut(scores, found, sample.group)
