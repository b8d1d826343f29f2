"""Whatever moment a run is killed at: see killed.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_whatever_moment_a_run_is_killed_at(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, moments = map(int, done.stdout.split())
    assert steps >= 30 and moments >= 10
