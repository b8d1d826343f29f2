"""The GPU backend: Triton kernels that read the canonical record as it is stored, and the torch ops around them.

**Memory.** ``prepare`` copies nothing large: kernels read the stored codes; what it adds is listed in ``triton_plan`` and
counted by ``derived_bytes``. A model loaded with ``device_map="cuda"`` therefore occupies its packed size plus at most 6 %.

**Arithmetic.** Sums are float32 in a fixed order. With one row of activations levels of 2 to 4 bits are rounded to the dtype
of the activations and multiplied in it, four products at a time, each rounded as it is added; all other widths use the
table as it is, in float32. With more rows weights are rounded to the dtype of the activations, as in a dense model; at 2 to
4 bits without offsets level, scale and product are each rounded, so that a weight is off by at most 3 * 2**-8 of itself in
bfloat16 and 3 * 2**-11 in float16. From ``triton_configs.DENSE_FROM`` rows on, and for float32 activations, the matrix is
decoded in pieces and multiplied by torch.

Bytes read per weight, codes and scales: ``bits / 8 + scale bytes / group``, so 0.53125 at 4 bits, groups of 64 and 16-bit
scales, where bf16 reads 2. Importing this module needs no Triton and no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.layout import Layout, parse_layout
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.kernels import ops
from hf_lowbit.kernels.reference import Reference, Stored
from hf_lowbit.kernels.select import Backend, Verdict, register_backend
from hf_lowbit.kernels.triton_plan import derive, plan, unsupported

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Oldest NVIDIA capability with bfloat16 tensor cores, which is also the oldest that Triton serves.
CAPABILITY = (8, 0)


class Prepared(NamedTuple):
    """The stored tensors in layout order, what ``triton_plan.derive`` adds, and the layout's text."""

    tensors: list[Tensor]
    derived: list[Tensor]
    layout: str


