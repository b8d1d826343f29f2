"""Fused decoder layers: the same logits as the layers' own forward, and theirs wherever fusing does not apply."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from hf_lowbit import LowBitConfig, quantize
from hf_lowbit.kernels import cpu, cpu_library
from hf_lowbit.plugin import fused
from hf_lowbit.plugin.cache_room import Room, room_in

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason=str(cpu_library.trouble()))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=None),
    "mistral, sliding": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=4),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32),
}


def made(family: str, dtype: torch.dtype = torch.float32, **changes):
    """A small low-bit model with fused layers, every norm and bias away from its start."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return quantize(model, LowBitConfig(method="rtn", bits=4, group_size=32))


def calls(model) -> int:
    return sum(layer.calls for layer in fused.fused_layers(model))


@pytest.fixture(autouse=True)
def exact():
    with cpu.arithmetic("exact"):
        yield


@torch.no_grad()
def both(model, run):
    """What ``run`` gives with fused layers and with the stock forward, and how often fused layers ran."""
    before = calls(model)
    ours = run()
    count = calls(model) - before
    fused.unfuse(model)
    stock = run()
    fused.fuse(model)
    return ours, stock, count


def close(ours: torch.Tensor, stock: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (ours - stock).abs().max() <= tolerance * stock.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_gives_the_logits_of_the_stock_forward(family):
    model = made(family)
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(1))

    def run():
        cache = DynamicCache(config=model.config)
        model(ids[:, :9], past_key_values=cache)
        steps = [model(ids[:, k : k + 1], past_key_values=cache).logits for k in (9, 10)]
        return torch.cat([*steps, model(ids[:, 11:], past_key_values=cache).logits], 1)

    ours, stock, count = both(model, run)
    assert count == 6
    close(ours, stock)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral, sliding", "qwen3"])
def test_batches_with_padding_and_several_tokens_at_once(family, attention):
    model = made(family)
    model.set_attn_implementation(attention)
    fused.fuse(model)
    ids = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def run():
        cache = DynamicCache(config=model.config)
        model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
        step = model(ids[:, 7:8], attention_mask=mask[:, :8], past_key_values=cache).logits
        return torch.cat([step, model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits], 1)

    ours, stock, count = both(model, run)
    assert count == 4
    close(ours, stock)


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_a_short_prompt_without_a_cache(tokens):
    model = made("llama")
    ids = torch.randint(3, 128, (1, tokens))
    ours, stock, count = both(model, lambda: model(ids, use_cache=False).logits)
    assert count == 2
    close(ours, stock)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generate_writes_the_same_text(options):
    model = made("qwen3")
    ids = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(2))
    if options.get("use_cache") is False:
        ids = ids[:1, :3]
    run = lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **options)  # noqa: E731
    ours, stock, count = both(model, run)
    assert count > 0
    assert torch.equal(ours, stock)


def test_bfloat16_models():
    model = made("qwen2", torch.bfloat16)
    ids = torch.randint(3, 128, (1, 6))
    ours, stock, count = both(model, lambda: model(ids).logits.float())
    assert count == 2
    close(ours, stock, 0.05)  # a bfloat16 keeps 8 bits, and the stock forward rounds to it after every step


def test_int8_arithmetic_is_that_of_the_matrices():
    model = made("llama")
    ids = torch.randint(3, 128, (1, 4))
    with cpu.arithmetic("int8"):
        ours, stock, count = both(model, lambda: model(ids).logits)
    assert count == 2
    close(ours, stock, 2e-2)


def test_where_fusing_does_not_apply_the_stock_forward_runs():
    model = made("llama")
    ids = torch.randint(3, 128, (1, 4))
    with torch.enable_grad():
        assert model(ids).logits.requires_grad
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 9)))
        model.train()
        model(ids)
        model.eval()
        assert calls(model) == 0
        model.set_attn_implementation("eager")
        found = model(ids, output_attentions=True).attentions
    assert len(found) == 2 and calls(model) == 0
    seen = []
    model = made("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(ids)
        assert seen == [1] and calls(model) == 1
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert seen == [1, 1] and len(hidden) == 3


def test_a_replaced_projection_is_obeyed():
    model = made("llama")
    ids = torch.randint(3, 128, (1, 2))
    with torch.no_grad():
        model(ids)
        before = calls(model)
        model.model.layers[0].mlp.down_proj = torch.nn.Linear(96, 64, bias=False)
        model(ids)
    assert calls(model) == before + 1  # the other layer


def test_changed_norms_and_weights_are_read_anew():
    model = made("llama")
    ids = torch.randint(3, 128, (1, 2))
    with torch.no_grad():
        before = model(ids).logits
        model.model.layers[0].input_layernorm.weight.mul_(2)
    ours, stock, _ = both(model, lambda: model(ids).logits)
    close(ours, stock)
    assert (ours - before).abs().max() > 1e-3


def test_copies_and_saved_models_work(tmp_path):
    model = made("llama")
    ids = torch.randint(3, 128, (1, 2))
    with torch.no_grad():
        logits = model(ids).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, logits)
        assert all(
            layer.layer is not other.layer
            for layer, other in zip(fused.fused_layers(twin), fused.fused_layers(model), strict=True)
        )
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(ids).logits, logits) and calls(again) > 0


