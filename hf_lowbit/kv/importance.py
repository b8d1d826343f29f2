"""How much attention tokens get, where no attention matrix is to be had.

A prompt is attended to by the host's own kernel, which keeps no weights. They are computed again for some of its queries
and summed over them: all queries (exact), every m-th one, or the last ones (SnapKV, arXiv 2404.14469). While decoding the
weights of the new tokens are at hand and are added as they come (H2O, arXiv 2306.14048). Older queries count less
(``decay``): what is looked at now tells better what will be. Tokens are ranked by the mean over the queries that could see
them, since sums alone favour old tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowbit.kv.attend import MOST_SCORES, hide
from hf_lowbit.kv.settings import CacheSettings

# Queries counted of a prompt: all of them up to EXACT, then about SAMPLE of them, and from LONG on the last WINDOW.
EXACT, LONG, SAMPLE, WINDOW = 512, 8192, 256, 64
# What a token that is important already is worth more than one that would take its place.
HYSTERESIS = 1.1


def observed(tokens: int, settings: CacheSettings) -> range:
    """Which of ``tokens`` queries of a prompt are counted."""
    mode = settings.importance
    if mode == "auto":
        mode = "exact" if tokens <= EXACT else "strided" if tokens <= LONG else "window"
    if mode == "keys":
        return range(0)
    if mode == "window":
        return range(max(0, tokens - WINDOW), tokens)
    step = 1 if mode == "exact" else -(-tokens // SAMPLE)
    return range((tokens - 1) % step, tokens, step)


def column_sums(
    queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, chosen: range, decay: float = 1.0
) -> Tensor:
    """Attention each token of a prompt without a past gets from the chosen queries, averaged over the heads of a group.

    Args:
        queries: ``[batch, heads, group, tokens, dim]``.
        keys: ``[batch, heads, tokens, dim]``.
        mask: as for :func:`~hf_lowbit.kv.attend.attend`.
        decay: a query ``n`` before the last one counts ``decay**n``.

    Returns:
        float32 ``[batch, heads, tokens]``.
    """
    batch, heads, group, tokens, dim = queries.shape
    wide = keys.float().transpose(-1, -2)
    out = torch.zeros(batch, heads, tokens, device=keys.device)
    step = max(1, MOST_SCORES // (batch * heads * group * tokens))
    for first in range(0, len(chosen), step):
        part = torch.tensor(chosen[first : first + step], device=keys.device)
        scores = queries[:, :, :, part].float().reshape(batch, heads, -1, dim) @ wide
        scores.mul_(scale)
        if mask is None:
            later = torch.arange(tokens, device=keys.device) > part.repeat(group)[:, None]
            scores.masked_fill_(later, -torch.inf)
        else:
            hide(scores, mask[:, :, part], 0, len(part), tokens, slice(0, group * len(part)))
        seen = scores.softmax(-1).nan_to_num_(0)  # queries of padding see nothing
        out += (seen * decay ** (tokens - 1 - part).repeat(group)[:, None]).sum(2) / group
    return out


def counts(positions: Tensor, ranges: Sequence[range], decay: float = 1.0) -> Tensor:
    """How much the counted queries that could see each position (int64 of any shape) weigh together, float32.

    The last query of all weighs 1, one ``n`` tokens before it ``decay**n``.
    """
    total = torch.zeros(positions.shape, device=positions.device)
    for found in ranges:
        passed = (positions - found.start).clamp_min_(0).add_(found.step - 1) // found.step
        seen = (len(found) - passed).clamp_min_(0)
        step = decay**found.step
        weight = seen if step == 1 else (1 - step**seen) / (1 - step)
        total += weight * decay ** (ranges[-1][-1] - found[-1])
    return total


def from_keys(keys: Tensor) -> Tensor:
    """Importance ``[batch, heads, n]`` where no queries are known: how far a key points away from the mean one (KeyDiff)."""
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    mean = torch.nn.functional.normalize(unit.mean(2, keepdim=True), dim=-1)
    return 1 - (unit * mean).sum(-1)
