"""``hf-lowbit merge``: three ways, each with the error it adds; the source is never touched, nothing half-written stays."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowbit import LowBitConfig, quantize
from hf_lowbit.cli import main
from hf_lowbit.errors import BadRequest
from hf_lowbit.kernels import cpu
from hf_lowbit.plugin.checkpoint import read_contents

pytest.importorskip("peft", reason="peft is not installed: pip install 'hf-lowbit[peft]'")
from peft import LoKrConfig, LoraConfig, MissConfig, PeftModel, get_peft_model

from hf_lowbit.plugin.adapters import merge_checkpoint

_spec = importlib.util.spec_from_file_location("commands", Path(__file__).parents[1] / "commands.py")
commands = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(commands)
refused = commands.refused

IDS = (torch.arange(12).view(2, 6) * 11) % 240 + 3
NAMES = ["q_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=NAMES),
    "dora": LoraConfig(r=4, target_modules=NAMES, use_dora=True),
    "miss": MissConfig(r=8, target_modules=NAMES),
    "bat": MissConfig(r=8, target_modules=NAMES, init_weights="bat"),
    "lokr": LoKrConfig(r=4, target_modules=["not_there"]),
}


@pytest.fixture(autouse=True)
def exact():
    with cpu.arithmetic("exact"):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Low-bit checkpoints and adapters trained on the first: read them, never write to them."""
    folder = tmp_path_factory.mktemp("merge")
    plain = LowBitConfig(method="rtn", bits=4)
    # down_proj of the first layer stays dense: PEFT's own layers are merged, too.
    some = LowBitConfig(method="rtn", bits=4, modules_to_not_convert=["layers.0.mlp.down_proj"])
    quantize(families.make_model("llama"), some).save_pretrained(folder / "base")
    quantize(families.make_model("gpt2"), plain).save_pretrained(folder / "gpt2")
    rounded = LowBitConfig(method="rtn", bits=4, activation_bits=8)
    quantize(families.make_model("llama"), rounded).save_pretrained(folder / "rounded")
    families.make_model("llama").save_pretrained(folder / "dense")
    draw = torch.Generator().manual_seed(0)
    for name, config in ADAPTERS.items():
        if name == "lokr":
            config.save_pretrained(folder / name)
            continue
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
        model.save_pretrained(folder / name)
    return folder


def adapted_logits(place: Path, adapter: str) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / adapter).eval()
    with torch.no_grad():
        return model(IDS).logits


def snapshot(folder: Path) -> dict:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("how", "adapter", "most"),
    [
        ("keep", "lora", 2e-4),
        ("keep", "miss", 2e-4),
        ("dense", "lora", 3e-3),
        ("dense", "dora", 3e-3),
        ("dense", "bat", 3e-3),
        ("resolve", "lora", 0.2),
        ("resolve", "dora", 0.2),
        ("resolve", "miss", 0.2),
        ("resolve", "bat", 0.2),
    ],
)
def test_each_way_writes_the_sum_and_states_its_error(place, tmp_path, how, adapter, most):
    before = snapshot(place)
    report = merge_checkpoint(str(place / "base"), str(place / adapter), tmp_path / "out", how)
    assert snapshot(place) == before
    assert 0 < report.error < most and report.update > 0.01 and len(report.rows) == 4
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written["how"] == how and written["error"] == report.error and len(written["matrices"]) == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (getattr(model, "hf_quantizer", None) is None) == (how == "dense")
    wanted = adapted_logits(place, adapter)
    with torch.no_grad():
        distance = (model(IDS).logits.float() - wanted).norm() / wanted.norm()
        away = (AutoModelForCausalLM.from_pretrained(place / "base")(IDS).logits - wanted).norm() / wanted.norm()
    assert distance < {"keep": 1e-3, "dense": 3e-2, "resolve": 0.6}[how] and distance < away
    if how == "keep":
        assert read_contents(tmp_path / "out").record.layouts["model.layers.0.self_attn.q_proj.weight"].rank > 0


