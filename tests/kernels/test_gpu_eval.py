"""`eval/gpu.py`: says what it lacks, and its logic on a tiny matrix in Triton's interpreter without its clock and graphs."""

from __future__ import annotations

import importlib.util
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

EVAL = Path(__file__).parents[2] / "eval"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def gpu(monkeypatch):
    """The program as a module."""
    monkeypatch.syspath_prepend(EVAL)
    spec = importlib.util.spec_from_file_location("eval_gpu", EVAL / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(gpu, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("eval/gpu.py needs a GPU that runs the Triton kernels: ")
    assert "eval/gpu_static.py needs none" in said


@pytest.mark.skipif(find_spec("triton") is None or not INTERPRETED, reason="needs Triton's interpreter")
def test_every_row_is_checked_and_complete(gpu, monkeypatch):
    here = torch.device("cpu")
    monkeypatch.setattr(gpu, "SHAPE", (5, 64))
    monkeypatch.setattr(gpu, "WIDTHS", (4,))
    monkeypatch.setattr(gpu, "BATCHES", (1, 3))
    monkeypatch.setattr(gpu, "TURNS_BYTES", 1)
    monkeypatch.setattr(gpu, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(gpu, "MODELS", {"tiny": ([(4, 64, 1)], 3, (8, 64))})
    monkeypatch.setattr(gpu, "captured", lambda job: job)
    monkeypatch.setattr(gpu, "median_seconds", lambda job, seconds: (job(), 1e-3)[1])
    rows = gpu.kernel_rows(here, 0.0)
    assert [(row["bits"], row["batch"]) for row in rows] == [(4, 1), (4, 3)]
    for row in rows:
        # The interpreter cuts off where hardware rounds to bfloat16: twice the error.
        assert 0 < row["error"] < 2 * gpu.ALLOWED_ERROR and row["times_bf16"] == 1.0
        # 5 rows of 64 codes, a scale each, and a table of 16; both copies took 1 ms together.
        assert row["gb_s"] == pytest.approx((5 * (32 + 2) + 32) / 0.5e-3 / 1e9)
        assert all("not measured" in str(row[f"times {name}"]) for name in gpu.PEERS if find_spec(name.split()[0]) is None)
    (model,) = gpu.model_rows(here, 0.0, 2)
    assert model == {"model": "tiny", "layers": 2, "tokens_per_s": pytest.approx(1000), "times_bf16": pytest.approx(1.0)}


@pytest.mark.skipif(find_spec("triton") is None or not INTERPRETED, reason="needs Triton's interpreter")
def test_a_wrong_product_is_seen(gpu):
    tensor = gpu.record((5, 64), 4, torch.device("cpu"))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    right = x.double() @ tensor.dequantize().double().T
    assert gpu.error(tensor, x, right) < 1e-12
    right[1, 3] += 0.1 * right.abs().max()
    assert gpu.error(tensor, x, right) > 0.05
