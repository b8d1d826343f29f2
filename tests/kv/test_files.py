"""Report, heat map and saved caches: what is said of a cache, and what comes back of it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from hf_lowbit import LowBitCache
from hf_lowbit.errors import BadRequest, FormatError
from hf_lowbit.kv.report import formula
from hf_lowbit.kv.settings import CacheSettings


@pytest.fixture
def used(model, ids):
    """A cache of 260 tokens."""
    cache = LowBitCache(model.config, low_bits=2, recent=16)
    with torch.no_grad():
        model(ids[:, :260], past_key_values=cache)
    return cache


@pytest.mark.parametrize("kwargs", [{}, {"low_bits": 4}, {"key_format": "token", "value_format": "channel"}], ids=str)
def test_bytes_are_those_of_the_formula(kwargs, module):
    tokens, dim = 4096, 64
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=dim)
    config.max_position_embeddings = 8192
    cache = LowBitCache(config, **kwargs)
    layer, draw = cache.layers[0], torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, tokens, dim, generator=draw).bfloat16() for _ in range(2))
    layer.update(keys, values)
    layer.attend(keys, None, 0.1, module, lambda k, v: v)
    found = cache.report()
    assert found.bits == pytest.approx(formula(CacheSettings(**kwargs), dim, tokens, 2), rel=0.02)
    vectors = 2 + (layer.held.frame.balance is not None)  # means of keys and of values
    assert sum(tier.bytes for tier in found.layers[0].tiers) == found.bytes - vectors * 2 * dim * 4
    if not kwargs:
        assert found.bits < 4  # a quarter of fp16


def test_the_report_says_what_was_moved_down_when(used):
    text = str(used.report())
    assert "260 tokens" in text and "compiled kernel" in text and "260 (192)" in text
    assert [tier.name for tier in used.report().layers[0].tiers] == ["important", "recent", "low"]


def test_a_saved_cache_goes_on_where_it_stood(used, model, ids, tmp_path):
    path = used.save(tmp_path / "prompt.safetensors")
    again = LowBitCache.load(path, model.config)
    assert again.get_seq_length() == 260
    with torch.no_grad():
        for at in range(260, 300, 4):
            ours, theirs = (model(ids[:, at : at + 4], past_key_values=cache).logits for cache in (again, used))
            assert torch.equal(ours, theirs)


def test_what_is_no_saved_cache_is_refused(used, model, tmp_path):
    path = used.save(tmp_path / "prompt.safetensors")
    other = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    with pytest.raises(FormatError, match="is the cache of another model: num_hidden_layers 4 instead of 2"):
        LowBitCache.load(path, other)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="cannot be read as a saved cache"):
        LowBitCache.load(path, model.config)
    with pytest.raises(FormatError, match="cannot be read"):
        LowBitCache.load(tmp_path / "nothing", model.config)


def test_heat_maps(used, model, tmp_path):
    picture = used.heatmap(tmp_path / "map.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture[16:24] == (260).to_bytes(4, "big") + (12 * 4).to_bytes(4, "big")
    assert "260 tokens from left to right" in used.heatmap(tmp_path / "map.html").read_text()
    with pytest.raises(BadRequest, match=r"written as .png or .html, got 'map.pdf'"):
        used.heatmap(tmp_path / "map.pdf")
    with pytest.raises(BadRequest, match="sequence 3 was asked for, the cache holds 1"):
        used.heatmap(tmp_path / "map.png", sequence=3)
    with pytest.raises(BadRequest, match="there is nothing to draw"):
        LowBitCache(model.config).heatmap(tmp_path / "map.png")


def test_a_cache_on_another_device_is_refused(model, ids):
    cache = LowBitCache(model.config)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
    there = torch.zeros(1, 2, 1, 64, device="meta")
    with pytest.raises(
        BadRequest, match=r"the cache is on cpu, meta tokens were given. Load a saved cache with device='meta'"
    ):
        cache.layers[0].update(there, there)
