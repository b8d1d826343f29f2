"""What kind of text a calibration is for: its commonest words and a few shares, with the range people's texts stay in.

A threshold says nothing about texts unlike those it was set on. Another language, code, tables and gibberish surprise a
detector, so their scores look like a person's; the profile is what notices.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

FAMILIAR = 100
# Characters looked at; the shares of a text do not change behind that.
LOOKED_AT = 200_000
# A share of letters and punctuation that only code, tables and the like stay under.
PROSE = 0.9
_WORD = re.compile(r"[^\W\d_]+")
_PROSE = re.compile(r"[^\W\d_]|[\s.,;:!?'\"()-]")
# Feature -> whether a text is outside below the range (-1) or above it (1), and what to call it then.
FEATURES: dict[str, tuple[int, str]] = {
    "familiar": (-1, "too few of the commonest words of the calibration texts: another language, a list, or no prose"),
    "letters": (-1, "too many digits and symbols: code, a table, or no prose"),
    "characters_per_token": (-1, "words the tokenizer does not know: another language, or no prose"),
    "surprise": (1, "stranger to the detector than people's texts: another language or field, or no prose"),
}


def common_words(texts: Iterable[str]) -> list[str]:
    """The commonest words of some texts, alphabetically."""
    counts = Counter(word for text in texts for word in set(_words(text)))
    return sorted(sorted(counts, key=lambda word: (-counts[word], word))[:FAMILIAR])


def features(text: str, tokens: int, surprise: float, common: Iterable[str]) -> dict[str, float]:
    """The features of one text.

    Args:
        text: cleaned.
        tokens: it has.
        surprise: mean negative log-probability of its scored tokens, nats.
        common: words of :func:`common_words`.
    """
    seen = text[:LOOKED_AT]
    words, known = _words(seen), frozenset(common)
    return {
        "familiar": sum(word in known for word in words) / max(1, len(words)),
        "letters": len(_PROSE.findall(seen)) / max(1, len(seen)),
        "characters_per_token": len(text) / max(1, tokens),
        "surprise": surprise,
    }


def ranges(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The bound of each feature: beyond the outermost of people's texts by a quarter of its distance from the median.

    Prose without a single digit must not make every date an outsider, so ``letters`` is not asked for above ``PROSE``.
    """
    out = {}
    for name, (side, _) in FEATURES.items():
        values = side * np.array([row[name] for row in found])
        out[name] = float(side * (values.max() + (values.max() - np.median(values)) / 4))
    out["letters"] = min(out["letters"], PROSE)
    return out


def repetition(text: str) -> float:
    """Share of the words that are repeats of earlier ones in the same company: the third of three words seen before."""
    words = _words(text[:LOOKED_AT])
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(threes)) / max(1, len(threes)) if threes else 0.0


def distinct_words(text: str) -> int:
    """How many different words a text has."""
    return len(set(_words(text[:LOOKED_AT])))


def outside(found: Mapping[str, float], bounds: Mapping[str, float]) -> str | None:
    """Why a text is outside the range, or None."""
    for name, (side, why) in FEATURES.items():
        if side * (found[name] - bounds[name]) > 0:
            return why
    return None


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
