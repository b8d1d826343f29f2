"""Scores texts of any length in bounded memory: windows in, sums of token statistics out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lowbit.detect.token_statistics import STATISTICS, token_statistics
from hf_lowbit.detect.windows import Window, batches, windows
from hf_lowbit.errors import BadRequest

# Characters tokenized at once, and how far to look for a blank to cut a longer text at.
PIECE, SLACK = 50_000, 2_000
_BLANK = re.compile(r"(?<=\S)\s(?=\S)")
# Tokens summed together; neighbours depend on each other, so resampling draws whole blocks.
BLOCK = 16
# Blocks kept of a text; neighbours are added up when there are twice as many.
BLOCKS = 1024


@dataclass
class Tokens:
    """The first tokens of a text one by one: places in the cleaned text and statistics.

    Attributes:
        spans: int64 ``[n, 2]``, first character and the one behind the last.
        values: float32 ``[n, 6]`` in the order of ``STATISTICS``; NaN where a token was context only.
    """

    spans: np.ndarray
    values: np.ndarray


@dataclass
class TextSums:
    """What the scores of one text are made of.

    Attributes:
        tokens: in the text, up to the limit.
        cut: whether the text goes on behind the limit.
        sums: float64 ``[k, 6]``, statistics summed over blocks of tokens.
        counts: int64 ``[k]``, scored tokens of each block.
        first: the first tokens one by one.
    """

    tokens: int = 0
    cut: bool = False
    sums: np.ndarray = field(default_factory=lambda: np.zeros((0, len(STATISTICS))))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    first: Tokens = field(default_factory=lambda: Tokens(np.zeros((0, 2), np.int64), np.zeros((0, len(STATISTICS)), "f4")))

    @property
    def scored(self) -> int:
        """Scored tokens."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray) -> None:
        """Take up the statistics ``[n, 6]`` of one window's scored tokens."""
        starts = np.arange(0, len(values), BLOCK)
        sums = np.add.reduceat(values.astype(np.float64), starts, axis=0)
        counts = np.diff(np.append(starts, len(values)))
        self.sums, self.counts = np.concatenate([self.sums, sums]), np.concatenate([self.counts, counts])
        if len(self.sums) >= 2 * BLOCKS:
            pairs = np.arange(0, len(self.sums), 2)
            self.sums = np.add.reduceat(self.sums, pairs, axis=0)
            self.counts = np.add.reduceat(self.counts, pairs)


class Scorer:
    """Runs a causal LM, and an observer if there is one, over texts.

    Args:
        model: anything with ``.device``, ``.config`` and a call that returns ``.logits``.
        tokenizer: of the model.
        observer: a second model of the same tokenizer, for scores of a pair.
        window: tokens read at once; the most the model takes if that is less.
        skip: tokens at the start of a text that are context only.
        limit: tokens of a text that are read; what comes behind is left out, and the result says so.
    """

    def __init__(
        self, model: Any, tokenizer: Any, observer: Any = None, window: int = 512, skip: int = 10, limit: int = 200_000
    ) -> None:
        self.model, self.tokenizer, self.observer = model, tokenizer, observer
        places = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in self._models]
        self.window = min([window, *(p for p in places if isinstance(p, int) and p > 0)])
        if self.window < 32 or not 1 <= skip < self.window // 2:
            raise BadRequest(
                f"window={self.window}, skip={skip}: a window needs 32 tokens or more, which the model must take, "
                "and skip is 1 to half of it."
            )
        self.skip, self.limit = skip, limit

    @property
    def _models(self) -> list[Any]:
        return [self.model] if self.observer is None else [self.model, self.observer]

    def score(self, texts: Iterable[str], keep: int = 0, together: int = 64) -> Iterator[TextSums]:
        """Sums for each text, in order.

        Args:
            texts: cleaned texts; taken as needed, ``together`` at a time.
            keep: how many tokens of each to return one by one.
        """
        held: list[str] = []
        for text in texts:
            held.append(text)
            if len(held) == together:
                yield from self._score(held, keep)
                held = []
        if held:
            yield from self._score(held, keep)

    def _score(self, texts: list[str], keep: int) -> list[TextSums]:
        found = [TextSums() for _ in texts]
        cut = chain.from_iterable(
            windows(number, self._pieces(text, found[number], keep), self.window, self.skip)
            for number, text in enumerate(texts)
        )
        for batch in batches(cut, self.window):
            for one, values in zip(batch, self._read(batch), strict=True):
                target = found[one.text]
                target.add(values)
                place = one.start + one.first
                kept = target.first.values[place : place + len(values)]
                kept[:] = values[: len(kept)]
        return found

    def _pieces(self, text: str, found: TextSums, keep: int) -> Iterator[Tensor]:
        """Token ids of a text, piece by piece; notes their number, and the places of those to keep."""
        for start, piece in _cut(text):
            encoded = self.tokenizer(piece, add_special_tokens=False, verbose=False, return_offsets_mapping=keep > 0)
            ids = encoded.input_ids[: self.limit - found.tokens]
            if found.tokens < keep and ids:
                spans = np.array(encoded.offset_mapping[: min(len(ids), keep - found.tokens)], dtype=np.int64) + start
                blank = np.full((len(spans), len(STATISTICS)), np.nan, dtype=np.float32)
                first = found.first
                found.first = Tokens(np.concatenate([first.spans, spans]), np.concatenate([first.values, blank]))
            found.tokens += len(ids)
            yield torch.tensor(ids, dtype=torch.int64)
            if len(ids) < len(encoded.input_ids) or (found.tokens == self.limit and start + len(piece) < len(text)):
                found.cut = True
                return

    @torch.inference_mode()
    def _read(self, batch: list[Window]) -> list[np.ndarray]:
        """Statistics float32 ``[k, 6]`` of each window's scored tokens."""
        longest = max(len(one.ids) for one in batch)
        # On the right, where no token that is scored can see it.
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, one in enumerate(batch):
            ids[row, : len(one.ids)] = one.ids
        logits = [model(input_ids=ids.to(model.device), use_cache=False).logits for model in self._models]
        largest, known = int(ids.max()), min(part.shape[-1] for part in logits)
        if largest >= known:
            raise BadRequest(
                f"the tokenizer makes token {largest}, a model knows {known} tokens. "
                "Tokenizer and model, or model and observer, do not belong together."
            )
        out = []
        for row, one in enumerate(batch):
            places = slice(one.first - 1, len(one.ids) - 1)
            targets = one.ids[one.first :].to(logits[0].device)
            other = logits[1][row, places].to(logits[0].device) if len(logits) > 1 else None
            out.append(token_statistics(logits[0][row, places], targets, other).numpy())
        return out


def _cut(text: str) -> Iterator[tuple[int, str]]:
    """A long text in pieces cut before a blank between words, where byte-level tokenizers cut too; start and piece."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > PIECE + SLACK:
            blank = _BLANK.search(text, start + PIECE, start + PIECE + SLACK)
            end = blank.start() if blank else start + PIECE
        yield start, text[start:end]
        start = end
