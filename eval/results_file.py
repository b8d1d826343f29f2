"""Writes one result of ``eval/`` with the command, the versions and the machine it came from."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def machine() -> str:
    """Processor, cores and vector width in a line."""
    try:
        names = {
            line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        }
    except OSError:
        names = {platform.processor() or platform.machine()}
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{', '.join(sorted(names))}; {torch.get_num_threads()} threads; {capability}"


def write(name: str, result: Any, sources: dict[str, str] | None = None) -> Path:
    """Write ``eval/results/NAME.json``; paths in ``sources`` are reduced to their last parts."""
    versions = {package: version(package) for package in ("hf-lowbit", "torch", "transformers", "safetensors")}
    content = {
        "command": " ".join([f"eval/{Path(sys.argv[0]).name}", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "versions": versions,
        "machine": machine(),
        "sources": sources or {},
        "result": result,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
