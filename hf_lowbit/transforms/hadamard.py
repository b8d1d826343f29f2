"""Hadamard rotations of the residual stream, of heads, and at run time (QuaRot, arXiv 2404.00456).

A rotation spreads what sits in a few channels over all. The residual stream and the values of each head are rotated in
the weights; the inputs of the matrices behind a gate or activation, and of attention's output matrix, at run time by a
fast transform. Where the stream itself cannot be rotated (norms write into it, as in Gemma 2), the inputs of its readers
are, at run time as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.transforms.algebra import RotateHeads, RotateResidual, Scale, gain_of
from hf_lowbit.transforms.registry import Bench, transform
from hf_lowbit.transforms.rotations import random_hadamard, residual_rotation


@transform(
    "hadamard",
    kind="rotation",
    needs="none",
    summary="residual stream, heads and inner activations rotated (QuaRot)",
    options={"online": True},
)
def hadamard(bench: Bench, options: Mapping[str, Any]) -> None:
    """Rotate the residual stream, or the inputs of its readers; values of heads; and other inputs at run time."""
    stream = bench.graph.residual
    if stream.trouble is None:
        fold_gains(bench)
        matrix = residual_rotation(stream.size, stream.centred, bench.seed)
        bench.apply(RotateResidual(bench.graph, matrix))
    else:
        bench.skipped.append(("residual stream", f"{stream.trouble}; the inputs of its readers are rotated at run time"))
    for number, site in enumerate(bench.graph.sites):
        if site.kind == "attention" and site.producer is not None and site.producer.through == ("attention",):
            heads = torch.stack([random_hadamard(site.width, bench.seed + 1 + number)] * (site.size // site.width))
            bench.apply(RotateHeads(site, heads))
        if (site.kind != "norm" or stream.trouble is not None) and options["online"]:
            bench.rotate(site)


def fold_gains(bench: Bench) -> None:
    """Move the gains of all norms on the residual stream into their readers, so that the norms commute with rotations.

    Raises:
        BadRequest: a gain of zero, which nothing can make 1. Nothing was changed then.
    """
    stream = [site for site in bench.graph.sites if site.source in bench.graph.residual.sites and site.producer is not None]
    gains = [gain_of(bench.weights, site) for site in stream]
    for site, gain in zip(stream, gains, strict=True):
        if (zeros := int((gain == 0).sum())) and site.norm is not None:
            raise BadRequest(
                f"{site.norm.weight} holds {zeros} gains of zero, so its gains cannot move into the matrices behind it and "
                "the residual stream cannot be rotated. Use a transform that scales (outlier_suppression_plus)."
            )
    for site, gain in zip(stream, gains, strict=True):
        bench.apply(Scale(site, gain))
