"""The charts of a report: markup from plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from hf_lowbit.page import escape
from hf_lowbit.report.draw import element, linear_ticks, log_ticks, picture, place_labels, squarify, words
from hf_lowbit.report.facts import REACH, Matrix, Point
from hf_lowbit.report.palette import step_of
from hf_lowbit.report.points import frontier

PLANE = (430.0, 340.0)
# Room around the plane: left, top, right, bottom.
MARGINS = (52.0, 14.0, 14.0, 46.0)
RADIUS = 4.5
MOST_ROWS = 8


def size_against_quality(points: Sequence[Point], quality: str, caption: str) -> str:
    """Every point by megabytes and ``kl`` or ``perplexity`` (both on logarithmic axes), and the line of the best."""
    left, top = MARGINS[0], MARGINS[1]
    right, bottom = PLANE[0] - MARGINS[2], PLANE[1] - MARGINS[3]
    sizes, values = [p.bytes / 1e6 for p in points], [getattr(p, quality) for p in points]
    x = _log_axis(min(sizes), max(sizes), left + 8, right - 8)
    y = _log_axis(min(values), max(values), bottom - 8, top + 8)
    parts = [_grid(x, y, (left, top, right, bottom), "size, MB", caption)]
    best = frontier(list(points), quality)
    corners = [(x.at(p.bytes / 1e6), y.at(getattr(p, quality))) for p in best]
    lines = [line for one, two in pairwise(corners) for line in _step(one, two)]
    if lines:
        stairs = "".join(f"H{at:.1f}V{level:.1f}" for at, level in corners[1:])
        parts.append(element("path", d=f"M{corners[0][0]:.1f} {corners[0][1]:.1f}{stairs}", class_="frontier"))
    ordered = sorted(points, key=lambda p: (not p.own, p not in best))
    anchors = [(x.at(p.bytes / 1e6), y.at(getattr(p, quality)), p.label) for p in ordered]
    spots = place_labels(anchors, 11, (left, top, right, bottom), RADIUS, lines)
    labels = []
    for point, (place, height, label), spot in zip(ordered, anchors, spots, strict=True):
        told = f"{point.label}: {point.bytes / 1e6:,.2f} MB, {quality} {getattr(point, quality):.4g}"
        kind = "own" if point.own else "best" if point in best else "other"
        dot = element("circle", element("title", escape(told)), cx=place, cy=height, r=RADIUS * (1.5 if point.own else 1))
        parts.append(element("g", dot, class_=f"point {kind}"))
        if spot is not None:
            labels.append(words(*spot, label, class_=f"label {kind}", font_size=11))
    told = f"Size against {caption} of {len(points)} models; the table beside it has every number."
    return picture(*PLANE, told, *parts, *labels)


def _step(one: tuple[float, float], two: tuple[float, float]) -> list[tuple[float, float, float, float]]:
    """From a point across and then down to the next one, as two boxes without breadth."""
    return [(one[0], one[1] - 1, two[0], one[1] + 1), (two[0] - 1, one[1], two[0] + 1, two[1])]


class _Axis:
    """A logarithmic scale from values to places."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = math.log(low), math.log(high), start, end

    def at(self, value: float) -> float:
        share = (math.log(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        low, high = math.exp(self.low), math.exp(self.high)
        found = log_ticks(low, high)
        return found if len(found) > 2 else linear_ticks(low, high)


def _log_axis(low: float, high: float, start: float, end: float) -> _Axis:
    grown = max(high / low, 1.2) ** 0.06
    return _Axis(low / grown, high * grown, start, end)


def _grid(x: _Axis, y: _Axis, bounds: tuple[float, ...], across: str, up: str) -> str:
    left, top, right, bottom = bounds
    parts = []
    for tick in x.ticks():
        place = x.at(tick)
        parts.append(element("line", x1=place, x2=place, y1=top, y2=bottom, class_="grid"))
        parts.append(words(place, bottom + 17, f"{tick:,.4g}", class_="tick", text_anchor="middle", font_size=12))
    for tick in y.ticks():
        place = y.at(tick)
        parts.append(element("line", x1=left, x2=right, y1=place, y2=place, class_="grid"))
        parts.append(words(left - 7, place + 4, f"{tick:,.4g}", class_="tick", text_anchor="end", font_size=12))
    parts.append(words((left + right) / 2, bottom + 37, across, class_="axis", text_anchor="middle", font_size=12))
    middle = (top + bottom) / 2
    turned = f"rotate(-90 13 {middle:.1f})"
    parts.append(words(13, middle, up, class_="axis", text_anchor="middle", font_size=12, transform=turned))
    return "".join(parts)


def heat_table(
    matrices: Sequence[Matrix], value: Callable[[Matrix], float | None], write: Callable[[float], str], scale: str, told: str
) -> str:
    """Blocks down, kinds of matrix across; every cell holds its number on the colour of its step."""
    inside = [m for m in matrices if m.layer is not None]
    kinds = list(dict.fromkeys(m.kind for m in inside))
    layers = sorted({m.layer for m in inside if m.layer is not None})
    known = {(m.layer, m.kind): value(m) for m in inside}
    numbers = [number for number in known.values() if number is not None]
    if not numbers:
        return ""
    low, high = _range(numbers)
    head = "".join(f'<th scope="col"><span>{_breakable(name)}</span></th>' for name in short_names(kinds))
    rows = []
    for layer in layers:
        cells = []
        for kind in kinds:
            number = known.get((layer, kind))
            if number is None:
                cells.append('<td class="none">-</td>')
            else:
                title = escape(f"block {layer}, {kind}: {write(number)}")
                cells.append(f'<td class="q{step_of(number, low, high)}" title="{title}">{write(number)}</td>')
        rows.append(f'<tr><th scope="row">{layer}</th>{"".join(cells)}</tr>')
    return (
        f'<table class="heat heat-{scale}"><caption class="unseen">{escape(told)}</caption>'
        f'<thead><tr><th scope="col">block</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _range(numbers: Sequence[float]) -> tuple[float, float]:
    """Ends of the colours: a fifth of the largest number at least, so that all but equal numbers look alike."""
    low, high = min(numbers), max(numbers)
    missing = max(0.0, 0.2 * high - (high - low)) / 2
    return low - missing, high + missing


def short_names(kinds: Sequence[str]) -> list[str]:
    """The last part of each name, or all of it where two would be alike; ``_proj`` says nothing and goes."""
    last = [kind.rpartition(".")[2].removesuffix("_proj") for kind in kinds]
    return [short if last.count(short) == 1 else kind for kind, short in zip(kinds, last, strict=True)]


def _breakable(name: str) -> str:
    return escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def stacked_bar(parts: Mapping[str, int], told: str) -> str:
    """One bar of shares with a key below it; at most seven kinds, small ones together."""
    total = sum(parts.values())
    fills = "abcdefg"
    shown = sorted(((n, s) for n, s in parts.items() if s), key=lambda part: -part[1])
    if len(shown) > len(fills):
        rest = sum(size for _, size in shown[len(fills) - 1 :])
        shown = [*shown[: len(fills) - 1], ("other", rest)]
    pieces, key = [], []
    for fill, (name, size) in zip(fills, shown, strict=False):
        share = f"{100 * size / total:.1f} %"
        pieces.append(f'<span class="fill-{fill}" style="flex-grow:{size}" title="{escape(name)}: {size:,} bytes"></span>')
        key.append(f'<li><i class="fill-{fill}"></i><b>{escape(name)}</b> {bytes_of(size)} <small>{share}</small></li>')
    return (
        f'<div class="bar" role="img" aria-label="{escape(told)}">{"".join(pieces)}</div><ul class="key">{"".join(key)}</ul>'
    )


def treemap(parts: Sequence[tuple[str, str, int, str]], told: str) -> str:
    """Areas by bytes: ``(name, short name, bytes, fill)`` of each part, largest first."""
    ordered = sorted(parts, key=lambda part: -part[2])
    boxes = squarify([size for _, _, size, _ in ordered], 160.0, 100.0)
    cells = "".join(
        f'<div class="fill-{fill}" style="left:{x / 1.6:.3f}%;top:{y:.3f}%;width:{w / 1.6:.3f}%;height:{h:.3f}%" '
        f'title="{escape(f"{name}: {size:,} bytes")}"><span><b>{escape(short)}</b><i>{bytes_of(size)}</i></span></div>'
        for (name, short, size, fill), (x, y, w, h) in zip(ordered, boxes, strict=True)
    )
    return f'<div class="map" role="img" aria-label="{escape(told)}">{cells}</div>'


def bytes_of(size: float) -> str:
    """Bytes in three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} bytes"


def levels_and_weights(kind: str, matrices: Sequence[Matrix]) -> str:
    """One kind of matrix: how its weights are spread before and after, and its level tables block by block.

    The height of a tick goes with the square root of how often its code is used.
    """
    shown = _spread(matrices, MOST_ROWS)
    left, right, top, tall = 26.0, 312.0, 8.0, 96.0
    width, base = right - left, top + tall
    height = base + 34 + 19 * len(shown)
    after, before = _mean([m.histogram for m in matrices]), _mean([m.reference_histogram for m in matrices])
    peak = max([*after, *(before or ())]) or 1.0
    parts = [_area(after, left, base, width, tall / peak)]
    if before:
        parts.append(_outline(before, left, base, width, tall / peak))
    parts.append(element("line", x1=left, x2=right, y1=base, y2=base, class_="base"))
    for tick in range(-int(REACH), int(REACH) + 1, 2):
        place = left + (tick + REACH) / (2 * REACH) * width
        parts.append(
            words(place, base + 14, f"{tick:+d}" if tick else "0", class_="tick", text_anchor="middle", font_size=11)
        )
    for row, matrix in enumerate(shown):
        line = base + 43 + 19 * row
        label = "" if matrix.layer is None else str(matrix.layer)
        parts.append(words(left - 8, line, label, class_="tick", text_anchor="end", font_size=11))
        parts.append(element("line", x1=left, x2=right, y1=line, y2=line, class_="base"))
        highest = max(matrix.code_shares) or 1.0
        for table in matrix.table:
            faint = max(0.25, 1 / len(matrix.table))
            ticks = "".join(
                f"M{left + (level + 1) / 2 * width:.1f} {line:.1f}v{-(2 + 12 * math.sqrt(share / highest)):.1f}"
                for level, share in zip(table, matrix.code_shares, strict=True)
            )
            parts.append(element("path", d=ticks, class_="levels", opacity=faint))
    told = f"{kind}: histogram of weights and level tables of {len(shown)} of {len(matrices)} blocks"
    return picture(320, height, told, *parts, class_="chart small")


def _spread(matrices: Sequence[Matrix], most: int) -> list[Matrix]:
    if len(matrices) <= most:
        return list(matrices)
    return [matrices[round(n * (len(matrices) - 1) / (most - 1))] for n in range(most)]


def _mean(histograms: Sequence[tuple[float, ...] | None]) -> list[float]:
    known = [h for h in histograms if h is not None]
    return [sum(values) / len(known) for values in zip(*known, strict=True)] if known else []


def _area(shares: Sequence[float], left: float, base: float, width: float, scale: float) -> str:
    bar = width / len(shares)
    tops = "".join(f"V{base - share * scale:.1f}h{bar:.2f}" for share in shares)
    return element("path", d=f"M{left} {base}{tops}V{base}Z", class_="after")


def _outline(shares: Sequence[float], left: float, base: float, width: float, scale: float) -> str:
    bar = width / len(shares)
    places = " ".join(f"{left + (n + 0.5) * bar:.1f},{base - share * scale:.1f}" for n, share in enumerate(shares))
    return element("polyline", points=places, class_="before")
