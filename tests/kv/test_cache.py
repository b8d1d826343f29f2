"""The cache in the host's hands: every way of generating, the same tokens, and clear words where it cannot serve."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, LlamaConfig, MistralConfig

from hf_lowbit import LowBitCache
from hf_lowbit.errors import BadRequest
from hf_lowbit.kv.settings import ATTENTION

EIGHT = {"low_bits": 8, "recent": 32}
PLAIN = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture
def small():
    """A random model of two layers, whose cache is not the embedded model's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=512)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model, ids, cache, prompt=120, tokens=1, mask=None):
    """Teacher-forced: a prompt, then ``tokens`` at a time."""
    out = [model(ids[:, :prompt], attention_mask=None if mask is None else mask[:, :prompt], past_key_values=cache).logits]
    for at in range(prompt, ids.shape[1], tokens):
        end = min(at + tokens, ids.shape[1])
        seen = None if mask is None else mask[:, :end]
        out.append(model(ids[:, at:end], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(out, 1)


def divergence(ours, true):
    ours, true = ours.log_softmax(-1), true.log_softmax(-1)
    return float(torch.nn.functional.kl_div(ours, true, log_target=True, reduction="sum") / true.shape[:-1].numel())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_tokens_in_16_bits_are_the_dynamic_cache(small, attention):
    small.set_attn_implementation(attention)
    ids = torch.randint(3, 128, (2, 80), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    ours = logits(small, ids, LowBitCache(small.config, high_bits=16, important=1.0), 40, 3, mask)
    small.set_attn_implementation(attention)
    assert torch.equal(ours, logits(small, ids, DynamicCache(config=small.config), 40, 3, mask))


def test_bits_buy_fidelity(model, ids):
    ids = ids[:, :320]
    true = logits(model, ids, DynamicCache(config=model.config), 200, 8)
    found = {}
    for bits in (8, 4, 3, 2):
        found[bits] = divergence(logits(model, ids, LowBitCache(model.config, low_bits=bits, recent=32), 200, 8), true)
    assert found[8] < 1e-4 and found[4] < 2e-3 and found[8] < found[4] < found[3] < found[2] < 0.1


def test_attention_that_does_not_know_the_cache_gets_it_decoded(model, ids):
    model = copy.deepcopy(model)
    cache = LowBitCache(model.config, **EIGHT)
    assert model.config._attn_implementation == ATTENTION
    known = logits(model, ids[:, :150], cache)
    model.set_attn_implementation("eager")
    cache = LowBitCache(model.config, **EIGHT)
    assert model.config._attn_implementation == "eager"
    assert divergence(logits(model, ids[:, :150], cache), known) < 1e-4
    assert "decoded whole at every step" in str(cache.report())
    model.set_attn_implementation("sdpa")
    assert divergence(logits(model, ids[:, :150], LowBitCache(copy.deepcopy(model.config), **EIGHT)), known) < 1e-4


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "several of each": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "contrasted with penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_generating_gives_the_tokens_of_the_dynamic_cache(model, ids, mode):
    kwargs = PLAIN | {"max_new_tokens": 24} | MODES[mode]
    found = []
    for cache in (DynamicCache(config=model.config), LowBitCache(model.config, **EIGHT)):
        torch.manual_seed(6)
        found.append(model.generate(ids[:, 40:260], past_key_values=cache, **kwargs))
    assert torch.equal(*found)


def test_assisted_decoding(model, ids, small):
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    plain = model.generate(ids[:, :220], max_new_tokens=24, **PLAIN)
    cache = LowBitCache(model.config, **EIGHT)
    ours = model.generate(ids[:, :220], max_new_tokens=24, assistant_model=assistant, past_key_values=cache, **PLAIN)
    assert torch.equal(plain, ours)


def test_a_batch_with_padding_is_its_sequences_one_by_one(model, ids):
    batch, mask = torch.zeros(2, 200, dtype=torch.long), torch.zeros(2, 200, dtype=torch.long)
    for row, length in enumerate((140, 200)):
        batch[row, 200 - length :] = ids[0, :length]
        mask[row, 200 - length :] = 1
    cache = LowBitCache(model.config, **EIGHT)
    both = model.generate(batch, attention_mask=mask, max_new_tokens=16, past_key_values=cache, **PLAIN)[:, 200:]
    for row, length in enumerate((140, 200)):
        alone = model.generate(
            ids[:, :length], max_new_tokens=16, past_key_values=LowBitCache(model.config, **EIGHT), **PLAIN
        )
        assert torch.equal(both[row], alone[0, length:])


def test_a_conversation_goes_on_with_its_cache(model, ids):
    found = []
    for cache in (DynamicCache(config=model.config), LowBitCache(model.config, **EIGHT)):
        text = model.generate(ids[:, :150], max_new_tokens=8, past_key_values=cache, **PLAIN)
        text = torch.cat([text, ids[:, 300:420]], 1)
        found.append(model.generate(text, max_new_tokens=12, past_key_values=cache, **PLAIN))
        assert cache.get_seq_length() == found[-1].shape[1] - 1
    assert torch.equal(*found)


def test_a_prompt_behind_a_packed_past_counts_attention_as_one_prompt_does(model, ids):
    with torch.no_grad():
        parts = LowBitCache(model.config, low_bits=4, recent=16, importance="exact")
        for at in range(0, 400, 100):
            model(ids[:, at : at + 100], past_key_values=parts)
        whole = LowBitCache(model.config, low_bits=4, recent=16, importance="exact")
        model(ids[:, :400], past_key_values=whole)
    kept = [
        set(cache.layers[0].held.kept.tensors["position"][0, 0, : cache.layers[0].held.kept.length].tolist())
        for cache in (parts, whole)
    ]
    assert len(kept[0] & kept[1]) > 0.6 * len(kept[1])


@pytest.mark.slow
def test_a_compiled_model(small):
    ids = torch.randint(3, 128, (1, 120), generator=torch.Generator().manual_seed(1))
    plain = logits(small, ids, LowBitCache(small.config, low_bits=4, recent=16), 100)
    compiled = torch.compile(small, backend="eager")
    ours = logits(compiled, ids, LowBitCache(small.config, low_bits=4, recent=16), 100)
    assert torch.allclose(plain, ours, atol=1e-4)


def test_offloading_moves_everything_and_back(model, ids):
    caches = [LowBitCache(model.config, low_bits=2, recent=16) for _ in range(2)]
    found = []
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :200], past_key_values=cache)
            if cache is caches[0]:
                for layer in cache.layers:
                    layer.offload()
                    layer.prefetch()
            found.append(model(ids[:, 200:201], past_key_values=cache).logits)
    assert torch.equal(*found)


def test_layers_without_full_attention_are_the_hosts(ids):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "vocab_size": 4096,
        "num_hidden_layers": 3,
    }
    sliding = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=16, sliding_window=64, layer_types=sliding)
    torch.manual_seed(0)
    mixed = AutoModelForCausalLM.from_config(config).eval()
    true = logits(mixed, ids[:, :200], DynamicCache(config=mixed.config))
    cache = LowBitCache(mixed.config, **EIGHT)
    assert divergence(logits(mixed, ids[:, :200], cache), true) < 1e-4
    assert list(cache.fallbacks) == [0, 2] and list(cache.low_bit_layers()) == [1]
    assert "stock: sliding_attention" in str(cache.report())
    every = LowBitCache(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=32))
    assert not every.low_bit_layers()


