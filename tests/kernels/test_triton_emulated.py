"""The compiled kernels, number by number, without a GPU: the tests of the kernels once more, on the PTX that Triton makes.

What the interpreter accepts the compiler may refuse or understand differently: byte permutations, pairs of 16-bit floats,
tensor core products and their layouts exist only here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@pytest.mark.parametrize(
    ("file", "chosen", "least"),
    [("kernels/test_triton.py", "not TestSelection", 30), ("kv/test_kernel.py", "triton", 11)],
    ids=["matrices", "cache"],
)
def test_the_tests_of_the_kernels_hold_for_compiled_code(file, chosen, least):
    environment = os.environ | {"EMULATE_PTX": "1", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "-k",
        chosen,
        str(TESTS / file),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least
