"""Weighted one-dimensional k-means: exact by dynamic programming, batched over rows, without a seed.

On sorted values every cluster is a run, so the best partition into ``k`` runs follows from the best partitions of all
prefixes into ``k - 1``. Where the last run of the best partition starts never decreases with the length of the prefix nor
with ``k``, and divide and conquer on that takes O(count n log n) instead of O(count n^2) (the scheme of Ckmeans.1d.dp;
weights notes 8, reconstructed).

Rows of more than ``BINS`` values are cut into ``BINS`` runs of neighbours, each at most ``2 n / BINS`` values long and
``2 / BINS`` of the row's range wide; clusters are exact up to those runs, and Lloyd steps on the values themselves follow.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Runs of neighbouring values a longer row is cut into; shorter rows are solved exactly.
BINS = 1024
# Lloyd steps that move the borders of binned clusters off the borders of bins; they settle in fewer.
LLOYD_STEPS = 20
# Best starts of the last run that are held at once, in all rows and for all numbers of clusters: bounds the memory.
HELD = 1 << 22

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def weighted_kmeans(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Levels that minimise ``sum_i weights_i (values_i - nearest level)^2`` in each row.

    Weights of a row matter up to a factor; a row of no weight counts all its values alike. A level that no weight needs
    repeats its lower neighbour (its upper one where it is the lowest), so the table can always be searched.

    Args:
        values: float ``[n, m]``, finite.
        weights: float ``[n, m]``, not negative.
        count: levels per row.

    Returns:
        float32 ``[n, count]``, ascending.
    """
    step = max(1, HELD // (count * (min(values.shape[1], BINS) + 1)))
    parts = [_solve_rows(values[k : k + step], weights[k : k + step], count) for k in range(0, len(values), step)]
    return torch.from_numpy(np.concatenate(parts)).to(torch.float32)


def _solve_rows(values: Tensor, weights: Tensor, count: int) -> Floats:
    weights = torch.where(weights.amax(1, keepdim=True) > 0, weights, 1.0).to(torch.float64)
    # Values of no weight join the lowest that has some: they may not widen the range that bins divide.
    lowest = torch.where(weights > 0, values, float("inf")).amin(1, keepdim=True)
    ordered, order = torch.where(weights > 0, values, lowest).sort(dim=1, stable=True)
    ordered, mass = ordered.to(torch.float64), weights.gather(1, order)
    points = ordered.numpy()
    total, moment = _prefix_sums(mass), _prefix_sums(mass * ordered)
    edges = _bin_edges(points)
    borders = _partition(_take(total, edges), _take(moment, edges), count)
    borders = _take(edges, borders)
    if edges.shape[1] <= points.shape[1]:
        borders = _lloyd(points, total, moment, borders)
    return _means(total, moment, borders)


def _prefix_sums(values: Tensor) -> Floats:
    """Sums of the first 0, 1, ... values of each row."""
    out = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values.numpy(), axis=1, out=out[:, 1:])
    return out


def _take(table: NDArray, index: Indices) -> NDArray:
    return np.take_along_axis(table, index, 1)


def _bin_edges(points: Floats) -> Indices:
    """Where runs of neighbours start and end in sorted ``points`` ``[n, m]``: ``[n, bins + 1]``, from 0 to m.

    Half of the bins go by rank, which follows the density, and half by value, which keeps the tails apart.
    """
    rows, length = points.shape
    if length <= BINS:
        return np.broadcast_to(np.arange(length + 1), (rows, length + 1))
    low, span = points[:, :1], points[:, -1:] - points[:, :1]
    place = np.arange(length) / length + (points - low) / np.where(span > 0, span, 1.0)
    wanted = np.arange(1, BINS) * (2 / BINS)
    edges = np.zeros((rows, BINS + 1), np.int64)
    edges[:, -1] = length
    for row in range(rows):
        edges[row, 1:-1] = np.searchsorted(place[row], wanted)
    return edges


