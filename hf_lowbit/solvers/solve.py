"""``solve``: one weight in, one ``LowBitTensor`` out, whatever the method."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, WeightError
from hf_lowbit.format.layout import Layout, Stage, stage_field
from hf_lowbit.format.outliers import store_outliers
from hf_lowbit.format.spec import Spec
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.solvers.parallel import block_threads, release_freed_memory
from hf_lowbit.solvers.registry import get_solver
from hf_lowbit.solvers.rows import Rows, shift_of

# Weights above which a solve leaves enough freed memory behind to be worth returning (2 ms).
LARGE = 1 << 20


@torch.no_grad()
@block_threads()
def solve(weight: Tensor, spec: Spec, importance: Tensor | None = None) -> LowBitTensor:
    """Quantize one matrix, or a stack of matrices, as ``spec`` says.

    Args:
        weight: float ``[out, in]`` or ``[experts, out, in]``, any float dtype; read in blocks, never copied whole.
        spec: bits, grouping, method.
        importance: float ``[in]``, weight of the squared error per input channel (mean squared input, say).

    Raises:
        WeightError: NaN, infinity, an integer dtype or another number of axes.
        BadRequest: a method or setting that cannot be served.
    """
    entry = get_solver(spec)
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or weight.numel() == 0:
        raise WeightError(f"a weight is a float [out, in] or [experts, out, in], got {weight.dtype} {list(weight.shape)}.")
    if importance is not None and tuple(importance.shape) != (weight.shape[-1],):
        raise BadRequest(
            f"importance is one number per input channel, [{weight.shape[-1]}] here, got {list(importance.shape)}."
        )
    flat = weight.detach().reshape(-1, weight.shape[-1])
    shift = shift_of(flat)
    excluded = _largest(flat, spec.outliers) if spec.outliers else None
    tables = weight.shape[0] if weight.dim() == 3 else 1
    group_size = spec.groups_of(weight.shape[-1])
    layout = Layout(tuple(weight.shape), (), shift=shift, method=spec.method)
    tensors: dict[str, Tensor] = {}
    source = flat
    for term in range(spec.residual_terms):
        rows = Rows(source, group_size, shift, tables, importance, excluded)
        stage, fields = entry.solve(rows, spec)
        layout = replace(layout, stages=(*layout.stages, stage))
        tensors |= {stage_field(name, term): fields[name] for name in _names(stage, layout)}
        if term + 1 < spec.residual_terms or excluded is not None:
            source = flat.float() - LowBitTensor(layout, tensors).dequantize().view(flat.shape)
    if excluded is not None:
        values = torch.ldexp(source.flatten()[excluded], torch.tensor(-shift))
        columns = excluded % layout.in_features
        tensors |= store_outliers(excluded // layout.in_features, columns, values, layout.rows, layout.in_features)
        layout = replace(layout, outliers=excluded.numel())
    if weight.numel() > LARGE:
        release_freed_memory()
    return LowBitTensor(layout, tensors)


def _names(stage: Stage, layout: Layout) -> list[str]:
    return list(stage.fields(layout.rows, layout.in_features))


def _largest(flat: Tensor, fraction: float) -> Tensor | None:
    """Sorted flat indices of the ``fraction`` of weights with the largest magnitude, at least one."""
    count = max(1, round(fraction * flat.numel()))
    size = flat.abs().flatten()
    size = size.float() if size.itemsize == 1 else size  # topk knows no 8-bit floats
    return size.topk(count).indices.sort().values
