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

# Columns whose errors are passed on among themselves one by one, and to the rest together.
COLUMNS = 32
# Rows that one thread works on at a time; fixed, so that the number of threads cannot change a result.
ROWS = 2048
# Damping is raised tenfold this often before the factorization is tried in float64; where none was asked for, from this.
ATTEMPTS = 4
LEAST_DAMPING = 1e-3


@dataclass(frozen=True)
class Factor:
    """A damped Gram matrix ready for use.

    Attributes:
        gram: float32 ``[in, in]``, damped.
        upper: upper Cholesky factor ``U`` of its inverse ``U^T U``, rows and columns in ``order``.
        order: int64 ``[in]``, the order columns are visited in.
        damping: share of the mean diagonal that was added.
        precision: ``float32`` or ``float64``: what the factorization needed.
    """

    gram: Tensor
    upper: Tensor
    order: Tensor
    damping: float
    precision: str

    def divide(self, rows: Tensor) -> Tensor:
        """``rows`` float32 ``[n, in]`` times the inverse of the damped Gram matrix."""
        out = torch.empty_like(rows)
        out[:, self.order] = rows[:, self.order] @ self.upper.T @ self.upper
        return out


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
    raised = [(damping or LEAST_DAMPING) * 10**k for k in range(1, ATTEMPTS + 1)]
    steps = [(share, torch.float32) for share in (damping, *raised)]
    steps.append((steps[-1][0], torch.float64))
    visited = gram.diagonal().argsort(descending=True, stable=True) if order == "activation" else torch.arange(len(gram))
    with all_threads():
        for share, dtype in steps:
            damped = gram.clone()
            damped.diagonal().add_(share * level)
            upper = _upper(damped, visited, dtype)
            if upper is not None:
                return Factor(damped, upper.float(), visited, share, str(dtype).removeprefix("torch."))
    return None


def _upper(damped: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Upper Cholesky factor of the inverse with rows and columns in ``order``; None where there is none.

    At most three matrices of this size are alive at once: 800 MB for 8,192 inputs.
    """
    permuted = damped.index_select(0, order).index_select(1, order).to(dtype)
    lower, failed = torch.linalg.cholesky_ex(permuted)
    del permuted
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper


def feed_back(coding: Coding, target: Tensor, found: Factor) -> None:
    """Choose the codes of ``coding`` in place so that they approximate ``target`` ``[n, in]`` under the Gram matrix.

    Free weights make up for the columns before them in full, so they pass no error on.
    """

    def run(start: int) -> None:
        _feed_rows(coding.rows(start, start + ROWS), target[start : start + ROWS], found)

    in_parallel(run, range(0, len(target), ROWS))


def _feed_rows(coding: Coding, target: Tensor, found: Factor) -> None:
    order, count = found.order.tolist(), target.shape[1]
    # One column of weights after the other is read and written, so columns lie contiguous here.
    work = target.T[found.order].contiguous()
    scale, inverse, offset = coding.columns()
    free = None if coding.free is None else coding.free.T[found.order].contiguous()
    nearest = Nearest(coding)
    diagonal = found.upper.diagonal().tolist()
    codes = torch.empty(work.shape, dtype=torch.int64)
    for first in range(0, count, COLUMNS):
        last = min(first + COLUMNS, count)
        errors = torch.empty(last - first, len(target))
        for column in range(first, last):
            group, value = order[column] // coding.group_size, work[column]
            shifted = value if offset is None else value - offset[group]
            code = nearest(shifted * inverse[group])
            error = torch.addcmul(shifted, nearest.levels(code), scale[group], value=-1).div_(diagonal[column])
            codes[column] = code
            if free is not None:
                error.masked_fill_(free[column], 0.0)
            work[column + 1 : last].addr_(found.upper[column, column + 1 : last], error, alpha=-1)
            errors[column - first] = error
        work[last:].addmm_(found.upper[first:last, last:].T, errors, alpha=-1)
    back = torch.empty_like(found.order)
    back[found.order] = torch.arange(count)
    coding.codes.copy_(codes[back].T)
    if coding.held is not None:
        coding.held.copy_(work[back].T)
