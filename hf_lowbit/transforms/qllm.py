"""QLLM (arXiv 2310.08041): outlier channels are split, similar ones merged, so that the width stays; a low-rank correction.

A channel of largest value m becomes ``ceil(m / t)`` channels of that share of it; as many others are merged by the mean,
those that cost least. The threshold t of a site is the one that loses least with both sides rounded, on tokens that
nothing was fitted to. Splitting is exact, merging is not; the matrix of merged channels is fitted to the outputs it had
(damped least squares on the rounded inputs), since the plain sum of columns loses several times as much. The correction
is trained through the rounded sum of matrix and correction, so that what is trained is what runs. Deviations from the
paper: that fit, and a cost of merging that knows of it; the correction is trained matrix by matrix against the original
outputs, not on blocks of four layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.transforms.assembly import Assemble, Assembly, Correct
from hf_lowbit.transforms.graph import Reader, Site
from hf_lowbit.transforms.intake import Before, Intake
from hf_lowbit.transforms.registry import Bench, transform
from hf_lowbit.transforms.search import FLOOR

# Every so many tokens of a sample one is kept for judging.
JUDGED = 4
# Added to the squares of a fit, as a share of them.
DAMPING = 1e-3
LEARNING_RATE = 5e-4
# Tokens of a step of the correction, and steps after which it is looked at.
BATCH, LOOK = 256, 20


@transform(
    "qllm",
    kind="scale",
    needs="rounding",
    summary="outlier channels split and similar ones merged; a low-rank correction of what rounding loses",
    options={"ratio": 0.2, "grid": 24, "rank": 4, "steps": 100},
)
def qllm(bench: Bench, options: Mapping[str, Any]) -> None:
    """Reassemble the channels before every norm's and gate's readers, and correct each matrix."""
    for site, matrices, seen in bench.watched():
        readers = [reader for reader in site.readers if reader.weight in bench.low_bit]
        if site.kind == "attention":
            continue
        if len(matrices) != len(readers):
            bench.skip(site, "a matrix reads a part of it, or its channels in another order")
            continue
        ratio, grid = float(options["ratio"]), int(options["grid"])
        found, fitted = search(bench, site, matrices, seen.sample, seen.largest, ratio, grid)
        for reader, matrix, new in zip(readers, matrices, fitted, strict=True):
            if found is not None:
                bench.apply(Assemble(Before(bench.intakes, reader), found, new, []))
            if int(options["rank"]) and int(options["steps"]):
                x, y = given(bench, site, seen.sample, found), seen.sample @ matrix.T
                correct(bench, reader, new, x, y, int(options["rank"]), int(options["steps"]))


def search(
    bench: Bench, site: Site, matrices: Sequence[Tensor], sample: Tensor, largest: Tensor, ratio: float, grid: int
) -> tuple[Assembly | None, list[Tensor]]:
    """The best assembly of a site's channels and its matrices; None and ``matrices`` where leaving them alone loses least.

    Args:
        sample: tokens ``[n, size]``.
        largest: absolute value of each channel, ``[size]``.
        ratio: most channels that splitting may add, as a share of all.
        grid: thresholds tried, evenly spaced on a logarithmic scale.
    """
    cost = merging_cost(sample, matrices)
    judged = torch.arange(len(sample)) % JUDGED == 0
    expected = [sample @ matrix.T for matrix in matrices]

    def loss(x: Tensor, tried: Sequence[Tensor]) -> float:
        pairs = [(x @ bench.rounded(matrix).T, y[judged]) for matrix, y in zip(tried, expected, strict=True)]
        return sum(float((found - y).pow(2).sum() / y.pow(2).sum().clamp_min(1e-30)) for found, y in pairs)

    best, chosen, kept = loss(given(bench, site, sample[judged], None), matrices), None, list(matrices)
    extra = 0
    for number in range(1, grid + 1):
        threshold = float(largest.max()) * FLOOR ** (number / grid)
        counts = torch.ceil(largest / max(threshold, 1e-30)).clamp_min(1).long()
        more = int(counts.sum()) - len(counts)
        if more > ratio * len(counts):
            break
        found = None if more == extra else assemble(counts, cost)
        extra = more
        if found is None:
            continue
        x = given(bench, site, sample, found)
        fitted = [fit(x[~judged], y[~judged], found.columns(matrix)) for matrix, y in zip(matrices, expected, strict=True)]
        if (error := loss(x[judged], fitted)) < best:
            best, chosen, kept = error, found, fitted
    if chosen is not None:  # with the tokens it was judged on as well
        x = given(bench, site, sample, chosen)
        kept = [fit(x, y, chosen.columns(matrix)) for matrix, y in zip(matrices, expected, strict=True)]
    return chosen, kept


def fit(x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The matrix ``[out, in]`` near ``start`` whose products with ``x`` ``[n, in]`` are least off ``y`` ``[n, out]``."""
    wide, near = x.double(), start.double()
    change = torch.linalg.solve(damped(wide.T @ wide), wide.T @ (y.double() - wide @ near.T))
    return (near + change.T).float()


