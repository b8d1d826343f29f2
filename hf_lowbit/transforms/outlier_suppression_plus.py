"""Outlier Suppression+ (arXiv 2304.09145): centre each channel, then shrink those beyond a searched threshold.

The threshold of a site is the one whose error, with inputs and matrices rounded as they will be, is least. Deviation from
the paper: the error is taken at the outputs of the readers, each as a share of its size, not behind attention and gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.transforms.graph import Site
from hf_lowbit.transforms.registry import Bench, transform
from hf_lowbit.transforms.search import FLOOR, shared, site_loss


@transform(
    "outlier_suppression_plus",
    kind="scale",
    needs="rounding",
    summary="channels centred, and those beyond a searched threshold shrunk to it",
    options={"grid": 16, "shift": True},
)
def outlier_suppression_plus(bench: Bench, options: Mapping[str, Any]) -> None:
    """Shift and scale every site."""
    for site, _, seen in bench.watched():
        offset = (seen.high + seen.low) / 2 if options["shift"] else torch.zeros(site.size)
        factor, centred = search(bench, site, seen.sample, seen.low, seen.high, offset, int(options["grid"]))
        if factor is not None:
            bench.divide(site, factor.double())
        if centred:
            # A divided site has its shift divided too; the shift itself stays at run time, where no bias is needed.
            bench.subtract(site, (offset / (1 if factor is None else factor)).double())


def search(
    bench: Bench, site: Site, sample: Tensor, low: Tensor, high: Tensor, offset: Tensor, grid: int
) -> tuple[Tensor | None, bool]:
    """The best factors ``[size]`` (None for no scale), and whether centring is kept.

    Args:
        low, high: range of each channel.
        offset: what centring subtracts, ``[size]``.
        grid: thresholds tried, evenly spaced on a logarithmic scale.
    """
    loss, best = site_loss(bench, site, sample), float("inf")
    chosen: tuple[Tensor | None, bool] = (None, False)
    for centred in (False, True) if bool(offset.any()) else (False,):
        shift = offset if centred else torch.zeros(site.size)
        reach = torch.maximum(high - shift, shift - low)
        for number in range(grid + 1):
            threshold = float(reach.max()) * FLOOR ** (number / grid)
            factor = shared(site, (reach / threshold).clamp_min(1.0))
            found = loss(factor, shift if centred else None)
            if found < best:
                best, chosen = found, (factor if number else None, centred)
    return chosen
