"""Plant outliers in a Llama-like model: the same function, exactly, with activations like those of large models.

    python eval/planted_outliers.py --model DIR --out DIR [--share 0.01] [--seed 0]

A random share of the residual channels is scaled by 30 to 100 in every norm and undone in all its readers; as large a share
of the value channels is shifted by ten times the size of attention's output, through biases, and undone behind it. All of it
is computed in float64 and compared there; the result is a float32 checkpoint of the stock class.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit.demo import embedded_model, held_out_text
from hf_lowbit.plugin.rewrite import graph_of
from hf_lowbit.transforms.algebra import Scale, Shift, Weights

LEAST, MOST, SHIFT = 30.0, 100.0, 10.0
TOKENS = 512


class Float64(TorchFunctionMode):
    """Lets no operation cast to float32, as norms and softmaxes do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run ``func`` with float64 in the place of float32."""
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        if getattr(func, "__name__", "") == "float":
            return args[0].double()
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **kwargs)


def with_biases(model: nn.Module) -> None:
    """Zero biases for the attention of a model without, as its config's ``attention_bias`` has them."""
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=linear.weight.dtype))
    model.config.attention_bias = True


@torch.no_grad()
def plant(model: nn.Module, ids: Tensor, share: float, seed: int) -> dict[str, int]:
    """Plant outliers in a float64 model, in place; returns how many channels of what.

    Args:
        ids: tokens ``[1, n]`` to measure the size of attention's output on.
    """
    draw = torch.Generator().manual_seed(seed)
    with_biases(model)
    weights, graph = Weights.of(model), graph_of(model)
    size = graph.residual.size
    chosen = torch.randperm(size, generator=draw)[: max(1, round(share * size))]
    seen: dict[str, Tensor] = {}
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, n=number: seen.__setitem__(n, args[0]))
        for number, layer in enumerate(model.model.layers)
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    heads = shifted = 0
    for site in graph.sites:
        if site.producer is None:
            continue
        if site.kind == "norm":
            factor = torch.ones(size, dtype=torch.float64)
            random = torch.rand(len(chosen), generator=draw, dtype=torch.float64)
            factor[chosen] = 1 / (LEAST * (MOST / LEAST) ** random)
            Scale(site, factor).apply(weights)
        elif site.kind == "attention":
            own = torch.zeros(site.producer.size, dtype=torch.float64)
            values = torch.randperm(site.producer.size, generator=draw)[: max(1, round(share * site.producer.size))]
            signs = torch.randint(0, 2, (len(values),), generator=draw).double() * 2 - 1
            own[values] = SHIFT * signs * seen[heads].double().std()
            shifted = len(values)
            heads += 1
            Shift(site, own[site.producer.channels]).apply(weights)
    return {"residual_channels": len(chosen), "value_channels_per_layer": shifted}


@torch.no_grad()
def main() -> None:
    """Plant, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--out", required=True)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(held_out_text()).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:TOKENS])[None]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().double()
    with Float64():
        before = model(input_ids=ids).logits
        planted = copy.deepcopy(model)
        found = plant(planted, ids, args.share, args.seed)
        error = float((planted(input_ids=ids).logits - before).norm() / before.norm())
    print(f"planted {found}; relative error in float64 {error:.2e}")
    if error > 1e-10:
        raise SystemExit("not the same function: nothing was written")
    planted.float().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
