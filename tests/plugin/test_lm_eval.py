"""The stock lm_eval command line opens a quantized checkpoint, which it can only do by finding the plugin itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'hf-lowbit[eval]'")


@pytest.fixture
def task(tmp_path: Path, load_test_module) -> Path:
    """A folder of tasks whose data lie beside them."""
    return load_test_module("plugin/task_files.py").write_tasks(tmp_path / "tasks")


def run_lm_eval(checkpoint: Path, task: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", "tiny_choice", "--include_path", str(task), "--output_path", str(task / "out.json")]
    return subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments],
        env=environment, capture_output=True, text=True, timeout=280, check=False, cwd=task,
    )  # fmt: skip


def test_the_stock_command_line_finds_the_method(quantized, task, offline):
    done = run_lm_eval(quantized, task, offline)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tiny_choice" in done.stdout
    (found,) = task.glob("**/out*.json")
    assert json.loads(found.read_text())["results"]["tiny_choice"]["acc,none"] == 1.0


@pytest.mark.slow
def test_without_autoload_it_says_that_it_does_not_know_the_method(quantized, task, offline):
    done = run_lm_eval(quantized, task, offline | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert done.returncode != 0
    assert "hf_lowbit" in done.stderr