def test_reset_makes_the_cache_new(model, ids):
    cache = LowBitCache(model.config, **EIGHT)
    first = logits(model, ids[:, :160], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(first, logits(model, ids[:, :160], cache))


def test_a_plan_by_layer(model, ids):
    cache = LowBitCache(model.config, low_bits=2, recent=16, protect=1, layers={"2": {"low_bits": [4, 3]}})
    with torch.no_grad():
        model(ids[:, :300], past_key_values=cache)
        model(ids[:, 300:301], past_key_values=cache)
    tiers = [
        [(tier.key_bits, tier.value_bits) for tier in layer.tiers if tier.name == "low"] for layer in cache.report().layers
    ]
    assert tiers[0] == tiers[-1] == [] and tiers[1] == [(2, 2)] and tiers[2] == [(4, 3)]


# What it refuses.


def refused(call):
    with pytest.raises(BadRequest) as caught:
        call()
    return str(caught.value)


def test_crop_says_what_can_be_taken_back(model, ids):
    cache = LowBitCache(model.config, low_bits=2, recent=20)
    with torch.no_grad():
        model(ids[:, :300], past_key_values=cache)
        assert "as a negative number, got 3" in refused(lambda: cache.crop(3))
        assert "take back its newest 20, older ones are packed. Use a larger recent (it is 20)" in refused(
            lambda: cache.crop(-21)
        )
        assert cache.get_seq_length() == 300
        cache.crop(-20)
        assert cache.get_seq_length() == 280
        assert torch.isfinite(model(ids[:, 280:281], past_key_values=cache).logits).all()
        short = LowBitCache(model.config)
        model(ids[:, :50], past_key_values=short)
        assert "newest 50" in refused(lambda: short.crop(-51))


def test_another_batch_is_refused_and_changes_nothing(model, ids):
    cache = LowBitCache(model.config, **EIGHT)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
        two = ids[:, 60:61].repeat(2, 1)
        assert "the cache holds 1 sequences, 2 were given" in refused(lambda: model(two, past_key_values=cache))
        assert cache.get_seq_length() == 60
        model(ids[:, 60:61], past_key_values=cache)


def test_another_models_cache_is_refused(model, small, ids):
    cache = LowBitCache(model.config, **EIGHT)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
        assert "is it another model's?" in refused(lambda: small(ids[:, :5] % 128, past_key_values=cache))
        twin = copy.deepcopy(model)
        assert "in use by another model" in refused(lambda: twin(ids[:, 60:61], past_key_values=cache))
        cache = LowBitCache(small.config)
        assert "this cache has 2 layers, layer 2 was given" in refused(lambda: model(ids[:, :9], past_key_values=cache))


def test_a_forward_that_was_broken_off_is_noticed(model, ids):
    cache = LowBitCache(model.config, **EIGHT)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
        cache.layers[0].update(torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 64))
        assert "a forward pass was broken off" in refused(lambda: model(ids[:, 60:61], past_key_values=cache))


