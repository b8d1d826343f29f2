"""Adapters that start from the original weights: the errors they state, what is trained, and what is refused."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_lowbit import LowBitConfig, LowBitLinear, quantize
from hf_lowbit.errors import BadRequest
from hf_lowbit.kernels import cpu

pytest.importorskip("peft", reason="peft is not installed: pip install 'hf-lowbit[peft]'")
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model

from hf_lowbit.plugin.adapters import adapt
from hf_lowbit.plugin.adapters.svfit import Directions, SingularValues, top_directions

IDS = (torch.arange(12).view(2, 6) * 11) % 240 + 3


@pytest.fixture(autouse=True)
def exact():
    with cpu.arithmetic("exact"):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Dense checkpoints by family: read them, never write to them."""
    folder = tmp_path_factory.mktemp("sources")
    for family in ("llama", "gpt2"):
        families.make_model(family).save_pretrained(folder / family)
    return folder


def low(place, bits: int = 2, method: str = "rtn", **settings):
    return AutoModelForCausalLM.from_pretrained(
        place, quantization_config=LowBitConfig(method=method, bits=bits, **settings)
    )


def original(place) -> dict[str, torch.Tensor]:
    """Weights as records hold them, by module name."""
    model = AutoModelForCausalLM.from_pretrained(place)
    flipped = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    named = {name.removesuffix(".weight"): weight for name, weight in model.named_parameters()}
    return {name: weight.detach().T if name in flipped else weight.detach() for name, weight in named.items()}


def recomputed(model, place) -> tuple[float, float]:
    """Relative error over all adapted matrices without and with the adapter, from what the layers hold."""
    dense, without, found, norm = original(place), 0.0, 0.0, 0.0
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "base_layer", None), LowBitLinear):
            weight = layer.base_layer.lowbit().dequantize()
            without += float((weight - dense[name]).square().sum())
            found += float((weight + layer.get_delta_weight("default") - dense[name]).square().sum())
            norm += float(dense[name].square().sum())
    return (without / norm) ** 0.5, (found / norm) ** 0.5


@pytest.mark.parametrize("init", ["loftq", "svfit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_error_it_states_is_that_of_the_model_it_returns(sources, family, init):
    place = str(sources / family)
    model = low(place)
    started = adapt(model, LoraConfig(r=8, lora_alpha=20, target_modules="all-linear"), init, place)
    before, after = recomputed(model, place)
    assert started.before == pytest.approx(before, rel=1e-4) and started.after == pytest.approx(after, rel=1e-4)
    assert started.after < started.before and all(row.after < row.before for row in started.rows)
    started.model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in started.model.parameters() if p.requires_grad)


def test_a_rank_that_is_full_mends_everything(sources):
    place = str(sources / "llama")
    model = low(place)
    adapt(model, LoraConfig(r=64, target_modules="all-linear"), "loftq", place)
    dense = AutoModelForCausalLM.from_pretrained(place).eval()
    unquantized_ends = {"embed_tokens", "lm_head"}
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "base_layer", None), LowBitLinear):
            mended = layer.base_layer.lowbit().dequantize() + layer.get_delta_weight("default")
            torch.testing.assert_close(mended, dense.get_parameter(f"{name}.weight"), rtol=0, atol=1e-4)
            assert name.rpartition(".")[2] not in unquantized_ends


def test_more_rounds_of_loftq_are_never_worse_and_change_the_codes(sources):
    place = str(sources / "llama")
    errors = {}
    for rounds in (1, 4):
        model = low(place, method="codebook")
        codes = model.model.layers[0].mlp.up_proj.weight_codes.clone()
        config = LoraConfig(r=8, target_modules=["up_proj"], use_dora=rounds == 4)
        started = adapt(model, config, "loftq", place, iterations=rounds)
        errors[rounds] = started.after
        same = torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight_codes, codes)
        assert same == (rounds == 1)
        if rounds == 4:  # magnitudes are those of the mended matrices, so that DoRA changes nothing yet
            layer = model.model.layers[0].mlp.up_proj
            mended = layer.base_layer.lowbit().dequantize() + layer.get_delta_weight("default")
            torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.data, mended.norm(dim=1).data)
    assert errors[4] < errors[1]


def test_svfit_trains_one_number_a_direction_and_is_saved_as_a_plain_lora(sources, tmp_path):
    place = str(sources / "llama")
    model = low(place)
    started = adapt(model, LoraConfig(r=6, target_modules=["q_proj", "down_proj"]), "svfit", place)
    assert started.model.get_nb_trainable_parameters()[0] == 2 * 2 * 6
    optimizer = torch.optim.SGD([p for p in started.model.parameters() if p.requires_grad], lr=0.05)
    layer = model.model.layers[0].self_attn.q_proj
    directions = layer.lora_A["default"].weight.clone()
    started.model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert torch.equal(layer.lora_A["default"].weight, directions)
    started.model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(low(place), tmp_path).eval()
    with torch.no_grad():
        wanted = started.model(IDS).logits
        torch.testing.assert_close(again(IDS).logits, wanted, rtol=0, atol=1e-5)
        values = layer.lora_B["default"].values.clone()
        layer.lora_B["default"].values.zero_()
        started.model.load_adapter(tmp_path, "default", is_trainable=True)
        torch.testing.assert_close(layer.lora_B["default"].values, values, rtol=0, atol=1e-6)
        merged = started.model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, wanted, rtol=0, atol=1e-2)


