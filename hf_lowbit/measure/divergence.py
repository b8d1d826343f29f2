"""Divergence of a model from its original: KL and top-1 agreement, over the windows of ``perplexity``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.measure.perplexity import (
    Progress,
    batches,
    exponential,
    log_probabilities,
    negative_log_likelihood,
    vocabulary_of,
)


@dataclass(frozen=True)
class Divergence:
    """How a model differs from a reference on one text.

    Attributes:
        perplexity, reference_perplexity: of either model.
        kl: mean of ``KL(reference || model)`` per predicted token, in nats.
        top1_agreement: share of predicted tokens whose most likely token is the same.
        tokens: predicted tokens.
    """

    perplexity: float
    reference_perplexity: float
    kl: float
    top1_agreement: float
    tokens: int


def divergence(model: Any, reference: Any, ids: Tensor, window: int = 512, progress: Progress | None = None) -> Divergence:
    """Run both models over the same windows, one batch at a time; no logits are kept.

    Raises:
        BadRequest: the vocabularies differ.
    """
    sizes = vocabulary_of(model), vocabulary_of(reference)
    if sizes[0] != sizes[1]:
        raise BadRequest(f"model and reference have vocabularies of {sizes[0]} and {sizes[1]} tokens; KL needs one.")
    nll = reference_nll = kl = same = 0.0
    tokens = 0
    for batch in batches(ids, window, sizes[0], progress):
        ours, theirs = log_probabilities(model, batch), log_probabilities(reference, batch).to(model.device)
        nll += negative_log_likelihood(ours, batch)
        reference_nll += negative_log_likelihood(theirs, batch)
        kl += (theirs.exp() * (theirs - ours)).sum(dtype=torch.float64).item()
        same += (theirs.argmax(-1) == ours.argmax(-1)).sum().item()
        tokens += batch.shape[0] * (batch.shape[1] - 1)
    perplexities = exponential(nll / tokens), exponential(reference_nll / tokens)
    return Divergence(*perplexities, kl / tokens, same / tokens, tokens)
