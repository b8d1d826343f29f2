"""A cache as a safetensors file: the tensors as they are, settings and counts in the header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_lowbit.errors import BadRequest, FormatError
from hf_lowbit.kv.center import Center
from hf_lowbit.kv.layer import LowBitLayer
from hf_lowbit.kv.rows import RowStore

if TYPE_CHECKING:
    from hf_lowbit.kv.cache import LowBitCache

KEY = "hf_lowbit_kv_cache"
VERSION = 1
# What must be the same of two configs for a cache of one to serve the other.
SAME = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def fingerprint(config: Any) -> dict[str, Any]:
    """The fields of a config that shape its cache."""
    return {name: getattr(config, name, None) for name in SAME}


def save(cache: LowBitCache, path: Path) -> Path:
    """Write a cache; the file appears whole or not at all.

    Raises:
        BadRequest: layers that are not packed, whose state only the host knows, or tokens no attention has seen yet.
    """
    if cache.fallbacks:
        kinds = ", ".join(sorted(set(cache.fallbacks.values())))
        raise BadRequest(
            f"only caches of full attention can be saved; layers {sorted(cache.fallbacks)} are stock ({kinds})."
        )
    tensors: dict[str, Tensor] = {}
    layers = []
    for number, layer in cache.low_bit_layers().items():
        layers.append(_state(layer, f"{number}.", tensors))
    record = {"version": VERSION, "settings": cache.settings.to_json(), "model": fingerprint(cache.config), "layers": layers}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata={KEY: json.dumps(record)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load(path: Path, config: Any, device: torch.device) -> LowBitCache:
    """Inverse of :func:`save`."""
    from hf_lowbit.kv.cache import LowBitCache

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} cannot be read as a saved cache ({error}).") from error
    if text is None:
        raise FormatError(f"{path} is no cache saved by LowBitCache.save: its header lacks {KEY!r}.")
    record = json.loads(text)
    if record["version"] > VERSION:
        raise FormatError(
            f"{path} has cache format {record['version']}, this package reads up to {VERSION}. Upgrade hf-lowbit."
        )
    cache = LowBitCache(config, **record["settings"])
    ours = fingerprint(cache.config)
    if ours != record["model"]:
        differ = [f"{name} {record['model'].get(name)!r} instead of {value!r}" for name, value in ours.items()
                  if record["model"].get(name) != value]  # fmt: skip
        raise FormatError(f"{path} is the cache of another model: {'; '.join(differ)}.")
    try:
        for number, layer in cache.low_bit_layers().items():
            _restore(layer, record["layers"][number], f"{number}.", tensors, device)
    except (KeyError, IndexError) as error:
        raise FormatError(f"{path} is incomplete: {error} is missing.") from error
    return cache


def _state(layer: LowBitLayer, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put a layer's tensors under ``prefix``; returns what else there is to know."""
    layer.store_pending()
    held = layer.held
    for name, part in (("kept", held.kept), ("recent", held.recent)):
        tensors.update(
            {f"{prefix}{name}.{key}": tensor.contiguous() for key, tensor in part.filled().items() if part.length}
        )
    for number, tier in enumerate(held.tiers):
        found = tier.tensors if not hasattr(tier, "store") else tier.store.filled()
        tensors.update({f"{prefix}tier{number}.{key}": tensor.contiguous() for key, tensor in found.items() if tier.length})
    beside = {"starts": held.starts, "balance": held.frame.balance}
    beside |= {f"center.{name}": tensor for name, tensor in layer.center.tensors().items()}
    tensors.update({prefix + name: tensor.contiguous() for name, tensor in beside.items() if tensor is not None})
    return {
        "shape": list(layer.shape),
        "dtype": str(layer.dtype),
        "frozen": held.frozen,
        "solid": held.solid,
        "observed": [[found.start, found.stop, found.step] for found in held.observed],
        "moves": [list(move) for move in held.moves],
    }


def _restore(
    layer: LowBitLayer, known: dict[str, Any], prefix: str, tensors: dict[str, Tensor], device: torch.device
) -> None:
    batch, heads, length, dim = known["shape"]
    if not length:
        return
    like = torch.empty(batch, heads, 0, dim, dtype=DTYPES[known["dtype"]], device=device)
    layer.lazy_initialization(like, like)
    held = layer.held

    def under(name: str) -> dict[str, Tensor]:
        start = f"{prefix}{name}."
        return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}

    for name in ("kept", "recent"):
        if found := under(name):
            store = getattr(held, name)
            setattr(held, name, RowStore(store.bits, store.dtype, found, store.endless))
    for number, tier in enumerate(held.tiers):
        if found := under(f"tier{number}"):
            if hasattr(tier, "store"):
                tier.store = RowStore(8, layer.dtype, found)
            else:
                tier.tensors = found
    layer.center = Center(**under("center"))
    held.starts, held.frame.balance = tensors.get(prefix + "starts"), tensors.get(prefix + "balance")
    held.frozen, held.observed = known["frozen"], [range(*found) for found in known["observed"]]
    held.moves = [(int(a), int(b), int(c)) for a, b, c in known["moves"]]
    if held.stored != length:
        raise KeyError(f"{length - held.stored} tokens of layer {prefix[:-1]}")
    held.length, held.solid = length, known["solid"]
