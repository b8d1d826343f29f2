"""Models on the Triton kernels, as `device_map="cuda"` runs them; in Triton's interpreter the CPU stands in for the GPU."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowbit import LowBitCache, LowBitConfig, explain, quantize
from hf_lowbit.errors import FallbackError
from hf_lowbit.kernels import Backend, Verdict, register_backend
from hf_lowbit.kernels.reference import Reference
from hf_lowbit.kernels.triton_backend import Triton
from hf_lowbit.plugin.experts import LowBitExperts
from hf_lowbit.plugin.fused import unfuse
from hf_lowbit.plugin.quantizer import decoded_on_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(find_spec("triton") is None or not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU; `make test-gpu`")
IDS = torch.tensor([[5]])


class Here(Triton):
    """The backend on the CPU."""

    devices = ("cpu",)

    def supports(self, layout, device):
        return Verdict(True, "interpreted")


class Refuses(Here):
    """One that the machine is too old for."""

    def supports(self, layout, device):
        return Verdict(False, "too old")


def use(monkeypatch, backend: Backend) -> None:
    table = [backend, *[Reference()] * (backend.name != "reference")]
    monkeypatch.setattr(sys.modules[register_backend.__module__], "_TABLE", table)


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Names of the Triton methods that ran."""
    ran = []
    for name in ("linear", "embedding", "grouped"):
        real = getattr(Triton, name)
        monkeypatch.setattr(Triton, name, lambda *args, name=name, real=real: ran.append(name) or real(*args))
    return ran


@runs
@pytest.mark.slow
@torch.no_grad()
def test_a_model_gives_the_logits_of_the_reference(monkeypatch, counted):
    model = families.make_model("llama-tied-172")
    model = quantize(model, LowBitConfig(method="rtn", bits=4)).eval()
    unfuse(model)
    logits = {}
    for backend in (Reference(), Here()):
        use(monkeypatch, backend)
        for module in model.modules():
            module.__dict__.pop("_prepared", None)
        logits[backend.name] = model(IDS).logits
    found, expected = logits["triton"], logits["reference"]
    assert counted.count("linear") == 15 and counted.count("embedding") == 1
    # Levels in fp16 are the only difference, in each of two layers.
    assert (found - expected).norm() < 2e-3 * expected.norm()


@runs
@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=pytest.mark.slow), "gpt-oss"])
def test_few_tokens_of_experts_are_one_launch_a_stack(name, monkeypatch, counted):
    model = quantize(families.make_model(name), LowBitConfig(method="rtn", bits=8)).eval()
    experts = next(module for module in model.modules() if isinstance(module, LowBitExperts))
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([[2, 0], [1, 4], [3, 2]]), torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1]])
    expected = experts(hidden, index, weights)
    use(monkeypatch, Here())
    experts.__dict__.pop("_prepared", None)
    found = experts(hidden, index, weights)
    assert counted == ["grouped", "grouped"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_fallback_is_said_once_with_counts_and_reasons(monkeypatch):
    model = quantize(families.make_model("llama"), LowBitConfig(method="rtn", bits=4))
    assert decoded_on_gpu(model) is None
    use(monkeypatch, Refuses())
    expected = "hf-lowbit: 16 of 16 matrices run on the slow reference path of the GPU (16: too old)"
    assert decoded_on_gpu(model) == expected
    with pytest.raises(FallbackError, match="too old"):
        explain(model, strict=True)


@on_gpu
def test_a_checkpoint_goes_packed_onto_the_gpu(tmp_path):
    quantize(families.make_model("llama"), LowBitConfig(bits=4)).save_pretrained(tmp_path)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda", dtype=torch.bfloat16)
    packed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    # The allocator rounds every small tensor up to 512 bytes.
    slack = 512 * 16 * len(model.state_dict())
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * packed + slack
    assert {line.backend for line in explain(model, strict=True).tensors} == {"triton"}
    assert model(IDS.cuda()).logits.isfinite().all()


@on_gpu
@torch.no_grad()
def test_a_compiled_model_gives_the_same_tokens(tmp_path):
    quantize(families.make_model("llama"), LowBitConfig(bits=4)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda ids: model(ids).logits, mode="reduce-overhead")
    expected = model(IDS.cuda()).logits
    for _ in range(3):
        assert (compiled(IDS.cuda()) - expected).norm() < 0.02 * expected.norm()


@on_gpu
@torch.no_grad()
def test_generating_with_a_packed_cache_runs_on_its_kernel(tmp_path):
    quantize(families.make_model("llama"), LowBitConfig(bits=4)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda", dtype=torch.bfloat16)
    ids = torch.randint(3, 200, (1, 200), generator=torch.Generator().manual_seed(0)).cuda()
    cache = LowBitCache(model.config, low_bits=8, recent=16)
    found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, past_key_values=cache)
    assert "compiled kernel" in cache.report().attention
    cache.save(tmp_path / "cache")
    again = LowBitCache.load(tmp_path / "cache", model.config, device="cuda")
    assert model(found[:, -1:], past_key_values=again).logits.isfinite().all()
