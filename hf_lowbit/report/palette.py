"""Colours of a report: steps of a scale for heat maps and fills for kinds of bytes, in both themes.

Hues are those of Okabe and Ito, which people with any common form of colour blindness tell apart; scales go by lightness
and every cell holds its number besides.
"""

from __future__ import annotations

STEPS = 9
# Lowest and highest colour of a scale, in light and in dark.
SCALES = {
    "bits": (("#eaf2fb", "#0a4f94"), ("#1b2735", "#8fc4fb")),
    "error": (("#fdf1e4", "#a04004"), ("#2e2218", "#fbb479")),
}
FILLS = {
    "a": ("#0072b2", "#3f8ccb"),
    "b": ("#e69f00", "#c48f2c"),
    "c": ("#009e73", "#2f9e7d"),
    "d": ("#cc79a7", "#b8749b"),
    "e": ("#56b4e9", "#69a9cf"),
    "f": ("#d55e00", "#c9743a"),
    "g": ("#8a8f96", "#7b828a"),
}
INK = ("#14161a", "#ffffff")


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def mix(low: str, high: str, share: float) -> str:
    """A colour between two, by channel."""
    pairs = zip(_channels(low), _channels(high), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def contrast(one: str, other: str) -> float:
    """Ratio of two colours' luminance as WCAG 2 defines it, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [c / 255 for c in _channels(colour)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def ink_on(ground: str) -> str:
    """Black or white, whichever is read more easily there."""
    return max(INK, key=lambda ink: contrast(ink, ground))


def style() -> str:
    """CSS classes ``heat-SCALE q0`` to ``q8`` and ``fill-a`` to ``fill-g`` for both themes."""
    light, dark = [_rules(theme) for theme in (0, 1)]
    return f"{light}@media screen and (prefers-color-scheme: dark) {{ {dark}}}\n"


def _rules(theme: int) -> str:
    out = []
    for name, ends in SCALES.items():
        for step in range(STEPS):
            ground = mix(*ends[theme], step / (STEPS - 1))
            out.append(f".heat-{name} .q{step} {{ background: {ground}; color: {ink_on(ground)}; }}")
    for name, colours in FILLS.items():
        ground = colours[theme]
        out.append(f".fill-{name} {{ background: {ground}; color: {ink_on(ground)}; fill: {ground}; }}")
    return "\n".join(out) + "\n"


def step_of(value: float, low: float, high: float) -> int:
    """The step of a scale a value falls on; the middle one where all values are the same."""
    if not high > low:
        return STEPS // 2
    return min(STEPS - 1, max(0, round((value - low) / (high - low) * (STEPS - 1))))