def _partition(total: Floats, moment: Floats, count: int) -> Indices:
    """Borders ``[n, count + 1]`` of the best runs, from 0 to m, given prefix sums ``[n, m + 1]`` of ``w`` and ``w x``.

    The error of a run is its ``sum w x^2`` less ``(sum w x)^2 / sum w``, and the first terms add up to a constant: what
    is maximised is the sum of the second ones, the gain. A run may be empty.
    """
    rows, last = total.shape[0], total.shape[1] - 1
    gain = _gain(total, moment)
    starts = [np.zeros(total.shape, np.int32)]
    for number in range(2, count):
        found, gain = _best_starts(total, moment, gain, starts[-1], lowest=number == 2)
        starts.append(found)
    borders = np.full((rows, count + 1), last, np.int64)
    borders[:, 0] = 0
    if count > 1:  # of the last run only the one that ends with the row is needed
        final = gain + _gain(total[:, -1:] - total, moment[:, -1:] - moment)
        borders[:, count - 1] = final.argmax(1)
    for number in range(count - 1, 1, -1):
        borders[:, number - 1] = _take(starts[number - 1], borders[:, number : number + 1])[:, 0]
    return borders


def _gain(total: Floats, moment: Floats) -> Floats:
    """``moment^2 / total``, zero where there is no weight (then the moment is zero too)."""
    return moment * moment / np.maximum(total, np.finfo(np.float64).tiny)


def _best_starts(
    total: Floats, moment: Floats, gain: Floats, before: NDArray[np.int32], lowest: bool
) -> tuple[NDArray[np.int32], Floats]:
    """For every prefix, where the last of ``k`` runs starts best, and the gain of all ``k``.

    Args:
        gain: of ``k - 1`` runs, ``[n, m + 1]``.
        before: the same starts for ``k - 1`` runs, which are lower bounds unless ``lowest``.
    """
    rows, width = total.shape
    stride = 1 << (width - 1).bit_length()
    starts = np.zeros((rows, stride + 1), np.int32)
    starts[:, width:] = width - 1
    most = np.zeros_like(gain)
    base = (np.arange(rows) * width)[:, None]
    flat = total.ravel(), moment.ravel(), gain.ravel()
    while stride > 1:
        stride //= 2
        ends = np.arange(stride, width, 2 * stride)
        low = starts[:, ends - stride] if lowest else np.maximum(starts[:, ends - stride], before[:, ends])
        high = np.maximum(np.minimum(starts[:, ends + stride], ends), low)
        found, best = _best_in_ranges(*flat, (low + base).ravel(), (high + base).ravel(), (ends + base).ravel())
        starts[:, ends] = found.reshape(low.shape) - base
        most[:, ends] = best.reshape(low.shape)
    return starts[:, :width], most


def _best_in_ranges(
    total: Floats, moment: Floats, gain: Floats, low: Indices, high: Indices, end: Indices
) -> tuple[Indices, Floats]:
    """The first index in each ``low .. high`` at which a last run up to ``end`` gains most, and all that is gained."""
    counts = high - low + 1
    offsets = np.cumsum(counts) - counts
    index = np.arange(int(counts.sum())) + np.repeat(low - offsets, counts)
    moments = np.repeat(moment[end], counts)
    moments -= moment[index]
    weight = np.repeat(total[end], counts)
    weight -= total[index]
    np.maximum(weight, np.finfo(np.float64).tiny, out=weight)
    moments *= moments
    moments /= weight
    moments += gain[index]
    best = np.maximum.reduceat(moments, offsets)
    hits = np.flatnonzero(moments == np.repeat(best, counts))
    return index[hits[np.searchsorted(hits, offsets)]], best


def _means(total: Floats, moment: Floats, borders: Indices) -> Floats:
    """Weighted mean of each run; runs without weight repeat a neighbour."""
    weight, levels = np.diff(_take(total, borders), axis=1), np.diff(_take(moment, borders), axis=1)
    filled = weight > 0
    source = np.where(filled, np.arange(filled.shape[1]), -1)
    source = np.maximum.accumulate(source, 1)
    source = np.where(source < 0, filled.argmax(1)[:, None], source)
    levels = _take(np.divide(levels, weight, out=np.zeros_like(levels), where=filled), source)
    return np.maximum.accumulate(levels, 1)  # rounding of the sums may swap levels that are all but equal


def _lloyd(points: Floats, total: Floats, moment: Floats, borders: Indices) -> Indices:
    """Borders half-way between the levels they make, repeated until they stay: never worse than those given."""
    for _ in range(LLOYD_STEPS):
        levels = _means(total, moment, borders)
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        moved = borders.copy()
        for row, each in enumerate(middles):
            moved[row, 1:-1] = np.searchsorted(points[row], each, side="right")
        if np.array_equal(moved, borders):
            break
        borders = moved
    return borders
