"""What the cache's tests share: the embedded model, a few lines of text, and random layers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import demo
from hf_lowbit.kv.layer import LowBitLayer
from hf_lowbit.kv.settings import CacheSettings


@pytest.fixture(autouse=True)
def threads(one_thread):
    """One thread: the test processes share two cores."""


@pytest.fixture(scope="session")
def model():
    """The embedded model in float32."""
    return AutoModelForCausalLM.from_pretrained(demo.embedded_model(), dtype="float32").eval()


@pytest.fixture(scope="session")
def ids():
    """600 tokens of text the embedded model has not seen."""
    tokenizer = AutoTokenizer.from_pretrained(demo.embedded_model())
    text = (demo.embedded_model() / "held_out.txt").read_text(encoding="utf-8")[:4000]
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :600]


class Module:
    """Stands for an attention module."""

    is_causal, scaling = True, 0.25


@pytest.fixture(scope="session")
def module():
    """An attention module of its own."""
    return Module()


@pytest.fixture(scope="session")
def filled():
    """``filled(module, tokens, **settings)``: a layer with that many random tokens of two heads of keys, and its inputs."""

    def make(module, tokens=300, batch=2, dim=32, group=2, dtype=torch.float32, mask=None, device="cpu", **settings):
        draw = torch.Generator().manual_seed(tokens + dim)
        layer = LowBitLayer(CacheSettings(**({"recent": 16, "low_bits": 2, "important": 0.2} | settings)))
        spread = 1 + 3 * torch.rand(dim, generator=draw)  # channels of different size, as keys have
        keys = (torch.randn(batch, 2, tokens + 64, dim, generator=draw) * spread).to(device, dtype)
        values = torch.randn(batch, 2, tokens + 64, dim, generator=draw).to(device, dtype)
        queries = torch.randn(batch, 2 * group, tokens + 64, dim, generator=draw).to(device, dtype)
        layer.update(keys[:, :, :tokens], values[:, :, :tokens])
        layer.attend(queries[:, :, :tokens], mask, 0.25, module, lambda k, v: torch.zeros(1, device=device))
        return layer, queries, keys, values

    return make
