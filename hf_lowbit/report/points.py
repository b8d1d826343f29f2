"""Measured models from files: what ``hf-lowbit eval --json`` and ``demo --json`` print, and results of ``eval/``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_lowbit.errors import BadRequest
from hf_lowbit.report.facts import Point


def read_points(file: str) -> list[Point]:
    """Every row of a file that has a size and a quality.

    Raises:
        BadRequest: the file cannot be read, is not JSON, or holds no such row.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"cannot read {file!r}: {error.strerror or error}.") from error
    except ValueError as error:
        raise BadRequest(f"{file!r} is not JSON ({error}). Give what `hf-lowbit eval --json` printed.") from error
    found = [
        Point(label, row["bytes"], _number(row.get("kl")), _number(row.get("perplexity")), Path(file).name)
        for label, row in _rows(content, Path(file).stem)
        if (_number(row.get("bytes")) or 0) > 0 and _number(row.get("perplexity")) is not None
    ]
    if not found:
        raise BadRequest(
            f"{file!r} holds no row with `bytes` and `perplexity`. Give what `hf-lowbit eval --json`, "
            "`hf-lowbit demo --json` or eval/peers.py wrote."
        )
    return found


def _rows(content: Any, stem: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(content, dict):
        return
    named, listed = content.get("result"), content.get("rows")
    if isinstance(named, dict):
        yield from ((label, row) for label, row in named.items() if isinstance(row, dict))
    elif isinstance(listed, list):
        yield from ((str(row.get("model", stem)), row) for row in listed if isinstance(row, dict))
    else:
        yield stem, content


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def frontier(points: list[Point], quality: str) -> list[Point]:
    """The points no other one beats in both size and quality, smallest first; quality is ``kl`` or ``perplexity``."""
    best, out = float("inf"), []
    for point in sorted(points, key=lambda p: (p.bytes, getattr(p, quality))):
        if getattr(point, quality) < best:
            best = getattr(point, quality)
            out.append(point)
    return out
