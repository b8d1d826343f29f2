"""A quantized checkpoint, one report about it, and what other commands say of the same."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from hf_lowbit import demo
from hf_lowbit.cli import main

SOURCE = str(demo.embedded_model())
TEXT = ["--text", str(demo.held_out_text()), "--characters", "2500", "--window", "128"]


def said(*arguments: str) -> dict:
    """What a command that succeeds prints with --json."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*arguments, "--json"]) == 0
    return json.loads(out.getvalue())


@pytest.fixture(scope="session")
def reported(tmp_path_factory) -> tuple[Path, dict, dict]:
    """The page, what the command said, and what eval said of the same checkpoint and text."""
    folder = tmp_path_factory.mktemp("report")
    model, page = str(folder / "three <bits>"), folder / "report.html"
    said("quantize", SOURCE, model, "--method", "rtn", "--bits", "3", "--override", "down_proj:bits=4")
    evaluated = said("eval", model, "--reference", SOURCE, *TEXT)
    others = [evaluated | {"bytes": evaluated["bytes"] * n, "kl": evaluated["kl"] / n**2} for n in (2, 3)]
    for number, other in enumerate(others):
        (folder / f"other {number}.json").write_text(json.dumps(other))
    results = [option for number in range(2) for option in ("--results", str(folder / f"other {number}.json"))]
    made = said("report", model, "--html", str(page), "--reference", SOURCE, "--tokens", "70", *TEXT, *results)
    return page, made, evaluated
