"""The CPU backend inside models: reload in a fresh process, greedy text, and what a fork or a lower instruction set does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig, demo
from hf_lowbit.kernels import cpu, cpu_library
from hf_lowbit.measure import divergence
from hf_lowbit.plugin.checkpoint import quantize_checkpoint
from hf_lowbit.plugin.targets import low_bit_modules

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason=str(cpu_library.trouble()))

RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
from hf_lowbit import explain
from hf_lowbit.kernels import cpu_library
lines = explain(model).tensors
ids = torch.tensor([[5, 9, 30, 77]])
tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
child = -1
if hasattr(__import__("os"), "fork"):
    import os
    torch.set_num_threads(2)
    layer = model.model.layers[0].mlp.gate_proj
    with torch.no_grad():  # one product: torch's own threads do not survive a fork, ours must
        x = torch.ones(16, layer.in_features)
        expected = layer(x)
        pid = os.fork()
        if pid == 0:
            os._exit(7 if torch.equal(layer(x).view(-1), expected.view(-1)) else 8)
        child = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps([sorted({line.backend for line in lines}), cpu_library.instruction_set(), tokens, child]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The embedded model at 4 bits with the default grouping."""
    folder = tmp_path_factory.mktemp("saved") / "low"
    quantize_checkpoint(str(demo.embedded_model()), folder, LowBitConfig(method="codebook", outliers=0.005))
    return folder


@pytest.fixture(scope="module")
def model(saved):
    return AutoModelForCausalLM.from_pretrained(saved, dtype="float32").eval()


@pytest.mark.parametrize("isa", cpu_library.instruction_sets())
def test_a_fresh_process_uses_the_kernels_and_a_fork_does_not_hang(saved, model, isa):
    clean = {**os.environ, "HF_LOWBIT_CPU_ISA": isa, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(saved)], env=clean, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    backends, used, tokens, child = json.loads(done.stdout.splitlines()[-1])
    assert backends == ["cpu"] and used == isa and len(tokens) == 12 and child in (7, -1)


def generate(model, prompt: str, count: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(demo.embedded_model())
    start = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    return model.generate(**start, max_new_tokens=count, do_sample=False, pad_token_id=0)[0].tolist()


def test_exact_greedy_text_is_the_reference_s(model, monkeypatch):
    with cpu.arithmetic("exact"):
        ours = generate(model, demo.PROMPT, 32)
    refuse = cpu.Verdict(False, "for the test")
    monkeypatch.setattr(cpu.Cpu, "supports", lambda self, layout, device: refuse)
    for _, module in low_bit_modules(model):
        module.__dict__.pop("_prepared", None)
    reference = generate(model, demo.PROMPT, 32)
    for _, module in low_bit_modules(model):
        assert module.prepared()[0].name == "reference"
        module.__dict__.pop("_prepared", None)
    assert ours == reference


@torch.no_grad()
def test_int8_changes_perplexity_by_less_than_a_thousandth(model):
    tokenizer = AutoTokenizer.from_pretrained(demo.embedded_model())
    text = demo.held_out_text().read_text(encoding="utf-8")[:8000]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    found = {}
    for mode in ("exact", "auto", "int8"):
        with cpu.arithmetic(mode):
            found[mode] = divergence(model, model, ids, 512).perplexity
    assert abs(found["auto"] / found["exact"] - 1) < 1e-3
    assert abs(found["int8"] / found["exact"] - 1) < 1e-3
