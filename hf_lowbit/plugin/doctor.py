"""What this machine has and what works here, for ``hf-lowbit doctor`` and bug reports."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import torch

from hf_lowbit.format.serialize import FORMAT_VERSION
from hf_lowbit.kernels import backends, cpu_library, triton_backend
from hf_lowbit.plugin.config import QUANT_METHOD
from hf_lowbit.solvers import SOLVERS, Solver
from hf_lowbit.transforms import TRANSFORMS, Transform


def examine() -> dict[str, dict[str, Any]]:
    """Sections of name -> finding; nothing is built, downloaded or changed."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    found = any(point.value.startswith("hf_lowbit.") for point in entry_points(group="torch.backends"))
    switch = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    return {
        "versions": {name: _version(name) for name in ("hf-lowbit", "torch", "transformers", "accelerate", "lm_eval")}
        | {"python": sys.version.split()[0], "format": FORMAT_VERSION},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "cpu capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        },
        "cpu kernels": {
            "library": cpu_library.trouble() or "built",
            "instruction set": cpu_library.instruction_set() or "none",
            "instruction sets here": ", ".join(cpu_library.instruction_sets()) or "none",
        },
        "gpu kernels": {"triton": triton_backend.trouble(torch.device("cuda")) or "ready"},
        "registration": {
            "transformers": "registered" if QUANT_METHOD in AUTO_QUANTIZER_MAPPING else "NOT registered",
            "found without import": f"off: TORCH_DEVICE_BACKEND_AUTOLOAD={switch}"
            if switch != "1"
            else "yes"
            if found
            else "no: not installed with pip, so say `import hf_lowbit` first",
        },
        "backends, fastest first": {backend.name: type(backend).__doc__ for backend in backends()},
        "methods": {name: _described(SOLVERS[name]) for name in sorted(SOLVERS)},
        "transforms": {name: _needing(TRANSFORMS[name]) for name in sorted(TRANSFORMS)},
        "options of calibrated methods": {
            name: ", ".join(f"{key}={value}" for key, value in SOLVERS[name].options.items())
            for name in sorted(SOLVERS)
            if SOLVERS[name].options
        },
    }


def _described(entry: Solver) -> str:
    needs = "" if entry.optional else " (needs calibration data)"
    return entry.summary + needs


def _needing(entry: Transform) -> str:
    needs = {"none": "", "helped": " (calibration data helps)"}.get(entry.needs, " (needs calibration data)")
    settings = ", ".join(f"{key}={value}" for key, value in entry.options.items())
    return entry.summary + needs + (f"; {settings}" if settings else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
