"""Launches of the Triton kernels: one for a plain matrix, a few for one with residual stages, outliers or a low-rank term.

A plain matrix, bias included, is one launch. Every further term (stage, split, outliers, low rank) writes float32 sums of
its own and one last launch adds them in order. A permutation gathers the inputs first. Nothing waits for the device, and
sizes follow from shapes alone, so that calls can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowbit.format.scales import from_f16_bits
from hf_lowbit.kernels import ops
from hf_lowbit.kernels.triton_configs import DENSE_FROM, Config, card, choose
from hf_lowbit.kernels.triton_gemm import gemm_kernel
from hf_lowbit.kernels.triton_gemv import gemv_kernel
from hf_lowbit.kernels.triton_plan import PERMUTED, Plan, StagePlan, StageTensors, plan, stage_tensors
from hf_lowbit.kernels.triton_rows import finish_kernel, outlier_kernel, rows_kernel

KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Rows of activations up to which matrices with further terms run term by term; beyond, decoding them is cheaper.
TERMS_TO = 64
DENSE_WEIGHTS = 1 << 26
FINISH_BLOCK, OUTLIER_BLOCK, ROW_COLUMNS = 1024, 64, 512


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(gemv_kernel, triton.JITFunction)


@lru_cache(maxsize=64)
def device_of(index: int | None) -> tuple[str, int, bool]:
    """Name, multiprocessors, and whether there is a byte permutation instruction."""
    if interpreted():
        return *card(torch.device("cpu")), False
    where = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    return *card(where), torch.version.hip is None


def linear(x: Tensor, stored: Sequence[Tensor], derived: Sequence[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``[..., in]`` float16, bfloat16 or float32."""
    made = plan(layout)
    flat = x.reshape(-1, made.columns).contiguous()
    batch = flat.shape[0]
    shape = (*x.shape[:-1], made.rows)
    if batch == 0:
        return x.new_empty(shape)
    one_by_one = batch <= (DENSE_FROM if made.simple else TERMS_TO) and x.dtype in KINDS
    with on_device(x):
        if one_by_one or batch == 1:
            return _terms(flat, made, stored, derived, bias).view(shape)
        return _dense(flat, made, stored, derived, layout, bias).view(shape)


def grouped(x: Tensor, experts: Tensor, stored: Sequence[Tensor], derived: Sequence[Tensor], layout: str) -> Tensor:
    """Each row of ``x`` ``[n, in]`` by the matrix of a stack that ``experts`` (int32 ``[n]``, on the device) names."""
    made = plan(layout)
    out = x.new_empty(x.shape[0], made.layout.shape[1])
    if x.shape[0]:
        with on_device(x):
            stage, tensors = made.stages[0], stage_tensors(made, 0, stored, derived)
            stage = stage._replace(rows=made.layout.shape[1])
            _gemv(x.contiguous(), stage, tensors, made, out, None, experts, 1)
    return out


