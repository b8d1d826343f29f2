"""Attention over a packed cache in torch: block-wise online softmax, one slab of decoded keys and values at a time.

This is the arithmetic that the compiled kernel is held to, and what runs prompts behind a packed past.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.kv.tiers import Frame

# Scores held at a time, and tokens decoded at a time.
MOST_SCORES = 1 << 22
SLAB = 1024


class Segment(NamedTuple):
    """Some keys and values ``[batch, heads, n, dim]`` of a cache and where they stand.

    Attributes:
        positions: int64 ``[batch, heads, n]``, or the position of the first of them where they follow each other.
        low: whether they are in the coordinates of low tiers.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | int
    low: bool = False


class Attended(NamedTuple):
    """What queries ``[batch, heads, group, tokens, dim]`` see (float32, like them), and the log of their softmax sum."""

    out: Tensor
    normalizer: Tensor


def attend(
    queries: Tensor, segments: Iterable[Segment], mask: Tensor | None, scale: float, frame: Frame, length: int
) -> Attended:
    """Softmax attention of the last tokens of a sequence.

    Args:
        queries: float32 ``[batch, heads of keys, group, tokens, dim]``.
        mask: bool (true is seen) or float (added), ``[1 or batch, 1, tokens, length]``; None is causal.
        length: tokens of the sequence, those of the queries last.

    Returns:
        Zeros where a query sees nothing, as the host's attention gives them.
    """
    batch, heads, group, tokens, dim = queries.shape
    flat = queries.reshape(batch, heads, group * tokens, dim)
    turned = frame.queries(flat)
    top = flat.new_full((batch, heads, group * tokens, 1), -torch.inf)
    total = torch.zeros_like(top)
    sums = {False: torch.zeros_like(flat), True: torch.zeros_like(flat)}
    for segment in segments:
        keys, values = segment.keys.float(), segment.values.float()
        for rows in _row_blocks(group * tokens, batch * heads * keys.shape[2]):
            scores = (turned if segment.low else flat)[:, :, rows] @ keys.transpose(-1, -2)
            hide(scores.mul_(scale), mask, segment.positions, tokens, length, rows)
            highest = torch.maximum(top[:, :, rows], scores.amax(-1, keepdim=True))
            safe = highest.masked_fill(highest == -torch.inf, 0)
            weights = scores.sub_(safe).exp_()
            fade = (top[:, :, rows] - safe).exp()
            total[:, :, rows] = total[:, :, rows] * fade + weights.sum(-1, keepdim=True)
            for low, sum_ in sums.items():
                sum_[:, :, rows] *= fade
                if low == segment.low:
                    sum_[:, :, rows] += weights @ values
            top[:, :, rows] = highest
    out = (sums[False] + frame.rotated(sums[True])) / total.masked_fill(total == 0, 1)
    normalizer = torch.where(total > 0, top + total.log(), torch.inf)  # of nothing seen: weights of zero
    return Attended(out.view_as(queries), normalizer.view(batch, heads, group, tokens))


def weights(queries: Tensor, normalizer: Tensor, segment: Segment, mask: Tensor | None, scale: float, length: int) -> Tensor:
    """Attention weights of queries to the tokens of a segment not in a low tier, averaged over the heads of a group.

    Args:
        queries, mask, scale, length: as for :func:`attend`.
        normalizer: from :func:`attend`.

    Returns:
        float32 ``[batch, heads, tokens, n]``.
    """
    batch, heads, group, tokens, dim = queries.shape
    scores = queries.reshape(batch, heads, group * tokens, dim) @ segment.keys.float().transpose(-1, -2)
    hide(scores.mul_(scale), mask, segment.positions, tokens, length, slice(0, group * tokens))
    scores = scores.view(batch, heads, group, tokens, -1).sub_(normalizer[..., None]).exp_()
    return scores.mean(2)


def hide(scores: Tensor, mask: Tensor | None, positions: Tensor | int, tokens: int, length: int, rows: slice) -> None:
    """Apply the mask in place.

    Args:
        scores: ``[batch, heads, rows, n]``; row ``i`` belongs to token ``i % tokens``.
        positions: of the ``n`` keys (:class:`Segment`).
    """
    batch, heads, _, count = scores.shape
    token = torch.arange(rows.start, rows.stop, device=scores.device) % tokens
    if mask is None:
        if tokens == 1:
            return
        where = (
            positions + torch.arange(count, device=scores.device) if isinstance(positions, int) else positions[:, :, None]
        )
        scores.masked_fill_(where > (length - tokens + token)[:, None], -torch.inf)
        return
    if isinstance(positions, int):
        seen = mask[..., positions : positions + count][:, :, token]
    else:
        wide = mask.expand(batch, heads, tokens, length)
        seen = wide.gather(3, positions[:, :, None].expand(batch, heads, tokens, count))[:, :, token]
    if mask.dtype == torch.bool:
        scores.masked_fill_(~seen, -torch.inf)
    else:
        scores += seen


def _row_blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, MOST_SCORES // max(1, width))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
