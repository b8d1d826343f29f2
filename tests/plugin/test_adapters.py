"""Adapters of PEFT on low-bit layers: as on the dense layer they stand for, in value, gradient and merge."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import families
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_lowbit import LowBitConfig, LowBitLinear, quantize
from hf_lowbit.errors import BadRequest
from hf_lowbit.format import Layout, Levels, LowBitTensor, Stage
from hf_lowbit.kernels import cpu, cpu_library
from hf_lowbit.plugin import fused
from hf_lowbit.solvers import solve

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'hf-lowbit[peft]'")
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model  # noqa: E402

from hf_lowbit.plugin.adapters.low_rank import Factors, with_low_rank  # noqa: E402

KINDS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["proj"]),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], use_dora=True),
    "miss": MissConfig(r=6, target_modules=["proj"]),
    "mini": MissConfig(r=8, mini_r=8, target_modules=["proj"], init_weights="mini"),
    "bat": MissConfig(r=8, target_modules=["proj"], init_weights="bat"),
}
KEPT = ("lora", "miss", "mini")
IDS = (torch.arange(12).view(2, 6) * 11) % 240 + 3


@pytest.fixture(autouse=True)
def exact():
    with cpu.arithmetic("exact"):
        yield


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer
        self.gain = nn.Parameter(torch.ones(1), requires_grad=False)  # PEFT asks a model's parameters for their device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def stir(model: nn.Module, seed: int = 0) -> None:
    """Move every trained number of an adapter away from its start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def twins(record: LowBitTensor, kind: str, bias: torch.Tensor | None = None) -> tuple:
    """The same adapter on a low-bit layer and on the dense one it stands for."""
    dense = nn.Linear(*reversed(record.layout.shape), bias=bias is not None)
    dense.weight.data = record.dequantize()
    if bias is not None:
        dense.bias.data = bias.clone()
    models = [
        get_peft_model(One(layer), copy.deepcopy(KINDS[kind])) for layer in (LowBitLinear.from_tensor(record, bias), dense)
    ]
    for model in models:
        torch.manual_seed(0)
        stir(model)
    models[1].load_state_dict({k: v for k, v in models[0].state_dict().items() if "base_layer" not in k}, strict=False)
    return tuple(models)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradient to the input, gradients to the adapter."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"output": y.detach(), "input": x.grad, **found}


def test_values_and_gradients_are_those_of_the_dense_layer(row):
    draw = torch.Generator().manual_seed(1)
    record = row.solve(torch.randn(24, 64, generator=draw), row.spec())
    x, bias = torch.randn(2, 5, 64, generator=draw), torch.randn(24, generator=draw)
    for kind in KINDS:
        ours, dense = (gradients(model, x) for model in twins(record, kind, bias))
        assert set(ours) == set(dense) and len(ours) > 2
        for name, wanted in dense.items():
            torch.testing.assert_close(
                ours[name], wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().max()), msg=f"{kind} {name}"
            )


@pytest.mark.parametrize("kind", KEPT)
def test_a_merge_keeps_codes_and_an_unmerge_gives_every_bit_back(row, kind):
    draw = torch.Generator().manual_seed(2)
    record = row.solve(torch.randn(24, 64, generator=draw), row.spec())
    ours, dense = twins(record, kind)
    layer, x = ours.base_model.model.proj, torch.randn(3, 64, generator=draw)
    before = layer(x)
    ours.merge_adapter()
    dense.merge_adapter()
    update = dense.base_model.model.proj.base_layer.weight - record.dequantize()
    error = (layer.base_layer.lowbit().dequantize() - dense.base_model.model.proj.base_layer.weight).abs().max()
    assert update.abs().max() > 0 and error <= 2**-9 * update.abs().max()
    assert layer.base_layer.lowbit().tensors["codes"] is record.tensors["codes"]
    torch.testing.assert_close(layer(x), before, rtol=0, atol=2**-7 * float(before.abs().max()))
    ours.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.lowbit().tensors[name], value) for name, value in record.tensors.items())
    assert layer.base_layer.lowbit().layout == record.layout
    assert not [name for name in layer.base_layer._buffers if "low_rank" in name]
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", ["dora", "bat"])
def test_what_no_low_rank_term_expresses_is_refused_unmerged(kind):
    record = solve(torch.randn(24, 64), LowBitConfig(method="rtn").spec())
    ours, _ = twins(record, kind)
    with pytest.raises(BadRequest, match=r"which no low-rank term expresses. Merge it with how='resolve' or how='dense'"):
        ours.merge_adapter()
    assert ours.base_model.model.proj.base_layer.lowbit().layout == record.layout


