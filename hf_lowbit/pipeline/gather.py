"""Gathering the statistics of one group of sites, which share their inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_lowbit.pipeline.blocks import Group, OpenBlock, Sink, Stop, stopping
from hf_lowbit.pipeline.forward import Batch, check_finite
from hf_lowbit.pipeline.share import Share
from hf_lowbit.solvers.statistics import ExactSum, Statistics, pooled

# A matrix of a stack that saw fewer tokens than a quarter of its inputs takes the pooled statistics of the stack.
FEWEST_TOKENS = 0.25


class Sums:
    """Running sums over the inputs of one matrix.

    Args:
        in_features: inputs of the matrix.
        level: largest magnitude of an input in the first batch, times its tokens; fixes the grids of the exact sums.
        largest: largest magnitude of an input in the first batch.
        crossed: whether the original model's inputs are given too.
    """

    def __init__(self, in_features: int, level: float, largest: float, crossed: bool) -> None:
        self.in_features, self.count = in_features, 0
        self.gram, self.cross, self.total = ExactSum(), ExactSum() if crossed else None, ExactSum()
        self.top = torch.zeros(in_features)
        for part, size in ((self.gram, level * largest), (self.cross, level * largest), (self.total, level)):
            if part is not None:
                part.fix_grid(size)

    def add(self, x: Tensor, original: Tensor | None) -> None:
        """Add tokens ``[n, in]``, and the same tokens' inputs in the original model."""
        self.count += len(x)
        self.gram.add(x.T @ x)
        self.total.add(x.sum(0))
        self.top = torch.maximum(self.top, x.abs().amax(0))
        if self.cross is not None:
            assert original is not None
            self.cross.add(original.T @ x)

    def finish(self, share: Share) -> Statistics:
        """Statistics over the tokens of all processes."""
        count = share.count(self.count)

        def mean(total: ExactSum, *shape: int) -> Tensor:
            share.add_up(total, shape)
            out = torch.zeros(shape) if total.total is None else total.mean(count)
            total.total = None  # twice the size of the mean
            return out

        size = self.in_features
        gram, mean_input = mean(self.gram, size, size), mean(self.total, size)
        cross = None if self.cross is None else mean(self.cross, size, size)
        return Statistics(count, gram, mean_input, share.largest(self.top), cross)


def gather(
    block: OpenBlock, original: OpenBlock | None, group: Group, batches: Sequence[Batch], share: Share
) -> list[Statistics]:
    """Statistics of the inputs of a group, one entry per matrix (several for a stack).

    Args:
        block: the working copy with the sites before this group already quantized.
        original: the working copy in high precision, to weigh its inputs against; None leaves ``cross`` out. Stacks go
            without: behind another prefix the router may send a token elsewhere.
        batches: those of this process.
    """
    site = block.sites[group.names[0]]
    matrices = len(site.parameter) if site.stacked else 1
    in_features = site.turned(site.parameter).shape[-1]
    crossed = original is not None and not site.stacked
    sums: dict[int, Sums] = {}
    for batch in batches:
        found = inputs_of(block, group.names[0], batch.hidden, batch)
        same = inputs_of(original, group.names[0], batch.original, batch) if crossed and original is not None else {}
        if not sums:
            largest = max((float(x.abs().max()) for x in found.values() if x.numel()), default=1.0)
            tokens = batch.ids.numel()
            level, largest = share.same((largest * tokens, largest))
            sums = {number: Sums(in_features, level, largest, crossed) for number in range(matrices)}
        for number, x in found.items():
            check_finite(x, f"what leads to {group.names[0]}")
            sums[number].add(x, same.get(number))
    each = [sums[number].finish(share) for number in range(matrices)]
    if not site.stacked:
        return each
    together = pooled(each)
    assert together is not None
    return [replace(together, count=found.count) if few_tokens([found]) else found for found in each]


def few_tokens(statistics: Sequence[Statistics]) -> int:
    """How many matrices of a stack saw too few tokens to be solved on those alone; sensitivities do not count tokens."""
    return sum(found.sensitivity is None and found.count < FEWEST_TOKENS * len(found.gram) for found in statistics)


def inputs_of(block: OpenBlock, name: str, hidden: Tensor, batch: Batch) -> dict[int, Tensor]:
    """Inputs ``[tokens, in]`` of each matrix of a site, from one batch."""
    site = block.sites[name]
    found: dict[int, list[Tensor]] = defaultdict(list)

    def take(number: int, x: Tensor) -> None:
        found[number].append(x.detach().flatten(0, -2).float())
        if not site.stacked:
            raise Stop

    sink: Sink = take
    handle = site.watch(sink)
    try:
        with stopping():
            block(hidden, batch.calls[block.number])
    finally:
        handle.remove()
    return {number: torch.cat(parts) for number, parts in found.items()}
