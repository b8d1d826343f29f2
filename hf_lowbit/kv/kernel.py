"""Decoding through the compiled kernel: which layers it serves, and their tensors as it takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hf_lowbit.kernels import cpu, cpu_cache
from hf_lowbit.kv.blocks import level_table
from hf_lowbit.kv.rows import RowStore
from hf_lowbit.kv.tiers import BlockTier

if TYPE_CHECKING:
    from hf_lowbit.kv.holdings import Holdings


def refusal(held: Holdings) -> str | None:
    """Why the kernel does not serve a layer of the cache, or None."""
    dim = held.dim
    if held.device.type != "cpu":
        return f"the cache is on {held.device.type}"
    if held.settings.hadamard:
        return "hadamard=True"
    if held.settings.group not in (None, dim) and "token" in (held.settings.key_format, held.settings.value_format):
        return f"group={held.settings.group} is not the whole head"
    if held.dtype not in cpu.DTYPES:
        return f"dtype {held.dtype}"
    if len(held.tiers) > cpu_cache.MOST_BLOCKS:
        return f"{len(held.tiers)} lower tiers"
    return cpu_cache.trouble(dim)


def attend(held: Holdings, queries: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Attention of tokens that are stored already.

    Args:
        queries: ``[batch, heads of keys, group, n, dim]``.
        mask: bool or float ``[1 or batch, 1, n, length]``, or None.

    Returns:
        Output float32 ``[batch, n, heads, dim]``, and where scores are kept weights of the rows ``[batch, heads, n, rows]``.
    """
    batch, heads, group, tokens, dim = queries.shape
    wanted = bool(held.tiers)
    flat = queries.flatten(1, 2).float()
    if flat.stride(3) != 1:
        flat = flat.contiguous()
    turned = flat
    if held.frame.balance is not None:
        turned = held.frame.queries(flat.reshape(batch, heads, group * tokens, dim)).view(batch, heads * group, tokens, dim)
    tensors: list[Tensor] = []
    rows, blocks = [], []
    for part in (held.kept, held.recent):
        if part.length:
            rows += _rows(part, tensors, held.older if part is held.recent else 0, low=False)
    for tier in held.tiers:
        if tier.tensors and not isinstance(tier, BlockTier):
            rows += _rows(tier.store, tensors, 0, low=True)
    for tier in held.tiers:
        if tier.tensors and isinstance(tier, BlockTier):
            blocks += _blocks(tier, tensors)
    if mask is not None:
        mask = mask.expand(batch, 1, tokens, held.length)
    layout = [
        heads,
        held.length,
        len(rows) // len(cpu_cache.ROW_FIELDS),
        len(blocks) // len(cpu_cache.BLOCK_FIELDS),
        *rows,
        *blocks,
    ]
    out, weights = cpu_cache.attend(flat, turned, tensors, layout, mask, scale, wanted)
    return out, weights if wanted else None


def _rows(part: RowStore, tensors: list[Tensor], first: int, low: bool) -> list[int]:
    held = part.tensors
    tensors += [held["key"], held["value"]]
    if part.bits == 8:
        tensors += [held["key_scale"], held["value_scale"]]
    positions = held.get("position")
    if positions is not None:
        tensors.append(positions)
    kind = cpu_cache.INT8 if part.bits == 8 else cpu.DTYPES[part.dtype]
    return [kind, part.length, first, int(low), int(positions is not None)]


def _blocks(tier: BlockTier, tensors: list[Tensor]) -> list[int]:
    (_, key_bits, keys_by_channel), (_, value_bits, values_by_channel) = tier.sides()
    for name in ("key", "value"):
        tensors += [tier.tensors[name], tier.tensors[f"{name}_scale"], tier.tensors[f"{name}_offset"]]
    levels = tier.settings.levels
    tensors += [tier.tensors["position"], level_table(levels, key_bits), level_table(levels, value_bits)]
    return [key_bits, value_bits, int(keys_by_channel), int(values_by_channel)]