@pytest.mark.parametrize("shift", [-9, 0, 7])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_low_rank_terms_add_up_under_permutation_shift_and_a_term_that_is_there(records, shift, size):
    layout = Layout((6, 40), (Stage(Levels("uniform", 3), 8),), shift=shift, rank=2, permuted=True)
    record, draw = records.fill(layout, 3), torch.Generator().manual_seed(0)
    b, a = torch.randn(6, 3, generator=draw) * size, torch.randn(3, 40, generator=draw) / 50
    found = with_low_rank(record, Factors(b, a)).dequantize() - record.dequantize()
    scale = float((b @ a).abs().max()) * 2**-9 + float(record.dequantize().abs().max()) * 2**-20
    torch.testing.assert_close(found, b @ a, rtol=0, atol=scale)
    assert with_low_rank(record, Factors(b, a)).layout.rank == 5
    assert with_low_rank(record, Factors(b * 0, a)) is record
    with pytest.raises(BadRequest, match="NaN or infinity"):
        with_low_rank(record, Factors(b / 0, a))


def low(family: str, **settings):
    """A tiny low-bit model of a family."""
    return quantize(families.make_model(family), LowBitConfig(method="rtn", bits=4, **settings))


def targets(model) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "merged_adapters")}


@pytest.mark.parametrize("config", [LoraConfig(target_modules="all-linear"), MissConfig(target_modules="all-linear")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt", "qwen2-moe"])
def test_all_linear_means_every_layer_but_the_head(family, config):
    dense = families.make_model(family)
    model = quantize(copy.deepcopy(dense), LowBitConfig(method="rtn"))
    linear = {name for name, module in model.named_modules() if isinstance(module, (LowBitLinear, nn.Linear))}
    config = copy.deepcopy(config)
    adapted = get_peft_model(model, config)
    head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    assert targets(model) == linear - head
    adapted.add_adapter("second", type(config)(target_modules="all-linear"))
    assert set(adapted.peft_config["second"].target_modules) == targets(model)
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if p.requires_grad and "default" in n)


def test_fused_layers_step_aside_and_come_back_with_what_was_merged():
    model = low("llama")
    if not list(fused.fused_layers(model)):
        pytest.skip(str(cpu_library.trouble()))
    calls = lambda: sum(layer.calls for layer in fused.fused_layers(model))  # noqa: E731
    with torch.no_grad():
        plain = model(IDS[:1]).logits
        assert calls() == 2
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
        stir(adapted)
        changed = adapted(IDS[:1]).logits
        assert calls() == 2 and (changed - plain).abs().max() > 1e-3
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(IDS[:1]).logits, plain, rtol=0, atol=1e-4)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(IDS[:1]).logits, changed, rtol=0, atol=1e-2 * float((changed - plain).abs().max()))
        assert merged is model and calls() == 4
        adapted = get_peft_model(merged, LoraConfig(r=4, target_modules=["q_proj"])).eval()
        adapted.unload()
        model(IDS[:1])
        assert calls() == 6


def test_a_merge_that_nobody_ran_in_between_is_seen_by_fused_layers():
    model = low("llama")
    with torch.no_grad():
        before = model(IDS[:1]).logits
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["v_proj"])).eval()
        stir(adapted)
        merged = adapted.merge_and_unload()
        found = merged(IDS[:1]).logits
        fused.unfuse(merged)
        torch.testing.assert_close(found, merged(IDS[:1]).logits, rtol=0, atol=1e-4)
    assert (found - before).abs().max() > 1e-3


