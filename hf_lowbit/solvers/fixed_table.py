"""``search``, ``nf`` and ``float``: a table that does not depend on the weights, under searched group scales."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import Levels, parse_levels
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.encode import encode_searched
from hf_lowbit.solvers.registry import solver
from hf_lowbit.solvers.rows import Rows
from hf_lowbit.solvers.rtn import FIXED, fixed_levels
from hf_lowbit.solvers.scale_search import Nearest, error_of, search_scales

SEARCHED = tuple(family for family in FIXED if family != "affine")
SAMPLE_WEIGHTS = 1 << 16


def search_table(rows: Rows, spec: Spec, levels: Levels) -> tuple[Stage, dict[str, Tensor]]:
    """A stage with generated ``levels`` and searched scales, of either sign where the table is not symmetric."""
    stage = Stage(levels, rows.group_size, spec.scale_bits)
    return stage, encode_searched(rows, stage, levels.table()[None], signed=not levels.symmetric)


def sample_error(rows: Rows, levels: Levels) -> float:
    """Squared error that searched fp16 scales leave on an even sample of the weights."""
    values, importance = rows.sample(SAMPLE_WEIGHTS)
    table = levels.table()
    scale = search_scales(values, table, importance, signed=not levels.symmetric)
    return float(error_of(values, Nearest(table)(values, scale), scale, importance).sum())


@solver("search", families=SEARCHED, summary="round to nearest with searched scales on integers of either sign")
def search(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Searched scales on a fixed table; by default the full integer range, whose scales may be negative."""
    return search_table(rows, spec, fixed_levels(spec, "integer" if spec.bits > 1 else "uniform_zero_free"))


@solver("nf", families=("normal_float",), bits=(2, 8), summary="normal-float table, searched scales")
def normal_float(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Quantiles of the normal distribution (QLoRA, arXiv 2305.14314) with searched instead of absmax scales."""
    return search_table(rows, spec, Levels("normal_float", spec.bits))


@solver("float", families=("float",), bits=(3, 8), summary="float table, exponent and mantissa split by error")
def low_bit_float(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """The split into exponent and mantissa bits with the least error on a sample (arXiv 2208.09225), or the one asked."""
    _, mantissa = parse_levels(spec.levels or "float")
    splits = range(spec.bits - 1) if mantissa is None else [mantissa]
    candidates = [Levels("float", spec.bits, mantissa=m) for m in splits]
    best = candidates[0] if len(candidates) == 1 else min(candidates, key=lambda levels: sample_error(rows, levels))
    return search_table(rows, spec, best)
