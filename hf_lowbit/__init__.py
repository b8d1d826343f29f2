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

_PLACES = {name: "hf_lowbit.plugin" for name in ("LowBitConfig", "LowBitLinear", "explain", "quantize")}
_PLACES["LowBitCache"] = "hf_lowbit.kv"
__all__ = ["LowBitCache", "LowBitConfig", "LowBitLinear", "__version__", "explain", "quantize"]

autoload()


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'hf_lowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
