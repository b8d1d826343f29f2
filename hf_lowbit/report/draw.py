"""Marks, axes and labels as inline SVG, coloured by the page's own variables so that one drawing serves both themes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hf_lowbit.page import escape

# Mean advance of a character of the page's font, as a share of its size.
ADVANCE = 0.62


def element(name: str, *children: str, **attributes: Any) -> str:
    """One element; ``children`` are markup, attribute values are escaped, ``_`` in names becomes ``-``."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(children)}</{name}>" if children else f"<{name}{written}/>"


def _short(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def words(x: float, y: float, text: str, **attributes: Any) -> str:
    """Text, escaped."""
    return element("text", escape(text), x=x, y=y, **attributes)


def picture(width: float, height: float, title: str, *children: str, class_: str = "chart") -> str:
    """An SVG that fills the width it is given; ``title`` is what a reader who cannot see it is told."""
    return element(
        "svg", element("title", escape(title)), *children,
        viewBox=f"0 0 {_short(float(width))} {_short(float(height))}", role="img", aria_label=title, class_=class_,
    )  # fmt: skip


def width_of(text: str, size: float) -> float:
    """About how wide a text is drawn."""
    return len(text) * size * ADVANCE


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``count`` of them: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from ``low`` to ``high``; only the powers where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leads = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    return [t for power in powers for lead in leads if low <= (t := lead * 10.0**power) <= high]


def place_labels(
    anchors: Sequence[tuple[float, float, str]],
    size: float,
    bounds: tuple[float, float, float, float],
    radius: float,
    lines: Sequence[tuple[float, float, float, float]] = (),
) -> list[tuple[float, float] | None]:
    """Where labels go beside their points without covering a point, a line or one another, the first ones served first.

    Args:
        anchors: point and label of each.
        size: of the font.
        bounds: left, top, right and bottom of the plane.
        radius: of a point.
        lines: left, top, right and bottom of each straight line across or down.

    Returns:
        Left end of the base line of each label, or None where it does not fit.
    """
    left, top, right, bottom = bounds
    taken = [*lines, *((x - radius, y - radius, x + radius, y + radius) for x, y, _ in anchors)]
    out: list[tuple[float, float] | None] = []
    for x, y, label in anchors:
        wide, gap = width_of(label, size), radius + 4
        spots = [(x + gap, y + size * 0.35), (x - gap - wide, y + size * 0.35)]
        spots += [(x - wide / 2, y - gap - 1), (x - wide / 2, y + gap + size * 0.8)]
        spots += [(x + gap * 0.7, y - gap * 0.9), (x + gap * 0.7, y + gap + size * 0.5)]
        spots += [(x - wide - gap * 0.7, y - gap * 0.9), (x - wide - gap * 0.7, y + gap + size * 0.5)]
        found = None
        for at, base in spots:
            box = (at, base - size * 0.8, at + wide, base + size * 0.2)
            inside = box[0] >= left and box[1] >= top and box[2] <= right and box[3] <= bottom
            if inside and not any(_overlap(box, other) for other in taken):
                found = (at, base)
                taken.append(box)
                break
        out.append(found)
    return out


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def squarify(sizes: Sequence[float], width: float, height: float) -> list[tuple[float, float, float, float]]:
    """Rectangles ``(x, y, w, h)`` of the given areas that fill a plane and are nearly square.

    Source: Bruls, Huizing, van Wijk, "Squarified Treemaps", 2000. ``sizes`` descending and positive.
    """
    total = sum(sizes)
    areas = [size * width * height / total for size in sizes]
    out: list[tuple[float, float, float, float]] = []
    x = y = 0.0
    while areas:
        side = min(width, height)
        row = [areas[0]]
        while len(row) < len(areas) and _worst([*row, areas[len(row)]], side) <= _worst(row, side):
            row.append(areas[len(row)])
        thick = sum(row) / side if side else 0.0
        along = 0.0
        for area in row:
            length = area / thick if thick else 0.0
            out.append((x, y + along, thick, length) if width >= height else (x + along, y, length, thick))
            along += length
        if width >= height:
            x, width = x + thick, width - thick
        else:
            y, height = y + thick, height - thick
        areas = areas[len(row) :]
    return out


def _worst(row: Sequence[float], side: float) -> float:
    total = sum(row)
    return max(side * side * max(row) / total**2, total**2 / (side * side * min(row)))
