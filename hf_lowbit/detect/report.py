"""A detection as people read it: lines for a terminal, and a page of HTML that holds no script and loads nothing.

The text judged is data: every character of it, and of the file's name, is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from hf_lowbit import page as shell
from hf_lowbit.detect.result import Detection, Span
from hf_lowbit.detect.scores import get_score
from hf_lowbit.detect.token_statistics import STATISTICS

HEADLINES = {"machine": "Reads like a machine's", "human": "Reads like a person's", "abstain": "No verdict"}
# What a reader must know whatever the verdict.
LIMITS = (
    "It compares the text with how predictable people's texts of this length are to this detector. It knows nothing else.",
    "Other kinds of text, authors writing in a second language, memorised or copied passages and edited machine text can "
    "shift the scores either way.",
    "Text sampled at temperature 1 from a model like the detector scores as people's do: no verdict does not mean human.",
    "The error rate is over many texts. It is not the probability that this one was written by a machine.",
)
RANK, LOG_PROBABILITY = STATISTICS.index("log_rank"), STATISTICS.index("log_probability")
# Steps of the heat map: tokens of rank below 1 (the first choice), 10, 100, 1,000, and the rest.
STEPS = (1.0, 10.0, 100.0, 1000.0)

STYLE = """
.lb-detect { --lb-h0:#9be3b4; --lb-h1:#d6f0c2; --lb-h2:#fdf0b5; --lb-h3:#fbcf9d; --lb-h4:#f3a6a6; --lb-ink:#1a1a1a;
  --lb-line:#8884; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
.lb-detect h2 { margin: 0 0 .2em; font-size: 1.5em; } .lb-detect h3 { margin: 1.3em 0 .4em; font-size: 1.05em; }
.lb-verdict { border-left: .5em solid #8a8a8a; padding: .7em 1em; margin: 0 0 1em; background: #8881; border-radius: .3em; }
.lb-verdict.machine { border-color: #c2410c; } .lb-verdict.human { border-color: #15803d; }
.lb-verdict p { margin: .2em 0; }
.lb-heat { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; max-height: 34em; overflow: auto;
  border: 1px solid var(--lb-line); border-radius: .3em; padding: .7em .9em; }
.lb-heat span, .lb-key span, .lb-strip span { color: var(--lb-ink); border-radius: .2em; }
.lb-h0 { background: var(--lb-h0); } .lb-h1 { background: var(--lb-h1); } .lb-h2 { background: var(--lb-h2); }
.lb-h3 { background: var(--lb-h3); } .lb-h4 { background: var(--lb-h4); }
.lb-key span { padding: .1em .5em; margin: 0 .4em .4em 0; font-size: .9em; display: inline-block; }
.lb-strip { display: flex; gap: 2px; height: 2.2em; } .lb-strip span { min-width: 4px; font-size: .8em; text-align: center;
  line-height: 2.7em; overflow: hidden; }
.lb-detect table { border-collapse: collapse; border: 0 !important; width: auto; }
.lb-detect tr { border: 0 !important; }
.lb-detect td, .lb-detect th { padding: .25em 1.4em .25em 0 !important; text-align: left;
  border: 0 !important; border-bottom: 1px solid var(--lb-line) !important; font-variant-numeric: tabular-nums; }
.lb-detect small { opacity: .75; } .lb-detect ul { padding-left: 1.2em; list-style: disc; }
@media print { .lb-heat { max-height: none; } }
"""


def lines(found: Detection) -> list[str]:
    """The detection for a terminal."""
    out = [f"{found.source or 'text'}: {HEADLINES[found.verdict]} ({found.verdict})", f"  {_sentence(found.reason)}"]
    if found.score is not None:
        out.append(f"  {_evidence(found)}")
        out.append("  " + ", ".join(f"{name} {value:.4g}" for name, value in found.scores.items()))
    return out + [f"  note: {note}." for note in found.notes]


def _sentence(reason: str) -> str:
    return f"{reason[:1].upper()}{reason[1:]}."


def _evidence(found: Detection) -> str:
    score = get_score(found.score_name)
    parts = [f"{score.title} {found.score:.4g}"]
    if found.interval is not None:
        parts.append(f"95 % interval {found.interval[0]:.4g} to {found.interval[1]:.4g}")
    if found.threshold is not None:
        parts.append(f"machine {'above' if score.sign > 0 else 'below'} {found.threshold:.4g}")
    if found.p_value is not None and found.fpr is not None:
        parts.append(f"p {found.p_value:.3g} (threshold set for {100 * found.fpr:g} % false positives)")
    return f"{'; '.join(parts)}; {found.scored:,} of {found.tokens:,} tokens scored"


def fragment(found: Detection) -> str:
    """The detection as one HTML element; needs ``STYLE`` on its page."""
    escaped = html.escape
    parts = [
        f'<section class="lb-detect" aria-label="Result"><div class="lb-verdict {found.verdict}" role="status">'
        f"<h2>{HEADLINES[found.verdict]}</h2><p>{escaped(_sentence(found.reason))}</p>"
    ]
    if found.score is not None:
        parts.append(f"<p><small>{escaped(_evidence(found))}</small></p>")
    parts += [f"<p><small>Note: {escaped(note)}.</small></p>" for note in found.notes]
    parts.append("</div>")
    if found.first is not None and len(found.first.spans):
        parts += [_strip(found), _heat(found), _scores(found)]
    limits = "".join(f"<li>{escaped(limit)}</li>" for limit in LIMITS)
    return "".join([*parts, f"<h3>What it does not know</h3><ul>{limits}</ul></section>"])


def page(results: Sequence[Detection]) -> str:
    """A whole page over all results, light or dark as the reader's system is."""
    body = "".join(
        f"<article><h1>{html.escape(found.source or 'text')}</h1>{fragment(found)}</article>" for found in results
    )
    style = "article { margin-bottom: 3em; } h1 { font-size: 1.1em; }"
    return shell.page("Who wrote it?", body, style + STYLE)


def _step(rank: float) -> int:
    return sum(rank >= step for step in STEPS)


def _heat(found: Detection) -> str:
    assert found.first is not None
    out, place = [], 0
    for (start, end), values in zip(found.first.spans.tolist(), found.first.values, strict=True):
        if end <= place:  # one of several tokens of the same character
            continue
        start = max(start, place)
        out.append(html.escape(found.text[place:start]))
        piece = html.escape(found.text[start:end])
        rank = math.expm1(float(values[RANK]))
        if math.isnan(rank):
            out.append(piece)
        else:
            probability = math.exp(float(values[LOG_PROBABILITY]))
            out.append(
                f'<span class="lb-h{_step(rank)}" title="rank {rank:.0f}, probability {probability:.2g}">{piece}</span>'
            )
        place = end
    rest = "" if place >= len(found.text) else "<small> ... the rest is not drawn</small>"
    labels = ("first choice", "rank under 10", "under 100", "under 1,000", "beyond")
    key = "".join(f'<span class="lb-h{step}">{label}</span>' for step, label in enumerate(labels))
    return (
        "<h3>Token by token: how far down the detector's list of guesses each one was</h3>"
        f'<div class="lb-key" aria-hidden="true">{key}</div>'
        f'<div class="lb-heat" tabindex="0" role="region" aria-label="Token heat map">{"".join(out)}{rest}</div>'
    )


def _strip(found: Detection) -> str:
    if len(found.spans) < 2:
        return ""
    ordered = _ranks(found)
    cells = "".join(
        f'<span class="lb-h{step}" style="flex:{span.tokens}" title="paragraph {number}: {span.tokens} tokens, '
        f'{found.score_name} {span.score:.4g}">{number}</span>'
        for number, (span, step) in enumerate(zip(found.spans, ordered, strict=True), 1)
    )
    return (
        "<h3>Paragraph by paragraph: green is the most machine-like of this text, red the least</h3>"
        f'<div class="lb-strip" role="img" aria-label="{len(found.spans)} paragraphs">{cells}</div>'
        "<small>To look at only: no threshold holds for single paragraphs.</small>"
    )


def _ranks(found: Detection) -> list[int]:
    """Steps 0 to 4 by order within the text."""
    score = get_score(found.score_name)

    def turned(span: Span) -> float:
        return -score.sign * span.score

    ordered = sorted(turned(span) for span in found.spans)
    return [min(4, 5 * ordered.index(turned(span)) // len(ordered)) for span in found.spans]


def _scores(found: Detection) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(get_score(name).title)}{' (decides)' if name == found.score_name else ''}</td>"
        f"<td>{value:.4g}</td><td>{'high' if get_score(name).sign > 0 else 'low'} in machines' texts</td></tr>"
        for name, value in found.scores.items()
    )
    return f"<h3>All scores</h3><table><tbody>{rows}</tbody></table>"
