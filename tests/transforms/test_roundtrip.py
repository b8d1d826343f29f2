"""Every transform's way: saved, pushed, and loaded from the Hub by a process that has seen nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys

import hub_server
import torch
from transform_table import IDS, ROWS, uneven
from transformers import AutoModelForCausalLM

from hf_lowbit.cli import main
from hf_lowbit.format import read_record

# One process for all, since importing takes seconds.
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1] + "/ids")
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained("user/" + name).eval()
    text = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    torch.save((model(ids).logits.detach(), text), sys.argv[1] + "/" + name + ".out")
"""


@torch.no_grad()
def test_a_fresh_process_loads_the_same_models_from_the_hub(tmp_path, monkeypatch):
    torch.save(IDS, tmp_path / "ids")
    made = {}
    with hub_server.FakeHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)  # read from the environment once
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "anything")
        for entry in ROWS:
            dense, saved = uneven(entry.families[-1]), tmp_path / entry.name
            dense.save_pretrained(tmp_path / "dense")
            low = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=entry.config).eval()
            low.save_pretrained(saved)
            assert main(["push", str(saved), f"user/{entry.name}"]) == 0
            text = low.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
            made[entry.name] = dense(IDS).logits, low(IDS).logits, text
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", LOAD, str(tmp_path), *made]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        for name, (dense, low, text) in made.items():
            logits, again = torch.load(tmp_path / f"{name}.out")
            assert torch.equal(logits, low), name
            assert torch.equal(again, text), name
            assert (logits - dense).norm() / dense.norm() < (0.1 if name != "qllm" else 0.6)
            file = tmp_path / name / "model.safetensors"
            assert hub.repos[f"user/{name}"].files[file.name] == file.read_bytes()
            record = read_record([file])
            assert record.activations
            assert {step["transform"] for step in record.transforms} == {name} - {"token_wise_clipping"}