def test_more_tokens_than_positions_are_refused(small):
    cache = LowBitCache(small.config)
    with torch.no_grad():
        small(torch.zeros(1, 500, dtype=torch.long), past_key_values=cache)
        message = refused(lambda: small(torch.zeros(1, 13, dtype=torch.long), past_key_values=cache))
        assert "the model has 512 positions, 500 are taken and 13 more tokens were given" in message
        small(torch.zeros(1, 12, dtype=torch.long), past_key_values=cache)


class Bare:
    """A config that lacks what a cache needs."""

    def get_text_config(self, decoder=True):
        return self


BAD = {
    "high_bits must be one of 8, 16, got 4": {"high_bits": 4},
    "low tiers take 2, 3, 4 bits under high_bits=8, got 5 for keys": {"low_bits": 5},
    "important is a share of the tokens, 0 to 1, got 1.5": {"important": 1.5},
    "recent must be a whole number of at least 0, got -1": {"recent": -1},
    "unknown KV cache setting 'recents'. Did you mean 'recent'?": {"recents": 3},
    "decay is a weight above 0 and up to 1, got 0": {"decay": 0},
    "unknown fit 'serch'. Did you mean 'search'?": {"fit": ["serch", "range"]},
    "unknown key_format 'chanel'. Did you mean 'channel'?": {"key_format": "chanel"},
    "group=48 does not divide the model's heads of 64 numbers": {"group": 48},
    "unknown level family 'afine'": {"levels": "afine"},
    "add up to more than 1": {"tiers": [[4, 0.7], [2, 0.6]]},
    "layers names layer 40, the model has": {"layers": {"40": {"low_bits": 4}}},
    "layers must map numbers of layers to settings, got 'first'": {"layers": {"first": {"low_bits": 4}}},
    "8 bits for one of keys and values only": {"high_bits": 16, "low_bits": [8, 4]},
    "need numbers fitted to a matrix": {"levels": "power"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings(model, message):
    assert message in refused(lambda: LowBitCache(model.config, **BAD[message]))


def test_bad_configs(small):
    assert "needs the model's config (model.config), got str" in refused(lambda: LowBitCache("llama"))
    assert "has no num_hidden_layers" in refused(lambda: LowBitCache(Bare()))
    small.config.head_dim = 12
    assert "heads of a multiple of 8 numbers, this model's have 12; use low_bits=8" in refused(
        lambda: LowBitCache(small.config)
    )
    assert "power of 2" in refused(lambda: LowBitCache(small.config, low_bits=8, high_bits=16, hadamard=True))
