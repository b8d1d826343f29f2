"""The round trip is bit-exact in a fresh process that imports only Transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_lowbit import LowBitConfig
from hf_lowbit.plugin.checkpoint import quantize_checkpoint
from hf_lowbit.solvers import SOLVERS

IDS = (torch.arange(16).view(2, 8) * 11) % 240 + 3
MODELS = ("llama", "llama-tied-172", "mixtral", "qwen3-moe-tied")
WINDOWS = torch.randint(3, 240, (4, 24), generator=torch.Generator().manual_seed(0))
QUICK = {"steps": 2, "sweeps": 1}
CASES = [
    (method, bits)
    for method, solver in SOLVERS.items()
    for bits in (range(2, 9) if solver.optional else (3,))  # codes are stored alike, whatever chose them
    if solver.bits[0] <= bits <= solver.bits[1]
]
FRESH = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    expected = load_file(directory + "/expected.st")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    print(directory, bool(torch.equal(logits, expected["logits"])))
"""


def save_case(folder: Path, dense: Path, method: str, bits: int, **settings) -> Path:
    """Quantize one dense checkpoint and save it with its logits beside it."""
    if not SOLVERS[method].optional:
        quick = {key: value for key, value in QUICK.items() if key in SOLVERS[method].options}
        settings |= {"calibration": WINDOWS, "options": quick}
    config = LowBitConfig(method=method, bits=bits, **settings)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).eval()
    target = folder / f"{dense.name}-{method}-{bits}-{len(list(folder.iterdir()))}"
    model.save_pretrained(target)
    with torch.no_grad():
        save_file({"ids": IDS, "logits": model(IDS).logits.contiguous()}, target / "expected.st")
    return target


def reload_all(directories: list[Path]) -> dict[str, bool]:
    """Reload in a fresh process; directory -> whether the logits are bit-identical."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, directories)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.split()[0]: line.split()[1] == "True" for line in done.stdout.splitlines()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Dense checkpoints of the four kinds: tied and untied, dense and mixture of experts."""
    folder = tmp_path_factory.mktemp("dense")
    for name in MODELS:
        families.make_model(name).save_pretrained(folder / name)
    return folder


def test_every_method_and_every_width_reload_bit_exactly(dense, tmp_path):
    # Each method at one width and each width of one method, the four models in turn; all with all is the slow test below.
    cases = list(dict(CASES).items()) + [case for case in CASES if case[0] == CASES[0][0]][:-1]
    saved = [save_case(tmp_path, dense / MODELS[i % 4], method, bits) for i, (method, bits) in enumerate(cases)]
    found = reload_all(saved)
    assert len(found) == len(cases) and {method for method, _ in cases} == {method for method, _ in CASES}
    assert [name for name, same in found.items() if not same] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_method_and_width_with_every_model(dense, tmp_path, name):
    found = reload_all([save_case(tmp_path, dense / name, method, bits) for method, bits in CASES])
    assert len(found) == len(CASES)
    assert [directory for directory, same in found.items() if not same] == []


def test_optional_terms_reload_bit_exactly(dense, tmp_path):
    extra = [
        {"outliers": 0.01},
        {"residual_terms": 2, "outliers": 0.005},
        {"scale_bits": 16, "group_size": -1},
        {"scale_bits": 8, "group_size": 24},
        {"overrides": {"down_proj": {"bits": 8, "method": "rtn"}, "embed_tokens": {"bits": 3}}},
        {"quantize_embeddings": False},
        {"modules_to_not_convert": ["layers.0"]},
    ]
    saved = [save_case(tmp_path, dense / name, "codebook", 3, **e) for name in MODELS[1:3] for e in extra]
    found = reload_all(saved)
    assert [directory for directory, same in found.items() if not same] == [] and len(found) == len(saved)


def test_the_comparison_can_fail(dense, tmp_path):
    saved = save_case(tmp_path, dense / "llama", "rtn", 4)
    save_file({"ids": IDS, "logits": torch.zeros(2, 8, 256)}, saved / "expected.st")
    assert reload_all([saved]) == {str(saved): False}


def test_shards_reload_bit_exactly(dense, tmp_path):
    saved = save_case(tmp_path, dense / "mixtral", "codebook", 4)
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    (tmp_path / "shards" / "expected.st").write_bytes((saved / "expected.st").read_bytes())
    assert reload_all([tmp_path / "shards"]) == {str(tmp_path / "shards"): True}


def test_same_inputs_give_the_same_files(dense, tmp_path):
    contents = []
    for run in ("first", "second"):
        quantize_checkpoint(str(dense / "qwen3-moe-tied"), tmp_path / run, LowBitConfig())
        contents.append({file.name: file.read_bytes() for file in (tmp_path / run).iterdir()})
    assert contents[0] == contents[1]
