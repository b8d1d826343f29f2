"""Which tokens are read together, and which of them are scored where.

The rule: windows of ``window`` tokens overlap by 1/32, or by ``skip`` tokens if that is more. A token is scored once, in
the first window that has it behind the overlap, or in the first window of the text. So each token has the overlap's length
of context at least, what it scores does not depend on what comes after it, and a long text costs 3 % more than reading it
once. The first ``skip`` tokens of a text are context only: nothing can be predicted from next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A run of one text's tokens that is read in one pass.

    Attributes:
        text: number of the text.
        start: place of ``ids[0]`` in the text.
        ids: int64 ``[n]``, n <= window.
        first: place in ``ids`` of the first token scored here; at least 1.
    """

    text: int
    start: int
    ids: Tensor
    first: int


def windows(text: int, pieces: Iterable[Tensor], window: int, skip: int) -> Iterator[Window]:
    """The windows of a text whose token ids arrive in pieces; holds no more than two windows of them.

    Args:
        text: number to mark them with.
        pieces: int64 ``[k]`` each, any k.
        window: tokens in a window.
        skip: tokens at the start of the text that are not scored; at least 1.
    """
    overlap, start = max(skip, window // 32), 0
    held = torch.empty(0, dtype=torch.int64)
    for piece in pieces:
        held = torch.cat([held, piece])
        while len(held) > window:
            yield Window(text, start, held[:window], overlap if start else skip)
            held, start = held[window - overlap :], start + window - overlap
    first = overlap if start else skip
    if len(held) > first:
        yield Window(text, start, held, first)


def batches(found: Iterable[Window], window: int, texts: int = 64) -> Iterator[list[Window]]:
    """Windows of like length together, each batch with no more tokens than one full window, padding included.

    Args:
        found: windows of many texts.
        window: tokens in a full window.
        texts: how many windows to look at together.
    """
    held: list[Window] = []
    for one in found:
        held.append(one)
        if len(held) == texts:
            yield from _packed(held, window)
            held = []
    yield from _packed(held, window)


def _packed(held: list[Window], window: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for one in sorted(held, key=lambda w: (len(w.ids), w.text, w.start)):
        if batch and (len(batch) + 1) * len(one.ids) > window:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
