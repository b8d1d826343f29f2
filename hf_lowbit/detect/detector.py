"""The detector: scores texts with a causal LM and says what the scores of people's texts allow to conclude."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import tee
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_lowbit.detect.calibrate import EDGES, LAST, Sample, make_calibration
from hf_lowbit.detect.calibration import Calibration, check_detector, needed
from hf_lowbit.detect.clean import Cleaned, clean
from hf_lowbit.detect.result import Detection, Span
from hf_lowbit.detect.scores import DEFAULT, SCORES, Means, Score, get_score
from hf_lowbit.detect.scoring import Scorer, TextSums
from hf_lowbit.detect.verdict import conclude, unreadable
from hf_lowbit.errors import BadRequest

if TYPE_CHECKING:
    from typing_extensions import Self

RESAMPLES = 400
FEWEST_BLOCKS = 4
# Tokens of a text kept one by one for the heat map, unless asked otherwise.
KEEP = 4096


class Detector:
    """Scores, and with a calibration verdicts, from a causal LM.

    Args:
        scorer: the model and how it reads.
        identity: what the scores depend on; a calibration is bound to it.
        calibration: thresholds for this very detector; without one there are scores and no verdicts.
        score: name of the score verdicts rest on.

    Raises:
        BadRequest: the calibration is of another detector, or the score is unknown or needs an observer.
    """

    def __init__(
        self, scorer: Scorer, identity: Mapping[str, Any], calibration: Calibration | None = None, score: str = DEFAULT
    ) -> None:
        self.scorer, self.identity = scorer, dict(identity)
        self._check_score(score)
        self.score = score
        self.calibration: Calibration | None = None
        if calibration is not None:
            self.use(calibration)

    def use(self, calibration: Calibration) -> None:
        """Take up a calibration.

        Raises:
            BadRequest: it is of another detector.
        """
        check_detector(calibration.detector, self.identity)
        self.calibration = calibration

    @property
    def scores(self) -> list[Score]:
        """The scores this detector can give."""
        return [score for score in SCORES.values() if self.scorer.observer is not None or not score.pair]

    def calibrate(
        self,
        human_texts: Iterable[str],
        fpr: float = 0.01,
        *,
        machine_texts: Iterable[str] = (),
        fnr: float = 0.05,
        groups: Sequence[Any] | None = None,
        language: str = "en",
        source: str = "",
    ) -> Self:
        """Set thresholds from texts people wrote, in place.

        Args:
            human_texts: of the kind and language that will be judged, and not read by the detector in its training. A text
                serves every length bin up to its own length, cut to it. ``1 / fpr - 1`` are needed at least, for each bin.
            fpr: of people's texts, the share that may be called a machine's.
            machine_texts: texts of the machines to be told apart. Only with them is there a verdict of ``human``, and only
                for scores at which people's texts are ten times as common as these.
            fnr: of such texts, the share that may be called a person's.
            groups: one value for each human text that names its author or source, for the bootstrap; each its own if None.
            language: what the texts are written in.
            source: what they are, in words.

        Returns:
            This detector.

        Raises:
            BadRequest: too few texts for this rate, or a text that is none.
        """
        needed(fpr)
        if not 0 < fnr <= 0.5:
            raise BadRequest(f"fnr={fnr}: the share of machines' texts called a person's lies above 0 and is 0.5 at most.")
        people = list(human_texts)
        of = range(len(people)) if groups is None else list(groups)
        if len(of) != len(people):
            raise BadRequest(f"groups has {len(of)} values for {len(people)} human texts; each text needs one.")
        names = {name: number for number, name in enumerate(dict.fromkeys(of))}
        human = self._samples(people, [names[name] for name in of])
        machines = list(machine_texts)
        machine = self._samples(machines, range(len(machines)))
        made = make_calibration(human, machine, self.identity, fpr, fnr, language, source or f"{len(people)} texts")
        self.calibration = made
        return self

    def _samples(self, texts: Sequence[str], groups: Sequence[int]) -> list[Sample]:
        cleaned = [clean(_text(text, number)).text for number, text in enumerate(texts)]
        found = self.scorer.score(cleaned, keep=int(LAST * EDGES[-1]))
        return [Sample(text, sums.first, group) for text, sums, group in zip(cleaned, found, groups, strict=True)]

    def detect(self, texts: str | Iterable[str], score: str | None = None, keep: int = KEEP) -> list[Detection]:
        """A detection for each text, in order; a single string is one text.

        Args:
            texts: of any length and content: what cannot be judged is answered with ``abstain``.
            score: name of the score the verdicts rest on; the detector's own if None.
            keep: tokens of each text to return one by one, and to cut into paragraphs.

        Raises:
            BadRequest: a text that is no string, or an unknown score.
        """
        return list(self.stream([texts] if isinstance(texts, str) else texts, score, keep))

    def stream(self, texts: Iterable[str], score: str | None = None, keep: int = KEEP) -> Iterator[Detection]:
        """As :meth:`detect`, one after another, holding 64 texts at most."""
        chosen = self._check_score(score or self.score)
        ahead, along = tee(_text(text, number) for number, text in enumerate(texts))
        cleaned = ((clean(text) if unreadable(text) is None else clean("")) for text in ahead)
        forms, scored = tee(cleaned)
        for text, form, sums in zip(along, forms, self.scorer.score((f.text for f in scored), keep), strict=True):
            yield self._detection(text, form, sums, chosen)

    def _detection(self, text: str, form: Cleaned, sums: TextSums, chosen: Score) -> Detection:
        why = unreadable(text)
        evidence = Detection("abstain", why or "", chosen.name, tokens=sums.tokens, scored=sums.scored, text=form.text)
        if why is not None or not sums.scored:
            return conclude(evidence, form, None, self.calibration)
        means = Means(sums.sums.sum(0) / sums.scored)
        evidence = replace(
            evidence,
            score=_value(chosen, means),
            scores={score.name: _value(score, means) for score in self.scores},
            interval=_interval(sums, chosen),
            spans=_paragraphs(form.text, sums, chosen),
            first=sums.first,
            notes=(f"only the first {sums.tokens:,} tokens were read",) if sums.cut else (),
        )
        return conclude(evidence, form, -float(means.log_probability), self.calibration)

    def _check_score(self, name: str) -> Score:
        found = get_score(name)
        if found.pair and self.scorer.observer is None:
            raise BadRequest(
                f"the score {name!r} compares two models; give the detector an observer, such as its 2-bit version."
            )
        return found


def _text(text: Any, number: int) -> str:
    if not isinstance(text, str):
        raise BadRequest(f"text {number} is a {type(text).__name__}, not a string. Decode bytes first.")
    return text


def _value(score: Score, means: Means) -> float:
    return float(score.compute(means))


def _interval(sums: TextSums, score: Score) -> tuple[float, float] | None:
    """95 % block bootstrap interval; None of a text too short to tell how much its parts differ."""
    blocks = len(sums.sums)
    if blocks < FEWEST_BLOCKS:
        return None
    drawn = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES)
    counts = np.maximum(drawn @ sums.counts, 1)
    low, high = np.percentile(score.compute(Means(drawn @ sums.sums / counts[:, None])), [2.5, 97.5])
    return float(low), float(high)


def _paragraphs(text: str, sums: TextSums, score: Score) -> tuple[Span, ...]:
    """The score over each paragraph that has scored tokens, as far as tokens were kept."""
    starts = sums.first.spans[:, 0]
    usable = np.isfinite(sums.first.values[:, 0])
    out, place = [], 0
    for part in text.split("\n\n"):
        end = place + len(part)
        inside = usable & (starts >= place) & (starts < end)
        if inside.any():
            means = Means(sums.first.values[inside].astype(np.float64).mean(0))
            out.append(Span(place, end, int(inside.sum()), _value(score, means)))
        place = end + 2
        if not len(starts) or place > starts[-1]:
            break
    return tuple(out)
