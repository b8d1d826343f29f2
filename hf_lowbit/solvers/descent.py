"""Coordinate descent on codes, scales, offsets and tables under the full Gram matrix. No step can raise the objective.

The objective is ``tr((W - W_hat) H (W - W_hat)^T)``. In one code, scale or offset it is a parabola, so the best storable
value is the one nearest to its minimum (QuantEase, arXiv 2309.01885, for the codes); in a table it is a small least-squares
problem (weights notes 0.4 B), whose rounded solution is taken only if the objective over all rows falls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.format.scales import round_f16
from hf_lowbit.solvers.coding import Coding, Nearest, on_grid
from hf_lowbit.solvers.feedback import ROWS
from hf_lowbit.solvers.parallel import in_parallel

# Columns that see each other's changes at once; the rest of the row is brought up to date after them.
COLUMNS = 256
# Columns moved one by one before the others of their block hear of it.
TOGETHER = 32
# Multiply-adds spent on the normal equations of a table; beyond, they are formed from evenly spread rows: 298 of 2,048
# inputs at 4 bits, 610,000 weights for 16 levels, in half a second.
TABLE_WORK = 2e10
# Tables of 6 bits and more are fine as they are, and their normal equations cost more than all sweeps.
MOST_LEVELS = 32
# Sweeps that are followed by a refit of the tables; later ones change them too little to pay for weighing the result.
REFITS = 2


def descend(coding: Coding, target: Tensor, gram: Tensor, sweeps: int) -> tuple[float, float]:
    """Improve ``coding`` in place; returns the objective before and after.

    Args:
        target: float32 ``[n, in]``.
        gram: float32 ``[in, in]``, positive diagonal.
        sweeps: passes over all columns; the first ones are followed by a refit of fitted tables.
    """
    spans = range(0, len(target), ROWS)
    before = now = objective(coding, target, gram)
    for number in range(sweeps):
        in_parallel(lambda start: _sweep_rows(coding, target, gram, start), spans)
        if coding.stage.levels.stored and coding.tables.shape[1] <= MOST_LEVELS and number < REFITS:
            _refit_tables(coding, target, gram)
    if sweeps:
        now = objective(coding, target, gram)
    return before, now


def objective(coding: Coding, target: Tensor, gram: Tensor) -> float:
    """``tr(E H E^T)`` of the error ``E = target - W_hat`` ``[n, in]``."""

    def part(start: int) -> float:
        error = target[start : start + ROWS] - coding.rows(start, start + ROWS).dequantize()
        return float(((error @ gram) * error).sum(dtype=torch.float64))

    return sum(in_parallel(part, range(0, len(target), ROWS)))


def _sweep_rows(whole: Coding, target: Tensor, gram: Tensor, start: int) -> None:
    """One pass over the columns of up to ``ROWS`` rows: scale and offset of a group, then its codes and free weights."""
    coding, target = whole.rows(start, start + ROWS), target[start : start + ROWS]
    pull = (target - coding.dequantize()) @ gram  # minus half the gradient by the values of W_hat
    nearest, size = Nearest(coding), coding.group_size
    width = max(size, COLUMNS // size * size)
    for first in range(0, target.shape[1], width):
        last = min(first + width, target.shape[1])
        block = gram[first:last, first:last]
        local = pull[:, first:last].T.contiguous()  # one column of weights after the other is moved
        fallen = torch.zeros_like(local)
        for group in range(first // size, -(-last // size)):
            low, high = group * size - first, min((group + 1) * size, last) - first
            fall = _move_scales(coding, group, local[low:high], block[low:high, low:high])
            local.addmm_(block[:, low:high], fall)
            fallen[low:high] += fall
            for left in range(low, high, TOGETHER):
                right = min(left + TOGETHER, high)
                fall = _move_codes(coding, nearest, first + left, group, local[left:right], block[left:right, left:right])
                local[right:].addmm_(block[right:, left:right], fall)
                fallen[left:right] += fall
        pull.addmm_(fallen.T, gram[first:last])


def _move_scales(coding: Coding, group: int, pull: Tensor, block: Tensor) -> Tensor:
    """Move scale and offset of one group to their best storable values; returns the fall of its values ``[m, n]``."""
    start = group * coding.group_size
    columns = slice(start, start + len(pull))
    levels = coding.levels_of(coding.codes[:, columns]).T.contiguous()
    fall = torch.zeros_like(pull)
    moves = [(levels, coding.scale, coding.step)]
    if coding.offset is not None:
        moves.append((torch.ones_like(levels), coding.offset, coding.offset_step))
    for direction, stored, step in moves:
        if coding.free is not None:
            direction = torch.where(coding.free[:, columns].T, 0.0, direction)
        curvature = ((block @ direction) * direction).sum(0)
        slope = (direction * torch.addmm(pull, block, fall)).sum(0)
        old = stored[:, group]
        best = old + torch.where(curvature > 0, slope / curvature, 0.0)
        kept = on_grid(best, None if step is None else step[:, group], coding.stage.scale_bits)
        kept = torch.where(curvature > 0, kept, old)
        fall = fall + (old - kept) * direction
        stored[:, group] = kept
    return fall


def _move_codes(coding: Coding, nearest: Nearest, start: int, group: int, pull: Tensor, block: Tensor) -> Tensor:
    """Move the codes of some columns of a group to their best levels one after the other, free weights to their best values.

    Returns the fall of their values ``[m, n]``; ``pull`` ``[m, n]`` is brought up to date on the way.
    """
    columns = slice(start, start + len(pull))
    scale = coding.scale[:, group].contiguous()
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    levels = coding.levels_of(coding.codes[:, columns]).T.contiguous()
    codes = torch.empty(levels.shape, dtype=torch.int64)
    fall = torch.empty_like(pull)
    curvature = block.diagonal().tolist()
    for column in range(len(pull)):
        wanted = torch.addcmul(levels[column], pull[column], inverse, value=1 / curvature[column])
        code = nearest(wanted)
        codes[column] = code
        torch.mul(levels[column] - nearest.levels(code), scale, out=fall[column])
        if coding.free is not None and coding.held is not None:
            step = pull[column] / curvature[column]
            coding.held[:, start + column] += step
            torch.where(coding.free[:, start + column], -step, fall[column], out=fall[column])
        pull[column + 1 :].addr_(block[column, column + 1 :], fall[column])
    coding.codes[:, columns] = codes.T
    return fall


def _refit_tables(coding: Coding, target: Tensor, gram: Tensor) -> None:
    """Solve each table's least-squares problem; keep the new tables if ascending and the objective falls."""
    old, now = coding.tables.clone(), objective(coding, target, gram)
    for table in range(len(old)):
        rows = torch.arange(len(target)) if coding.ids is None else (coding.ids == table).nonzero()[:, 0]
        affordable = max(16, int(TABLE_WORK / (old.shape[1] * len(gram) ** 2)))
        if not len(rows):
            continue
        picked = rows[torch.linspace(0, len(rows) - 1, min(len(rows), affordable)).round().long()]
        new = _solve_table(coding, target, gram, picked, old[table])
        if (new.diff() > 0).all():
            coding.tables[table] = new
    if not objective(coding, target, gram) < now:
        coding.tables.copy_(old)


def _solve_table(coding: Coding, target: Tensor, gram: Tensor, rows: Tensor, old: Tensor) -> Tensor:
    """Levels that minimise the objective of ``rows`` for their codes and scales; a level in no use stays."""
    count = len(old)
    codes, scale = coding.codes[rows], coding.spread(coding.scale[rows])
    wanted = target[rows] if coding.offset is None else target[rows] - coding.spread(coding.offset[rows])
    if coding.free is not None and coding.held is not None:
        free = coding.free[rows]
        scale = torch.where(free, 0.0, scale)
        wanted = torch.where(free, target[rows] - coding.held[rows], wanted)
    parts = [torch.where(codes == k, scale, 0.0) for k in range(count)]
    normal, right = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)

    def line(k: int) -> None:
        through = parts[k] @ gram
        right[k] = (through * wanted).sum(dtype=torch.float64)
        for other in range(k, count):
            normal[k, other] = normal[other, k] = (through * parts[other]).sum(dtype=torch.float64)

    in_parallel(line, range(count))
    ridge = 1e-8 * normal.diagonal().mean()
    normal.diagonal().add_(ridge)
    if not ridge > 0:
        return old
    return round_f16(torch.linalg.solve(normal, right + ridge * old.double()).float())
