"""Token-wise clipping, coarse and fine (Outlier Suppression, arXiv 2209.13325, section 4.2).

A token's largest value is its own; clipping what only the top tokens reach costs those tokens little and all others nothing.
Coarse: one share of tokens is searched for the whole model, by the error at its outputs. Fine: from there both ends of
every range are learned by the same error, with the gradients of LSQ+ (arXiv 2004.09576); what does not help on windows that
were not learned from is not kept. Deviation from the paper: an end is learned as a factor of itself, at a rate that fits all
sites, where the paper learns steps at 1e-5.
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

Ranges = dict[str, tuple[Tensor, Tensor]]


@transform(
    "token_wise_clipping",
    kind="range",
    needs="rounding",
    summary="static ranges that clip the share of tokens the outputs can spare, then learned",
    options={"step": STEP, "epochs": 3, "rate": 0.01},
)
def token_wise_clipping(bench: RangeBench, options: Mapping[str, Any]) -> None:
    """Choose one quantile of tokens for all ranges, then learn each."""
    ranges, least = coarse(bench, float(options["step"]))
    bench.set(ranges)
    if int(options["epochs"]) > 0:
        learned = fine(bench, ranges, int(options["epochs"]), float(options["rate"]))
        bench.set(learned)
        if bench.loss() >= least:
            bench.set(ranges)


def coarse(bench: RangeBench, step: float) -> tuple[Ranges, float]:
    """The ranges of the best quantile, and their loss."""
    reach = next((share for bits, share in REACH.items() if bench.bits >= bits), REACH[4])
    tried = []
    for number in range(max(1, round(reach / step))):
        ratio = 1 - number * step
        bench.set({name: clipped(seen, ratio) for name, seen in bench.extremes.items()})
        tried.append((bench.loss(), -ratio))
    least, best = min(tried)
    return {name: clipped(seen, -best) for name, seen in bench.extremes.items()}, least


def fine(bench: RangeBench, ranges: Ranges, epochs: int, rate: float) -> Ranges:
    """Ranges learned from a start: Adam, batch by batch, with a rate that falls to zero over the ``epochs``."""
    factors = {name: torch.zeros(2, *low.shape, requires_grad=True) for name, (low, _) in ranges.items()}

    def scaled() -> Ranges:
        return {name: (low * factors[name][0].exp(), high * factors[name][1].exp()) for name, (low, high) in ranges.items()}

    optimizer = torch.optim.Adam(factors.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * bench.batches())
    with torch.enable_grad():
        for step in range(epochs * bench.batches()):
            optimizer.zero_grad()
            torch.autograd.backward(bench.error(scaled(), step % bench.batches()), inputs=list(factors.values()))
            optimizer.step()
            schedule.step()
    return {name: (low.detach(), high.detach()) for name, (low, high) in scaled().items()}


def clipped(seen: Extremes, ratio: float) -> tuple[Tensor, Tensor]:
    """The range of the tokens whose extremes lie within a quantile, on either side: ``[steps]`` each."""
    high = torch.quantile(seen.high, ratio, dim=0, interpolation="lower")
    low = -torch.quantile(-seen.low, ratio, dim=0, interpolation="lower")
    return low, high
