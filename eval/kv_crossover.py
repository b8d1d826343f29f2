"""From how many new tokens on decoding the packed past pays: the compiled kernel, decoded slabs, and the whole past decoded.

    python eval/kv_crossover.py [--past 1024,4096] [--tokens 1,4,8,16,32,64,128]

One layer of the 1 B model's shape (8 heads of keys and 32 of queries, 64 wide). ``kernel`` reads packed blocks as they are,
``slabs`` decodes 1,024 tokens at a time and multiplies matrices, ``whole`` decodes everything and calls the host's ``sdpa``.
``hf_lowbit.kv.layer.FEW`` is the rule that follows: up to that many tokens go through the kernel, more through slabs; a
prompt without a past is the host's ``sdpa`` alone.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from results_file import write

from hf_lowbit.kv import layer as kv_layer
from hf_lowbit.kv.layer import LowBitLayer
from hf_lowbit.kv.settings import CacheSettings

HEADS, GROUP, DIM = 8, 4, 64


class Module:
    """Stands for an attention module."""


def filled(tokens: int, owner: Module) -> LowBitLayer:
    """A layer of random keys and values, by default settings."""
    draw, kv_layer.FEW = torch.Generator().manual_seed(0), 0
    layer = LowBitLayer(CacheSettings())
    keys, values = torch.randn(2, 1, HEADS, tokens, DIM, generator=draw)
    layer.update(keys, values)
    layer.attend(
        torch.randn(1, HEADS * GROUP, tokens, DIM, generator=draw), None, 0.125, owner, lambda k, v: v.transpose(1, 2)
    )
    return layer


def seconds(layer: LowBitLayer, way: str, tokens: int, owner: Module, rounds: int) -> float:
    """The median time of ``tokens`` more."""
    draw = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 1, HEADS, tokens, DIM, generator=draw)
    queries = torch.randn(1, HEADS * GROUP, tokens, DIM, generator=draw)
    kv_layer.FEW = {"kernel": 1 << 30, "slabs": 0, "whole": 1 << 30}[way]
    mask = torch.ones(tokens, layer.length + tokens, dtype=torch.bool).tril(layer.length)
    times = []
    for _ in range(rounds + 1):
        layer._owner = None
        one = copy.deepcopy(layer)
        begun = time.perf_counter()
        one.update(keys, values)
        if way == "whole":
            wide = [side.repeat_interleave(GROUP, 1) for side in one.dense()]
            torch.nn.functional.scaled_dot_product_attention(queries, *wide, mask, scale=0.125)
        else:
            one.attend(queries, None, 0.125, owner, lambda k, v: v)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main() -> None:
    """Measure, write ``eval/results/kv_crossover.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--past", default="1024,4096")
    parser.add_argument("--tokens", default="1,4,8,16,32,64,128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rule, rows = kv_layer.FEW, {}
    owner: Any = Module()
    for past in map(int, args.past.split(",")):
        layer = filled(past, owner)
        for tokens in map(int, args.tokens.split(",")):
            found = {way: 1000 * seconds(layer, way, tokens, owner, args.rounds) for way in ("kernel", "slabs", "whole")}
            rows[f"{tokens} tokens behind {past}"] = found
            print(f"{tokens:4} behind {past:5}: {', '.join(f'{way} {ms:.2f} ms' for way, ms in found.items())}", flush=True)
    print("written to", write("kv_crossover", {"few": rule, "milliseconds": rows}))


if __name__ == "__main__":
    main()
