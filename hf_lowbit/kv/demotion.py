"""Moving tokens down: who loses precision when the important ones are too many.

Tokens move only at the start of an update, when those before it are certain: what ``crop`` takes back has left no trace.
Packed tokens stay as they are for good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.kernels.packed_cache import BLOCK
from hf_lowbit.kv import importance
from hf_lowbit.kv.holdings import Holdings
from hf_lowbit.kv.rows import RowStore, gather, joined
from hf_lowbit.kv.tiers import BlockTier, RowTier

# Blocks quantized at a time.
BATCH = 16
# Tokens beyond the tail that move over to the important ones together.
RIPE = 16


def count_pending(held: Holdings) -> None:
    """Add the weights that the last tokens gave to the scores: these tokens are certain now."""
    if held.pending is None:
        return
    tokens = held.pending.shape[2]
    ages = torch.arange(tokens - 1, -1, -1, device=held.device)
    faded = held.settings.decay**ages
    held.add_scores((held.pending * faded[:, None]).sum(2) if tokens > 1 else held.pending[:, :, 0], tokens)
    held.pending = None
    last = held.observed[-1] if held.observed else None
    if last is not None and last.step == 1 and last.stop == held.length - tokens:
        held.observed[-1] = range(last.start, held.length)
    else:
        held.observed.append(range(held.length - tokens, held.length))


def store(held: Holdings, keys: Tensor, values: Tensor, sums: Tensor | None) -> None:
    """Store a prompt ``[batch, heads, n, dim]`` that attention has seen.

    Args:
        sums: ``[batch, heads, n]``, what its tokens got of it, None where unknown.
    """
    tokens = keys.shape[2]
    if tokens <= held.settings.recent or not held.moving:
        held.append(keys, values)
        if sums is not None:
            held.recent.tensors["score"][:, :, held.recent.length - tokens : held.recent.length] += sums
        return
    count_pending(held)
    staged = RowStore(16, held.dtype, {"key": keys, "value": values})
    if held.counts:
        staged.tensors["score"] = keys.new_zeros(keys.shape[:3], dtype=torch.float32) if sums is None else sums
    settle(held, staged)


def settle(held: Holdings, staged: RowStore | None = None) -> None:
    """Move down what exceeds the share of important tokens, those of a ``staged`` prompt included."""
    count_pending(held)
    if not held.moving:
        return
    settings = held.settings
    total = held.kept.length + held.recent.length + (staged.length if staged else 0)
    over = total - settings.most_high(held.length)
    blocks = min(-(-over // BLOCK), (total - settings.recent - settings.sinks) // BLOCK) if held.tiers else 0
    if blocks > 0 or staged is not None:
        _divide(held, max(0, blocks), [held.kept, held.recent, *([staged] if staged else [])])
    elif held.recent.bits != held.kept.bits and held.recent.length >= settings.tail + RIPE:
        _keep_oldest(held, held.recent.length - settings.tail)


def _keep_oldest(held: Holdings, count: int) -> None:
    """Move the oldest of the newest tokens over to the important ones, where they may wait to be moved down."""
    old = {name: tensor[:, :, :count] for name, tensor in held.recent.filled().items()}
    beside = {"score": old["score"]} if held.counts else {}
    positions = held.positions(held.recent)[:, :, :count].to(held.position_dtype)
    if held.kept.length:
        held.kept.tensors["position"] = held.kept.tensors["position"].to(positions.dtype)
    held.kept.append(old["key"], old["value"], position=positions, **beside)
    rest = {name: tensor[:, :, count:] for name, tensor in held.recent.filled().items()}
    held.recent = RowStore(held.recent.bits, held.recent.dtype)
    held.recent.append_encoded(rest)


def _divide(held: Holdings, count: int, parts: list[RowStore]) -> None:
    """Share out all rows anew: the ``count * 64`` least important go to lower tiers, the newest stay recent."""
    parts = [part for part in parts if part.length]
    positions = torch.cat([held.positions(part) for part in parts], 2)
    total = positions.shape[2]
    stay = torch.ones_like(positions, dtype=torch.bool)
    if count:
        order = _rank(held, parts, positions).topk(count * BLOCK, 2, largest=False).indices
        stay.scatter_(2, order, False)
        _move_down(held, count, order, parts, positions)
    slots = torch.arange(total, device=held.device).expand_as(stay)[stay].unflatten(0, (*stay.shape[:2], -1))
    newest = min(held.settings.tail, slots.shape[2])
    cut = slots.shape[2] - newest
    kept, recent = slots[..., :cut], slots[..., cut:]
    moved = [_moved(parts, store, where) for store, where in ((held.kept, kept), (held.recent, recent))]
    moved[0]["position"] = positions.gather(2, kept).to(held.position_dtype)
    held.kept = RowStore(held.kept.bits, held.kept.dtype, moved[0], held.kept.endless)
    held.recent = RowStore(held.recent.bits, held.recent.dtype)
    held.recent.append_encoded(moved[1])
    if count:
        held.solid = min(held.solid, held.settings.recent)


def _rank(held: Holdings, parts: list[RowStore], positions: Tensor) -> Tensor:
    """Importance of rows ``[batch, heads, n]``; infinite for those that must stay or go."""
    if held.observed:
        scores = torch.cat([part.tensors["score"][:, :, : part.length] for part in parts], 2)
        rank = scores / importance.counts(positions, held.observed, held.settings.decay).clamp_min(1e-6)
    else:
        rank = importance.from_keys(torch.cat([part.dense()[0].float() for part in parts], 2))
    if parts[0] is held.kept:
        rank[:, :, : held.kept.length] *= importance.HYSTERESIS
    place = positions if held.starts is None else positions - held.starts[:, None, None]
    rank.masked_fill_(place < 0, -torch.inf)
    pinned = ((place >= 0) & (place < held.settings.sinks)) | (positions >= held.length - held.settings.recent)
    return rank.masked_fill_(pinned, torch.inf)


def _move_down(held: Holdings, count: int, order: Tensor, parts: list[RowStore], positions: Tensor) -> None:
    """Give the slots ``order`` (least important first) to the tiers whose share is least filled."""
    dense = [part.dense() for part in parts]
    keys, values = dense[0] if len(parts) == 1 else [torch.cat(side, 2) for side in zip(*dense, strict=True)]
    held.freeze(None, keys)
    wanted = _tiers_for(held, count)
    first = 0
    for tier in reversed(held.tiers):  # fewest bits first
        last = first + wanted.count(tier) * BLOCK
        slots = order[:, :, first:last].sort(2).values
        for at in range(0, slots.shape[2], BATCH * BLOCK):
            part = slots[:, :, at : at + BATCH * BLOCK]
            rows = gather({"key": keys, "value": values, "position": positions}, part)
            stored = held.frame.keys(rows["key"]), held.frame.rotated(rows["value"].float())
            tier.append(*stored, rows["position"].to(held.position_dtype))
        if last > first:
            held.moves.append((held.length, tier.tier.key_bits, last - first))
        first = last


def _tiers_for(held: Holdings, count: int) -> list[BlockTier | RowTier]:
    lengths = {id(tier): float(tier.length) for tier in held.tiers}
    out = []
    for _ in range(count):
        tier = min(held.tiers, key=lambda tier: lengths[id(tier)] / tier.tier.share)
        lengths[id(tier)] += BLOCK
        out.append(tier)
    return out


def _moved(parts: list[RowStore], store: RowStore, slots: Tensor) -> dict[str, Tensor]:
    """Slots of all parts as ``store`` holds rows; codes are copied where they are of its kind."""
    if all(part.bits == store.bits and part.dtype == store.dtype for part in parts):
        found = [{name: tensor for name, tensor in part.filled().items() if name != "position"} for part in parts]
        return gather(joined(found), slots)
    dense = [part.dense() for part in parts]
    keys, values = (torch.cat(side, 2) for side in zip(*dense, strict=True))
    rows = gather({"key": keys, "value": values}, slots)
    new = store.encoded(rows["key"], rows["value"])
    if "score" in parts[0].tensors:
        score = torch.cat([part.tensors["score"][:, :, : part.length] for part in parts], 2)
        new["score"] = score.gather(2, slots)
    return new
