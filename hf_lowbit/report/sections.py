"""The sections of a report, each markup from the facts, or nothing where there is nothing to tell."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from hf_lowbit.detect.report import LIMITS
from hf_lowbit.page import escape
from hf_lowbit.report import charts
from hf_lowbit.report.facts import REPETITION_PENALTY, Continuation, Facts, Matrix, Point
from hf_lowbit.report.points import frontier

KINDS = {
    **{"codes": "codes", "scale": "scales", "offset": "offsets", "levels": "level tables", "outlier": "outliers"},
    **{"low_rank": "low-rank terms", "permutation": "permutations", "table_ids": "table numbers", "row_ids": "row numbers"},
}
PENALTY = f"repetition made less likely by a factor of {REPETITION_PENALTY:g}"


def section(title: str, lead: str, body: str, slug: str) -> str:
    """One section; ``title`` and ``lead`` are plain text."""
    head = f'<h2 id="{slug}">{escape(title)}</h2><p class="lead">{escape(lead)}</p>'
    return f'<section aria-labelledby="{slug}">{head}{body}</section>'


def card(title: str, note: str, body: str) -> str:
    """A figure with its caption; ``title`` and ``note`` are plain text, ``body`` is markup."""
    small = f" <small>{escape(note)}</small>" if note else ""
    return f'<figure class="card"><figcaption><b>{escape(title)}</b>{small}</figcaption>{body}</figure>'


def header(facts: Facts) -> str:
    """Name, one sentence, and the numbers one asks for first."""
    widths = sorted({m.bits for m in facts.matrices if not m.end})
    made = f"{facts.method}{f', {_range(widths)} bits' if widths else ''}"
    if facts.transforms:
        made += f" after {', '.join(facts.transforms)}"
    of = f" of <b>{escape(facts.reference)}</b>" if facts.reference else ""
    tiles = [tile("on disk", charts.bytes_of(facts.file_bytes), _smaller(facts))]
    tiles.append(
        tile("bits per weight", f"{facts.bits_per_weight_linears:.2f}", f"{facts.bits_per_weight_model:.2f} with all else")
    )
    if (found := facts.measured) is not None:
        was = f"original {found.reference_perplexity:.2f}" if found.reference_perplexity else f"over {found.tokens:,} tokens"
        tiles.append(tile("perplexity", f"{found.perplexity:.2f}", was))
        if found.kl is not None and found.top1_agreement is not None:
            tiles.append(tile("KL to the original", f"{found.kl:.3g}", "nats per token"))
            tiles.append(tile("same first choice", f"{found.top1_agreement:.1%}", "of all tokens"))
    return (
        f'<header><p class="over">Low-bit model report</p><h1>{escape(facts.name)}</h1>'
        f'<p class="lead">A low-bit version{of}, made with {escape(made)}.</p>'
        f'<dl class="tiles">{"".join(tiles)}</dl></header>'
    )


def _range(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def tile(label: str, value: str, note: str) -> str:
    """One number."""
    return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"


def _smaller(facts: Facts) -> str:
    if not facts.reference_bytes:
        return f"{facts.file_bytes:,} bytes"
    return f"{facts.reference_bytes / facts.file_bytes:.1f} times smaller than {charts.bytes_of(facts.reference_bytes)}"


def quality(facts: Facts) -> str:
    """The plane of size and quality, and its numbers."""
    if (found := facts.measured) is None:
        return ""
    measure = "kl" if found.kl is not None else "perplexity"
    caption = "KL to the original, nats per token" if measure == "kl" else "perplexity"
    shown = [p for p in facts.points if (getattr(p, measure) or 0) > 0]
    left = len(facts.points) - len(shown)
    lead = f"Measured now on {found.text}: {found.tokens:,} tokens in windows of {found.window}. Left and down is better."
    notes = []
    if sources := sorted({p.source for p in facts.points if not p.own}):
        named = ", ".join(sources) if len(sources) < 4 else f"{len(sources)} files"
        notes.append(f"Points from {named} are as measured then: compare them only where model and text were the same.")
    if left:
        notes.append(
            f"{left} without a positive {measure} (the original itself has none) {'is' if left == 1 else 'are'} not drawn."
        )
    rows = _point_rows(shown, measure)
    chart = ""
    if len(shown) > 1:
        chart = f'<figure class="card">{charts.size_against_quality(shown, measure, caption)}</figure>'
    elif shown:
        notes.append("Give --results FILE to set other models beside it.")
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return section(
        "Size against quality",
        lead,
        f'<div class="pair">{chart}<div class="card scroll">{rows}{told}</div></div>',
        "quality",
    )


def _point_rows(points: Sequence[Point], measure: str) -> str:
    best = frontier(list(points), measure)
    rows = []
    for point in sorted(points, key=lambda p: p.bytes):
        name = f"<b>{escape(point.label)}</b>" if point.own else escape(point.label)
        mark = (
            ' <small title="no other is both smaller and better">unbeaten</small>'
            if point in best and len(points) > 1
            else ""
        )
        kl = "" if point.kl is None else f"{point.kl:.4f}"
        perplexity = "" if point.perplexity is None else f"{point.perplexity:.2f}"
        cells = "".join(f"<td>{cell}</td>" for cell in (charts.bytes_of(point.bytes), kl, perplexity))
        rows.append(f'<tr{" class=own" if point.own else ""}><th scope="row">{name}{mark}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{text}</th>' for text in ("model", "size", "KL", "perplexity"))
    return f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def layers(facts: Facts) -> str:
    """Bits and error of every matrix of every block."""
    told = "Bits per weight of each matrix, everything stored for it counted."
    body = _heat_card("Bits per weight", "fainter is fewer", charts.heat_table(
        facts.matrices, lambda m: m.bits_per_weight, lambda v: f"{v:.2f}", "bits", told))  # fmt: skip
    lead = "Where the bits go, block by block."
    known = [m for m in facts.matrices if m.error is not None]
    if known:
        worst = max(known, key=lambda m: m.error or 0.0)
        lead = f"Where the bits go and what rounding changed, block by block. Furthest from the original: {worst.name}."
        told = "Relative error of each matrix: norm of the change over the norm of the original."
        body += _heat_card("Relative error, %", "fainter is closer to the original", charts.heat_table(
            facts.matrices, lambda m: m.error, lambda v: f"{100 * v:.1f}", "error", told))  # fmt: skip
    return section("Bits and error by block", lead, f'<div class="pair even">{body}</div>', "layers")


def _heat_card(title: str, note: str, table: str) -> str:
    return card(title, note, f'<div class="scroll">{table}</div>') if table else ""


def levels(facts: Facts) -> str:
    """Spread of weights and level tables, a card for each kind of matrix."""
    groups: dict[str, list[Matrix]] = {}
    for matrix in facts.matrices:
        groups.setdefault(matrix.kind, []).append(matrix)
    names = charts.short_names(list(groups))
    cards = "".join(
        card(name, _family(found), charts.levels_and_weights(kind, found))
        for name, (kind, found) in zip(names, groups.items(), strict=True)
    )
    compared = any(m.reference_histogram for m in facts.matrices)
    key = '<p class="legend"><i class="swatch after"></i>stored weights'
    key += ' <i class="swatch before"></i>original' if compared else ""
    key += ' <i class="swatch levels"></i>level, taller the more weights use it</p>'
    lead = (
        "Above, all weights of one kind, in units of their root mean square. Below, a line for each block: what its codes "
        "stand for, from the lowest level to the highest, before scales."
    )
    return section("Levels and weights", lead, f'{key}<div class="cards">{cards}</div>', "levels")


def _family(matrices: Sequence[Matrix]) -> str:
    families = dict.fromkeys(m.levels.partition("(")[0].replace("_", " ") for m in matrices)
    bits = sorted({m.bits for m in matrices})
    return f"{', '.join(families)}, {_range(bits)} bits"


def memory(facts: Facts) -> str:
    """What the bytes of the files are, by kind and by tensor."""
    kinds = {KINDS.get(name, name): size for name, size in facts.bytes_by_kind.items()}
    bar = charts.stacked_bar(kinds, "Bytes of the files by kind: " + ", ".join(f"{n} {s:,}" for n, s in kinds.items()))
    parts = [(m.name, _place(m), m.bytes, _fill(m)) for m in facts.matrices]
    kept = sum(size for size, _ in facts.high_precision.values())
    if kept:
        parts.append(("all tensors in high precision", "high precision", kept, "g"))
    told = f"Bytes of {len(parts)} tensors as areas; the table below has every number."
    fills = dict.fromkeys((_fill(m), _group(m)) for m in facts.matrices)
    key = "".join(f'<li><i class="fill-{fill}"></i>{label}</li>' for fill, label in fills)
    areas = f'{charts.treemap(parts, told)}<ul class="key">{key}</ul>'
    body = card("What the bytes are", "", bar) + card("Which tensor takes them", "", areas) + _matrix_rows(facts)
    lead = f"All {facts.file_bytes:,} bytes of the weight files, headers included."
    return section("Memory map", lead, body, "memory")


def _group(matrix: Matrix) -> str:
    if matrix.end:
        return "embedding and head"
    return "attention" if "att" in matrix.kind else "feed-forward"


def _fill(matrix: Matrix) -> str:
    return {"embedding and head": "c", "attention": "a", "feed-forward": "b"}[_group(matrix)]


def _place(matrix: Matrix) -> str:
    (short,) = charts.short_names([matrix.kind])
    return short if matrix.layer is None else f"{matrix.layer} {short}"


def _matrix_rows(facts: Facts) -> str:
    head = "".join(
        f'<th scope="col">{text}</th>'
        for text in ("matrix", "shape", "levels", "bits", "group", "bits/weight", "size", "error")
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(m.name)}</th><td>{"x".join(map(str, m.shape))}</td><td>{escape(m.levels)}</td>'
        f"<td>{m.bits}</td><td>{m.group_size}</td><td>{m.bits_per_weight:.3f}</td><td>{charts.bytes_of(m.bytes)}</td>"
        f"<td>{'' if m.error is None else f'{100 * m.error:.2f} %'}</td></tr>"
        for m in facts.matrices
    )
    kept = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td colspan="5">high precision{escape(f": {why}" if why else "")}</td>'
        f"<td>{charts.bytes_of(size)}</td><td></td></tr>"
        for name, (size, why) in facts.high_precision.items()
    )
    return (
        f'<details class="card"><summary>Every tensor ({len(facts.matrices) + len(facts.high_precision)})</summary>'
        f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}{kept}</tbody></table></div></details>"
    )


def generation(facts: Facts) -> str:
    """The same prompt continued by both, greedily, what differs marked."""
    if not facts.continuations:
        return ""
    if len(facts.continuations) == 1:
        lead = f"What it writes after the prompt, taking the likeliest token each time, {PENALTY}."
        body = _written(facts.continuations[0], set(), facts.prompt)
        return section("Generation", lead, f'<div class="pair">{body}</div>', "generation")
    ours, theirs = facts.continuations
    first = next((n for n, (a, b) in enumerate(zip(ours.ids, theirs.ids, strict=False)) if a != b), None)
    marked_ours, marked_theirs = differing(ours.ids, theirs.ids)
    lead = f"Both take the likeliest token each time, {PENALTY}. "
    if first is None:
        lead += f"All {len(ours.ids)} tokens are the same."
    else:
        lead += (
            f"The first {first} of {len(ours.ids)} tokens are the same; tokens the other text lacks there are underlined."
        )
    body = _written(theirs, marked_theirs, facts.prompt) + _written(ours, marked_ours, facts.prompt)
    return section("Generation side by side", lead, f'<div class="pair even">{body}</div>', "generation")


def differing(ours: Sequence[int], theirs: Sequence[int]) -> tuple[set[int], set[int]]:
    """Places of tokens of either sequence that a longest alignment of both leaves alone."""
    left, right = set(range(len(ours))), set(range(len(theirs)))
    for block in SequenceMatcher(None, list(ours), list(theirs), autojunk=False).get_matching_blocks():
        left -= set(range(block.a, block.a + block.size))
        right -= set(range(block.b, block.b + block.size))
    return left, right


def _written(one: Continuation, marked: set[int], prompt: str) -> str:
    parts: list[str] = []
    for number, piece in enumerate(one.pieces):
        if number in marked and (number - 1) not in marked:
            parts.append("<mark>")
        parts.append(escape(piece))
        if number in marked and (number + 1) not in marked:
            parts.append("</mark>")
    text = f'<span class="prompt">{escape(prompt)}</span>{"".join(parts)}'
    return card(one.label, "", f'<p class="text">{text}</p>')


def detector(facts: Facts) -> str:
    """What the detector says of the texts above."""
    if not facts.verdicts:
        return ""
    cards = "".join(
        card(v.label, "" if v.spot is None else f"SPOT score {v.spot:.4f} over {v.tokens} tokens",
             f"<p><b>{escape(v.headline)}.</b> {escape(v.reason[:1].upper() + v.reason[1:])}.</p>")
        for v in reversed(facts.verdicts)
    )  # fmt: skip
    lead = f"The texts above, read by the detector {facts.detector}. SPOT is low where each token was easy to guess."
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in LIMITS)
    known = f'<details class="card"><summary>What it does not know</summary><ul>{limits}</ul></details>'
    body = f'<div class="pair even">{cards}</div>{known}'
    return section("Would a detector notice?", lead, body, "detector")


def making(facts: Facts) -> str:
    """Settings, versions, and what the page leaves out."""
    pairs = {name.replace("_", " "): str(value) for name, value in facts.settings.items()}
    if facts.transforms:
        pairs["transforms"] = ", ".join(facts.transforms)
    pairs |= facts.versions
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs.items())
    out = section("How it was made and measured", "Settings of the checkpoint; versions of this report.",
                  f'<dl class="facts card">{listed}</dl>', "making")  # fmt: skip
    if facts.left_out:
        missing = "".join(f"<li><b>{escape(name)}</b>: {escape(why)}</li>" for name, why in facts.left_out.items())
        out += section(
            "Left out",
            "What this page would show with more to go on.",
            f'<ul class="card missing">{missing}</ul>',
            "missing",
        )
    return out
