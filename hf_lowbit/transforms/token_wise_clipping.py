"""Token-wise clipping, the coarse stage (Outlier Suppression, arXiv 2209.13325, section 4.2).

A token's largest value is its own; clipping what only the top tokens reach costs those tokens little and all others nothing.
One share of tokens is searched for the whole model, by the error at its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.transforms.registry import Extremes, RangeBench, transform

# How far down the share of tokens is searched, by bits (those between take the next narrower).
REACH = {8: 0.1, 6: 0.3, 4: 0.9}
# A quantile over fewer tokens than this many per candidate is one token's.
STEP = 0.01


@transform(
    "token_wise_clipping",
    kind="range",
    needs="rounding",
    summary="static ranges that clip the share of tokens the outputs can spare",
    options={"step": STEP},
)
def token_wise_clipping(bench: RangeBench, options: Mapping[str, Any]) -> None:
    """Choose one quantile of tokens for all ranges."""
    reach = next((share for bits, share in REACH.items() if bench.bits >= bits), REACH[4])
    step = float(options["step"])
    tried = []
    for number in range(max(1, round(reach / step))):
        ratio = 1 - number * step
        bench.set({name: clipped(seen, ratio) for name, seen in bench.extremes.items()})
        tried.append((bench.loss(), -ratio))
    best = -min(tried)[1]
    bench.set({name: clipped(seen, best) for name, seen in bench.extremes.items()})


def clipped(seen: Extremes, ratio: float) -> tuple[Tensor, Tensor]:
    """The range of the tokens whose extremes lie within a quantile, on either side: ``[steps]`` each."""
    high = torch.quantile(seen.high, ratio, dim=0, interpolation="lower")
    low = -torch.quantile(-seen.low, ratio, dim=0, interpolation="lower")
    return low, high
