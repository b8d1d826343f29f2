"""``squeezellm``: a free level table per row by k-means under the Fisher diagonal (SqueezeLLM, arXiv 2306.07629).

Each row ``o`` gets the ``2**bits`` levels that minimise ``sum_i F[o, i] (w[o, i] - w_hat[o, i])^2`` with ``F`` the mean
squared gradient of the model's loss. The paper's form is ``group_size=-1``: one table and one scale (the row's largest
magnitude, fp16) per row. Any other group size is served as asked: the row's table is then shared by groups with a scale
each, and the clusters are those of ``w / s`` under ``F s^2`` (weights notes 8, reconstructed).

``outliers`` is the paper's dense-and-sparse split: the most sensitive weights (option ``sensitive``, a share of all
weights) and the largest ones are kept beside the codes and do not count in the clustering.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.scales import round_f16, to_f16_bits
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.encode import Span, empty_fields, put_codes, put_group_values
from hf_lowbit.solvers.kmeans import weighted_kmeans
from hf_lowbit.solvers.parallel import in_parallel
from hf_lowbit.solvers.registry import SOLVERS, solver
from hf_lowbit.solvers.rows import Rows
from hf_lowbit.solvers.statistics import Statistics

# Sensitivities of a row are capped at this quantile, so that single weights cannot capture a level (weights notes 8).
CAP = 0.999
# Times that group scales are fitted to the clusters and the clusters to them. Further ones gain less than 1 %.
ROUNDS = 2


def split_outliers(weight: Tensor, spec: Spec, statistics: Sequence[Statistics]) -> Tensor:
    """Which weights are kept beside the codes: sorted flat indices, int64.

    The share of ``spec.outliers`` that the option ``sensitive`` allows goes to the largest sensitivities, the rest to the
    weights beyond the paper's threshold, ``max(|Q1 - r IQR|, |Q3 + r IQR|)`` of their matrix. It bounds magnitudes alone,
    and its ``r`` is tuned for a number of outliers: so these are the largest magnitudes, as many as asked for.

    Args:
        weight: ``[rows, in]``, the matrices of a stack one after the other; each gets its equal share.

    Raises:
        BadRequest: statistics without sensitivities.
    """
    matrices, each = len(statistics), len(weight) // len(statistics)
    size = each * weight.shape[1]
    wanted = max(1, round(spec.outliers * weight.numel()))
    sensitive = min(spec.outliers, SOLVERS["squeezellm"].option(spec, "sensitive"))
    picked = []
    for number in range(matrices):
        count = wanted * (number + 1) // matrices - wanted * number // matrices
        fisher = sensitivity_of(statistics, number, each, weight.shape[1]).flatten()
        first = min(count, round(sensitive * size), int((fisher > 0).sum()))
        top = fisher.topk(first).indices
        magnitude = weight[number * each : (number + 1) * each].to(torch.float32).abs().flatten()
        magnitude[top] = -1.0
        picked.append(torch.cat([top, magnitude.topk(count - first).indices]) + number * size)
    return torch.cat(picked).sort().values


@solver(
    "squeezellm",
    families=("fitted",),
    summary="a level table per row by k-means under the Fisher diagonal, and the paper's choice of outliers",
    evidence="fisher",
    optional=False,
    options={"sensitive": 0.0005},
    outliers=split_outliers,
)
def squeezellm(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Cluster every row under its sensitivities.

    Raises:
        BadRequest: statistics without sensitivities.
    """
    whole = rows.groups == 1
    stage = Stage(Levels("fitted", spec.bits), rows.group_size, 16 if whole else spec.scale_bits, tables=rows.rows)
    fields = empty_fields(rows, stage)
    each = rows.rows // rows.tables
    fisher = [sensitivity_of(rows.statistics, number, each, rows.in_features) for number in range(rows.tables)]

    def encode_span(span: Span) -> None:
        start, stop, number = span
        counted, _ = rows.block(start, stop)
        own = fisher[number][start - number * each : stop - number * each]
        weight = _padded(_weights(own, _counts(rows, start, stop)), counted)
        scale = put_group_values(fields, "scale", stage, span, counted.abs().amax(-1, keepdim=True))
        table = _cluster(counted, weight, scale, 2**spec.bits)
        for _ in range(0 if whole else ROUNDS):
            levels = table.gather(1, _nearest(counted, scale, table).flatten(1)).view(counted.shape)
            square = (weight * levels * levels).sum(-1, keepdim=True)
            fitted = torch.where(square > 0, (weight * levels * counted).sum(-1, keepdim=True) / square, 0.0)
            scale = put_group_values(fields, "scale", stage, span, fitted)
            table = _cluster(counted, weight, scale, 2**spec.bits)
        fields["levels"][start:stop] = to_f16_bits(table)
        # Outliers too are coded as what they are: what is left of them to store is least then.
        values = torch.ldexp(rows.weight[start:stop].to(torch.float32), torch.tensor(-rows.shift))
        put_codes(fields, rows, stage, span, _nearest(_padded(values, counted), scale, table))

    in_parallel(encode_span, rows.spans())
    return stage, fields


