"""AWQ's scale search (arXiv 2306.00978): channels divided by a power of their mean size, the power searched per site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_lowbit.transforms.registry import Bench, transform
from hf_lowbit.transforms.search import shared, site_loss

SMALLEST = 1e-4


@transform(
    "awq",
    kind="scale",
    needs="inputs",
    summary="channels divided by mean|x|^p, p searched against the rounded matrices",
    options={"grid": 20},
)
def awq(bench: Bench, options: Mapping[str, Any]) -> None:
    """Scale every site, each by the power that loses least."""
    grid = int(options["grid"])
    for site, _, seen in bench.watched():
        loss = site_loss(bench, site, seen.sample)
        mean = seen.mean.clamp_min(SMALLEST)
        candidates = []
        for power in range(grid):
            factor = mean ** (power / grid)
            # Shared last: powers of equal numbers differ in their last bit between vector lanes and the rest.
            factor = shared(site, factor / (factor.max() * factor.min()).sqrt())
            candidates.append((loss(factor, None), power, factor))
        _, power, best = min(candidates, key=lambda found: found[:2])
        if power and bool(torch.isfinite(best).all()):
            bench.divide(site, best.double())
