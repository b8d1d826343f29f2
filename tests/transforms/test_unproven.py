"""Parts that cannot be followed: they are left alone, that is reported, and the function stays whatever is asked for."""

from __future__ import annotations

import exact
import pytest
import torch
from torch import nn
from transform_table import ROWS, WINDOWS
from transformers import AttentionInterface

from hf_lowbit import explain, quantize
from hf_lowbit.errors import BadRequest
from hf_lowbit.plugin.compress import prepare_targets
from hf_lowbit.plugin.rewrite import rewrite, unrounded
from hf_lowbit.transforms import TRANSFORMS
from hf_lowbit.transforms.algebra import Scale, Shift, Weights


class Experts(nn.Module):
    """Experts in a list, of which one runs; ``chosen`` stands for a router, whose choice depends on the text."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(2))
        self.chosen = 0

    def forward(self, x):
        return self.experts[self.chosen](x)


class Sine(nn.Module):
    """A second reader of its input that is no matrix."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(size, size, bias=False)

    def forward(self, x):
        return self.up_proj(x) + torch.sin(x)


def softmax_plus_one(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention with one more in the denominator, so that the weights of a token sum to less than 1."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).exp()
    weights = weights / (1 + weights.sum(-1, keepdim=True))
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("softmax_plus_one", softmax_plus_one)
# what is odd -> (a place, why it is left alone)
ODD = {
    "expert": ("model.layers.0.self_attn.q_proj+k_proj+v_proj", "mlp.experts.1.weight did not run on the tokens tried"),
    "sine": ("model.layers.0.mlp.up_proj", "also used by sin"),
    "plus one": ("model.layers.0.self_attn.o_proj", "matmul, which a scale does not pass"),
}


def odd_model(kind: str):
    model = exact.make_model("llama-mha-biased")
    torch.manual_seed(1)
    for layer in model.model.layers:
        if kind != "plus one":
            layer.mlp = (Experts if kind == "expert" else Sine)(48).double()
    if kind == "plus one":
        model.config._attn_implementation = "softmax_plus_one"
    return model


@pytest.mark.parametrize("kind", ODD)
def test_it_is_named_and_not_folded(kind):
    model = odd_model(kind)
    graph = exact.graph_of(model)
    name, reason = ODD[kind]
    site = next(site for site in graph.sites if site.name == name)
    assert reason in site.trouble
    for step in (Scale(site, torch.full((site.size,), 2.0)), Shift(site, torch.ones(site.size))):
        with pytest.raises(BadRequest, match="cannot be folded"):
            step.apply(Weights.of(model))
    if kind != "plus one":
        assert graph.residual.trouble is not None


EXACT = [row for row in ROWS if row.exact and TRANSFORMS[row.name].kind != "range"]


@torch.no_grad()
@pytest.mark.parametrize("entry", EXACT, ids=lambda entry: entry.name)
@pytest.mark.parametrize("kind", ODD)
def test_the_function_stays(kind, entry):
    model, config = odd_model(kind).float(), entry.config

    def choose(number: int) -> None:
        for layer in model.model.layers if kind == "expert" else ():
            layer.mlp.chosen = number

    choose(1)
    before = model(exact.IDS).logits
    choose(0)
    done = rewrite(model, config, prepare_targets(model, config), WINDOWS)
    choose(1)
    with unrounded(model, done.intakes):
        assert float((model(exact.IDS).logits - before).abs().max()) < 1e-3


def test_what_is_left_alone_is_reported():
    model = odd_model("expert").float()
    config = next(row.config for row in ROWS if row.name == "hadamard")
    low = quantize(model, config)
    rows = {row["name"]: row["left_alone"] for row in low.hf_quantizer.report if "left_alone" in row}
    assert "did not run on the tokens tried" in rows["residual stream"]
    assert rows["model.layers.0.mlp.experts.1.weight"] == "the traced pass did not reach it"
    text = str(explain(low))
    assert "residual stream" in text and "left alone by hadamard: the traced pass did not reach it" in text
