"""`eval/gpu.py`: says what it lacks, and its logic on a tiny matrix in Triton's interpreter without its clock and graphs."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowbit import explain
from hf_lowbit.kernels import triton_cache, triton_tune
from hf_lowbit.kv import kernel
from hf_lowbit.plugin.checkpoint import read_contents

EVAL = Path(__file__).parents[2] / "eval"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def gpu(monkeypatch):
    """The program as a module."""
    monkeypatch.syspath_prepend(EVAL)
    return importlib.import_module("gpu")


@pytest.fixture
def gpu_models(gpu, monkeypatch):
    """The part about whole models, of a size that a processor makes."""
    module = importlib.import_module("gpu_models")
    monkeypatch.setattr(module, "MODELS", {"tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}})
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256}
    monkeypatch.setattr(module, "COMMON", sizes)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(gpu, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("eval/gpu.py needs a GPU that runs the Triton kernels: ")
    assert "eval/gpu_static.py needs none" in said


@pytest.mark.skipif(find_spec("triton") is None or not INTERPRETED, reason="needs Triton's interpreter")
def test_every_row_is_checked_and_complete(gpu, gpu_models, monkeypatch):
    here = torch.device("cpu")
    monkeypatch.setattr(gpu, "SHAPE", (5, 64))
    monkeypatch.setattr(gpu, "WIDTHS", (4,))
    monkeypatch.setattr(gpu, "BATCHES", (1, 3))
    monkeypatch.setattr(gpu, "TURNS_BYTES", 1)
    monkeypatch.setattr(gpu, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(gpu_models, "matrices", lambda config: [(4, 64)] * 2 + [(8, 64)])
    monkeypatch.setattr(triton_tune, "captured", lambda job: job)
    for module in (triton_tune, gpu):
        monkeypatch.setattr(module, "median_seconds", lambda job, seconds: (job(), 1e-3)[1])
    torch.manual_seed(0)
    rows = gpu.kernel_rows(here, 0.0)
    assert [(row["bits"], row["batch"]) for row in rows] == [(4, 1), (4, 3)]
    for row in rows:
        # The interpreter cuts off where hardware rounds to bfloat16, and the largest of five outputs is not large.
        assert 0 < row["error"] < 3 * gpu.ALLOWED_ERROR and row["times_bf16"] == 1.0
        # 5 rows of 64 codes, a scale each, and a table of 16; both copies took 1 ms together.
        assert row["gb_s"] == pytest.approx((5 * (32 + 2) + 32) / 0.5e-3 / 1e9)
        assert all("not measured" in str(row[f"times {name}"]) for name in gpu.PEERS)
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


@torch.no_grad()
def test_a_deep_checkpoint_has_the_first_layer_in_all(gpu_models, tmp_path):
    config = gpu_models.config_of("tiny", 2)
    folder = gpu_models.low_bit_checkpoint(tmp_path, config)
    read_contents(folder)  # every checksum
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first, second = model.model.layers
    assert torch.equal(first.mlp.up_proj.weight_codes, second.mlp.up_proj.weight_codes)
    names = {tuple(module.shape) for module in (line for line in explain(model).tensors) if "layers" in module.name}
    assert names == set(gpu_models.matrices(config)[:-1])
    assert gpu_models.rate(model) > 0


def test_a_swapped_model_has_a_peers_layers(gpu_models):
    model = gpu_models.dense_model(gpu_models.config_of("tiny", 2), torch.device("cpu"))
    made = []
    gpu_models.swapped(model, lambda linear, batch: made.append(linear) or torch.nn.Identity())
    assert len(made) == 14 and made[0].weight.dtype == torch.bfloat16
    assert isinstance(model.model.layers[1].mlp.down_proj, torch.nn.Identity)
    assert isinstance(model.lm_head, torch.nn.Linear)


@pytest.mark.skipif(find_spec("triton") is None or not INTERPRETED, reason="needs Triton's interpreter")
def test_the_cache_is_timed_beside_the_hosts_attention(gpu_models, monkeypatch):
    monkeypatch.setitem(kernel.KERNELS, "cpu", triton_cache)
    monkeypatch.setattr(triton_cache, "trouble", lambda device, dim: None)
    monkeypatch.setattr(gpu_models, "CONTEXTS", (260,))
    monkeypatch.setattr(gpu_models, "HEADS", (1, 2, 16))
    ran = []
    rows = gpu_models.cache_rows(torch.device("cpu"), lambda job: ran.append(job()) or 1e-3)
    assert [row["times_bf16"] for row in rows] == [1.0] * 3 and {row["tokens"] for row in rows} == {260}
    assert ran[0].shape == (1, 2, 1, 16) and all(out.isfinite().all() for out, _ in ran[1:])
