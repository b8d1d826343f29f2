"""Notebooks run from top to bottom, offline, and hold no output of anybody's machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

# What the cells of a notebook must have said, by its name.
EXPECTED = {
    "detect": ["machine - at most", "another detector"],
    "03_long_context": ["the same tokens", "more bits, less divergence", "639 tokens read back"],
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
    assert EXPECTED[path.stem]
    for words in EXPECTED[path.stem]:
        assert words in text
