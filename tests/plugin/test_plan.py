"""``plan`` says beforehand what ``quantize`` then does, and ``auto`` picks by it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import make_model

from hf_lowbit import LowBitConfig, demo, quantize
from hf_lowbit.cli import main
from hf_lowbit.errors import BadRequest
from hf_lowbit.plugin.auto import ABOVE, RECIPES, resolve
from hf_lowbit.plugin.checkpoint import quantize_checkpoint, read_contents
from hf_lowbit.plugin.plan import plan
from hf_lowbit.solvers import SOLVERS

WINDOWS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
SOME = [
    ("llama", {}),
    ("gpt2", {"group_size": -1}),
    ("qwen2-moe", {"outliers": 0.01}),
    ("llama-tied-172", {"scale_bits": 8}),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")

    def save(family: str):
        if not (folder / family).exists():
            make_model(family).save_pretrained(folder / family)
        return folder / family

    return save


@pytest.mark.parametrize(("family", "settings"), SOME, ids=[name for name, _ in SOME])
@pytest.mark.parametrize("method", ["codebook", "nupes", "squeezellm", "jlcm"])
def test_the_size_is_the_size(family, settings, method, saved, tmp_path):
    # sweeps and steps change codes, never sizes
    quick = {key: 1 for key in ("sweeps", "steps") if key in SOLVERS[method].options}
    calibration = None if SOLVERS[method].evidence == "none" else WINDOWS
    config = LowBitConfig(method=method, bits=3, calibration=calibration, options=quick, **settings)
    expected = plan(str(saved(family)), config)
    explanation, _ = quantize_checkpoint(str(saved(family)), tmp_path / "out", config)
    assert expected.bits_per_weight == pytest.approx(explanation.bits_per_weight_linears, rel=1e-3)
    contents = read_contents(tmp_path / "out")
    low = contents.file_bytes - contents.header_bytes - sum(contents.dense.values())
    assert abs(expected.low_bit_bytes - low) <= 0.001 * low + 64
    assert expected.peak_bytes > 0 and expected.seconds > 0


def test_no_weight_is_read(tmp_path, capsys):
    source = tmp_path / "config only"
    source.mkdir()
    shutil.copy(demo.embedded_model() / "config.json", source)
    assert main(["plan", str(source), "--method", "gptq", "--bits", "3", "--calibration", "unread.txt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] > found["low_bit_bytes"] > 1_000_000
    assert found["parts"]["coding"] > 0
    assert main(["plan", str(source), "--bits", "3"]) == 0
    assert "bits per weight inside blocks" in capsys.readouterr().out


def test_more_text_takes_longer_and_more_memory():
    def of(sequences: int):
        calibration = {"source": "unread.txt", "sequences": sequences}
        return plan(str(demo.embedded_model()), LowBitConfig(method="gptq", calibration=calibration))

    few, many = of(8), of(800)
    assert few.parts["statistics"] < many.parts["statistics"]
    assert few.peak_bytes < many.peak_bytes


def test_plan_refuses_what_cannot_be_quantized(quantized, tmp_path):
    with pytest.raises(BadRequest, match="quantized already"):
        plan(str(quantized), LowBitConfig())
    with pytest.raises(BadRequest, match="cannot read the config"):
        plan(str(tmp_path), LowBitConfig())


@pytest.mark.parametrize("bits", range(1, 9))
def test_auto_takes_the_best_that_fits(bits):
    model = make_model("llama")
    best, last = [recipe[k][0] for recipe in (RECIPES.get(bits, ABOVE),) for k in (0, -1)]
    for minutes, method in ((1e6, best), (0, last)):
        config = LowBitConfig(method="auto", bits=bits, calibration=WINDOWS, options={"minutes": minutes})
        assert resolve(config, model).method == method
        assert config.method == "auto"
    assert resolve(LowBitConfig(method="auto", bits=bits), model).method == "codebook"


def test_auto_is_resolved_before_it_is_saved():
    model = quantize(make_model("llama"), LowBitConfig(method="auto", bits=5, calibration=WINDOWS))
    assert model.config.quantization_config.method == ABOVE[0][0]


def test_auto_has_one_option():
    with pytest.raises(BadRequest, match=r"unknown option of method 'auto' 'minute'\. Did you mean 'minutes'\?"):
        LowBitConfig(method="auto", options={"minute": 3})
    with pytest.raises(BadRequest, match=r"takes a value like 60\.0, got 'long'"):
        LowBitConfig(method="auto", options={"minutes": "long"})
