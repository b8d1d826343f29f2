"""``solve``: one weight in, one ``LowBitTensor`` out, whatever the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, WeightError
from hf_lowbit.format.layout import Layout, Stage, stage_field
from hf_lowbit.format.outliers import store_outliers
from hf_lowbit.format.spec import Spec
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.solvers.calibrated import Calibrated
from hf_lowbit.solvers.parallel import block_threads, release_freed_memory
from hf_lowbit.solvers.registry import get_solver
from hf_lowbit.solvers.rows import Rows, shift_of
from hf_lowbit.solvers.statistics import Statistics

# Weights above which a solve leaves enough freed memory behind to be worth returning (2 ms).
LARGE = 1 << 20


@torch.no_grad()
@block_threads()
def solve(
    weight: Tensor,
    spec: Spec,
    importance: Tensor | None = None,
    statistics: Sequence[Statistics] = (),
    notes: dict[str, Any] | None = None,
) -> LowBitTensor:
    """Quantize one matrix, or a stack of matrices, as ``spec`` says.

    Args:
        weight: float ``[out, in]`` or ``[experts, out, in]``, any float dtype; read in blocks, never copied whole.
        spec: bits, grouping, method.
        importance: float ``[in]``, weight of the squared error per input channel; given ``statistics``, theirs.
        statistics: what calibration gathered, one entry for each matrix of a stack.
        notes: receives what a calibrated solver has to report (``hf_lowbit.solvers.calibrated``).

    Raises:
        WeightError: NaN, infinity, an integer dtype or another number of axes.
        BadRequest: a method or setting that cannot be served, or one that needs statistics without them.
    """
    entry = get_solver(spec)
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or weight.numel() == 0:
        raise WeightError(f"a weight is a float [out, in] or [experts, out, in], got {weight.dtype} {list(weight.shape)}.")
    if importance is not None and tuple(importance.shape) != (weight.shape[-1],):
        raise BadRequest(
            f"importance is one number per input channel, [{weight.shape[-1]}] here, got {list(importance.shape)}."
        )
    flat = weight.detach().reshape(-1, weight.shape[-1])
    tables = weight.shape[0] if weight.dim() == 3 else 1
    if not statistics and not entry.optional:
        raise BadRequest(f"method {spec.method!r} fits codes to calibration data and was given none.")
    calibrated = Calibrated(entry, spec, statistics) if statistics and entry.evidence in ("gram", "block") else None
    if statistics:
        _check_statistics(statistics, tables, flat)
        importance = torch.stack([found.importance for found in statistics]).mean(0)
        importance = importance if bool(importance.any()) else None  # no token came by
    if calibrated is not None:
        shift_of(flat)  # refuses NaN and infinity before they spread
        flat = calibrated.targets(flat)
    shift = shift_of(flat)
    excluded = (entry.outliers or _largest)(flat, spec, statistics) if spec.outliers else None
    group_size = spec.groups_of(weight.shape[-1])
    layout = Layout(tuple(weight.shape), (), shift=shift, method=spec.method)
    tensors: dict[str, Tensor] = {}
    source = flat
    for term in range(spec.residual_terms):
        rows = Rows(source, group_size, shift, tables, importance, excluded, statistics)
        stage, fields = entry.solve(rows, spec)
        if calibrated is not None:
            wanted = calibrated.recode(stage, fields, torch.ldexp(source, torch.tensor(-shift)), excluded)
            if excluded is not None:
                flat.view(-1)[excluded] += torch.ldexp(wanted, torch.tensor(shift)).sub_(source).flatten()[excluded]
        layout = replace(layout, stages=(*layout.stages, stage))
        tensors |= {stage_field(name, term): fields[name] for name in _names(stage, layout)}
        if term + 1 < spec.residual_terms or excluded is not None:
            source = flat.float() - LowBitTensor(layout, tensors).dequantize().view(flat.shape)
    if notes is not None and calibrated is not None:
        notes |= calibrated.notes
    if excluded is not None:
        values = torch.ldexp(source.flatten()[excluded], torch.tensor(-shift))
        columns = excluded % layout.in_features
        tensors |= store_outliers(excluded // layout.in_features, columns, values, layout.rows, layout.in_features)
        layout = replace(layout, outliers=excluded.numel())
    if weight.numel() > LARGE:
        release_freed_memory()
    return LowBitTensor(layout, tensors)


def _check_statistics(statistics: Sequence[Statistics], matrices: int, flat: Tensor) -> None:
    if len(statistics) != matrices:
        raise BadRequest(f"a stack of {matrices} matrices needs as many statistics, got {len(statistics)}.")
    for found in statistics:
        if found.gram.shape != (flat.shape[1], flat.shape[1]):
            raise BadRequest(f"the weight has {flat.shape[1]} inputs, its statistics are of {len(found.gram)}.")


def _names(stage: Stage, layout: Layout) -> list[str]:
    return list(stage.fields(layout.rows, layout.in_features))


def _largest(flat: Tensor, spec: Spec, statistics: Sequence[Statistics]) -> Tensor:
    """Sorted flat indices of the ``spec.outliers`` share of weights with the largest magnitude, at least one."""
    count = max(1, round(spec.outliers * flat.numel()))
    size = flat.abs().flatten()
    size = size.float() if size.itemsize == 1 else size  # topk knows no 8-bit floats
    return size.topk(count).indices.sort().values
