"""``tquant``, ``mquant`` and ``ternary``: levels -1, 0, 1 under three rules for the threshold.

Support and mass equalization (arXiv 2306.17442, reconstructed): TQuant cuts the support of a group into three equal
intervals, MQuant cuts its mass into three equal parts; ``ternary`` takes the threshold with the least squared error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.encode import Span, empty_fields, put_codes, put_group_values
from hf_lowbit.solvers.fixed_table import search_table
from hf_lowbit.solvers.parallel import in_parallel
from hf_lowbit.solvers.registry import solver
from hf_lowbit.solvers.rows import Rows

# Magnitudes [n, groups, group_size] -> threshold and level, [n, groups, 1] each.
Cut = Callable[[Tensor], tuple[Tensor, Tensor]]

ONLY: dict = {"families": ("ternary",), "bits": (2, 2)}


@solver("tquant", **ONLY, summary="ternary, least largest error (support cut in three)")
def tquant(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Threshold m/3 and level 2m/3 for a group's largest magnitude m: no error exceeds m/3."""
    return _encode(rows, spec, lambda size: (size.amax(-1, keepdim=True) / 3, size.amax(-1, keepdim=True) * (2 / 3)))


@solver("mquant", **ONLY, summary="ternary, mass cut in three")
def mquant(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """A third of the magnitudes becomes zero (fewer where equal ones would be parted); the level is the mean of the others.

    The padding of a row's last group counts neither as zero nor as weight.
    """
    padding = torch.zeros(rows.groups, 1, dtype=torch.int64)
    padding[-1] = rows.groups * rows.group_size - rows.in_features
    smallest_kept = padding + (rows.group_size - padding) // 3

    def cut(size: Tensor) -> tuple[Tensor, Tensor]:
        threshold = size.sort(-1).values.gather(-1, smallest_kept.expand(len(size), -1, -1))
        outside = (size >= threshold) & (size > 0)
        return threshold, (size * outside).sum(-1, keepdim=True) / outside.sum(-1, keepdim=True).clamp_min(1)

    return _encode(rows, spec, cut)


@solver("ternary", **ONLY, summary="ternary, least squared error")
def ternary(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """The searched scale of the table -1, 0, 1, which is the best threshold."""
    return search_table(rows, spec, Levels("ternary", 2))


def _encode(rows: Rows, spec: Spec, cut: Cut) -> tuple[Stage, dict[str, Tensor]]:
    """Codes by ``cut(|w|) -> threshold, level``: the threshold rules, not the nearest level."""
    stage = Stage(Levels("ternary", 2), rows.group_size, spec.scale_bits)
    fields = empty_fields(rows, stage)

    def encode_span(span: Span) -> None:
        values, _ = rows.block(*span[:2])
        threshold, level = cut(values.abs())
        put_group_values(fields, "scale", stage, span, level)
        codes = torch.where(values.abs() >= threshold, values.sign(), 0.0) + 1
        put_codes(fields, rows, stage, span, codes)

    in_parallel(encode_span, rows.spans())
    return stage, fields
