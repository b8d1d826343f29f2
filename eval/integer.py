"""Seconds of one layer in whole numbers, beside the float simulation of the same rounding and a dense float32 layer.

    python eval/integer.py [--name NAME]

Layers of a 1 B model (2048 to 2048 and 2048 to 8192), one scale per row, activations at 8 bits with a step per token, for
1, 16 and 128 tokens. The best of alternating calls, since the machine is shared.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from results_file import write
from torch import nn

from hf_lowbit.format import Spec
from hf_lowbit.format.activations import ActivationLayout, ActivationSpec
from hf_lowbit.kernels import integer
from hf_lowbit.plugin.modules import ActivationQuantizer, LowBitLinear
from hf_lowbit.solvers import solve

ROUNDS = 15


@torch.no_grad()
def main() -> None:
    """Time every layer and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="integer")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    for out in (2048, 8192):
        dense = nn.Linear(2048, out, bias=False)
        for bits in (8, 4):
            record = solve(dense.weight, Spec(method="rtn", bits=bits, group_size=-1, scale_bits=16))
            whole, plain = LowBitLinear.from_tensor(record), LowBitLinear.from_tensor(record)
            for module in (whole, plain):
                module.activation = ActivationQuantizer(ActivationLayout(2048, ActivationSpec(8)), {})
            x = torch.randn(1, 2048)
            whole(x)
            with integer.simulated():
                plain(x)
            for tokens in (1, 16, 128):
                x = torch.randn(tokens, 2048)
                runs: dict[str, list[float]] = {"integer": [], "simulated": [], "dense": []}
                for _ in range(ROUNDS):
                    for name, module in (("integer", whole), ("simulated", plain), ("dense", dense)):
                        begun = time.perf_counter()
                        module(x)
                        runs[name].append(time.perf_counter() - begun)
                off = float((whole(x) - plain(x)).abs().max() / plain(x).abs().max())
                row = {f"{name}_ms": round(1e3 * min(times), 3) for name, times in runs.items()}
                rows[f"W{bits}A8 2048 to {out}, {tokens} tokens"] = row | {"largest_difference": float(f"{off:.1e}")}
                print(f"W{bits}A8 2048 to {out}, {tokens:3} tokens: {row}  differ by {off:.1e}", flush=True)
    write(args.name, rows)


if __name__ == "__main__":
    main()
