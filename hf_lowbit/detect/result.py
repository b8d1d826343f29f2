"""What a detector says about one text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_lowbit.detect.scoring import Tokens

MACHINE, HUMAN, ABSTAIN = "machine", "human", "abstain"


@dataclass(frozen=True)
class Span:
    """A paragraph of the cleaned text: first character, the one behind the last, scored tokens, and the score over them.

    Its score is there to look at: no threshold holds for it.
    """

    start: int
    end: int
    tokens: int
    score: float


@dataclass(frozen=True)
class Detection:
    """Verdict and evidence on one text.

    Attributes:
        verdict: ``machine``, ``human`` or ``abstain``.
        reason: why, in a sentence, with the error rate behind it.
        score_name: the score the verdict rests on.
        score: its value; None where nothing could be scored.
        p_value: share of people's texts of this length that score at least as machine-like, counting this one; None without
            a calibration that covers the text. Never below 1 / (human texts + 1).
        interval: where the score would lie in 95 of 100 texts of the same kind and length; a block bootstrap over tokens.
            None of a text of a few blocks.
        threshold: the value at which the verdict turns to ``machine``, in the units of the score.
        fpr: of people's texts, the share that a verdict of ``machine`` is allowed to hit.
        tokens: in the text, as far as it was read.
        scored: tokens the score is a mean over.
        scores: name -> value, of all scores.
        notes: what a reader of the verdict should know besides.
        spans: the paragraphs, as far as tokens were kept.
        text: the cleaned text, which all places refer to.
        first: its first tokens one by one.
        source: name of the file it came from.
    """

    verdict: str
    reason: str
    score_name: str
    score: float | None = None
    p_value: float | None = None
    interval: tuple[float, float] | None = None
    threshold: float | None = None
    fpr: float | None = None
    tokens: int = 0
    scored: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    text: str = field(default="", repr=False)
    first: Tokens | None = field(default=None, repr=False, compare=False)
    source: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values; the text and its single tokens are left out."""
        out = {name: value for name, value in vars(self).items() if name not in ("text", "first")}
        out["spans"] = [vars(span) for span in self.spans]
        return out | {"notes": list(self.notes), "interval": self.interval and list(self.interval)}
