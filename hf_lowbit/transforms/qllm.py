"""QLLM (arXiv 2310.08041): outlier channels are split, similar ones merged, so that the width stays; a low-rank correction.

A channel of largest value m becomes ``ceil(m / t)`` channels of that share of it; as many others are merged by the mean,
those that cost least. The threshold t of a site is the one that loses least with both sides rounded. Splitting is exact,
merging is not. The correction is trained through the rounded sum of matrix and correction, so that what is trained is what
runs. Deviations from the paper: it is trained matrix by matrix against the original outputs, not on blocks of four layers;
the cost of merging is the paper's formula, not its code's surrogate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.transforms.graph import Reader, Site
from hf_lowbit.transforms.intake import Assemble, Assembly, Correct, Intake
from hf_lowbit.transforms.registry import Bench, transform
from hf_lowbit.transforms.search import TOKENS

# Thresholds tried between the largest value and zero.
STEPS = 100
LEARNING_RATE = 5e-4


@transform(
    "qllm",
    kind="scale",
    needs="rounding",
    summary="outlier channels split and similar ones merged; a low-rank correction of what rounding loses",
    options={"ratio": 0.1, "rank": 4, "steps": 100},
)
def qllm(bench: Bench, options: Mapping[str, Any]) -> None:
    """Reassemble the channels before every norm's and gate's readers, and correct each matrix."""
    for site in bench.graph.sites:
        matrices = bench.matrices(site)
        readers = [reader for reader in site.readers if reader.weight in bench.low_bit]
        if not matrices or len(matrices) != len(readers) or site.kind == "attention":
            continue
        seen = bench.inputs(site)
        if seen is None:
            bench.skip(site, "no calibration text reached it")
            continue
        sample = seen.sample[:: max(1, len(seen.sample) // TOKENS)][:TOKENS]
        found = search(bench, site, matrices, sample, seen.largest, float(options["ratio"]))
        for reader, matrix in zip(readers, matrices, strict=True):
            if found is not None:
                bench.apply(Assemble(bench.intakes, reader, found, []))
            if int(options["rank"]) and int(options["steps"]):
                correct(bench, site, reader, found, matrix, sample, int(options["rank"]), int(options["steps"]))


def search(
    bench: Bench, site: Site, matrices: Sequence[Tensor], sample: Tensor, largest: Tensor, ratio: float
) -> Assembly | None:
    """The best assembly of a site's channels, or None where leaving them alone loses least."""
    expected = [sample @ matrix.T for matrix in matrices]
    best, chosen = _loss(bench, site, matrices, expected, sample, None), None
    cost = merging_cost(sample, matrices)
    extra = -1
    for number in range(1, STEPS):
        threshold = float(largest.max()) * (1 - number / STEPS)
        counts = torch.ceil(largest / threshold).clamp_min(1).long()
        more = int(counts.sum()) - len(counts)
        if more > ratio * len(counts):
            break
        if more == extra:
            continue
        extra = more
        found = assemble(counts, cost)
        if found is not None and (error := _loss(bench, site, matrices, expected, sample, found)) < best:
            best, chosen = error, found
    return chosen


def merging_cost(sample: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``[size, size]``: squared error at the outputs if two channels are replaced by their mean.

    It is ``|x_i - x_j|^2 |w_i - w_j|^2 / 4``, by equation 5 of the paper.
    """

    def apart(columns: Tensor) -> Tensor:
        square = columns.T @ columns
        return (square.diagonal()[:, None] + square.diagonal()[None] - 2 * square).clamp_min(0)

    return apart(sample.double()) * apart(torch.cat(list(matrices)).double()) / 4


def assemble(counts: Tensor, cost: Tensor) -> Assembly | None:
    """Split each channel into its count and merge as many others into neighbours; None where there are not enough.

    Args:
        counts: int64 ``[size]``, at least 1.
        cost: of merging two channels, ``[size, size]``.
    """
    size, whole = len(counts), counts == 1
    extra = int(counts.sum()) - size
    even, odd = torch.arange(0, size, 2), torch.arange(1, size, 2)
    even, odd = even[whole[even]], odd[whole[odd]]
    if extra > len(even) or not len(odd):
        return None
    least, partner = cost[even][:, odd].min(1)
    merged = least.argsort(stable=True)[:extra]
    into = {int(even[number]): int(odd[partner[number]]) for number in merged}
    slots: list[tuple[list[int], float]] = []
    groups: dict[int, list[int]] = {}
    for source, goal in into.items():
        groups.setdefault(goal, []).append(source)
    for channel in range(size):
        if channel in into:
            continue
        members = [channel, *groups.get(channel, [])]
        slots += [(members, 1 / (len(members) * int(counts[channel])))] * int(counts[channel])
    flat = [(member, target, share) for target, (members, share) in enumerate(slots) for member in members]
    member, target, share = zip(*flat, strict=True)
    return Assembly(torch.tensor(member), torch.tensor(target), torch.tensor(share, dtype=torch.float64))


def _loss(
    bench: Bench, site: Site, matrices: Sequence[Tensor], expected: Sequence[Tensor], sample: Tensor, found: Assembly | None
) -> float:
    x, total = _given(bench, site, sample, found), 0.0
    for matrix, y in zip(matrices, expected, strict=True):
        rounded = bench.rounded(matrix if found is None else found.columns(matrix))
        total += float((x @ rounded.T - y).pow(2).sum() / y.pow(2).sum().clamp_min(1e-30))
    return total


def _given(bench: Bench, site: Site, sample: Tensor, found: Assembly | None) -> Tensor:
    """What a matrix would be given for some tokens, rounded."""
    intake = Intake(site.size)
    if found is not None:
        intake.member, intake.target, intake.coefficient = found.member, found.target, found.coefficient
    return intake.activations(bench.spec)(sample)


def correct(
    bench: Bench, site: Site, reader: Reader, found: Assembly | None, matrix: Tensor, sample: Tensor, rank: int, steps: int
) -> None:
    """Train a low-rank change of one matrix through its rounding and add it, if it helps."""
    x, y = _given(bench, site, sample, found), sample @ matrix.T
    weight = matrix if found is None else found.columns(matrix)
    draw = torch.Generator().manual_seed(bench.seed)
    right = (torch.rand(rank, weight.shape[1], generator=draw) * 2 - 1) * weight.shape[1] ** -0.5
    left = torch.zeros(len(weight), rank)

    def change(left: Tensor, right: Tensor) -> Tensor:
        return left @ right / rank

    def error(rounded: Tensor) -> Tensor:
        return (x @ rounded.T - y).pow(2).mean() / y.pow(2).mean().clamp_min(1e-30)

    with torch.enable_grad():
        left.requires_grad_()
        right.requires_grad_()
        optimizer = torch.optim.AdamW([left, right], lr=LEARNING_RATE, weight_decay=0.0)
        first, best, kept = None, float("inf"), None
        for _ in range(steps + 1):
            moved = weight + change(left, right)
            loss = error(moved + (bench.rounded(moved.detach()) - moved).detach())
            found_error = float(loss.detach())
            first = found_error if first is None else first
            if found_error < best:
                best, kept = found_error, (left.detach().clone(), right.detach().clone())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if kept is not None and first is not None and best < first:
        bench.apply(Correct(reader, kept[0] / rank, kept[1]))