class Triton(Backend):
    """Triton kernels: one pass over the packed codes for small batches, tensor cores on decoded tiles for larger ones."""

    name = "triton"
    devices = ("cuda",)

    def supports(self, layout: Layout, device: torch.device) -> Verdict:
        """Tensors on a GPU of capability 8.0 or newer whose groups are whole units of columns, where Triton is installed."""
        reason = trouble(device) or unsupported(layout)
        if reason:
            return Verdict(False, reason)
        return Verdict(True, _name(device))

    def prepare(self, tensor: LowBitTensor) -> Prepared:
        """The record itself and its small derived tensors."""
        return Prepared([tensor.tensors[name] for name in tensor.layout.fields], derive(tensor), tensor.layout.dumps())

    def linear(self, x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
        """``hf_lowbit::triton_linear``; activations of other dtypes take the reference op."""
        if x.dtype not in DTYPES:
            return _REFERENCE.linear(x, Stored(prepared.tensors, prepared.layout), bias)
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return self.linear(x, prepared) + bias.to(x.dtype)
        bias = None if bias is None else bias.detach()
        return ops.OPS.triton_linear(x, prepared.tensors, prepared.derived, prepared.layout, bias)

    def embedding(self, ids: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        """``hf_lowbit::triton_rows`` for plain matrices, else the reference op."""
        if not plan(prepared.layout).simple:
            return _REFERENCE.embedding(ids, Stored(prepared.tensors, prepared.layout), dtype)
        return ops.OPS.triton_rows(ids, prepared.tensors, prepared.derived, prepared.layout, dtype)

    def groups(self, prepared: Prepared) -> bool:
        """Whether :meth:`grouped` takes a matrix: a stack of one stage over all rows with nothing beside it."""
        made = plan(prepared.layout)
        return made.simple and len(made.layout.shape) == 3

    def grouped(self, x: Tensor, experts: Tensor, prepared: Prepared) -> Tensor:
        """``hf_lowbit::triton_grouped``: each row of ``x`` ``[n, in]`` by its own matrix of a plain stack, in one launch.

        Args:
            experts: int32 ``[n]``, matrices of the stack.
        """
        return ops.OPS.triton_grouped(x, experts, prepared.tensors, prepared.derived, prepared.layout)


_REFERENCE = Reference()


def trouble(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a device, or None."""
    if device.type != "cuda":
        return f"the tensor is on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    found = capability(device)
    if torch.version.hip is None and found < CAPABILITY:
        return (
            f"{_name(device)} has compute capability {found[0]}.{found[1]}, the kernels need {CAPABILITY[0]}.{CAPABILITY[1]}"
        )
    return None


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=16)
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _launch() -> Any:
    from hf_lowbit.kernels import triton_launch

    return triton_launch


def _same_place(x: Tensor, others: Sequence[Tensor], what: str) -> None:
    for other in others:
        if other.device != x.device:
            raise BadRequest(f"the matrix is on {other.device}, the {what} on {x.device}: move one of them there.")


def _checked(x: Tensor, tensors: Sequence[Tensor], columns: int) -> None:
    _same_place(x, tensors[:1], "activations are")
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise BadRequest(f"the Triton kernels take {known} activations, got {str(x.dtype).removeprefix('torch.')}.")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise BadRequest(f"the matrix has {columns} inputs, the activations have shape {list(x.shape)}.")


def _linear(x: Tensor, tensors: Sequence[Tensor], derived: Sequence[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    made = plan(layout)
    if len(made.layout.shape) != 2:
        raise BadRequest("a stack of matrices is multiplied by `triton_grouped`.")
    _checked(x, tensors, made.columns)
    if bias is not None:
        _same_place(bias, tensors[:1], "bias is")
        if bias.shape != (made.rows,):
            raise BadRequest(f"the matrix has {made.rows} outputs, the bias has shape {list(bias.shape)}.")
    return _launch().linear(x, tensors, derived, layout, bias)


def _rows(ids: Tensor, tensors: Sequence[Tensor], derived: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    made = plan(layout)
    if not made.simple or dtype not in DTYPES:
        raise BadRequest(f"cannot decode rows of a matrix with more than one term, or as {dtype}, by `triton_rows`.")
    _same_place(ids, tensors[:1], "row numbers are")
    out = torch.empty(*ids.shape, made.columns, dtype=dtype, device=ids.device)
    _launch().rows(ids.contiguous(), ids.numel(), 0, tensors, derived, made, out)
    return out


def _grouped(x: Tensor, experts: Tensor, tensors: Sequence[Tensor], derived: Sequence[Tensor], layout: str) -> Tensor:
    made = plan(layout)
    if len(made.layout.shape) != 3 or not made.simple or x.dim() != 2 or experts.shape != x.shape[:1]:
        raise BadRequest("`triton_grouped` takes a plain stack, activations [n, in] and the number of a matrix for each.")
    _checked(x, tensors, made.columns)
    _same_place(experts, tensors[:1], "experts are")
    return _launch().grouped(x, experts, tensors, derived, layout)


def _fake_linear(x: Tensor, tensors: Any, derived: Any, layout: str, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], parse_layout(layout).shape[-2])


def _fake_rows(ids: Tensor, tensors: Any, derived: Any, layout: str, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, parse_layout(layout).in_features, dtype=dtype)


def _fake_grouped(x: Tensor, experts: Tensor, tensors: Any, derived: Any, layout: str) -> Tensor:
    return x.new_empty(x.shape[0], parse_layout(layout).shape[-2])


def _keep_record(ctx, inputs, output) -> None:
    _, tensors, derived, ctx.layout, _ = inputs
    ctx.derived = len(derived)
    ctx.save_for_backward(*tensors)


def _grad_to_input(ctx, grad: Tensor):
    weight = ops.OPS.dequantize(list(ctx.saved_tensors), ctx.layout, grad.dtype)
    return grad @ weight, [None] * len(ctx.saved_tensors), [None] * ctx.derived, None, None


_FUNCTIONS = (
    ("triton_linear(Tensor x, Tensor[] tensors, Tensor[] derived, str layout, Tensor? bias) -> Tensor", _linear,
     _fake_linear),
    ("triton_rows(Tensor ids, Tensor[] tensors, Tensor[] derived, str layout, ScalarType dtype) -> Tensor", _rows,
     _fake_rows),
    ("triton_grouped(Tensor x, Tensor experts, Tensor[] tensors, Tensor[] derived, str layout) -> Tensor", _grouped,
     _fake_grouped),
)  # fmt: skip
for _schema, _body, _fake in _FUNCTIONS:
    ops.register(_schema, _body, _fake)
torch.library.register_autograd("hf_lowbit::triton_linear", _grad_to_input, setup_context=_keep_record, lib=ops.LIBRARY)

register_backend(Triton(), before=Reference.name)