def test_several_adapters_are_switched_and_merged_one_by_one():
    model = low("llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])).eval()
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    outputs = {}
    with torch.no_grad():
        for seed, name in enumerate(("default", "other")):
            adapted.set_adapter(name)
            stir(adapted, seed)
            outputs[name] = adapted(IDS).logits
        assert (outputs["default"] - outputs["other"]).abs().max() > 1e-3
        adapted.set_adapter("default")
        assert torch.equal(adapted(IDS).logits, outputs["default"])
        adapted.merge_adapter(["other"])
        torch.testing.assert_close(adapted(IDS).logits, outputs["other"], rtol=0, atol=1e-2)
        adapted.unmerge_adapter()
        assert torch.equal(adapted(IDS).logits, outputs["default"])


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_lowers_the_loss_and_leaves_the_base_alone(gradient_checkpointing):
    model = low("qwen2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = adapted.unload().state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 8, "group_size": -1, "scale_bits": 16}])
def test_rounded_inputs_pass_gradients_straight_through(settings):
    layer = next(m for m in low_rounded(**settings).modules() if isinstance(m, LowBitLinear))
    assert (layer.simulated is None) == (settings["bits"] == 8)  # multiplied in whole numbers where nothing is trained
    model = get_peft_model(One(layer), copy.deepcopy(KINDS["lora"]))
    stir(model)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    weights = torch.randn(3, layer.out_features)
    (model(x) * weights).sum().backward()
    lora = model.base_model.model.proj
    b, a = lora.lora_B["default"].weight, lora.lora_A["default"].weight
    torch.testing.assert_close(
        x.grad, weights @ (layer.matrix(torch.float32) + lora.scaling["default"] * b @ a), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        b.grad, lora.scaling["default"] * weights.T @ (x @ a.T), rtol=1e-4, atol=1e-4
    )  # x not rounded
    with pytest.raises(BadRequest, match=r"rewrites or rounds its inputs .8 bits per token.*how='dense'"):
        model.merge_adapter()
    with pytest.raises(BadRequest, match="'bat' would skip that"):
        get_peft_model(One(layer), copy.deepcopy(KINDS["bat"]))


def low_rounded(bits: int, **settings):
    """A tiny model with rounded inputs; whole-number products where its matrices allow."""
    return quantize(
        families.make_model("llama"), LowBitConfig(method="rtn", bits=bits, levels="integer", activation_bits=8, **settings)
    )


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_starts_that_need_dense_weights_are_refused(start):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
    config.init_lora_weights = start
    with pytest.raises(BadRequest, match=f"init_lora_weights='{start}'.*adapt"):
        get_peft_model(low("llama"), config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_and_loaded(tmp_path, kind):
    config = copy.deepcopy(KINDS[kind])
    config.target_modules = {"q_proj", "down_proj"}
    adapted = get_peft_model(low("llama"), config).eval()
    stir(adapted)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(low("llama"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, adapted(IDS).logits)


FRESH = """
import sys
{imports}
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
from safetensors.torch import load_file
wanted = load_file(sys.argv[1] + "/wanted.st")
load = lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
model = PeftModel.from_pretrained(load(), sys.argv[1] + "/adapter").eval()
other = load()
other.load_adapter(sys.argv[1] + "/adapter")
with torch.no_grad():
    print(*[torch.equal(one(wanted["ids"]).logits, wanted["logits"]) for one in (model, other)])
"""


@pytest.mark.parametrize(
    ("imports", "autoload"), [("import peft", "1"), pytest.param("import peft, hf_lowbit", "0", marks=pytest.mark.slow)]
)
def test_a_saved_adapter_loads_in_a_fresh_process(tmp_path, imports, autoload):
    from safetensors.torch import save_file

    model = low("llama")
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    stir(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        save_file({"ids": IDS, "logits": adapted(IDS).logits}, tmp_path / "wanted.st")
    environment = os.environ | {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload,
        "HF_HUB_OFFLINE": "1",
        "HF_LOWBIT_CPU_ARITHMETIC": "exact",
    }
    done = subprocess.run(
        [sys.executable, "-c", FRESH.format(imports=imports), str(tmp_path)],
        capture_output=True, text=True, timeout=200, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["True", "True"]
