"""The exception types users meet, and the nearest-name hint their messages carry.

Every message says what was asked, what was found and what to do. ``BadRequest`` ends a command with exit code 2 (the
request cannot be served as it stands), every other ``LowBitError`` with 1 (the work failed).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowBitError(Exception):
    """Base of all errors this package raises on purpose."""


class BadRequest(LowBitError, ValueError):
    """The request itself is at fault: an unknown name, a value out of range, a path that cannot be used."""


class WeightError(LowBitError, ValueError):
    """A weight cannot be quantized: it holds NaN or infinity, or has a shape no solver accepts."""


class FormatError(LowBitError, ValueError):
    """A stored low-bit tensor or checkpoint is corrupt, truncated, inconsistent or too new."""


class FallbackError(LowBitError, RuntimeError):
    """``strict=True`` was asked and something would have been skipped or run on a slower road."""


def unknown_name(kind: str, asked: object, known: Iterable[str]) -> str:
    """Message for a name that does not exist: what was asked, the nearest known name, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(asked), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {asked!r}.{hint} Known: {', '.join(names)}."
