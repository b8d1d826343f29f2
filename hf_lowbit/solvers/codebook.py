"""``codebook``: one fitted level table per matrix under searched group scales; the best data-free method here.

Alternates the scale search with the exact least-squares refit of the table (weights notes 0.4 A); for fixed codes and
scales ``level_k = sum h s w / sum h s^2`` over the weights coded ``k``. One table per tensor gets all of the gain of
finer tables at no cost in bits (weights notes 0.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.scales import round_f16, to_f16_bits
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.encode import encode_searched
from hf_lowbit.solvers.parallel import in_parallel
from hf_lowbit.solvers.registry import solver
from hf_lowbit.solvers.rows import Rows
from hf_lowbit.solvers.scale_search import codes_of, error_of, search_scales

SAMPLE_WEIGHTS = 1 << 18
ROUNDS = 5
LLOYD_STEPS = 25


@solver("codebook", families=("fitted",), summary="a level table fitted to each matrix, scales searched together with it")
def codebook(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Fit a table per matrix (one each for the matrices of a stack) on a sample, then search all scales."""
    samples = SAMPLE_WEIGHTS if rows.tables == 1 else SAMPLE_WEIGHTS // 4
    fit = in_parallel(lambda table: fit_table(*rows.sample(samples, table), spec.bits), range(rows.tables))
    tables = torch.stack(fit)
    stage = Stage(Levels("fitted", spec.bits), rows.group_size, spec.scale_bits, tables=rows.tables)
    fields = encode_searched(rows, stage, tables, signed=True)
    fields["levels"] = to_f16_bits(tables)
    return stage, fields


def fit_table(values: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    """A level table, ascending fp16 values in float32 ``[2**bits]`` with largest magnitude 1.

    Several starts are compared after one round, so that weights already on a grid keep it; the best is refined, and the
    best table seen is returned: never worse than any start.

    Args:
        values: sampled groups, float32 ``[n, 1, group_size]``.
        importance: weights of the squared error, broadcastable, or None.
    """
    # Where all sampled weights are zero so is the k-means start, which could hold none of the weights outside the sample.
    starts = [_normalised(table) for table in _starts(values, importance, bits) if table.any()]
    fits = in_parallel(lambda table: _fit_scales(values, table, importance), starts)
    first = min(range(len(starts)), key=lambda number: fits[number][1])
    best_table = table = starts[first]
    scale, least = fits[first]
    for _ in range(ROUNDS):
        table = _refit(values, scale, table, importance)
        scale, error = _fit_scales(values, table, importance)
        if error < least:
            best_table, least = table, error
    return best_table


def _starts(values: Tensor, importance: Tensor | None, bits: int) -> list[Tensor]:
    """K-means of the weights over their group's largest magnitude, a power table, and the uniform grids."""
    starts = [_lloyd(values, importance, bits), Levels("power_zero_free", bits, exponent=0.8).table()]
    starts += [Levels(family, bits).table() for family in ("uniform_zero_free", "integer")]
    return starts + ([Levels("uniform", bits).table()] if bits > 1 else [])


def _fit_scales(values: Tensor, table: Tensor, importance: Tensor | None) -> tuple[Tensor, float]:
    scale = search_scales(values, table, importance, signed=True)
    levels = table[codes_of(values, scale, table).long()]
    return scale, float(error_of(values, levels, scale, importance).sum())


def _refit(values: Tensor, scale: Tensor, table: Tensor, importance: Tensor | None) -> Tensor:
    codes = codes_of(values, scale, table)
    weight = scale * scale if importance is None else scale * scale * importance
    cross = scale * values if importance is None else scale * values * importance
    return _normalised(_means(codes, cross, weight.expand(values.shape), table))


def _lloyd(values: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    """Weighted one-dimensional k-means of ``values / absmax``, from quantiles; an emptied level keeps its place."""
    peak = values.abs().amax(-1, keepdim=True)
    weight = (peak * peak if importance is None else peak * peak * importance).expand(values.shape)
    ordered, place = torch.where(peak > 0, values / peak, 0.0).flatten().sort()
    count = 2**bits
    table = ordered[((torch.arange(count) + 0.5) / count * len(ordered)).long()]
    # Cells of sorted values are runs of them, whose sums are differences of running sums: a step costs a search per level
    # instead of one per weight.
    mass = weight.flatten()[place].double()
    total, moment = (torch.cat([mass.new_zeros(1), part.cumsum(0)]) for part in (mass, mass * ordered))
    for _ in range(LLOYD_STEPS):
        edges = torch.searchsorted(ordered, (table[1:] + table[:-1]) / 2, right=True)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(ordered))])
        table = _centres(moment[edges].diff(), total[edges].diff(), table)
    return table


def _means(codes: Tensor, cross: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Weighted mean per code in float64, so that the order of summation cannot move a level; ascending."""
    flat, count = codes.flatten().long(), len(table)
    total = torch.bincount(flat, weight.flatten().double(), minlength=count)
    summed = torch.bincount(flat, cross.flatten().double(), minlength=count)
    return _centres(summed, total, table)


def _centres(moment: Tensor, total: Tensor, table: Tensor) -> Tensor:
    """Mean of each cell of ``table``, float32 ascending; an empty cell keeps its level."""
    return torch.where(total > 0, moment / total, table.double()).float().sort().values


def _normalised(table: Tensor) -> Tensor:
    peak = table.abs().max()
    return round_f16(table / peak) if peak > 0 else table