def test_one_switch_turns_it_off(monkeypatch):
    monkeypatch.setenv(fused.SWITCH, "0")
    model = made("llama")
    assert not list(fused.fused_layers(model)) and fused.fuse(model) == "off: HF_LOWBIT_FUSED=0"


def test_a_failing_self_check_leaves_the_stock_forward(monkeypatch, caplog):
    monkeypatch.setattr(fused.FusedLayer, "finish", lambda self, x, *_: x * 1.5)
    with caplog.at_level(logging.WARNING):
        model = made("llama")
    assert not list(fused.fused_layers(model))
    assert "differ from the stock forward" in caplog.text


def test_models_that_do_not_qualify_say_why():
    model = made("llama", hidden_act="gelu")
    assert fused.fuse(model) == "activation 'gelu'"
    model = quantize(
        AutoModelForCausalLM.from_config(FAMILIES["llama"]), LowBitConfig(method="rtn", modules_to_not_convert=["down_proj"])
    )
    assert fused.fuse(model) == "mlp.down_proj is in high precision"
    model = made("llama", head_dim=8)
    assert fused.fuse(model) == "heads of 8 numbers, not a multiple of 16"


def tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, count, 4, generator=draw), torch.randn(2, 3, count, 4, generator=draw)


def appended(cache: DynamicCache, keys: torch.Tensor, values: torch.Tensor, number: int):
    """As the fused layer does it: written into the room where there is one, else the cache's own update."""
    room = room_in(cache, number, len(keys), keys.shape[2], keys.dtype)
    if room is None:
        return cache.update(keys, values, number)
    grown = room.grown(keys.shape[2])
    for whole, new in zip(grown, (keys, values), strict=True):
        whole[:, :, -new.shape[2] :] = new
    room.give(*grown)
    return grown


def test_appending_is_the_hosts_update():
    ours, stock = DynamicCache(), DynamicCache()
    for step, count in enumerate([5, 1, 2, 1, 300, 1]):
        found = appended(ours, *tokens(count, step), 0)
        expected = stock.update(*tokens(count, step), 0)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ours.get_seq_length() == stock.get_seq_length() == 310
    assert isinstance(ours.layers[0].lowbit_room, Room)


def test_nothing_that_was_written_is_written_over():
    cache = DynamicCache()
    appended(cache, *tokens(4, 0), 0)
    longer, _ = appended(cache, *tokens(3, 1), 0)
    kept = longer.clone()
    cache.crop(-2)
    twin, shallow = copy.deepcopy(cache), copy.copy(cache.layers[0])
    appended(cache, *tokens(2, 2), 0)
    appended(twin, *tokens(2, 3), 0)
    assert torch.equal(longer, kept)
    assert torch.equal(cache.layers[0].keys[:, :, 5:], tokens(2, 2)[0])
    assert torch.equal(twin.layers[0].keys[:, :, 5:], tokens(2, 3)[0])
    assert shallow.keys.shape[2] == 5 and torch.equal(shallow.keys, kept[:, :, :5])


def test_caches_are_pickled_without_their_room():
    cache = DynamicCache()
    appended(cache, *tokens(4, 0), 0)
    appended(cache, *tokens(1, 1), 0)
    file = io.BytesIO()
    torch.save(cache.layers[0], file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.lowbit_room is None and torch.equal(again.keys, cache.layers[0].keys)


def test_other_caches_update_themselves():
    model = made("llama")
    cache = StaticCache(config=model.config, max_cache_len=8)
    keys = torch.randn(1, 2, 1, 16)
    found, _ = appended(cache, keys, keys, 0)
    assert found.shape[2] == 8 and not hasattr(cache.layers[0], "lowbit_room")
