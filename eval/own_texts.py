"""Texts to test a detector on: pieces of books it has not read, and what models write behind other pieces of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.detect.clean import clean

# val.txt is made of so many books, 60 kB each.
BOOKS = 8
PROMPT = 32
BATCH = 50
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "T=0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "T=0.9": {"do_sample": True, "temperature": 0.9, "top_k": 0},
    "T=1.0": {"do_sample": True, "temperature": 1.0, "top_k": 0},
    "top-k 50": {"do_sample": True, "temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9},
}


@dataclass(frozen=True)
class Source:
    """A text as tokens of one tokenizer: ids int64 ``[n]``, and the book each stands in."""

    ids: Tensor
    books: Tensor
    tokenizer: Any

    @classmethod
    def read(cls, file: str, tokenizer: Any) -> Source:
        """The text of a file, cleaned as detectors clean it."""
        text = clean(Path(file).read_text(encoding="utf-8")).text
        found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        books = torch.tensor([start * BOOKS // len(text) for start, _ in found.offset_mapping])
        return cls(torch.tensor(found.input_ids), books, tokenizer)


def people(source: Source, lengths: dict[int, int]) -> tuple[list[str], list[int]]:
    """Pieces of the text that do not overlap, so many of each length in tokens, spread over it; and their books."""
    runs = [length for length, count in lengths.items() for _ in range(count)]
    random.Random(0).shuffle(runs)
    gap = (len(source.ids) - sum(runs)) // len(runs)
    if gap < 0:
        raise SystemExit(f"the text has {len(source.ids)} tokens, {sum(runs)} are needed.")
    texts, books, place = [], [], 0
    for length in runs:
        texts.append(source.tokenizer.decode(source.ids[place : place + length]))
        books.append(int(source.books[place]))
        place += length + gap
    return texts, books


@torch.inference_mode()
def continuations(model: Any, source: Source, how: str, count: int, length: int, seed: int = 0) -> list[str]:
    """What a model writes behind prompts of 32 tokens spread over the text: ``length`` tokens each, without the prompt."""
    torch.manual_seed(seed)
    starts = torch.linspace(0, len(source.ids) - PROMPT - 1, count).long()
    prompts = torch.stack([source.ids[start : start + PROMPT] for start in starts.tolist()])
    out = []
    for batch in prompts.split(BATCH):
        sizes = {"max_new_tokens": length, "min_new_tokens": length}
        made = model.generate(batch, attention_mask=torch.ones_like(batch), pad_token_id=0, **sizes, **DECODING[how])
        out += [source.tokenizer.decode(row[PROMPT:]) for row in made]
    return out
