"""What a report tells: plain values, gathered once, so that drawing and writing need no model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

# Histograms of weights over their root mean square: this many bins from -REACH to REACH.
BINS = 80
REACH = 4.0
# Of the texts: small models otherwise go round in circles, and two circles say little of two models.
REPETITION_PENALTY = 1.3


@dataclass(frozen=True)
class Matrix:
    """One low-bit matrix or stack.

    Attributes:
        name: of the parameter.
        end: whether it is the input embedding or the output head.
        levels: family of the first term, with its number.
        bits, group_size: of the first term.
        bytes, bits_per_weight: everything stored for it, metadata included.
        table: up to ``MOST_TABLES`` level tables of the first term, each from -1 to 1.
        code_shares: how often each code of the first term is used, summing to 1.
        histogram: share of decoded weights in each bin.
        reference_histogram: the same of the original's; None without one.
        error: norm of (weight - original) over the norm of the original; None without one.
    """

    name: str
    shape: tuple[int, ...]
    end: bool
    levels: str
    bits: int
    group_size: int
    bytes: int
    bits_per_weight: float
    table: tuple[tuple[float, ...], ...]
    code_shares: tuple[float, ...]
    histogram: tuple[float, ...]
    reference_histogram: tuple[float, ...] | None = None
    error: float | None = None

    @property
    def layer(self) -> int | None:
        """Number of the block it sits in."""
        found = re.search(r"\.(\d+)\.", self.name)
        return int(found.group(1)) if found and not self.end else None

    @property
    def kind(self) -> str:
        """What it is in every block: its name behind the block's number, ``.weight`` left out."""
        stem = self.name.removesuffix(".weight")
        return stem if self.layer is None else re.split(r"\.\d+\.", stem, maxsplit=1)[1]


@dataclass(frozen=True)
class Point:
    """One model on the plane of size and quality."""

    label: str
    bytes: int
    kl: float | None = None
    perplexity: float | None = None
    source: str = ""
    own: bool = False


@dataclass(frozen=True)
class Measured:
    """The checkpoint on a text, beside the original where there is one; see ``hf_lowbit.measure``."""

    text: str
    tokens: int
    window: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Continuation:
    """Greedy text of one model after the prompt, under ``REPETITION_PENALTY``: id and text of each token."""

    label: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class Verdict:
    """What the detector said of one continuation."""

    label: str
    headline: str
    reason: str
    spot: float | None
    tokens: int


@dataclass(frozen=True)
class Facts:
    """Everything a page shows; ``left_out`` says of each section that is missing why, and what would bring it."""

    name: str
    method: str
    settings: dict[str, Any]
    transforms: tuple[str, ...]
    file_bytes: int
    bits_per_weight_linears: float
    bits_per_weight_model: float
    bytes_by_kind: dict[str, int]
    high_precision: dict[str, tuple[int, str]]
    matrices: tuple[Matrix, ...]
    reference: str | None = None
    reference_bytes: int | None = None
    measured: Measured | None = None
    points: tuple[Point, ...] = ()
    prompt: str = ""
    continuations: tuple[Continuation, ...] = ()
    detector: str = ""
    verdicts: tuple[Verdict, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
