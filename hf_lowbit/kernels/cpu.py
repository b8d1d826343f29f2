"""The CPU backend: compiled kernels that multiply by codes, levels and scales without decoding the matrix.

**Prepared form.** ``prepare`` copies a record once into the order the kernels stream (tiles of 16 rows, ``cpu/matrix.h``):
codes at their own width, scales as fp16 or as int8 under fp16 super-scales, so it is about as large as the stored
tensors (4.31 instead of 4.25 bits per weight at 4 bits, groups of 32 and 6-bit scales). The stored tensors stay what
``state_dict`` gives and what is saved; a checkpoint that was loaded has them as pages of the mapped file, which the
system takes back, so the prepared form is the one copy that occupies memory. A model quantized in memory holds both.

**Arithmetic.** Two modes, :func:`arithmetic` chooses:

``int8``   Activations are rounded per 32 stored columns to ``xs * q`` with ``xs = max |x| / 127``, so by at most
           ``xs / 2``; levels of a table are rounded to ``ts * l`` with integers ``|l| <= L``, by at most ``e <= ts / 2``,
           where ``L`` is 63 at up to 3 bits and 127 above, and ``ts`` is the scale between ``max / L`` and ``2 max / L``
           that rounds best what is used most (``e`` is 0 for tables of such integers).
           Products and sums within 32 columns are exact integers. With ``w = scale * level`` the result is off by at most
           ``sum_i |w_i| xs_i / 2 + |scale_i| e (|x_i| + xs_i / 2)`` plus the rounding of a float32 sum.
           Offsets, outliers and the low-rank term are multiplied by the activations as they are.
``exact``  True levels and float32 activations, summed in float32 in a fixed order. From 32 rows of activations on the
           matrix is decoded in pieces and multiplied by torch.
``auto``   ``int8`` where every stage has at most 4 bits, or integer levels, or a table whose rounding adds at most a
           quarter to the squared error that its median spacing makes; else ``exact``. The default.

Tables of more than 64 entries that are not integers have no int8 form; they run exact whatever is asked.
Results do not depend on the number of threads. They do depend on the instruction set, in the last bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.layout import Layout
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.kernels import cpu_library, ops
from hf_lowbit.kernels.cpu_repack import checked, loaded, repack, unsupported
from hf_lowbit.kernels.reference import Reference
from hf_lowbit.kernels.select import Backend, Verdict, register_backend

MODES = {"auto": 0, "int8": 1, "exact": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EXACT = MODES["exact"]
# Rows of activations from which decoding the matrix once and a dense product beat looking levels up for every row.
DECODE_FROM = 32
DECODE_WEIGHTS = 1 << 22

_mode = MODES["auto"]


def set_arithmetic(mode: str) -> None:
    """Choose ``auto``, ``int8`` or ``exact`` for this process from now on.

    Raises:
        BadRequest: another word.
    """
    global _mode
    if mode not in MODES:
        raise BadRequest(unknown_name("CPU arithmetic", mode, MODES))
    _mode = MODES[mode]


def mode() -> int:
    """The mode in force, a value of ``MODES``."""
    return _mode


@contextmanager
def arithmetic(mode: str) -> Iterator[None]:
    """The same for the length of a ``with`` block; the setting is the process's, not the thread's."""
    before = next(name for name, number in MODES.items() if number == _mode)
    set_arithmetic(mode)
    try:
        yield
    finally:
        set_arithmetic(before)


class Prepared(NamedTuple):
    """A matrix in the order of the kernels.

    Attributes:
        matrix: uint8, the block of memory ``cpu/matrix.h`` describes.
        rows, columns: of the matrix.
        auto: the mode ``auto`` means for it.
        tensors, layout: the stored record, which the backward decodes.
    """

    matrix: Tensor
    rows: int
    columns: int
    auto: int
    tensors: list[Tensor]
    layout: str

    @property
    def mode(self) -> int:
        """The mode in force."""
        return _mode or self.auto


class Cpu(Backend):
    """Compiled kernels for AVX-512, AVX2 and plain C++: levels looked up in registers, int8 or exact arithmetic."""

    name = "cpu"
    devices = ("cpu",)

    def supports(self, layout: Layout, device: torch.device) -> Verdict:
        """2-D tensors on the CPU whose groups are whole quads of columns, where the kernels were compiled."""
        if device.type != "cpu":
            return Verdict(False, f"the tensor is on {device.type}")
        reason = cpu_library.trouble() or unsupported(layout)
        if reason:
            return Verdict(False, reason)
        return Verdict(True, f"{cpu_library.instruction_set()}, {_arithmetic_of(layout)}")

    def prepare(self, tensor: LowBitTensor) -> Prepared:
        """Repack with all of torch's threads; the record's own tensors are kept by reference."""
        layout = tensor.layout
        matrix = repack(tensor)
        auto = loaded().lowbit_auto_mode(matrix.data_ptr())
        stored = [tensor.tensors[name] for name in layout.fields]
        return Prepared(matrix, layout.rows, layout.in_features, auto, stored, layout.dumps())

    def linear(self, x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
        """``hf_lowbit::cpu_linear``, or ``hf_lowbit::cpu_linear_train`` where a gradient to ``x`` is wanted."""
        wants_grad = torch.is_grad_enabled()
        if wants_grad and bias is not None and bias.requires_grad:
            return self.linear(x, prepared) + bias.to(x.dtype)
        if wants_grad and x.requires_grad:
            return ops.OPS.cpu_linear_train(
                x, prepared.matrix, prepared.rows, prepared.mode, bias, prepared.tensors, prepared.layout
            )
        return ops.OPS.cpu_linear(x, prepared.matrix, prepared.rows, prepared.mode, bias)

    def embedding(self, ids: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        """``hf_lowbit::cpu_rows``: only the rows asked for are decoded."""
        return ops.OPS.cpu_rows(ids, prepared.matrix, prepared.rows, prepared.columns, dtype)


def _arithmetic_of(layout: Layout) -> str:
    """What the verdict says of the mode: for fitted tables of 5 and 6 bits only the table itself decides."""
    if _mode:
        return "exact" if _mode == EXACT else "int8"
    wide = [stage for stage in layout.stages if stage.bits > 4 and stage.levels.family not in ("uniform", "integer")]
    if not wide:
        return "int8"
    return "exact" if any(stage.bits > 6 for stage in wide) else "int8 or exact as its table asks"


def _activations(x: Tensor, columns: int) -> Tensor:
    """``x`` as the kernels read it, or an error that says what is wrong."""
    if x.device.type != "cpu":
        raise BadRequest(f"the CPU kernels take activations on the CPU, got them on {x.device}.")
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise BadRequest(f"the CPU kernels take {known} activations, got {str(x.dtype).removeprefix('torch.')}.")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise BadRequest(f"the matrix has {columns} inputs, the activations have shape {list(x.shape)}.")
    return x.contiguous()


def _columns_of(matrix: Tensor, rows: int) -> int:
    """Columns of a prepared matrix, after checking that it is one with ``rows`` rows."""
    if matrix.dtype != torch.uint8 or matrix.dim() != 1 or matrix.device.type != "cpu" or not matrix.is_contiguous():
        raise BadRequest(f"a prepared matrix is a uint8 vector on the CPU, got {matrix.dtype} {list(matrix.shape)}.")
    columns = loaded().lowbit_columns(matrix.data_ptr(), matrix.numel(), rows)
    if columns <= 0:
        raise BadRequest(f"the tensor is no prepared matrix of {rows} rows.")
    return columns


def _linear(x: Tensor, matrix: Tensor, rows: int, mode: int, bias: Tensor | None) -> Tensor:
    columns = _columns_of(matrix, rows)
    x = _activations(x, columns)
    batch = x.numel() // columns
    if mode == EXACT and batch >= DECODE_FROM:
        return _decoded_linear(x, matrix, rows, columns, bias)
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    bias = None if bias is None else _bias(bias, rows)
    checked(
        loaded().lowbit_linear(
            matrix.data_ptr(), matrix.numel(), x.data_ptr(), batch, columns, DTYPES[x.dtype],
            None if bias is None else bias.data_ptr(), y.data_ptr(), mode, torch.get_num_threads(),
        )
    )  # fmt: skip
    return y


def _bias(bias: Tensor, rows: int) -> Tensor:
    if bias.shape != (rows,) or bias.device.type != "cpu":
        raise BadRequest(f"the matrix has {rows} outputs, the bias has shape {list(bias.shape)} on {bias.device}.")
    return bias.to(torch.float32).contiguous()


def _decoded_linear(x: Tensor, matrix: Tensor, rows: int, columns: int, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, columns).float()
    y = torch.empty(flat.shape[0], rows)
    step = max(1, DECODE_WEIGHTS // columns)
    for start in range(0, rows, step):
        ids = torch.arange(start, min(start + step, rows))
        torch.mm(flat, _rows(ids, matrix, rows, columns, torch.float32).T, out=y[:, start : start + step])
    if bias is not None:
        y += _bias(bias, rows)
    return y.to(x.dtype).view(*x.shape[:-1], rows)


def linear_codes(codes: Tensor, matrix: Tensor, rows: int) -> Tensor:
    """Products in whole numbers of inputs that were rounded already, times the scale of each row.

    Args:
        codes: int8 ``[n, in]``.
        matrix: prepared, of one stage with integer levels and one scale per row, without any other term.
        rows: its rows.

    Returns:
        float32 ``[n, rows]``.
    """
    return ops.OPS.cpu_linear_codes(codes, matrix, rows)


def _linear_codes(codes: Tensor, matrix: Tensor, rows: int) -> Tensor:
    columns = _columns_of(matrix, rows)
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] != columns or codes.device.type != "cpu":
        raise BadRequest(f"the matrix takes int8 codes [n, {columns}] on the CPU, got {codes.dtype} {list(codes.shape)}.")
    codes, y = codes.contiguous(), torch.empty(len(codes), rows)
    where = matrix.data_ptr(), matrix.numel(), codes.data_ptr(), len(codes), columns
    checked(loaded().lowbit_linear_codes(*where, y.data_ptr(), torch.get_num_threads()))
    return y


def _rows(ids: Tensor, matrix: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if _columns_of(matrix, rows) != columns or dtype not in DTYPES:
        raise BadRequest(f"cannot decode rows of {columns} {dtype} numbers from this matrix.")
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty(*ids.shape, columns, dtype=dtype)
    where, threads = (matrix.data_ptr(), matrix.numel()), torch.get_num_threads()
    status = loaded().lowbit_rows(*where, ids.data_ptr(), ids.numel(), DTYPES[dtype], out.data_ptr(), threads)
    if status == 2:
        raise IndexError(f"row numbers must lie in 0 .. {rows - 1}, got {int(ids.min())} .. {int(ids.max())}.")
    checked(status)
    return out


def _linear_train(
    x: Tensor, matrix: Tensor, rows: int, mode: int, bias: Tensor | None, tensors: Sequence[Tensor], layout: str
) -> Tensor:
    return _linear(x, matrix, rows, mode, bias)


def _keep_record(ctx, inputs, output) -> None:
    *_, tensors, ctx.layout = inputs
    ctx.save_for_backward(*tensors)


def _grad_to_input(ctx, grad: Tensor):
    tensors = list(ctx.saved_tensors)  # once: under gradient checkpointing each look unpacks them again
    weight = ops.OPS.dequantize(tensors, ctx.layout, grad.dtype)
    return grad @ weight, None, None, None, None, [None] * len(tensors), None


_FUNCTIONS = (
    ("cpu_linear(Tensor x, Tensor matrix, int rows, int mode, Tensor? bias) -> Tensor", _linear,
     lambda x, matrix, rows, mode, bias: x.new_empty(*x.shape[:-1], rows)),
    ("cpu_linear_train(Tensor x, Tensor matrix, int rows, int mode, Tensor? bias, Tensor[] tensors, str layout) -> Tensor",
     _linear_train, lambda x, matrix, rows, mode, bias, tensors, layout: x.new_empty(*x.shape[:-1], rows)),
    ("cpu_linear_codes(Tensor codes, Tensor matrix, int rows) -> Tensor", _linear_codes,
     lambda codes, matrix, rows: codes.new_empty(codes.shape[0], rows, dtype=torch.float32)),
    ("cpu_rows(Tensor ids, Tensor matrix, int rows, int columns, ScalarType dtype) -> Tensor", _rows,
     lambda ids, matrix, rows, columns, dtype: ids.new_empty(*ids.shape, columns, dtype=dtype)),
)  # fmt: skip
for _schema, _body, _fake in _FUNCTIONS:
    ops.register(_schema, _body, _fake, "CPU")
torch.library.register_autograd("hf_lowbit::cpu_linear_train", _grad_to_input, setup_context=_keep_record, lib=ops.LIBRARY)

set_arithmetic(os.environ.get("HF_LOWBIT_CPU_ARITHMETIC", "auto"))
register_backend(Cpu(), before=Reference.name)
