"""Finds and opens the compiled CPU kernels: a shared library with a plain C ABI, beside this file.

Nothing is opened on import; :func:`library` opens it once, on first use. A library that is missing or of another ABI
version is not used, and :func:`trouble` says why. ``HF_LOWBIT_CPU_ISA`` (``portable``, ``avx2``, ``avx512``)
forces a lower instruction set than the best one.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

ABI_VERSION = 4
LIBRARY_FILE = Path(__file__).with_name("_lowbit_cpu.so")
REBUILD = "Install hf-lowbit again where a C++17 compiler is present (in a checkout: pip install -e .)."


class StageSource(ctypes.Structure):
    """``LowbitStageSource`` of ``cpu/lowbit_cpu.h``."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "scale", "scale_super", "offset", "offset_super", "levels")),
        *((name, c_void_p) for name in ("table_of_row", "row_ids", "zero")),
        *((name, c_int32) for name in ("rows", "bits", "group_size", "scale_bits", "tables", "per_super")),
    )


class Source(ctypes.Structure):
    """``LowbitSource`` of ``cpu/lowbit_cpu.h``."""

    _fields_ = (
        ("stages", POINTER(StageSource)),
        *((name, c_void_p) for name in ("permutation", "outlier_values", "outlier_columns", "outlier_starts")),
        *((name, c_void_p) for name in ("low_rank_a", "low_rank_b")),
        *((name, c_int32) for name in ("rows", "columns", "stage_count", "outliers", "rank", "shift")),
    )


_SIGNATURES = {
    "lowbit_isa": (c_char_p,),
    "lowbit_isas": (c_char_p,),
    "lowbit_set_isa": (c_int32, c_char_p),
    "lowbit_prepared_bytes": (c_int64, POINTER(Source)),
    "lowbit_prepare": (c_int32, POINTER(Source), c_void_p, c_int64, c_int32),
    "lowbit_auto_mode": (c_int32, c_void_p),
    "lowbit_columns": (c_int32, c_void_p, c_int64, c_int64),
    "lowbit_linear": (
        c_int32, c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_int32,
    ),
    "lowbit_linear_codes": (c_int32, c_void_p, c_int64, c_void_p, c_int64, c_int32, c_void_p, c_int32),
    "lowbit_rows": (c_int32, c_void_p, c_int64, c_void_p, c_int64, c_int32, c_void_p, c_int32),
    "lowbit_layer": (c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "lowbit_layer_start": (c_int32, c_void_p, c_void_p, c_void_p, c_void_p),
    "lowbit_layer_finish": (c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "lowbit_layer_output": (c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
    "lowbit_kv_attend": (c_int32, c_void_p),
    "lowbit_kv_round": (
        c_int32, c_void_p, c_int32, c_int64, c_int64, c_int32, c_void_p, c_void_p, c_int64, c_int64,
    ),
}  # fmt: skip


def open_library(path: Path) -> ctypes.CDLL | str:
    """The library at ``path`` with its signatures, or why it cannot be used."""
    if not path.is_file():
        return f"the compiled kernels are not here ({path.name}): no working C++ compiler was found at install. {REBUILD}"
    try:
        found = ctypes.CDLL(str(path))
        version = found.lowbit_abi_version()
    except (OSError, AttributeError) as error:
        return f"the compiled kernels do not load ({error}). {REBUILD}"
    if version != ABI_VERSION:
        return f"the compiled kernels have ABI version {version}, this package needs {ABI_VERSION}. {REBUILD}"
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


@lru_cache(maxsize=1)
def _opened() -> ctypes.CDLL | str:
    return open_library(LIBRARY_FILE)


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be used."""
    found = _opened()
    return None if isinstance(found, str) else found


def trouble() -> str | None:
    """Why the compiled kernels cannot be used, or None where they can."""
    found = _opened()
    return found if isinstance(found, str) else None


def instruction_sets() -> list[str]:
    """Instruction sets this build holds and this processor can run, best first; empty without a library."""
    found = library()
    return found.lowbit_isas().decode().split() if found else []


def instruction_set() -> str | None:
    """The instruction set in use, or None without a library."""
    found = library()
    return found.lowbit_isa().decode() if found else None
