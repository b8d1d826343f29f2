"""What a user does with a low-bit model besides saving it: move, copy, train through, offload, explain."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from hf_lowbit import LowBitConfig, LowBitLinear, explain, quantize
from hf_lowbit.errors import BadRequest, FallbackError
from hf_lowbit.plugin.modules import LowBitTiedHead

IDS = (torch.arange(20).view(2, 10) * 13) % 240 + 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tied low-bit checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    quantize(families.make_model("llama-tied-172"), LowBitConfig()).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved):
    """The tied checkpoint, loaded."""
    return AutoModelForCausalLM.from_pretrained(saved).eval()


def stored(model) -> dict[str, torch.Tensor]:
    """Integer tensors of a model's state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}


@torch.no_grad()
def test_casting_changes_activations_not_codes(model):
    before, logits = stored(model), model(IDS).logits
    half = model.to(torch.bfloat16)
    assert half(IDS).logits.dtype == torch.bfloat16
    assert half.get_input_embeddings()(IDS).dtype == torch.bfloat16
    after = stored(half)
    assert len(before) > 20 and all(torch.equal(before[name], after[name]) for name in before)
    assert (half(IDS).logits - logits).abs().max() < 0.1 * logits.abs().max()


@torch.no_grad()
def test_a_deep_copy_is_independent_and_equal(model):
    twin, expected = copy.deepcopy(model), model(IDS).logits
    head, table = twin.get_output_embeddings(), twin.get_input_embeddings()
    assert isinstance(head, LowBitTiedHead) and head.embedding is table
    model.get_input_embeddings().weight_codes.zero_()
    assert torch.equal(twin(IDS).logits, expected) and not torch.equal(model(IDS).logits, expected)


def test_the_tied_table_is_stored_once(saved):
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert "model.embed_tokens.weight_codes" in names
    assert not [name for name in names if name.startswith("lm_head")]


def test_gradients_flow_through_to_an_adapter(model):
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, LowBitLinear)
    low = torch.nn.Parameter(torch.zeros(layer.out_features, 4))
    high = torch.nn.Parameter(torch.randn(4, layer.in_features) * 0.1)
    layer.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ high.T @ low.T)
    optimizer = torch.optim.Adam([low, high], 0.02)
    losses = []
    for _ in range(15):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    codes = [tensor for tensor in model.state_dict().values() if not tensor.is_floating_point()]
    assert codes and all(not tensor.requires_grad for tensor in codes)


@torch.no_grad()
def test_disk_offload_gives_identical_logits(saved, model, tmp_path):
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path, offload_buffers=True)
    assert torch.equal(offloaded.eval()(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_the_base_model_opens_a_causal_checkpoint(saved, model):
    base = AutoModel.from_pretrained(saved).eval()
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_overrides_and_skips_are_followed_and_explained():
    config = LowBitConfig(
        bits=3,
        overrides={"down_proj": {"bits": 8, "method": "rtn"}, "model.layers.1.*": {"group_size": 16}},
        modules_to_not_convert=["q_proj"],
    )
    report = explain(quantize(families.make_model("llama"), config))
    lines = {line.name: line for line in report.tensors}
    assert lines["model.layers.0.mlp.down_proj.weight"].bits == 8
    assert lines["model.layers.0.mlp.down_proj.weight"].method == "rtn"
    assert lines["model.layers.1.mlp.down_proj.weight"].bits == 8
    assert lines["model.layers.1.mlp.up_proj.weight"].group_size == 16
    assert lines["model.layers.0.mlp.up_proj.weight"].bits == 3
    assert lines["lm_head.weight"].bits == 6 and lines["model.embed_tokens.weight"].bits == 6
    kept = report.kept["model.layers.0.self_attn.q_proj.weight"]
    assert kept == (64 * 64 * 4, "modules_to_not_convert names 'q_proj'")
    assert "q_proj" in str(report) and "bits per weight" in str(report)


def test_reasons_survive_saving(tmp_path):
    quantize(families.make_model("opt"), LowBitConfig(quantize_embeddings=False)).save_pretrained(tmp_path)
    report = explain(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert report.kept["model.decoder.embed_tokens.weight"][1] == "quantize_embeddings is off"
    assert "not the input embedding" in report.kept["model.decoder.embed_positions.weight"][1]


def test_counts_equal_the_stored_tensors(model, saved):
    report = explain(model)
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - a file handle, not a dict
    assert report.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # 2 layers of 4 attention and 3 MLP matrices (172 wide), the table, and 5 norms of 64.
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 172 * 64) + 256 * 64 + 5 * 64
    assert report.bits_per_weight_model == pytest.approx(8 * report.bytes / weights)


class Strange(torch.nn.Linear):
    """A linear layer with a forward nobody can know."""

    def forward(self, x):
        return super().forward(x) * 2


def test_an_unknown_large_module_is_kept_said_and_refused_when_strict():
    dense = families.make_model("llama")
    dense.model.layers[0].mlp.up_proj = Strange(64, 96, bias=False)
    expected = dense.model.layers[0].mlp.up_proj(torch.ones(64))
    with pytest.raises(FallbackError, match=r"strict: 1 matrices would stay .*up_proj.weight: Strange is a subclass"):
        quantize(dense, LowBitConfig(strict=True))
    low = quantize(dense, LowBitConfig())
    assert torch.equal(low.model.layers[0].mlp.up_proj(torch.ones(64)), expected)
    assert "whose forward is not known" in explain(low).kept["model.layers.0.mlp.up_proj.weight"][1]


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_either_name_of_a_tied_table_keeps_it(name):
    low = quantize(families.make_model("llama-tied-172"), LowBitConfig(modules_to_not_convert=[name]))
    assert low.lm_head.weight is low.model.embed_tokens.weight
    assert explain(low).kept["model.embed_tokens.weight"][1] == f"modules_to_not_convert names {name!r}"


def test_quantizing_twice_and_explaining_a_dense_model_are_refused(model):
    with pytest.raises(BadRequest, match="quantized already"):
        quantize(model, LowBitConfig())
    with pytest.raises(BadRequest, match="holds no low-bit matrix"):
        explain(families.make_model("llama"))


@torch.no_grad()
def test_tie_weights_after_loading_keeps_the_shared_table(model):
    expected = model(IDS).logits
    model.tie_weights()
    assert torch.equal(model(IDS).logits, expected)
