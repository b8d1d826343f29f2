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

# Every switch of every kernel, at a width that is permuted and one that is looked up.
SWITCHES = """
from hf_lowbit.format import Layout, Levels, Stage
from hf_lowbit.kernels.triton_gemm import gemm_kernel
from hf_lowbit.kernels.triton_gemv import gemv_kernel
from hf_lowbit.kernels.triton_rows import finish_kernel, outlier_kernel, rows_kernel
import gpu_static as static
for bits in (3, 8):
    for offset, tables, rows in ((False, 64, None), (True, 1, 9), (True, 64, 9)):
        stage = Stage(Levels("fitted", bits), 32, 6, offset, tables, tables > 1, rows)
        plan = static.plan(Layout((64, 256), (stage,)).dumps()).stages[0]
        for batch, kernel, switches in ((1, gemv_kernel, {"EXPERTS": True, "BIAS": True}), (3, gemm_kernel, {"BIAS": True}),
                                        (1, rows_kernel, {"PICK": False}), (1, rows_kernel, {})):
            config = static.choose(plan, 256, batch, "a card nobody tuned", 132)
            static.compiled(kernel, plan, config, 80, **switches)
            print(kernel.__name__, bits, offset, tables, rows)
for kernel in (outlier_kernel, finish_kernel):
    static.compiled(kernel, plan, config, 80, BIAS=True)
    print(kernel.__name__)
"""


# The packed cache, with every switch of both kernels, and the widest heads and most queries they take.
CACHE = """
import json, sys
import gpu_static as static
for bits in json.loads(sys.argv[1]):
    for switches in ({}, {"KEYS_BY_CHANNEL": False, "VALUES_BY_CHANNEL": True, "MASK": 1, "POSITIONS": False, "RAW": False},
                     {"MASK": 2, "CAUSAL": True, "queries": 64, "dim": 256}):
        found = static.counted(static.compiled_cache(bits, 80, **switches), 128)
        print(json.dumps([bits, found]))
"""


def compiled(cases: list[tuple[int, int, int]], cache: Path) -> list[dict]:
    """What ``eval/gpu_static.py`` finds for (bits, batch, capability)."""
    return [json.loads(line)[3] for line in compile_apart(cache, CODE, json.dumps(cases))]


def compile_apart(cache: Path, code: str, *arguments: str) -> list[str]:
    """Lines that a process with Triton's compiler prints."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(EVAL), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_usual_kernels_compile_and_stay_in_registers(tmp_path):
    one, many = compiled([(4, 1, 90), (4, 16, 80)], tmp_path)
    for found in (one, many):
        assert found["spilled_bytes"] == 0
    # Levels come from permutations: no look-up in memory, and a sum in each thread before any exchange between threads.
    assert one["by_kind"]["PRMT"] > 2 and one["instructions"] < 8
    assert many["instructions"] < 11


@pytest.mark.parametrize("bits", [pytest.param([2, 4, 16], marks=pytest.mark.slow), [3, 8]], ids=str)
def test_the_kernels_of_the_cache_compile_and_stay_in_registers(bits, tmp_path):
    found = [json.loads(line) for line in compile_apart(tmp_path, CACHE, json.dumps(bits))]
    assert len(found) == 3 * len(bits)
    for bits, one in found:
        assert one["spilled_bytes"] == 0, bits


@pytest.mark.slow
def test_every_kernel_compiles_with_every_switch(tmp_path):
    assert len(compile_apart(tmp_path, SWITCHES)) == 26


@pytest.mark.slow
def test_all_widths_compile_for_every_capability(tmp_path):
    cases = [(bits, batch, capability) for capability in (80, 90) for bits in range(1, 9) for batch in (1, 16, 512)]
    for case, found in zip(cases, compiled(cases, tmp_path), strict=True):
        assert found["spilled_bytes"] <= 64, case
