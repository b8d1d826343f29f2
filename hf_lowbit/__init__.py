"""hf-lowbit: make, load, run, measure and share low-bit language models through Transformers' ``from_pretrained``.

Importing this package registers the quantization method ``hf_lowbit`` and does nothing else; names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_lowbit._version import __version__
from hf_lowbit.autoload import autoload

if TYPE_CHECKING:
    from hf_lowbit.kv import LowBitCache
    from hf_lowbit.plugin import LowBitConfig, LowBitLinear, explain, quantize
    from hf_lowbit.plugin.detector import SpotDetector

_HOMES = dict.fromkeys(("LowBitConfig", "LowBitLinear", "explain", "quantize"), "hf_lowbit.plugin")
_HOMES |= {"LowBitCache": "hf_lowbit.kv", "SpotDetector": "hf_lowbit.plugin.detector"}
__all__ = ["LowBitCache", "LowBitConfig", "LowBitLinear", "SpotDetector", "__version__", "explain", "quantize"]

autoload()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hf_lowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
