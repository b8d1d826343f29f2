"""Decoding through a kernel: which one serves a layer on its device, and its tensors as the kernel takes them."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lowbit.kernels import cpu, cpu_cache, packed_cache, triton_cache
from hf_lowbit.kernels.packed_cache import Blocks, Parts, Rows
from hf_lowbit.kv.blocks import level_table
from hf_lowbit.kv.rows import RowStore
from hf_lowbit.kv.tiers import BlockTier

if TYPE_CHECKING:
    from hf_lowbit.kv.holdings import Holdings

# Type of a device -> the module with its kernel: ``attend``, ``levels`` and ``trouble``.
KERNELS: dict[str, ModuleType] = {"cpu": cpu_cache, "cuda": triton_cache}


def refusal(held: Holdings) -> str | None:
    """Why no kernel serves a layer of the cache, or None."""
    kernel = KERNELS.get(held.device.type)
    if kernel is None:
        return f"the cache is on {held.device.type}"
    if held.settings.hadamard:
        return "hadamard=True"
    if held.settings.group not in (None, held.dim) and "token" in (held.settings.key_format, held.settings.value_format):
        return f"group={held.settings.group} is not the whole head"
    if held.dtype not in cpu.DTYPES:
        return f"dtype {held.dtype}"
    if len(held.tiers) > packed_cache.MOST_BLOCKS:
        return f"{len(held.tiers)} lower tiers"
    return kernel.trouble(held.device, held.dim)


def attend(held: Holdings, queries: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Attention of tokens that are stored already.

    Args:
        queries: ``[batch, heads of keys, group, n, dim]``.
        mask: bool or float ``[1 or batch, 1, n, length]``, or None.

    Returns:
        Output float32 ``[batch, n, heads, dim]``, and where scores are kept weights of the rows ``[batch, heads, n, rows]``.
    """
    batch, heads, group, tokens, dim = queries.shape
    flat = queries.flatten(1, 2).float()
    if flat.stride(3) != 1:
        flat = flat.contiguous()
    turned = flat
    if held.frame.balance is not None:
        turned = held.frame.queries(flat.reshape(batch, heads, group * tokens, dim)).view(batch, heads * group, tokens, dim)
    kernel = KERNELS[held.device.type]
    rows = [_rows(part, held.older if part is held.recent else 0) for part in (held.kept, held.recent) if part.length]
    filled = [tier for tier in held.tiers if tier.tensors]
    rows += [_rows(tier.store, 0)._replace(low=True) for tier in filled if not isinstance(tier, BlockTier)]
    blocks = [_blocks(tier, kernel) for tier in filled if isinstance(tier, BlockTier)]
    if mask is not None:
        mask = mask.expand(batch, 1, tokens, held.length)
    tensors, layout = packed_cache.flatten(Parts(heads, held.length, tuple(rows), tuple(blocks)))
    wanted = bool(held.tiers)
    out, weights = kernel.attend(flat, turned, tensors, layout, mask, scale, wanted)
    return out, weights if wanted else None


def _rows(part: RowStore, first: int) -> Rows:
    held = part.tensors
    scales = held.get("key_scale"), held.get("value_scale")
    return Rows(held["key"], held["value"], *scales, held.get("position"), part.length, first, False)


def _blocks(tier: BlockTier, kernel: ModuleType) -> Blocks:
    (_, key_bits, keys), (_, value_bits, values) = tier.sides()
    held = tier.tensors
    tables = [_levels(kernel, tier.settings.levels, bits, held["key"].device) for bits in (key_bits, value_bits)]
    return Blocks(
        held["key"], held["key_scale"], held["key_offset"], held["value"], held["value_scale"], held["value_offset"],
        held["position"], tables[0], tables[1], key_bits, value_bits, keys, values,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _levels(kernel: ModuleType, levels: str, bits: int, device: torch.device) -> Tensor:
    return kernel.levels(level_table(levels, bits)).to(device)
