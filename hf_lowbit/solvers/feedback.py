"""Error feedback: codes chosen column by column, each column's error made up for by the columns that follow.

GPTQ (Frantar et al., arXiv 2210.17323) over any level table: scales and tables are fixed beforehand (static groups), so
columns may be visited in any order, and what is rounded to is the nearest level under the column's scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.solvers.coding import Coding, Nearest
from hf_lowbit.solvers.parallel import all_threads, in_parallel

COLUMNS = 128
# Rows that one thread works on at a time; fixed, so that the number of threads cannot change a result.
ROWS = 512
# Damping is raised tenfold this often before the factorization is tried in float64.
ATTEMPTS = 4


@dataclass(frozen=True)
class Factor:
    """A damped Gram matrix ready for use.

    Attributes:
        gram: float32 ``[in, in]``, damped.
        inverse: its inverse.
        upper: upper Cholesky factor of the inverse with columns in ``order``.
        order: int64 ``[in]``, the order columns are visited in.
        damping: share of the mean diagonal that was added.
        precision: ``float32`` or ``float64``: what the factorization needed.
    """

    gram: Tensor
    inverse: Tensor
    upper: Tensor
    order: Tensor
    damping: float
    precision: str


def factor(gram: Tensor, damping: float, order: str) -> Factor | None:
    """Factorize ``gram + damping * mean(diag) * I``, raising the damping until that works.

    The ladder: the damping asked for, then tenfold up to four times, then the last one in float64.

    Args:
        gram: float32 ``[in, in]``, symmetric, positive semi-definite up to rounding.
        order: ``activation`` visits columns of large inputs first (act-order), ``given`` as stored.

    Returns:
        None where no step of the ladder works, or the inputs were all zero: the caller rounds to nearest.
    """
    level = float(gram.diagonal().mean())
    if not (level > 0 and level < float("inf")):
        return None
    steps = [(damping * 10**k, torch.float32) for k in range(ATTEMPTS + 1)]
    steps.append((steps[-1][0], torch.float64))
    visited = gram.diagonal().argsort(descending=True, stable=True) if order == "activation" else torch.arange(len(gram))
    with all_threads():
        for share, dtype in steps:
            damped = gram.clone()
            damped.diagonal().add_(share * level)
            lower, failed = torch.linalg.cholesky_ex(damped[visited][:, visited].to(dtype))
            if failed:
                continue
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if failed or not torch.isfinite(upper).all():
                continue
            back = torch.empty_like(visited)
            back[visited] = torch.arange(len(visited))
            plain = inverse[back][:, back].float()
            return Factor(damped, plain, upper.float(), visited, share, str(dtype).removeprefix("torch."))
    return None


def feed_back(coding: Coding, target: Tensor, found: Factor) -> None:
    """Choose the codes of ``coding`` in place so that they approximate ``target`` ``[n, in]`` under the Gram matrix.

    Free weights make up for the columns before them in full, so they pass no error on.
    """

    def run(start: int) -> None:
        _feed_rows(coding.rows(start, start + ROWS), target[start : start + ROWS], found)

    in_parallel(run, range(0, len(target), ROWS))


def _feed_rows(coding: Coding, target: Tensor, found: Factor) -> None:
    order, count = found.order, target.shape[1]
    work = target[:, order]
    scale = coding.spread(coding.scale)[:, order]
    offset = None if coding.offset is None else coding.spread(coding.offset)[:, order]
    inverse_scale = torch.where(scale != 0, 1 / scale, 0.0)
    free = None if coding.free is None else coding.free[:, order]
    nearest = Nearest(coding)
    codes = torch.empty_like(coding.codes)
    for first in range(0, count, COLUMNS):
        last = min(first + COLUMNS, count)
        errors = torch.empty(len(target), last - first)
        upper = found.upper[first:last, first:last]
        for column in range(first, last):
            value = work[:, column]
            if offset is None:
                code = nearest(value * inverse_scale[:, column])
                level = coding.levels_of(code[:, None])[:, 0] * scale[:, column]
            else:
                code = nearest((value - offset[:, column]) * inverse_scale[:, column])
                level = coding.levels_of(code[:, None])[:, 0] * scale[:, column] + offset[:, column]
            codes[:, column] = code
            place = column - first
            error = (value - level) / upper[place, place]
            if free is not None:
                error = torch.where(free[:, column], 0.0, error)
            work[:, column + 1 : last] -= error[:, None] * upper[place, place + 1 :]
            errors[:, place] = error
        work[:, last:] -= errors @ found.upper[first:last, last:]
    coding.codes[:, order] = codes
    if coding.held is not None:
        coding.held[:, order] = work
