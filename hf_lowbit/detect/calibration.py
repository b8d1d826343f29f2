"""The calibration: which scores people's texts get from one detector, by length, and the thresholds that follow.

Split-conformal: with ``n`` human texts of a length bin, a text is called a machine's if its score is beyond the
``ceil((n + 1) (1 - fpr))``-th of theirs. If it is exchangeable with them, that happens to a person's text with probability
``fpr`` at most. It takes ``n >= 1 / fpr - 1`` texts, else there is no such order statistic.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_lowbit.errors import BadRequest, FormatError

FORMAT, VERSION = "hf-lowbit detector calibration", 1
# Where a checkpoint's own calibration lies.
FILE_NAME = "detector_calibration.json"
RESAMPLES = 1000
# A verdict of "human" is only given where it says something: people's texts must fall there this many times as often as the
# machine texts do.
LIKELIHOOD_RATIO = 10


@dataclass(frozen=True)
class Threshold:
    """A conformal threshold, larger meaning a machine, and its 95 % bootstrap interval over the groups of human texts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """One range of lengths.

    Attributes:
        low, high: tokens of a text, ``low <= n < high``; None for no upper end.
        human, machine: score name -> sorted scores of people's and of machines' texts, larger meaning a machine.
        thresholds: score name -> threshold for ``machine``.
        bounds: feature -> end of the range of people's texts (``hf_lowbit/detect/profile.py``).
    """

    low: int
    high: int | None
    human: dict[str, list[float]]
    machine: dict[str, list[float]]
    thresholds: dict[str, Threshold]
    bounds: dict[str, float]

    def p_value(self, score: str, value: float) -> float:
        """``(1 + #{human >= value}) / (n + 1)``."""
        scores = self.human[score]
        return (1 + len(scores) - int(np.searchsorted(scores, value, side="left"))) / (len(scores) + 1)

    def human_threshold(self, score: str, fnr: float) -> float | None:
        """Below it fall ``fnr`` of machines' texts at most and ten times that of people's; None if nothing is."""
        machine, human = self.machine.get(score, []), self.human[score]
        k = math.floor((len(machine) + 1) * fnr)
        if k < 1:
            return None
        value = machine[k - 1]
        share = np.searchsorted(human, value, side="left") / len(human)
        return value if share >= LIKELIHOOD_RATIO * fnr else None


