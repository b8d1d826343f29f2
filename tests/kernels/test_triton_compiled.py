"""The kernels through Triton's compiler for real cards, without one: what the interpreter accepts need not compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EVAL = Path(__file__).parents[2] / "eval"
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
# In a process of its own: this one's Triton may be the interpreter.
CODE = """
import json, sys
from hf_lowbit.kernels.triton_gemm import gemm_kernel
from hf_lowbit.kernels.triton_gemv import gemv_kernel
import gpu_static as static
for bits, batch, capability in json.loads(sys.argv[1]):
    stage = static.plan(static.layout(bits).dumps()).stages[0]
    config = static.choose(stage, static.SHAPE[1], batch, "a card nobody tuned", 132)
    found = static.examine(gemv_kernel if batch == 1 else gemm_kernel, stage, config, capability)
    print(json.dumps([bits, batch, capability, found]))
"""


def compiled(cases: list[tuple[int, int, int]], cache: Path) -> list[dict]:
    """What ``eval/gpu_static.py`` finds for (bits, batch, capability)."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(EVAL), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", CODE, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line)[3] for line in done.stdout.splitlines()]


def test_the_usual_kernels_compile_and_stay_in_registers(tmp_path):
    one, many = compiled([(4, 1, 90), (4, 16, 80)], tmp_path)
    for found in (one, many):
        assert found["spilled_bytes"] == 0
    # Levels come from permutations: no look-up in memory, and a sum in each thread before any exchange between threads.
    assert one["by_kind"]["PRMT"] > 2 and one["instructions_a_weight"] < 8
    assert many["instructions_a_weight"] < 11


@pytest.mark.slow
def test_all_widths_compile_for_every_capability(tmp_path):
    cases = [(bits, batch, capability) for capability in (80, 90) for bits in range(1, 9) for batch in (1, 16, 512)]
    for case, found in zip(cases, compiled(cases, tmp_path), strict=True):
        assert found["spilled_bytes"] <= 64, case