def test_the_error_of_resolve_is_the_distance_from_the_exact_sum(place, tmp_path):
    report = merge_checkpoint(str(place / "base"), str(place / "lora"), tmp_path / "out", "resolve", "codebook")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place / "base"), place / "lora"
    ).get_base_model()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for row in report.rows:
        layer = adapted.get_submodule(row.name)
        if not hasattr(layer.base_layer, "matrix"):
            continue
        base = layer.base_layer.matrix(torch.float32)
        exact = base + layer.get_delta_weight("default")
        found = merged.get_submodule(row.name).matrix(torch.float32)
        assert row.error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-4)
        assert row.update == pytest.approx(float((base - exact).norm() / exact.norm()), rel=1e-4)
        assert merged.get_submodule(row.name).layouts["weight"].method == "codebook"


def test_transposed_layers_and_rounded_inputs_go_dense(place, tmp_path):
    for name, targets in (("gpt2", ["c_attn"]), ("rounded", ["q_proj"])):
        base = AutoModelForCausalLM.from_pretrained(place / name)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
        model.save_pretrained(tmp_path / f"{name}-adapter")
        merge_checkpoint(str(place / name), str(tmp_path / f"{name}-adapter"), tmp_path / name, "dense")
        with torch.no_grad():
            found, wanted = (
                AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(IDS).logits.float(),
                model(IDS).logits,
            )
        assert (found - wanted).norm() < 0.05 * wanted.norm()
    with pytest.raises(BadRequest, match=r"q_proj: the layer rewrites or rounds its inputs.*how='dense'"):
        merge_checkpoint(str(place / "rounded"), str(tmp_path / "rounded-adapter"), tmp_path / "kept", "keep")
    assert not (tmp_path / "kept").exists() and not list(tmp_path.glob(".*"))
    again = merge_checkpoint(str(place / "rounded"), str(tmp_path / "rounded-adapter"), tmp_path / "again", "resolve")
    assert 0 < again.error < 0.2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert merged.model.layers[0].self_attn.q_proj.activation is not None


def test_the_command_prints_what_the_function_returns(place, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["merge", str(place / "base"), str(place / "lora"), out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["how"] == "keep" and found["destination"] == out and found["error"] < 2e-4
    assert found["bytes"] == sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    assert main(["merge", str(place / "base"), str(place / "lora"), str(tmp_path / "dense"), "--how", "dense"]) == 0
    text = capsys.readouterr().out
    assert "error added" in text and "model.layers.1.mlp.down_proj" in text and "written to" in text


def test_what_cannot_be_merged_is_refused_and_nothing_stays(place, tmp_path, refused):
    base, out = place / "base", tmp_path / "out"
    refused(2, ["merge", base, place / "dora", out], "q_proj", "is a DoRA", "how='resolve' or how='dense'")
    refused(2, ["merge", base, place / "bat", out], "init_weights='bat'", "how='resolve' or how='dense'")
    refused(2, ["merge", base, place / "lora", out, "--how", "dens"], "unknown way to merge 'dens'", "'dense'")
    refused(2, ["merge", base, place / "lora", out, "--method", "rtn"], "goes with --how resolve, not keep")
    refused(2, ["merge", base, place / "lora", out, "--how", "resolve", "--method", "gptq"], "needs calibration data")
    refused(2, ["merge", base, place / "lora", out, "--how", "resolve", "--method", "rtm"], "unknown method 'rtm'", "'rtn'")
    refused(2, ["merge", base, place / "dense", out], "is no PEFT adapter")
    refused(2, ["merge", base, place / "lokr", out], "is a LOKR adapter", "LoRA, DoRA and MiSS")
    refused(2, ["merge", place / "dense", place / "lora", out], "not a low-bit checkpoint", "merge_and_unload")
    refused(2, ["merge", place / "gpt2", place / "lora", out], "does not fit")
    refused(2, ["merge", base, place / "lora", place / "dense"], "exists and is not an empty directory")
    changed = tmp_path / "modules"
    shutil.copytree(place / "lora", changed)
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    refused(2, ["merge", base, changed, out], "holds whole modules (lm_head)")
    (changed / "adapter_config.json").write_text(json.dumps(config | {"bias": "lora_only"}))
    refused(2, ["merge", base, changed, out], "changes biases (bias='lora_only')")


def test_without_peft_it_says_what_to_install(place, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    refused(2, ["merge", place / "base", place / "lora", tmp_path / "out"], 'pip install "hf-lowbit[peft]"')
