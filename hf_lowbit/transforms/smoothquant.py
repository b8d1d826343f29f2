"""SmoothQuant (arXiv 2211.10438): part of each channel's size moves from a norm's output into its readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_lowbit.transforms.registry import Bench, transform
from hf_lowbit.transforms.search import helps

SMALLEST = 1e-5


@transform(
    "smoothquant",
    kind="scale",
    needs="inputs",
    summary="channels of norm outputs divided by max|x|^alpha / max|w|^(1 - alpha)",
    options={"alpha": 0.5},
)
def smoothquant(bench: Bench, options: Mapping[str, Any]) -> None:
    """Scale the output of every norm that matrices alone read."""
    for site, matrices, seen in bench.watched("norm"):
        weight = torch.stack([matrix.abs().amax(0) for matrix in matrices]).amax(0).clamp_min(SMALLEST)
        alpha = float(options["alpha"])
        factor = (seen.largest.clamp_min(SMALLEST) ** alpha / weight ** (1 - alpha)).clamp_min(SMALLEST)
        if helps(bench, site, factor):
            bench.divide(site, factor.double())
        else:
            bench.skip(site, "on the calibration text it costs less unscaled")
