"""Gamma Migration: the gain of a norm goes into its readers (Outlier Suppression, arXiv 2209.13325, section 4.1).

A norm amplifies a few channels by its gain; without it the tensor that is rounded is the normalized one. Where a norm's
output is added to a residual as well (post-norm models), the division by the gain stays at run time instead. With
calibration text, sites where the matrices would lose more than the activations win are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_lowbit.transforms.registry import Bench, transform
from hf_lowbit.transforms.search import helps

# Gains below this share of the median gain keep the rest of their size in the norm: a bias divided by them would explode.
SMALLEST_GAIN = 1e-3


@transform("gamma_migration", kind="scale", needs="helped", summary="gains of norms move into the matrices that read them")
def gamma_migration(bench: Bench, options: Mapping[str, Any]) -> None:
    """Divide the output of every norm by its gain."""
    for site in bench.graph.sites:
        if site.norm is None:
            continue
        gain = bench.weights[site.norm.weight] + site.norm.plus
        floor = SMALLEST_GAIN * float(gain.abs().median())
        if floor <= 0:
            bench.skip(site, "most of its gains are zero")
            continue
        sign = torch.where(gain < 0, -1.0, 1.0).to(gain)
        factor = gain.abs().clamp_min(floor) * sign
        if helps(bench, site, factor):
            bench.divide(site, factor)
        else:
            bench.skip(site, "on the calibration text its gain costs less where it is")
