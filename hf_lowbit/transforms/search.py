"""The loss that scales and shifts are searched by: what rounding both sides of a site does to its readers' outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowbit.transforms.graph import Site
from hf_lowbit.transforms.intake import Intake
from hf_lowbit.transforms.registry import Bench

# Tokens a candidate is judged on.
TOKENS = 512
# Smallest threshold tried, as a share of the largest input.
FLOOR = 0.02


def shared(site: Site, factor: Tensor) -> Tensor:
    """Factors made equal, by the largest, over channels that are one channel of the producer (heads on shared values)."""
    if site.producer is None:
        return factor
    own = torch.zeros(site.producer.size, dtype=factor.dtype)
    own = own.scatter_reduce(0, site.producer.channels, factor, "amax", include_self=False)
    return own[site.producer.channels]


def helps(bench: Bench, site: Site, factor: Tensor) -> bool:
    """Whether dividing by ``factor`` ``[size]`` loses no more than leaving a site alone; true where nothing can tell."""
    seen = bench.inputs(site)
    if seen is None or not bench.matrices(site):
        return True
    loss = site_loss(bench, site, seen.sample)
    return loss(factor.float(), None) <= loss(torch.ones(site.size), None)


def site_loss(bench: Bench, site: Site, sample: Tensor) -> Callable[[Tensor, Tensor | None], float]:
    """A function of (divisor, shift) ``[size]``: error of the readers' outputs, as a share of their size, summed.

    Inputs are rounded as they will be (not at all without ``bench.spec``), matrices as low-bit codes.

    Args:
        sample: tokens ``[n, size]``.
    """
    sample = sample[:: max(1, len(sample) // TOKENS)][:TOKENS]
    matrices = bench.matrices(site)
    expected = [sample @ matrix.T for matrix in matrices]
    sizes = [float(y.pow(2).sum()) + 1e-30 for y in expected]

    def loss(divisor: Tensor, shift: Tensor | None) -> float:
        intake = Intake(site.size, shift=shift, divisor=divisor)
        x = intake.activations(bench.spec)(sample)
        total = 0.0
        for matrix, y, size in zip(matrices, expected, sizes, strict=True):
            total += float((x @ bench.rounded(matrix * divisor).T - y).pow(2).sum()) / size
        return total

    return loss
