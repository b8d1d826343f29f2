"""From evidence to verdict: when to abstain, and in which words."""

from __future__ import annotations

from dataclasses import replace

from hf_lowbit.detect.calibration import Bin, Calibration, six_digits
from hf_lowbit.detect.clean import Cleaned
from hf_lowbit.detect.profile import distinct_words, features, outside, repetition
from hf_lowbit.detect.result import HUMAN, MACHINE, Detection
from hf_lowbit.detect.scores import get_score

# Share of hidden or imitating characters above which a text counts as doctored.
DOCTORED = 0.01
# Share of repeated runs of three words above which a note says so.
REPEATS = 0.3


def unreadable(text: str) -> str | None:
    """Why a string is no text that can be read, or None."""
    if "\0" in text:
        return "not a text: it holds NUL bytes, as binary files do"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not a text: half of a surrogate pair at character {error.start}"
    if not text.strip():
        return "the text is empty"
    return None


def conclude(evidence: Detection, form: Cleaned, surprise: float | None, calibration: Calibration | None) -> Detection:
    """The evidence with verdict, p-value, threshold, reason and notes."""
    if evidence.reason:
        return evidence
    if surprise is None:
        return replace(evidence, reason=f"too short: nothing to score in {_tokens(evidence.tokens)}")
    notes = [*evidence.notes, *_notes(evidence, form)]
    if calibration is None:
        why = "no calibration: the scores stand for themselves, no error rate is known. Calibrate the detector"
        return replace(evidence, reason=why, notes=tuple(notes))
    evidence = replace(evidence, notes=tuple(notes), fpr=calibration.fpr)
    found = calibration.bin_for(evidence.tokens)
    if found is None:
        return replace(evidence, reason=_uncovered(evidence.tokens, calibration))
    if evidence.score_name not in found.human:
        return replace(evidence, reason=f"the calibration holds no {evidence.score_name} scores. Calibrate with an observer")
    score = get_score(evidence.score_name)
    threshold = found.thresholds[evidence.score_name]
    value = six_digits(score.sign * (evidence.score or 0.0))
    p_value = found.p_value(evidence.score_name, value)
    # Outside its calibration the threshold and the share mean nothing, so they are not given either.
    outside_of = _outside(evidence, form, surprise, calibration, found)
    if outside_of is not None:
        return replace(evidence, reason=outside_of)
    evidence = replace(evidence, p_value=p_value, threshold=score.sign * threshold.value)
    return _judge(evidence, value, found, calibration)


def _judge(evidence: Detection, value: float, found: Bin, calibration: Calibration) -> Detection:
    p_value, people = evidence.p_value or 1.0, len(found.human[evidence.score_name])
    error = f"{100 * calibration.fpr:g} %"
    if p_value <= calibration.fpr:
        why = (
            f"at most {100 * p_value:.2g} % of people's texts of this length score as machine-like as this ({people} in the "
            f"calibration); of people's texts like those, at most {error} get this verdict"
        )
        return replace(evidence, verdict=MACHINE, reason=why)
    threshold = found.human_threshold(evidence.score_name, calibration.fnr)
    if threshold is not None and value < threshold:
        why = (
            f"less machine-like than {100 * (1 - calibration.fnr):g} % of the machines' texts in the calibration and than "
            f"{100 * p_value:.0f} % of people's; machines other than those are not covered"
        )
        return replace(evidence, verdict=HUMAN, reason=why)
    why = (
        f"no sign of a machine that would hold at {error} false positives: {100 * p_value:.2g} % of people's texts of this "
        "length score as machine-like or more. That is no proof of a person: text sampled at temperature 1 scores alike"
    )
    return replace(evidence, reason=why)


def _outside(evidence: Detection, form: Cleaned, surprise: float, calibration: Calibration, found: Bin) -> str | None:
    if form.share > DOCTORED:
        return (
            f"doctored: {form.hidden} hidden and {form.imitated} imitated characters, {100 * form.share:.1f} % of the text; "
            "they were replaced before scoring"
        )
    if distinct_words(form.text) < 2:
        return "outside the calibration: one word over and over, or none"
    seen = features(form.text, evidence.tokens, surprise, calibration.common)
    why = outside(seen, found.bounds)
    return None if why is None else f"outside the calibration ({calibration.language}, {calibration.source}): {why}"


def _uncovered(tokens: int, calibration: Calibration) -> str:
    if tokens < calibration.shortest:
        return f"too short: {_tokens(tokens)}, the calibration starts at {calibration.shortest}"
    return f"too long: {_tokens(tokens)}, the calibration ends at {calibration.bins[-1].high}"


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def _notes(evidence: Detection, form: Cleaned) -> list[str]:
    out = []
    if form.hidden + form.imitated > 0 and form.share <= DOCTORED:
        out.append(f"{form.hidden} hidden and {form.imitated} imitated characters were replaced before scoring")
    share = repetition(form.text)
    if share > REPEATS:
        out.append(f"{100 * share:.0f} % of the text repeats itself; a person's copying scores like a machine's")
    return out
