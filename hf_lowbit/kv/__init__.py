"""The mixed-precision KV cache and the attention that reads it; names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lowbit.kv.cache import LowBitCache
    from hf_lowbit.kv.settings import CacheSettings

_PLACES = {"LowBitCache": "cache", "CacheSettings": "settings"}
__all__ = ["CacheSettings", "LowBitCache"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"hf_lowbit.kv.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'hf_lowbit.kv' has no attribute {name!r}")
