"""The low-bit cache in low-bit models: fused decoding over it, and the cache a checkpoint asks for."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_lowbit import LowBitCache, LowBitConfig, quantize
from hf_lowbit.errors import BadRequest
from hf_lowbit.kernels import cpu, cpu_library
from hf_lowbit.plugin import fused

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason=str(cpu_library.trouble()))


@pytest.fixture(scope="module")
def model(quantized):
    return AutoModelForCausalLM.from_pretrained(quantized, dtype="float32").eval()


@torch.no_grad()
def steps(model, ids, cache):
    model(ids[:, :200], past_key_values=cache)
    parts = [
        model(ids[:, at : at + count], past_key_values=cache).logits
        for at, count in ((200, 1), (201, 4), (205, 8), (213, 1))
    ]
    return torch.cat(parts, 1)


def test_decoding_stays_fused_over_the_low_bit_cache(model):
    ids = torch.randint(3, 4000, (1, 214), generator=torch.Generator().manual_seed(0))
    with cpu.arithmetic("exact"):
        before = sum(layer.calls for layer in fused.fused_layers(model))
        ours = steps(model, ids, LowBitCache(model.config, low_bits=4, recent=16))
        assert sum(layer.calls for layer in fused.fused_layers(model)) - before == 4 * model.config.num_hidden_layers
        fused.unfuse(model)
        stock = steps(model, ids, LowBitCache(model.config, low_bits=4, recent=16))
        fused.fuse(model)
    assert (ours - stock).abs().max() <= 2e-3 * stock.abs().max()


def test_16_bits_are_the_dynamic_cache_in_fused_layers_too(model):
    ids = torch.randint(3, 4000, (1, 214), generator=torch.Generator().manual_seed(1))
    ours = steps(model, ids, LowBitCache(model.config, high_bits=16, important=1.0))
    assert torch.equal(ours, steps(model, ids, DynamicCache(config=model.config)))


def test_a_checkpoint_carries_its_cache(model, tmp_path):
    dense = copy.deepcopy(model).dequantize()
    low = quantize(dense, LowBitConfig(method="rtn", kv_cache={"low_bits": 4, "recent": 24}))
    low.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    ids = torch.randint(3, 4000, (1, 150), generator=torch.Generator().manual_seed(2))
    out = again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    cache = out.past_key_values
    assert isinstance(cache, LowBitCache) and cache.settings.low_bits == 4 and cache.settings.recent == 24
    given = again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
                           past_key_values=DynamicCache(config=again.config))  # fmt: skip
    assert type(given.past_key_values) is DynamicCache


def test_a_cache_the_model_cannot_have_is_refused_with_the_model(model):
    dense = copy.deepcopy(model).dequantize()
    with pytest.raises(BadRequest, match="group=48 does not divide"):
        quantize(dense, LowBitConfig(method="rtn", kv_cache={"group": 48}))
    with pytest.raises(BadRequest, match=r"unknown KV cache setting 'low_bit'\. Did you mean 'low_bits'"):
        LowBitConfig(kv_cache={"low_bit": 4})
