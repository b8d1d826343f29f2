"""``Rows``: a weight matrix as solvers see it, in float32 blocks of rows cut into groups.

Blocks bound the temporaries of every solver to a few megabytes whatever the matrix, keep the working set in cache, and
let the source stay in its own dtype, memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_lowbit.errors import WeightError
from hf_lowbit.format.scales import group_count
from hf_lowbit.solvers.statistics import Statistics

# 2**18 float32 weights are 1 MB: a block and its temporaries stay in the second-level cache of one core.
BLOCK_WEIGHTS = 1 << 18
# A tensor's largest magnitude is brought to 2**8 .. 2**9, so that scales of 8-bit codes and of far smaller groups stay
# normal fp16 numbers and offsets stay below fp16's limit.
TOP_EXPONENT = 9


class Rows:
    """A ``[rows, in]`` matrix times ``2**-shift``, grouped along the input axis.

    Args:
        weight: any float dtype, ``[rows, in]``.
        group_size: weights per group; the last group of a row is padded with zeros of no importance.
        shift: power of two the values are divided by.
        tables: equal blocks of rows that may have a level table each (the matrices of a stack).
        importance: float ``[in]`` weights of the squared error per input channel; None is all ones.
        excluded: sorted flat indices (int64) of weights stored elsewhere (outliers): zeros that do not count in the error.
        statistics: what calibration gathered, one entry for each of ``tables`` blocks of rows; empty without calibration.
    """

    def __init__(
        self,
        weight: Tensor,
        group_size: int,
        shift: int,
        tables: int = 1,
        importance: Tensor | None = None,
        excluded: Tensor | None = None,
        statistics: Sequence[Statistics] = (),
    ) -> None:
        self.statistics = statistics
        self.weight, self.group_size, self.shift, self.tables = weight, group_size, shift, tables
        self.rows, self.in_features = weight.shape
        self.groups = group_count(self.in_features, group_size)
        self.excluded = excluded
        self._importance = self._padded_importance(importance)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Blocks of rows as ``(start, stop, table)``; no block crosses the border of two tables."""
        step = max(1, BLOCK_WEIGHTS // self.in_features)
        each = self.rows // self.tables
        for table in range(self.tables):
            for start in range(table * each, (table + 1) * each, step):
                yield start, min(start + step, (table + 1) * each), table

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Values float32 ``[n, groups, group_size]`` of rows ``start .. stop`` and their importance (broadcastable)."""
        return self._counted(self._grouped(self.weight[start:stop]), torch.arange(start, stop))

    def sample(self, weights: int, table: int = 0) -> tuple[Tensor, Tensor | None]:
        """Groups ``[n, 1, group_size]`` of about ``weights`` weights of one table's rows, evenly spread, never random."""
        each = self.rows // self.tables
        take = max(1, min(each, weights // self.in_features))
        picked = torch.linspace(0, each - 1, take).round().long() + table * each
        values, importance = self._counted(self._grouped(self.weight[picked]), picked)
        if importance is not None:
            importance = importance.expand(values.shape).reshape(-1, 1, self.group_size)
        values = values.view(-1, 1, self.group_size)
        step = max(1, values.shape[0] * self.group_size // weights)
        return values[::step].contiguous(), None if importance is None else importance[::step].contiguous()

    def pick(self, ids: Tensor) -> Rows:
        """Rows ``ids`` (int64 ``[n]``, ascending) as a matrix of their own, with one table."""
        excluded = self.excluded
        if excluded is not None:
            place = torch.full((self.rows,), -1).index_copy_(0, ids, torch.arange(len(ids)))
            row, column = place[excluded // self.in_features], excluded % self.in_features
            excluded = (row * self.in_features + column)[row >= 0]
        picked = Rows(self.weight[ids], self.group_size, self.shift, 1, None, excluded, self.statistics)
        picked._importance = self._importance
        return picked

    def _counted(self, values: Tensor, picked: Tensor) -> tuple[Tensor, Tensor | None]:
        """``values`` of the rows ``picked`` (int64 ``[n]``) with excluded weights as zeros of no importance, as padding is.

        A zero and not the weight itself, since no scale, range or threshold of the others may follow an outlier.
        """
        if self.excluded is None:
            return values, self._importance
        first, last = torch.searchsorted(self.excluded, torch.stack([picked, picked + 1]) * self.in_features)
        counts = last - first
        rows = torch.repeat_interleave(torch.arange(len(picked)), counts)
        within = torch.arange(len(rows)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        columns = self.excluded[first[rows] + within] - picked[rows] * self.in_features
        counted = torch.ones(values.shape)
        counted.view(len(picked), -1)[rows, columns] = 0
        return values * counted, counted if self._importance is None else counted * self._importance

    def _grouped(self, weight: Tensor) -> Tensor:
        values = torch.ldexp(weight.to(torch.float32), torch.tensor(-self.shift))
        padding = self.groups * self.group_size - self.in_features
        values = torch.nn.functional.pad(values, (0, padding)) if padding else values.contiguous()
        return values.view(-1, self.groups, self.group_size)

    def _padded_importance(self, importance: Tensor | None) -> Tensor | None:
        padding = self.groups * self.group_size - self.in_features
        if importance is None and not padding:
            return None
        each = torch.ones(self.in_features) if importance is None else importance.to(torch.float32)
        return torch.nn.functional.pad(each, (0, padding)).view(1, self.groups, self.group_size)


def shift_of(weight: Tensor) -> int:
    """The power of two that brings the largest magnitude of ``weight`` ``[rows, in]`` to 2**8 .. 2**9; 0 for zeros.

    Raises:
        WeightError: NaN or infinity, with how many and where the first one is.
    """
    step = max(1, BLOCK_WEIGHTS * 16 // weight.shape[1])
    largest = 0.0
    for start in range(0, weight.shape[0], step):
        block = weight[start : start + step].to(torch.float32)
        top = torch.linalg.vector_norm(block, float("inf")).item()
        if not top < float("inf"):
            bad = (~torch.isfinite(block)).nonzero()
            if len(bad):
                row, column = (bad[0] + torch.tensor([start, 0])).tolist()
                raise WeightError(
                    f"the weight holds NaN or infinity ({len(bad)} values in rows {start} to {start + len(block) - 1}, "
                    f"first at row {row}, column {column}). Repair or exclude it (modules_to_not_convert)."
                )
        largest = max(largest, top)
    return int(torch.frexp(torch.tensor(largest)).exponent) - TOP_EXPONENT if largest else 0
