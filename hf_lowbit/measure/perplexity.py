"""Perplexity, and the one definition of the windows every text measure here uses.

A text is cut into non-overlapping windows of ``window`` tokens. Each token of a window but the first is predicted from
those before it in the same window. A last window that is not full is dropped, unless it is the only one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest

# Logits of one forward pass are kept under 64 MB of float32, which decides how many windows share a pass.
LOGITS_PER_PASS = 1 << 24

Progress = Callable[[int, int], None]


def windows(ids: Tensor, window: int) -> Tensor:
    """Token ids ``[n]`` as windows ``[k, window]`` (or ``[1, n]`` for a shorter text).

    Raises:
        BadRequest: fewer than two tokens, or a window of fewer than two.
    """
    if window < 2:
        raise BadRequest(f"a window needs at least 2 tokens, got {window}.")
    if ids.numel() < 2:
        raise BadRequest(f"the text has {ids.numel()} tokens; at least 2 are needed to predict one from another.")
    if ids.numel() < window:
        return ids[None]
    return ids[: ids.numel() // window * window].view(-1, window)


def batches(ids: Tensor, window: int, vocabulary: int, progress: Progress | None = None) -> Iterator[Tensor]:
    """Windows in batches sized so that their logits stay small."""
    cut = windows(ids, window)
    step = max(1, LOGITS_PER_PASS // (cut.shape[1] * vocabulary))
    for start in range(0, len(cut), step):
        yield cut[start : start + step]
        if progress is not None:
            progress(min(start + step, len(cut)), len(cut))


@torch.no_grad()
def log_probabilities(model: Any, batch: Tensor) -> Tensor:
    """Float32 log-probabilities ``[b, n - 1, vocabulary]`` of the tokens after each position but the last."""
    logits = model(input_ids=batch.to(model.device)).logits[:, :-1]
    return logits.float().log_softmax(-1)


def negative_log_likelihood(log_probs: Tensor, batch: Tensor) -> float:
    """Summed over the predicted tokens, in nats."""
    targets = batch[:, 1:, None].to(log_probs.device)
    return -log_probs.gather(-1, targets).sum(dtype=torch.float64).item()


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood in nats, and over how many predicted tokens."""

    perplexity: float
    tokens: int


def perplexity(model: Any, ids: Tensor, window: int = 512, progress: Progress | None = None) -> Perplexity:
    """Perplexity of a causal LM on token ids ``[n]``.

    Args:
        model: anything with ``.device``, ``.config.vocab_size`` and a call that returns ``.logits``.
        ids: int64 ``[n]``.
        window: tokens per window.
        progress: called with windows done and windows in all.
    """
    total, tokens = 0.0, 0
    for batch in batches(ids, window, vocabulary_of(model), progress):
        total += negative_log_likelihood(log_probabilities(model, batch), batch)
        tokens += batch.shape[0] * (batch.shape[1] - 1)
    return Perplexity(exponential(total / tokens), tokens)


def exponential(value: float) -> float:
    """``exp``, and infinity where that is more than a float holds."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def vocabulary_of(model: Any) -> int:
    """Size of the vocabulary, also where a text model sits inside a larger config."""
    config = model.config
    return int((config.get_text_config() if hasattr(config, "get_text_config") else config).vocab_size)
