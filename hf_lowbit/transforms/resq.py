"""ResQ (arXiv 2412.14363): the few directions of most variance at 8 bits, all others at few, both rotated within themselves.

One basis serves the whole residual stream, one each key-value head: eigenvectors of the second moments of what is rounded.
Deviations from the paper: all columns of a matrix have codes of one width, and queries and keys are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.transforms.algebra import RotateHeads, RotateResidual, Widen
from hf_lowbit.transforms.graph import Site
from hf_lowbit.transforms.hadamard import fold_gains
from hf_lowbit.transforms.registry import Bench, transform
from hf_lowbit.transforms.rotations import random_orthogonal, residual_rotation

DAMPING = 0.01
HIGH_BITS = 8


@transform(
    "resq",
    kind="rotation",
    needs="rounding",
    summary="rotated so that the directions of most variance can have 8 bits (share of them: high)",
    options={"high": 0.125},
)
def resq(bench: Bench, options: Mapping[str, Any]) -> None:
    """Rotate residual stream and heads into their principal directions and round the last of them to 8 bits."""
    stream, share = bench.graph.residual, float(options["high"])
    if stream.trouble is None:
        fold_gains(bench)
    seen = {site.source: bench.inputs(site) for site in bench.graph.sites}
    norms = [site for site in bench.graph.sites if site.source in stream.sites and bench.matrices(site)]
    samples = [found.sample for site in norms if (found := seen[site.source]) is not None]
    if stream.trouble is not None or stream.centred or not samples:
        reason = stream.trouble or ("layer norms read it" if stream.centred else "no calibration text reached it")
        bench.skipped.append(("residual stream", f"{reason}: no directions of it get more bits"))
        if stream.trouble is None:
            bench.apply(RotateResidual(bench.graph, residual_rotation(stream.size, stream.centred, bench.seed)))
    else:
        count = round(share * stream.size)
        bench.apply(RotateResidual(bench.graph, basis(samples, count, bench.seed)))
        for site in norms:
            widen(bench, site, torch.arange(stream.size - count, stream.size))
    for number, site in enumerate(bench.graph.sites):
        found = seen[site.source]
        if site.kind == "attention" and found is not None and site.producer is not None:
            heads(bench, site, found.sample, share, bench.seed + 1 + number)
        elif site.kind not in ("norm", "attention"):
            bench.rotate(site)


def heads(bench: Bench, site: Site, sample: Tensor, share: float, seed: int) -> None:
    """Rotate the values of each key-value head into its principal directions, and widen the last of every head."""
    assert site.producer is not None
    if site.producer.through != ("attention",):
        return bench.skip(site, f"values pass {' and '.join(site.producer.through)}")
    groups: dict[int, list[Tensor]] = {}
    for channels in torch.arange(site.size).split(site.width):
        groups.setdefault(int(site.producer.channels[channels[0]]), []).append(sample[:, channels])
    count = round(share * site.width)
    matrices = [basis(parts, count, seed + number) for number, parts in enumerate(groups.values())]
    bench.apply(RotateHeads(site, torch.stack(matrices)))
    widen(bench, site, torch.cat([head[len(head) - count :] for head in torch.arange(site.size).split(site.width)]))
    return None


def widen(bench: Bench, site: Site, channels: Tensor) -> None:
    """Round some channels of a site to 8 bits before each of its low-bit readers."""
    for place in bench.places(site):
        bench.apply(Widen(place, torch.isin(place.reader.columns, channels).nonzero().flatten(), HIGH_BITS))


def basis(samples: list[Tensor], count: int, seed: int) -> Tensor:
    """Principal directions in rising order of variance, the last ``count`` and the others rotated at random; float64.

    Args:
        samples: tokens ``[n, size]`` each; their second moments are added, each as a share of its trace.
    """
    size = samples[0].shape[1]
    moment = torch.zeros(size, size, dtype=torch.float64)
    for sample in samples:
        square = sample.double().T @ sample.double()
        moment += square / square.trace().clamp_min(1e-30)
    moment += DAMPING * moment.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    vectors = torch.linalg.eigh(moment).eigenvectors
    low = random_orthogonal(size - count, seed)
    return vectors @ (torch.block_diag(low, random_orthogonal(count, seed)) if count else low)
