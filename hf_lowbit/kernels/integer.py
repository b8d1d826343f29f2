"""Products of rounded activations and low-bit matrices in whole numbers, by the compiled CPU kernels.

``y[n, o] = step[n] (scale[o] sum_i (q[n, i] - m) l[o, i] + (m - zero[n]) scale[o] sum_i l[o, i])`` with the middle m of
the codes: the first sum is of int8 products (``lowbit_linear_codes``), the second stored. What is left in float is the
rounding of the inputs itself and two multiplications per output. Codes of the matrix stay packed at their own width. It
serves matrices of one stage with one scale per row and integer levels, and activations with one step per token or tensor;
everything else is simulated (``hf_lowbit.format.activations``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowbit.format.activations import ActivationLayout, Activations, numbers, steps_of
from hf_lowbit.format.packing import pack
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.kernels import cpu, cpu_library
from hf_lowbit.kernels.cpu_repack import repack, unsupported

# Codes of 8 bits and levels of 8 bits: their products stay below 2**15, so that many of them fit int32.
MOST_INPUTS = 1 << 16
# Bits up to which the kernels look levels up; wider ones must be consecutive.
MOST_LOOKED_UP = 6
_allowed = True


@contextmanager
def simulated() -> Iterator[None]:
    """Let layers that are prepared inside the block simulate rounding in float instead; for comparison."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@dataclass(frozen=True)
class Part:
    """Columns of a matrix whose inputs share their steps.

    Attributes:
        columns: int64, which; None all.
        matrix: uint8, prepared (``cpu_repack.repack``).
        sums: float32 ``[out]``, row sums of the levels times the scales.
        bits: of the inputs' codes.
        steps: (step float32 ``[1]``, zero ``[1]``) if they are static.
    """

    columns: Tensor | None
    matrix: Tensor
    sums: Tensor
    bits: int
    steps: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix ready for integer products.

    Attributes:
        parts: of its columns.
        rows: of the matrix.
        offset: float32 ``[out]``, what the shift of its inputs gives; None without.
        activations: what is done to its inputs.
        record: the stored matrix, for gradients.
    """

    parts: tuple[Part, ...]
    rows: int
    offset: Tensor | None
    activations: Activations
    record: LowBitTensor

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of ``x``; no gradient."""
        spec = self.activations.layout.spec
        assert spec is not None
        y = self.activations.rewritten(x.float()).reshape(-1, x.shape[-1])
        total: Tensor | None = None
        for part in self.parts:
            own = y if part.columns is None else y[:, part.columns]
            step, zero = part.steps if part.steps is not None else steps_of(own, spec, part.bits)
            middle = 0 if spec.symmetric else 1 << (part.bits - 1)
            low = 1 - (1 << (part.bits - 1)) if spec.symmetric else -middle
            codes = torch.round(own / step).add_(zero - middle).clamp_(low, (1 << (part.bits - 1)) - 1).to(torch.int8)
            found = cpu.linear_codes(codes, part.matrix, self.rows)
            if not spec.symmetric:
                found.addcmul_((middle - zero).view(-1, 1), part.sums)
            found *= step
            total = found if total is None else total.add_(found)
        assert total is not None
        for more in (self.offset, bias):
            total = total if more is None else total + more.float()
        return total.to(x.dtype).view(*x.shape[:-1], -1)


def unfit(tensor: LowBitTensor, layout: ActivationLayout) -> str | None:
    """Why a matrix and its activations cannot be multiplied in whole numbers, or None."""
    stored, spec = tensor.layout, layout.spec
    if spec is None:
        return "its inputs are not rounded"
    if spec.per == "group":
        return "its inputs have a step per group"
    if not _allowed or tensor.device.type != "cpu":
        return "not on this device"
    if reason := cpu_library.trouble() or unsupported(stored):
        return reason
    if len(stored.stages) != 1 or stored.outliers or stored.rank or stored.permuted:
        return "it has more than one stage, outliers, a low-rank term or a permutation"
    stage = stored.stages[0]
    if stage.offset or stage.zero or stage.rows is not None or stage.group_size < stored.in_features:
        return "it has more than one scale per row, or offsets"
    table = tensor.table()
    wide = stage.bits > MOST_LOOKED_UP and stage.levels.family not in ("uniform", "integer")
    if wide or bool((table != table.round()).any()) or float(table.abs().max()) > 128 or len(table) > 1:
        return f"its levels ({stage.levels.family}) are no integers of 8 bits"
    return None if stored.in_features < MOST_INPUTS else "its rows are longer than int32 sums allow"


def integer_matrix(tensor: LowBitTensor, activations: Activations) -> IntegerMatrix:
    """The prepared form of a matrix that :func:`unfit` finds nothing against."""
    layout, spec = activations.layout, activations.layout.spec
    assert spec is not None
    scale, table, codes = tensor.scales().float()[:, 0], tensor.table()[0], tensor.codes()
    steps = None
    if spec.static:
        step, zero = numbers(activations.tensors["step"]), activations.tensors["zero"].float()
        steps = list(zip(step.split(1), zero.split(1), strict=True))
    chosen: list[tuple[Tensor | None, int]] = [(None, spec.bits)]
    if layout.high:
        high = activations.tensors["high"].long()
        low = torch.ones(layout.in_features, dtype=torch.bool)
        low[high] = False
        chosen = [(low.nonzero().flatten(), spec.bits), (high, layout.high_bits)]
    parts = []
    for number, (columns, bits) in enumerate(chosen):
        own = tensor if columns is None else _columns(tensor, codes, columns)
        levels = table[(codes if columns is None else codes[:, columns]).long()]
        fixed = None if steps is None else steps[number]
        parts.append(Part(columns, repack(own), levels.sum(1) * scale, bits, fixed))
    offset = None
    if layout.shifted:
        offset = tensor.dequantize() @ activations.exact(numbers(activations.tensors["shift"]))
    return IntegerMatrix(tuple(parts), len(scale), offset, activations, tensor)


def _columns(tensor: LowBitTensor, codes: Tensor, columns: Tensor) -> LowBitTensor:
    """The record of some columns, int64 ``[n]``, of a matrix with one scale per row."""
    layout = replace(tensor.layout, shape=(tensor.layout.rows, len(columns)))
    packed = pack(codes[:, columns], layout.stages[0].bits)
    return LowBitTensor(layout, {**tensor.tensors, "codes": packed})
