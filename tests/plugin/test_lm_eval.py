"""The stock lm_eval command line opens a quantized checkpoint, which it can only do by finding the plugin itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'hf-lowbit[eval]'")

# The end that English has against one it does not: any trained model is right, one with random weights is not.
ROWS = [
    {"q": "He went to the", "choices": [" house", " were"], "gold": 0},
    {"q": "She said that she would", "choices": [" of", " be"], "gold": 1},
    {"q": "There was a great deal of", "choices": [" went", " money"], "gold": 1},
    {"q": "It was one of the", "choices": [" most", " him"], "gold": 0},
    {"q": "I do not know what", "choices": [" and", " you"], "gold": 1},
    {"q": "They looked at each", "choices": [" other", " had"], "gold": 0},
]
TASK = """
task: local_ends
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0.1}}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with one task whose data lie beside it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local_ends.yaml").write_text(TASK.format(rows=rows))
    return folder


def run_lm_eval(checkpoint: Path, task: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", "local_ends", "--include_path", str(task), "--output_path", str(task / "out.json")]
    return subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments],
        env=environment, capture_output=True, text=True, timeout=280, check=False, cwd=task,
    )  # fmt: skip


def test_the_stock_command_line_finds_the_method(quantized, task, offline):
    done = run_lm_eval(quantized, task, offline)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "local_ends" in done.stdout
    (found,) = task.glob("**/out*.json")
    assert json.loads(found.read_text())["results"]["local_ends"]["acc,none"] == 1.0


@pytest.mark.slow
def test_without_autoload_it_says_that_it_does_not_know_the_method(quantized, task, offline):
    done = run_lm_eval(quantized, task, offline | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert done.returncode != 0
    assert "hf_lowbit" in done.stderr