def merging_cost(sample: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``[size, size]``: squared error at the outputs if two channels become their mean and the matrix is fitted anew.

    What is lost is ``(w_i - w_j)`` times the part of ``(x_i - x_j) / 2`` that no other channel tells, whose energy is
    ``1 / (P_ii + P_jj - 2 P_ij)`` with the inverse P of the second moments. Without the fit it would be
    ``|x_i - x_j|^2 / 4``, equation 5 of the paper.
    """

    def apart(square: Tensor) -> Tensor:
        return (square.diagonal()[:, None] + square.diagonal()[None] - 2 * square).clamp_min(1e-30)

    stacked = torch.cat(list(matrices)).double()
    return apart(stacked.T @ stacked) / apart(torch.linalg.inv(damped(sample.double().T @ sample.double())))


def damped(square: Tensor) -> Tensor:
    """Second moments float64 ``[n, n]`` that can be inverted; each channel by its own size, lest outliers drown it."""
    return square + torch.diag(DAMPING * square.diagonal() + 1e-30)


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


def given(bench: Bench, site: Site, sample: Tensor, found: Assembly | None) -> Tensor:
    """What a matrix would be given for some tokens, rounded."""
    intake = Intake(site.size)
    if found is not None:
        intake.member, intake.target, intake.coefficient = found.member, found.target, found.coefficient
    return intake.activations(bench.spec)(sample)


def correct(bench: Bench, reader: Reader, weight: Tensor, x: Tensor, y: Tensor, rank: int, steps: int) -> None:
    """Train a low-rank change of a matrix through its rounding and add it, if it helps on tokens it was not trained on.

    Args:
        weight: ``[out, in]``.
        x, y: rounded inputs ``[n, in]`` and outputs ``[n, out]`` wanted.
    """
    judged = (torch.arange(len(x)) % JUDGED == 0).nonzero()[:, 0]
    others = (torch.arange(len(x)) % JUDGED != 0).nonzero()[:, 0]
    draw = torch.Generator().manual_seed(bench.seed)
    right = (torch.rand(rank, weight.shape[1], generator=draw) * 2 - 1) * weight.shape[1] ** -0.5
    left = torch.zeros(len(weight), rank)

    def error(rounded: Tensor, some: Tensor) -> Tensor:
        return (x[some] @ rounded.T - y[some]).pow(2).mean() / y[some].pow(2).mean().clamp_min(1e-30)

    with torch.enable_grad():
        left.requires_grad_()
        right.requires_grad_()
        optimizer = torch.optim.AdamW([left, right], lr=LEARNING_RATE, weight_decay=0.0)
        first, best, kept = None, float("inf"), None
        for step in range(steps + 1):
            moved = weight + left @ right / rank
            rounded = moved + (bench.rounded(moved.detach()) - moved).detach()
            if step % LOOK == 0 or step == steps:
                found = float(error(rounded.detach(), judged))
                first = found if first is None else first
                if found < best:
                    best, kept = found, (left.detach().clone(), right.detach().clone())
            optimizer.zero_grad()
            error(rounded, others[torch.randperm(len(others), generator=draw)[:BATCH]]).backward()
            optimizer.step()
    if kept is not None and first is not None and best < first:
        bench.apply(Correct(reader, kept[0] / rank, kept[1]))
