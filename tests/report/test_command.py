"""``hf-lowbit report``: it says what the other commands say, leaves out what it does not know, and refuses cleanly."""

from __future__ import annotations

import importlib.util
import json
from html import unescape
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lowbit import demo
from hf_lowbit.cli import main
from hf_lowbit.format import load_tensors

_spec = importlib.util.spec_from_file_location("commands", Path(__file__).parents[1] / "commands.py")
_commands = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_commands)
refused = _commands.refused

SOURCE = str(demo.embedded_model())


def test_it_measures_what_eval_measures(reported):
    _, made, evaluated = reported
    for key in ("perplexity", "reference_perplexity", "kl", "top1_agreement", "tokens"):
        assert made["measured"][key] == pytest.approx(evaluated[key], rel=1e-9)
    assert made["file_bytes"] == evaluated["bytes"]
    assert made["bits_per_weight_model"] == evaluated["bits_per_weight_model"]
    assert [point["own"] for point in made["points"]] == [True, False, False]
    assert made["left_out"] == {}


def test_the_memory_map_counts_every_byte(reported):
    _, made, _ = reported
    assert sum(made["bytes_by_kind"].values()) == made["file_bytes"]
    kept = sum(size for size, _ in made["high_precision"].values())
    assert sum(m["bytes"] for m in made["matrices"]) + kept + made["bytes_by_kind"]["headers"] == made["file_bytes"]


def test_errors_and_histograms_are_those_of_the_weights(reported):
    page, made, _ = reported
    stored = load_tensors(page.parent / "three <bits>" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    with safe_open(f"{SOURCE}/model.safetensors", "pt") as file:
        original = file.get_tensor(name).float()
    found = next(m for m in made["matrices"] if m["name"] == name)
    values = stored[name].dequantize()
    assert found["error"] == pytest.approx(float((values - original).norm() / original.norm()), rel=1e-5)
    unit = float(original.square().mean().sqrt())
    middle = float((values.abs() < 0.1 * unit).float().mean())  # the two bins around zero
    assert sum(found["histogram"][39:41]) == pytest.approx(middle, abs=1e-3)
    assert found["bits"] == 4 and len(found["code_shares"]) == 16
    assert sum(found["code_shares"]) == pytest.approx(1)


def test_the_page_shows_it(reported):
    page, made, _ = reported
    text = page.read_text(encoding="utf-8")
    assert "three &lt;bits&gt;" in text and "three <bits>" not in text
    assert f"{made['measured']['perplexity']:.2f}" in text
    assert text.count('class="point') == 3
    for verdict in made["verdicts"]:
        assert verdict["headline"] in unescape(text)
    assert {len(c["ids"]) for c in made["continuations"]} == {70}
    assert "".join(made["continuations"][0]["pieces"]) != "".join(made["continuations"][1]["pieces"])
    assert len(text) < 400_000


def test_without_reference_and_text_it_says_what_is_left_out(reported, tmp_path, capsys):
    page, _, _ = reported
    out = tmp_path / "short.html"
    assert main(["report", str(page.parent / "three <bits>"), "--html", str(out), "--tokens", "0"]) == 0
    said = capsys.readouterr().out
    assert f"written to {out}" in said
    assert "left out: Size against quality: no text to measure on; give --reference SRC, --text FILE or both." in said
    assert "left out: Error per matrix: there is no original" in said
    text = out.read_text(encoding="utf-8")
    assert 'id="quality"' not in text and 'id="missing"' in text and "give --reference SRC" in text


def test_bad_requests_are_refused(reported, refused, tmp_path):
    model = reported[0].parent / "three <bits>"
    refused(2, ["report", model], "--html")
    refused(2, ["report", SOURCE, "--html", tmp_path / "a.html"], "not an hf-lowbit checkpoint")
    refused(2, ["report", model, "--html", tmp_path], "cannot write", "not a file")
    refused(2, ["report", model, "--html", tmp_path / "no" / "a.html"], "cannot write", "there is no directory")
    refused(2, ["report", model, "--html", tmp_path / "a.html", "--results", tmp_path / "x"], "cannot read", "No such file")
    refused(2, ["report", model, "--html", tmp_path / "a.html", "--text", tmp_path / "x"], "cannot read")
    refused(2, ["report", model, "--html", tmp_path / "a.html", "--tokens", "-1"], "--tokens must be 0 or more")
    refused(2, ["report", model, "--html", tmp_path / "a.html", "--prompt", ""], "makes no token", "--prompt")
    refused(2, ["report", model, "--html", tmp_path / "a.html", "--reference", "nowhere"], "nowhere")


def test_a_model_without_tokenizer_whose_weights_lie_the_other_way(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_inner=64, vocab_size=300, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    source, target, page = (str(tmp_path / name) for name in ("gpt2", "low", "page.html"))
    options = ("--method", "rtn", "--bits", "4", "--residual-terms", "2", "--outliers", "0.01")
    assert main(["quantize", source, target, *options, "--json"]) == 0
    assert main(["report", target, "--html", page, "--reference", source]) == 0
    text = Path(page).read_text(encoding="utf-8")
    assert "c_attn" in text and "Relative error" in text
    assert "Size against quality</b>: the checkpoint has no tokenizer" in text


def test_json_is_one_object_with_the_page_in_it(reported):
    page, made, _ = reported
    assert made["page"] == str(page)
    assert json.dumps(made)
