"""Notebooks run from top to bottom, offline, and hold no output of anybody's machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

# What the outputs of each notebook must hold; one without an entry fails.
EXPECTED = {
    "01_load_and_generate": ["the same logits, bit for bit: True", "times smaller", "bits per weight", "Linear torch."],
    "02_choose_bits_and_read_the_report": ["peak", "2 bits, down_proj 4:", "written to", "Bits and error by block"],
    "03_long_context": ["the same tokens", "more bits, less divergence", "639 tokens read back"],
    "04_finetune_on_two_bits": ["of the gap closed", "merged, keep", "merged, resolve", "merged, dense"],
    "05_who_wrote_this": ["machine - at most", "another detector"],
}
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_output(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="needs nbclient, as pip install -e '.[dev]' brings")
def test_it_runs(path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    text = "".join(str(cell.get("outputs")) for cell in notebook.cells)
    assert [wanted for wanted in EXPECTED[path.stem] if wanted not in text] == []
