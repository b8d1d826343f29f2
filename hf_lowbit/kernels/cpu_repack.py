"""From a stored record to the prepared form of the CPU kernels, with every stored index checked on the way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, FormatError, LowBitError
from hf_lowbit.format.layout import Layout, Stage
from hf_lowbit.format.scales import groups_per_super
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.kernels import cpu_library

Pointer = Callable[[Tensor | None], int | None]
MAX_STAGES = 8
_ERRORS = {
    1: "the prepared matrix is damaged or of another version of the kernels",
    2: "the activations or row numbers do not fit the matrix",
    3: "there is not enough memory",
    4: "the layout is not supported",
}


def unsupported(layout: Layout) -> str | None:
    """Why the kernels cannot run a layout, or None."""
    if len(layout.shape) != 2:
        return "stacks of experts run on the reference path"
    if len(layout.stages) > MAX_STAGES:
        return f"{len(layout.stages)} stages, the kernels take {MAX_STAGES}"
    for stage in layout.stages:
        if stage.group_size % 4 and stage.group_size < layout.in_features:
            return f"groups of {stage.group_size} are not whole quads of columns"
    return None


def loaded() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        LowBitError: they are not there, and why.
    """
    found = cpu_library.library()
    if found is None:
        raise LowBitError(f"the CPU kernels were asked for, but {cpu_library.trouble()}")
    return found


def repack(tensor: LowBitTensor) -> Tensor:
    """The prepared form, uint8 ``[bytes]``."""
    library, held = loaded(), []  # held: tensors whose pointers the source carries

    def pointer(value: Tensor | None) -> int | None:
        if value is None:
            return None
        if value.device.type != "cpu":
            raise BadRequest(f"the CPU kernels read tensors on the CPU, got one on {value.device}.")
        held.append(value.contiguous())
        return held[-1].data_ptr()

    layout = tensor.layout
    stages = (cpu_library.StageSource * len(layout.stages))()
    for number, stage in enumerate(layout.stages):
        _describe_stage(stages[number], tensor, number, stage, pointer)
    source = cpu_library.Source(stages=stages, rows=layout.rows, columns=layout.in_features, stage_count=len(stages))
    source.outliers, source.rank, source.shift = layout.outliers, layout.rank, layout.shift
    for name in ("permutation", "outlier_values", "outlier_columns", "outlier_starts", "low_rank_a", "low_rank_b"):
        setattr(source, name, pointer(tensor.tensors.get(name)))
    check_indices(tensor)
    size = library.lowbit_prepared_bytes(source)
    if size == 0:
        raise BadRequest(f"the CPU kernels do not support this layout: {unsupported(layout) or layout}.")
    matrix = torch.empty(size, dtype=torch.uint8)
    checked(library.lowbit_prepare(source, matrix.data_ptr(), size, torch.get_num_threads()))
    return matrix


def _describe_stage(out: cpu_library.StageSource, tensor: LowBitTensor, number: int, stage: Stage, pointer: Pointer) -> None:
    fields = tensor.stage_tensors(number)
    rows = tensor.layout.rows if stage.rows is None else stage.rows
    for name in ("codes", "scale", "scale_super", "offset", "offset_super", "zero", "row_ids"):
        setattr(out, name, pointer(fields.get(name)))
    out.levels = pointer(tensor.table(number).to(torch.float32))
    if stage.tables > 1:
        out.table_of_row = pointer(table_of_row(tensor, stage, fields))
    out.rows, out.bits, out.group_size = rows, stage.bits, min(stage.group_size, tensor.layout.in_features)
    out.scale_bits, out.tables, out.per_super = stage.scale_bits, stage.tables, groups_per_super(stage.group_size)


def table_of_row(tensor: LowBitTensor, stage: Stage, fields: Mapping[str, Tensor]) -> Tensor:
    """Number of the level table of each row of a stage, int32 ``[rows of the stage]``."""
    if stage.table_ids:
        ids = fields["table_ids"].to(torch.int32)
        if int(ids.max()) >= stage.tables:
            raise FormatError(f"a row asks for level table {int(ids.max())}, the tensor has {stage.tables}.")
        return ids
    every = torch.arange(tensor.layout.rows, dtype=torch.int32, device=tensor.device)
    rows = fields["row_ids"] if stage.rows is not None else every
    return (rows // (tensor.layout.rows // stage.tables)).to(torch.int32)


def check_indices(tensor: LowBitTensor) -> None:
    """Stored indices are followed by the kernels without a check each; a damaged one is refused here.

    Raises:
        FormatError: naming the tensor and the range.
    """
    layout = tensor.layout
    limits = {"permutation": layout.in_features, "outlier_columns": layout.in_features}
    limits |= {name: layout.rows for name in layout.fields if name.startswith("row_ids")}
    for name, limit in limits.items():
        if name in tensor.tensors:
            values = tensor.tensors[name].to(torch.int32)
            if int(values.min()) < 0 or int(values.max()) >= limit:
                raise FormatError(f"stored tensor {name!r} holds indices outside 0 .. {limit - 1}; the file is damaged.")
    if layout.outliers:
        starts = tensor.tensors["outlier_starts"].long()
        if int(starts[0]) != 0 or int(starts[-1]) != layout.outliers or bool((starts.diff() < 0).any()):
            raise FormatError("stored tensor 'outlier_starts' does not ascend from 0 to the outliers' number.")


def checked(status: int) -> None:
    """Raise what a status of the kernels other than 0 means."""
    if status:
        raise LowBitError(f"the CPU kernels refused: {_ERRORS.get(status, status)}.")
