"""What the plugin's tests share: a quantized checkpoint, and an environment for offline child processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_lowbit import demo
from hf_lowbit.plugin.checkpoint import quantize_checkpoint
from hf_lowbit.plugin.config import LowBitConfig


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at 4 bits, by the fastest method: read it, never write to it."""
    target = tmp_path_factory.mktemp("quantized") / "rtn-4"
    quantize_checkpoint(str(demo.embedded_model()), target, LowBitConfig(method="rtn"))
    return target


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment for a child process that must not reach the network nor the user's caches."""
    home = str(tmp_path_factory.mktemp("hf_home"))
    found = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    return {**found, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
