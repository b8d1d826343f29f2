"""Calibration that cannot work is refused in a line that says what to do; what can work, works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, JetMoeConfig, JetMoeForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowbit import LowBitConfig, demo, quantize
from hf_lowbit.cli import main
from hf_lowbit.errors import BadRequest


@pytest.fixture
def text(tmp_path):
    """Writes a calibration text and gives the options that name it."""

    def write(content: str | bytes, *options: str, name: str = "text.txt") -> list[str]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--calibration", str(tmp_path / name), *options]

    return write


@pytest.fixture
def change(dense, tmp_path):
    """A copy of the dense checkpoint whose tensors went through a function."""

    def make(how) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(dense, folder)
        tensors = load_file(folder / "model.safetensors")
        how(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.fixture
def ask(dense, tmp_path):
    """The arguments of a calibrated run."""

    def make(*options: object, source: Path = dense, method: str = "gptq") -> list:
        plain = ["quantize", source, tmp_path / "out", "--method", method, "--bits", "3", "--no-quantize-embeddings"]
        return [*plain, *options]

    return make


@pytest.mark.parametrize("method", ["gptq", "nupes", "squeezellm"])
def test_an_empty_or_short_text(method, ask, text, refused):
    for content, tokens in (("", "0 tokens"), (" \n\n ", "tokens"), ("just a few words", "tokens")):
        data = text(content, "--length", "64")
        refused(2, ask(*data, method=method), "text.txt", tokens, "one calibration window needs 64", "Give more text")


def test_what_is_no_text(ask, text, refused, tmp_path):
    refused(2, ask("--calibration", tmp_path / "nowhere.txt"), "nowhere.txt", "cannot read", "No such file")
    refused(2, ask("--calibration", tmp_path), "cannot read")
    refused(2, ask(*text("café ".encode("latin-1") * 99)), "not UTF-8")
    refused(2, ask(*text('{"body": "a"}\n', name="rows.jsonl")), "rows.jsonl", "text")


def test_windows_longer_than_the_context(ask, command, dense, tmp_path, refused):
    arguments = command(dense, tmp_path / "out", "--length", "256")
    refused(2, arguments, "a window of 256 tokens was asked for", "the model takes 128", "Use a length of 128")


def test_a_default_window_fits_a_short_context(dense, tmp_path):
    data = ["--calibration", str(demo.held_out_text()), "--sequences", "3"]
    assert main(["quantize", str(dense), str(tmp_path / "out"), "--method", "gptq", "--no-quantize-embeddings", *data]) == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["calibration"]["length"] == 128


def test_a_tokenizer_of_another_model(ask, text, refused, tmp_path, dense):
    narrow = tmp_path / "narrow"
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **shape)).save_pretrained(narrow)
    data = text(demo.held_out_text().read_text(encoding="utf-8")[:4000])
    refused(2, ask(*data, source=narrow), "cannot load a tokenizer", "narrow")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, narrow)
    refused(2, ask(*data, source=narrow), "the tokenizer makes token", "the model knows 300", "not of one checkpoint")


def test_windows_that_are_none(dense):
    for windows, part in (
        (torch.full((2, 16), 5000), "the windows hold token 5000, the model knows 4096"),
        (torch.full((2, 16), -1), "token ids are 0 or more"),
        (torch.zeros(0, 16, dtype=torch.int64), "calibration windows are token ids"),
        (torch.zeros(2, 16), "calibration windows are token ids"),
        (torch.zeros(2, 200, dtype=torch.int64), "the model takes 128"),
        ([], "a calibration source is"),
        (3, "a calibration source is"),
    ):
        with pytest.raises(BadRequest, match=part):
            quantize(AutoModelForCausalLM.from_pretrained(dense), LowBitConfig(method="gptq", calibration=windows))


@pytest.mark.parametrize("method", ["gptq", "nupes", "squeezellm"])
def test_inputs_that_are_all_the_same_are_no_failure(method, dense, tmp_path):
    windows = torch.full((4, 16), 7)
    options = {"steps": 2} if method == "nupes" else {}
    asked = LowBitConfig(method=method, bits=3, quantize_embeddings=False, calibration=windows, options=options)
    model = quantize(AutoModelForCausalLM.from_pretrained(dense), asked)
    assert torch.isfinite(model(windows).logits).all()
    rows = [row for row in model.hf_quantizer.report if "damping" in row]
    assert all(row["damping"] >= 0.01 and row["error"] < 0.01 for row in rows)
    assert bool(rows) == (method != "squeezellm")


@pytest.mark.parametrize("method", ["gptq", "squeezellm"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_block_that_yields_nan_is_named(layer, method, ask, change, capsys):
    name = f"model.layers.{layer}"
    source = change(lambda tensors: tensors[f"{name}.post_attention_layernorm.weight"].fill_(float("nan")))
    data = ["--calibration", demo.held_out_text(), "--sequences", "2", "--length", "16"]
    assert main([str(argument) for argument in ask(*data, source=source, method=method)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert name in last and "yields NaN or infinity" in last and "check its weights" in last


def test_a_head_that_yields_nan_is_an_error(ask, change, refused):
    source = change(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    data = ["--calibration", demo.held_out_text(), "--sequences", "2", "--length", "16"]
    refused(1, ask(*data, source=source, method="squeezellm"), "what follows the last block yields NaN or infinity")


def test_dead_inputs_are_no_failure(ask, change, tmp_path):
    source = change(lambda tensors: tensors["model.layers.0.post_attention_layernorm.weight"].zero_())
    data = ["--calibration", demo.held_out_text(), "--sequences", "4", "--length", "16"]
    assert main([str(argument) for argument in ask(*data, source=source)]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "quantization_report.json").read_text())}
    assert rows["model.layers.0.mlp.up_proj.weight"]["fallback"].startswith("nearest rounding: the inputs were zero")
    assert rows["model.layers.0.mlp.down_proj.weight"]["fallback"].startswith("nearest rounding")
    assert "fallback" not in rows["model.layers.1.mlp.up_proj.weight"]


def test_models_without_a_matrix_to_calibrate(dense):
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}
    jetmoe = {"num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = JetMoeForCausalLM(JetMoeConfig(**size, **jetmoe))
    quantize(model, LowBitConfig(method="gptq", calibration=torch.randint(3, 240, (3, 16)), quantize_embeddings=False))
    plain = AutoModelForCausalLM.from_pretrained(dense)
    asked = LowBitConfig(method="gptq", modules_to_not_convert=["*layers*"], calibration=torch.full((2, 8), 5))
    with pytest.raises(BadRequest, match=r"no list of repeated layers|nothing to calibrate"):
        quantize(plain, asked)