@dataclass(frozen=True)
class Calibration:
    """Thresholds of one detector; made by ``SpotDetector.calibrate``.

    Attributes:
        detector: identity of the detector they hold for, compared with :func:`check_detector`.
        fpr: of people's texts, the share that may be called a machine's.
        fnr: of machines' texts like those calibrated on, the share that may be called a person's.
        language: of the texts, such as ``en``.
        source: what they were, in words.
        common: their commonest words.
        bins: ranges of lengths, ascending.
    """

    detector: dict[str, Any]
    fpr: float
    fnr: float
    language: str
    source: str
    common: list[str]
    bins: list[Bin] = field(repr=False)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text a verdict is given on."""
        return self.bins[0].low

    def bin_for(self, tokens: int) -> Bin | None:
        """The bin a text of that many tokens falls in, if any."""
        return next((b for b in self.bins if b.low <= tokens and (b.high is None or tokens < b.high)), None)

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            BadRequest: the place cannot be written.
        """
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        try:
            Path(path).write_text(_compact(content) + "\n", encoding="utf-8")
        except OSError as error:
            raise BadRequest(f"cannot write {str(path)!r}: {error.strerror or error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            BadRequest: it cannot be read.
            FormatError: it is no calibration, damaged, or of a newer version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadRequest(f"cannot read {str(path)!r}: {error.strerror or error}.") from error
        except ValueError as error:
            raise FormatError(f"{path} is damaged: not JSON ({error}). Make it again with calibrate.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise FormatError(f"{path} is no calibration of a detector. Make one with SpotDetector.calibrate(...).")
        if content.get("version") != VERSION:
            raise FormatError(f"{path} has version {content.get('version')!r}, this hf-lowbit reads {VERSION}. Upgrade it.")
        try:
            return cls._from_json(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} is damaged ({error!r}). Make it again with SpotDetector.calibrate(...).") from error

    @classmethod
    def _from_json(cls, content: Mapping[str, Any]) -> Calibration:
        bins = []
        for entry in content["bins"]:
            thresholds = {name: Threshold(**{k: float(v) for k, v in t.items()}) for name, t in entry["thresholds"].items()}
            scores = {
                kind: {name: sorted(map(float, values)) for name, values in entry[kind].items()}
                for kind in ("human", "machine")
            }
            bounds = {name: float(value) for name, value in entry["bounds"].items()}
            high = None if entry["high"] is None else int(entry["high"])
            bins.append(Bin(int(entry["low"]), high, scores["human"], scores["machine"], thresholds, bounds))
        if not bins:
            raise ValueError("no length bins")
        return cls(dict(content["detector"]), float(content["fpr"]), float(content["fnr"]), str(content["language"]),
                   str(content["source"]), list(map(str, content["common"])), bins)  # fmt: skip


def six_digits(value: float) -> float:
    """A score as it is stored and compared: rounded, so that a calibration is the same before and after saving."""
    return float(f"{value:.6g}")


def needed(fpr: float) -> int:
    """Human texts that a false-positive rate takes.

    Raises:
        BadRequest: not between 0 and 0.5.
    """
    if not 0 < fpr <= 0.5:
        raise BadRequest(f"fpr={fpr}: a false-positive rate lies above 0 and is 0.5 at most, such as 0.01.")
    return math.ceil(1 / fpr - 1 - 1e-9)


def threshold(scores: Sequence[float], groups: Sequence[int], fpr: float) -> Threshold:
    """Conformal threshold of scores that mean a machine where they are large, resampled by whole groups."""
    order = np.argsort(scores, kind="stable")
    values = np.asarray(scores, dtype=np.float64)[order]
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count = int(group.max()) + 1
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    copies = drawn[:, group[order]]
    low, high = np.percentile(_order_statistics(values, copies, fpr), [2.5, 97.5])
    (value,) = _order_statistics(values, np.ones((1, len(values)), dtype=np.int64), fpr)
    return Threshold(float(value), float(low), float(high))


def _order_statistics(values: np.ndarray, copies: np.ndarray, fpr: float) -> np.ndarray:
    """The ``ceil((n + 1) (1 - fpr))``-th of each row's ``n`` values, where a row has ``copies`` of each sorted value."""
    reached = copies.cumsum(1)
    n = reached[:, -1]
    # A resample may hold fewer texts than the rate takes; its largest then stands for the one that is not there.
    k = np.minimum(n, np.ceil((n + 1) * (1 - fpr) - 1e-9))
    return values[(reached >= k[:, None]).argmax(1)]


def check_detector(asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a calibration of another detector.

    Args:
        asked: the identity a calibration holds for.
        found: the identity of the detector at hand. ``name`` may differ: directories are moved.

    Raises:
        BadRequest: naming the first few differences.
    """
    changed = [key for key in sorted({*asked, *found} - {"name"}) if asked.get(key) != found.get(key)]
    if changed:
        list_of = "; ".join(f"{key} was {_short(asked.get(key))}, is {_short(found.get(key))}" for key in changed[:4])
        raise BadRequest(
            f"the calibration is of another detector ({asked.get('name')}): {list_of}. Scores of two detectors do not "
            "compare; calibrate this one."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def _compact(content: dict[str, Any]) -> str:
    """Indented JSON with each list of numbers on one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\n\s+(-?\d[^\]]*?)\n\s+\]", lambda found: "[" + "".join(found[1].split()) + "]", text)
