"""Attention over what a layer holds: a few stored tokens through the compiled kernel, prompts behind a past in torch."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from hf_lowbit.kv import importance, kernel
from hf_lowbit.kv.attend import Segment, attend, weights
from hf_lowbit.kv.holdings import Holdings

# Counted queries whose weights are computed again at a time.
PART = 64


def attend_stored(held: Holdings, queries: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of tokens that are stored already; the weights they give wait to be counted.

    Args:
        queries: ``[batch, heads of keys, group, n, dim]``.
        mask: bool or float ``[1 or batch, 1, n, length]``, or None for causal.

    Returns:
        float32 ``[batch, n, heads, dim]``.
    """
    if kernel.refusal(held) is None:
        out, rows = kernel.attend(held, queries, mask, scale)
    else:
        queries = queries.float()
        found = attend(queries, chain(held.rows(), held.packed()), mask, scale, held.frame, held.length)
        out = found.out.permute(0, 3, 1, 2, 4).flatten(2, 3)
        rows = row_weights(queries, held.rows(), found.normalizer, mask, scale, held.length) if held.counts else None
    held.pending = rows
    return out


def attend_behind(
    held: Holdings, incoming: tuple[Tensor, Tensor], queries: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, range, Tensor | None]:
    """Attention of a prompt that is not stored yet, behind what is.

    Args:
        incoming: its keys and values ``[batch, heads of keys, n, dim]``.
        queries, mask, scale: as for :func:`attend_stored`.

    Returns:
        Its output, the queries counted, and what attention its own tokens got, ``[batch, heads, n]``.
    """
    own = Segment(*incoming, held.stored)
    found = attend(queries.float(), chain(held.rows(), [own], held.packed()), mask, scale, held.frame, held.length)
    out = found.out.permute(0, 3, 1, 2, 4).flatten(2, 3)
    tokens = queries.shape[3]
    chosen = importance.observed(tokens, held.settings) if held.counts else range(0)
    if not chosen:
        return out, chosen, None
    first, sums = held.length - tokens, torch.zeros(())
    full = mask
    if full is None:
        full = torch.ones(1, 1, tokens, held.length, dtype=torch.bool, device=out.device).tril(first)
    for at in range(0, len(chosen), PART):
        part = torch.tensor(chosen[at : at + PART], device=out.device)
        rows = row_weights(
            queries[:, :, :, part].float(),
            chain(held.rows(), [own]),
            found.normalizer[..., part],
            full[:, :, part],
            scale,
            held.length,
        )
        faded = held.settings.decay ** (tokens - 1 - part)
        sums = sums + (rows * faded[:, None]).sum(2)
    stored = held.kept.length + held.recent.length
    held.add_scores(sums[..., :stored], tokens)
    return out, range(first + chosen.start, first + chosen.stop, chosen.step), sums[..., stored:]


def row_weights(
    queries: Tensor, segments: Iterable[Segment], normalizer: Tensor, mask: Tensor | None, scale: float, length: int
) -> Tensor:
    """Weights of queries to the tokens of segments that are not low, ``[batch, heads, n, tokens]``."""
    return torch.cat([weights(queries, normalizer, part, mask, scale, length) for part in segments], -1)
