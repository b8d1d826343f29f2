"""What importance can buy on a model: the attention that falls on packed tokens, by who is packed.

    python eval/kv_bounds.py --model DIR --text FILE [--length N] [--windows 2] [--name NAME]

Plays the cache's schedule (a prompt of 128 tokens, then 8 at a time; blocks of 64 are packed for good when the important
ones exceed their share) on the exact attention of the model and sums what later queries give to packed tokens: the share of
attention that is read at low precision. ``future`` ranks tokens by the attention they are going to get, which no cache can
know: the most any rule can reach.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from kv_cache import PROMPT, STEP, held_out
from results_file import write
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_lowbit.kernels.packed_cache import BLOCK

SINKS = 4
RULES = ("chance", "the newest stay", "all queries alike", "decay 0.95", "future")


def rank(rule: str, attention: torch.Tensor, seen: int, draw: torch.Generator) -> torch.Tensor:
    """Importance ``[heads, seen]`` of tokens when ``seen`` tokens have been read; ``attention [heads, queries, keys]``."""
    heads = len(attention)
    if rule == "chance":
        return torch.rand(heads, seen, generator=draw)
    if rule == "the newest stay":
        return torch.arange(seen).float().expand(heads, seen)
    if rule == "future":
        return attention[:, seen:, :seen].mean(1)
    fade = (1.0 if rule == "all queries alike" else 0.95) ** torch.arange(seen - 1, -1, -1)
    sums = (attention[:, :seen, :seen] * fade[:, None]).sum(1)
    return sums / fade.flip(0).cumsum(0).flip(0)


def read_low(rule: str, attention: torch.Tensor, share: float, recent: int) -> float:
    """Share of the attention behind the prompt that falls on packed tokens."""
    heads, length, _ = attention.shape
    packed, draw = torch.zeros(heads, length, dtype=torch.bool), torch.Generator().manual_seed(0)
    found = []
    for seen in range(PROMPT, length, STEP):
        rows = int((~packed[0, :seen]).sum())
        over = rows - max(-int(-share * seen // 1), SINKS + recent + BLOCK)
        count = min(-(-over // BLOCK), (rows - SINKS - recent) // BLOCK) * BLOCK
        if count > 0:
            scores = rank(rule, attention, seen, draw).masked_fill(packed[:, :seen], torch.inf).clone()
            scores[:, :SINKS] = scores[:, seen - recent :] = torch.inf
            packed.scatter_(1, scores.topk(count, 1, largest=False).indices, True)
        found.append((attention[:, seen : seen + STEP] * packed[:, None]).sum(-1).mean())
    return float(torch.stack(found).mean())


@torch.no_grad()
def attention_of(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of every layer ``[windows, heads of keys, n, n]``, the mean over the heads that share keys."""
    groups = model.config.num_key_value_heads
    return [found.unflatten(1, (groups, -1)).mean(2) for found in model(ids, output_attentions=True).attentions]


def main() -> None:
    """Measure, write ``eval/results/kv_bounds....json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--recent", type=int, default=32)
    parser.add_argument("--name", default="kv_bounds")
    args = parser.parse_args()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32", attn_implementation="eager").eval()
    length = args.length or model.config.max_position_embeddings
    layers = attention_of(model, held_out(args.model, args.text, length, args.windows))
    rows = {}
    for rule in RULES:
        shares = [sum(read_low(rule, window, args.share, args.recent) for window in layer) / len(layer) for layer in layers]
        rows[rule] = {"by_layer": shares, "mean": sum(shares) / len(shares)}
        print(
            f"{rule:18} {rows[rule]['mean']:.3f} of the attention is read low; {[round(s, 3) for s in shares]}", flush=True
        )
    print("written to", write(args.name, {"context": length, "important": args.share, "recent": args.recent, "rows": rows}))


if __name__ == "__main__":
    main()