def test_the_gradient_of_a_singular_value_is_that_of_its_direction():
    weight, x, g = torch.randn(12, 20), torch.randn(7, 20), torch.randn(7, 12)
    u, s, v = top_directions(weight, 12)
    torch.testing.assert_close((u * s) @ v.T, weight)
    values = SingularValues(u, s)
    (values(Directions(v.T)(x)) * g).sum().backward()
    torch.testing.assert_close(values.values.grad, torch.einsum("or,no,ni,ir->r", u, g, x, v), rtol=1e-4, atol=1e-4)


def test_large_matrices_take_the_seeded_road(monkeypatch):
    weight = torch.randn(40, 12) @ torch.randn(12, 60) + 0.01 * torch.randn(40, 60)
    wanted = top_directions(weight, 5)
    monkeypatch.setattr("hf_lowbit.plugin.adapters.svfit.EXACT", 8)
    state = torch.get_rng_state()
    found, again = top_directions(weight, 5), top_directions(weight, 5)
    assert torch.equal(torch.get_rng_state(), state) and all(map(torch.equal, found, again))
    product = [(u * s) @ v.T for u, s, v in (found, wanted)]
    torch.testing.assert_close(product[0], product[1], rtol=0, atol=1e-3 * float(weight.abs().max()))


def test_svfit_without_the_original_starts_from_nothing(sources):
    model = low(sources / "llama")
    with torch.no_grad():
        before = model(IDS).logits
        started = adapt(model, LoraConfig(r=6, target_modules=["q_proj"]), "svfit")
        torch.testing.assert_close(started.model(IDS).logits, before, rtol=0, atol=1e-5)


def lora(**settings) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj"], **settings)


REFUSED = [
    ({"init": "lofq"}, "unknown start of an adapter 'lofq'. Did you mean 'loftq'"),
    ({"source": None}, "init='loftq' mends what quantizing lost, so give source=ORIGINAL"),
    ({"config": MissConfig(r=4, target_modules=["q_proj"])}, "give a LoraConfig, got MissConfig"),
    ({"config": lora(init_lora_weights="gaussian")}, "are two starts"),
    ({"init": "svfit", "config": lora(use_dora=True)}, "leave use_dora and lora_bias out"),
    ({"iterations": 0}, "iterations=0"),
    ({"init": "svfit", "iterations": 2}, "svfit has but one"),
    ({"source": "other"}, "holds 'model.layers.0.self_attn.q_proj.weight' as .*, the model has"),
    ({"source": "gpt2"}, "holds no 'model.layers.0.self_attn.q_proj.weight'; it is not what this model was made from"),
    ({"source": "quantized"}, "is quantized itself"),
    ({"config": LoraConfig(r=4, target_modules=["embed_positions"])}, "not found in the base model|embed_positions"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_what_cannot_be_started_is_refused_before_anything_changes(sources, tmp_path, changes, message):
    changes = {"init": "loftq", "source": "llama", "config": lora(), "iterations": 1} | changes
    if changes["source"] == "quantized":
        low(sources / "llama").save_pretrained(tmp_path / "quantized")
        sources = tmp_path
    if changes["source"] == "other":
        families.make_model("llama-tied-172").save_pretrained(tmp_path / "other")
        wide = families.make_model("llama")
        wide.model.layers[0].self_attn.q_proj = nn.Linear(64, 32, bias=False)
        wide.save_pretrained(tmp_path / "other")
        sources = tmp_path
    source = None if changes["source"] is None else str(sources / changes["source"])
    model = quantize(families.make_model("llama"), LowBitConfig(method="rtn"))
    with pytest.raises(ValueError, match=message):
        adapt(model, copy.deepcopy(changes["config"]), changes["init"], source, changes["iterations"])
    assert not [module for module in model.modules() if hasattr(module, "base_layer")]


def test_models_that_cannot_be_compared_with_their_original_are_refused(sources):
    place = str(sources / "llama")
    rotated = quantize(families.make_model("llama"), LowBitConfig(method="rtn", transforms=["hadamard"]))
    with pytest.raises(BadRequest, match="transforms rewrote this model's weights"):
        adapt(rotated, lora(), "loftq", place)
    windows = torch.randint(3, 240, (2, 16))
    calibrated = quantize(
        families.make_model("llama"), LowBitConfig(method="gptq", calibration=windows, options={"sweeps": 1})
    )
    with pytest.raises(BadRequest, match=r"'gptq' needs calibration data for that. Use iterations=1"):
        adapt(calibrated, lora(), "loftq", place, iterations=2)
    assert adapt(calibrated, lora(), "loftq", place).after < 1
    with pytest.raises(BadRequest, match="carries an adapter already"):
        adapt(calibrated, lora(), "loftq", place)
    get_peft_model(low(sources / "llama"), lora())