def rows(
    ids: Tensor | None, count: int, first: int, stored: Sequence[Tensor], derived: Sequence[Tensor], made: Plan, out: Tensor
) -> None:
    """Decode rows ``ids``, or ``count`` rows from ``first`` on, of a plain matrix into ``out`` ``[count, in]``."""
    stage, tensors = made.stages[0], stage_tensors(made, 0, stored, derived)
    if not count:
        return
    block = max(1, ROW_COLUMNS // stage.unit)
    with on_device(out):
        rows_kernel[(count, triton.cdiv(stage.units, block))](
            given(ids, tensors.table), tensors.codes, tensors.scale, given(tensors.scale_super, tensors.table),
            given(tensors.offset, tensors.table), given(tensors.offset_super, tensors.table), tensors.table,
            given(tensors.table_of_row, tensors.table), out, first, made.rows, made.columns, stage.words, stage.units,
            stage.scale_stride, stage.supers, stage.per_super, made.factor,
            **_static(stage), PER_ROW=stage.tables > 1, PICK=ids is not None, BLOCK_U=block, num_warps=4, num_stages=1,
        )  # fmt: skip


def _terms(x: Tensor, made: Plan, stored: Sequence[Tensor], derived: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    layout, batch = made.layout, x.shape[0]
    named = dict(zip(layout.fields, stored, strict=True))
    if layout.permuted:
        x = x.index_select(1, named["permutation"])
    name, multiprocessors, _ = device_of(x.device.index)
    configs = [choose(stage, made.columns, batch, name, multiprocessors) for stage in made.stages]
    out = x.new_empty(batch, made.rows)
    slots = sum(config.split for config in configs) + bool(layout.outliers) + bool(layout.rank)
    if slots == 1 and made.simple:
        _product(x, made.stages[0], stage_tensors(made, 0, stored, derived), made, out, bias, configs[0])
        return out
    parts = torch.empty(slots, batch, made.rows, dtype=torch.float32, device=x.device)
    slot = 0
    for number, (stage, config) in enumerate(zip(made.stages, configs, strict=True)):
        own = parts[slot : slot + config.split]
        if stage.subset:
            own.zero_()
        _product(x, stage, stage_tensors(made, number, stored, derived), made, own, None, config)
        slot += config.split
    if layout.outliers:
        _outliers(x, named, made, parts[slot])
        slot += 1
    if layout.rank:
        inner = x.float() @ from_f16_bits(named["low_rank_a"]).T
        torch.mm(inner, from_f16_bits(named["low_rank_b"]).T * made.factor, out=parts[slot])
    size = batch * made.rows
    finish_kernel[(triton.cdiv(size, FINISH_BLOCK),)](
        parts, given(bias, parts), out, slots, size, made.rows, BIAS=bias is not None, BLOCK=FINISH_BLOCK
    )
    return out


def _product(
    x: Tensor, stage: StagePlan, tensors: StageTensors, made: Plan, out: Tensor, bias: Tensor | None, config: Config
) -> None:
    if x.shape[0] == 1:
        _gemv(x, stage, tensors, made, out, bias, None, config.split, config)
    else:
        _gemm(x, stage, tensors, made, out, bias, config)


def _gemv(
    x: Tensor, stage: StagePlan, tensors: StageTensors, made: Plan, out: Tensor, bias: Tensor | None,
    experts: Tensor | None, split: int, config: Config | None = None,
) -> None:  # fmt: skip
    name, multiprocessors, asm = device_of(x.device.index)
    config = config or choose(stage, made.columns, 1, name, multiprocessors)
    block_u, each = _steps(stage, config.block_k, split)
    gemv_kernel[(triton.cdiv(stage.rows, config.block_n), x.shape[0], split)](
        x, *_pointers(tensors, x.dtype), given(tensors.row_ids, tensors.table), given(experts, tensors.table),
        given(bias, x), out, stage.rows, made.columns, stage.words, stage.units, each, stage.scale_stride,
        stage.supers, stage.per_super, made.factor, x.stride(0), out.shape[-1],
        **_static(stage), PER_ROW=stage.tables > 1, SUBSET=stage.subset, EXPERTS=experts is not None, BIAS=bias is not None,
        PERMUTE=_permuting(stage), ASM=asm, BLOCK_N=config.block_n, BLOCK_U=block_u,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _gemm(
    x: Tensor, stage: StagePlan, tensors: StageTensors, made: Plan, out: Tensor, bias: Tensor | None, config: Config
) -> None:
    block_u, each = _steps(stage, config.block_k, config.split)
    batch = x.shape[0]
    grid = (triton.cdiv(stage.rows, config.block_n), triton.cdiv(batch, config.block_m), config.split)
    gemm_kernel[grid](
        x, *_pointers(tensors, x.dtype), given(tensors.row_ids, tensors.table), given(bias, x), out, batch, stage.rows,
        made.columns, stage.words, stage.units, each, stage.scale_stride, stage.supers, stage.per_super, made.factor,
        x.stride(0), out.shape[-1],
        **_static(stage), PER_ROW=stage.tables > 1, SUBSET=stage.subset, BIAS=bias is not None, PERMUTE=_permuting(stage),
        ASM=device_of(x.device.index)[2], KIND=KINDS[x.dtype], WIDE=interpreted(), BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_U=block_u, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _outliers(x: Tensor, named: dict[str, Tensor], made: Plan, out: Tensor) -> None:
    outlier_kernel[(made.rows, x.shape[0])](
        x, named["outlier_values"].view(torch.float16), named["outlier_columns"], named["outlier_starts"], out, x.stride(0),
        made.rows, made.factor, BLOCK=OUTLIER_BLOCK, num_warps=1,
    )  # fmt: skip


def _dense(
    x: Tensor, made: Plan, stored: Sequence[Tensor], derived: Sequence[Tensor], layout: str, bias: Tensor | None
) -> Tensor:
    """Decode, then multiply, in pieces of at most 64 M weights."""
    if not made.simple:
        out = torch.nn.functional.linear(x, ops.OPS.dequantize(list(stored), layout, x.dtype))
        return out if bias is None else out.add_(bias)
    out = x.new_empty(x.shape[0], made.rows)
    step = max(1, DENSE_WEIGHTS // made.columns)
    piece = x.new_empty(min(step, made.rows), made.columns)
    for first in range(0, made.rows, step):
        count = min(step, made.rows - first)
        rows(None, count, first, stored, derived, made, piece[:count])
        part = torch.mm(x, piece[:count].T)
        out[:, first : first + count] = part if bias is None else part.add_(bias[first : first + count])
    return out


def _steps(stage: StagePlan, block_k: int, split: int) -> tuple[int, int]:
    """Units of a step, and of a split, in whole steps."""
    block_u = max(1, block_k // stage.unit)
    return block_u, triton.cdiv(triton.cdiv(stage.units, split), block_u) * block_u


def _static(stage: StagePlan) -> dict[str, Any]:
    return {
        "BITS": stage.bits, "UNIT": stage.unit, "UNIT_WORDS": stage.unit_words, "GROUP": stage.group, "CODED": stage.coded,
        "OFFSET": stage.offset,
    }  # fmt: skip


def _pointers(tensors: StageTensors, dtype: torch.dtype) -> list[Tensor]:
    """In the order of the kernels; what a layout has not is some other tensor, which is never read.

    Args:
        dtype: of the activations; levels for float32 ones are fp16.
    """
    planes = tensors.planes[torch.bfloat16 if dtype == torch.bfloat16 else torch.float16]
    optional = (tensors.scale_super, tensors.offset, tensors.offset_super)
    return [
        tensors.codes, tensors.scale, *(given(one, tensors.table) for one in optional), tensors.table,
        planes, tensors.unit, given(tensors.table_of_row, tensors.table),
    ]  # fmt: skip


def given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor, or in the place of none some other, which the kernel never reads."""
    return other if tensor is None else tensor


def _permuting(stage: StagePlan) -> bool:
    """Whether levels come by permutation: where the instruction is missing a table in memory is faster."""
    return stage.bits in PERMUTED and (interpreted() or torch.version.hip is None)


def on_device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.no_grad()