def sensitivity_of(statistics: Sequence[Statistics], number: int, rows: int, in_features: int) -> Tensor:
    """Sensitivities of one matrix of a stack, float32 ``[rows, in_features]``.

    Raises:
        BadRequest: there are none, they are of another shape, or they are not finite.
    """
    found = statistics[number].sensitivity
    if found is None:
        raise BadRequest(
            "method 'squeezellm' weighs errors by the squared gradients of the loss, and the statistics it was given hold "
            "none (Statistics.sensitivity is None). Calibrate with the fisher evidence."
        )
    if tuple(found.shape) != (rows, in_features):
        raise BadRequest(f"the weight is [{rows}, {in_features}], its sensitivities are {list(found.shape)}.")
    if not torch.isfinite(found).all():
        raise BadRequest("the sensitivities hold NaN or infinity: a gradient overflowed. Calibrate with float32 gradients.")
    return found


def _counts(rows: Rows, start: int, stop: int) -> Tensor:
    """Which weights of some rows count in the error, float32 ``[n, in]``: 0 for outliers."""
    mask = torch.ones((stop - start) * rows.in_features)
    if rows.excluded is not None:
        borders = torch.tensor([start, stop]) * rows.in_features
        low, high = torch.searchsorted(rows.excluded, borders).tolist()
        mask[rows.excluded[low:high] - borders[0]] = 0
    return mask.view(-1, rows.in_features)


def _weights(fisher: Tensor, counts: Tensor) -> Tensor:
    """Weights of the squared error: capped sensitivities; ones for a row without any, and outliers are never counted."""
    weight = fisher.to(torch.float32) * counts
    weight = weight.minimum(torch.quantile(weight, CAP, dim=1, keepdim=True))
    return torch.where(weight.amax(1, keepdim=True) > 0, weight, counts)


def _padded(values: Tensor, like: Tensor) -> Tensor:
    """``[n, in]`` with zeros up to whole groups, in the shape of ``like`` ``[n, groups, group_size]``."""
    return torch.nn.functional.pad(values, (0, like[0].numel() - values.shape[1])).view(like.shape)


def _cluster(values: Tensor, weight: Tensor, scale: Tensor, count: int) -> Tensor:
    """Tables ``[n, count]`` (fp16 values in float32) of ``values / scale``, all float32 ``[n, groups, group_size or 1]``."""
    return round_f16(weighted_kmeans(_divided(values, scale).flatten(1), (weight * scale * scale).flatten(1), count))


def _nearest(values: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Codes (int64) of the levels of each row's table nearest to ``values / scale``; ties go to the lower level."""
    middles = (table[:, 1:] + table[:, :-1]) / 2
    return torch.searchsorted(middles, _divided(values, scale).flatten(1).contiguous()).view(values.shape)


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, values / scale)
