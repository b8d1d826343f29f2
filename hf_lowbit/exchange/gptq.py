"""GPTQ checkpoints: ``qweight`` packed along the inputs, ``qzeros``, fp16 ``scales``, and ``g_idx``, each input's group.

``value[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o])``. The first convention (``checkpoint_format`` "gptq", which
files that state none follow, too) stores ``z - 1``, the second ("gptq_v2") stores ``z``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.exchange.bit_stream import codes_of, words_of
from hf_lowbit.exchange.grid import Grid, exactly, grid_of, signed_bits, with_zero_points
from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.exchange.reading import Reader, integer_record, order_of, reader, setting, tensor_of
from hf_lowbit.exchange.writing import Scheme, Target, register
from hf_lowbit.format.tensor import LowBitTensor

BITS = (2, 3, 4, 8)


@reader("gptq")
def open_gptq(settings: Mapping[str, Any]) -> Reader:
    """Of any width, grouping and order of activations; ``dynamic`` settings per module are not read."""
    bits = setting(settings, "bits", BITS)
    setting(settings, "dynamic", (None, {}))
    form = setting(settings, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    size = settings.get("group_size", -1)
    if not isinstance(size, int) or (size < 1 and size != -1):
        raise Misfit("quantization_config['group_size']", repr(size), "a whole number, or -1 for one scale per row.")
    read = partial(_record, bits=bits, size=size, first=0 if form == "gptq_v2" else 1)
    return Reader("gptq", "qweight", ("qweight", "qzeros", "scales", "g_idx"), read, bits, size)


def _record(tensors: Mapping[str, Tensor], bits: int, size: int, first: int) -> LowBitTensor:
    packed, scales = tensor_of(tensors, "qweight"), tensor_of(tensors, "scales")
    columns = packed.shape[0] * 32 // bits
    size = columns if size == -1 else size
    zero = codes_of(tensor_of(tensors, "qzeros"), bits, scales.shape[1]).long() + first
    order = order_of(tensors["g_idx"], size) if "g_idx" in tensors else None
    codes = codes_of(packed.T, bits, columns)
    return integer_record(codes, scales.T, zero.T, bits, size, "gptq", order)


def scheme_of(record: LowBitTensor, dtype: torch.dtype) -> Scheme:
    """The narrowest scheme that holds a record exactly.

    Raises:
        Misfit: none does.
    """
    grid = with_zero_points(grid_of(record, permuted=True))
    needed, moved = signed_bits(grid)
    rows, columns = record.shape
    if rows % 32 or columns % 32:
        raise Misfit("the shape", [rows, columns], "both must be multiples of 32.")
    exactly(grid.scale, torch.float16, "scale", "the format has fp16 ones: --scale-bits 16.")
    bits = next(b for b in BITS if b >= needed)
    scheme = Scheme(bits, grid.group_size, grid.zero is None and not moved, grid.order is None)
    _zeros(grid, bits, moved)
    return scheme


def together(schemes: Mapping[str, Scheme]) -> Mapping[str, Scheme]:
    """One width and one group size for all matrices: the widest, and the smallest.

    Raises:
        Misfit: a group size that the smallest does not divide.
    """
    bits = max(scheme.bits for scheme in schemes.values())
    size = min(scheme.group_size for scheme in schemes.values())
    for module, scheme in schemes.items():
        if scheme.group_size % size:
            raise Misfit("group_size", scheme.group_size, f"all matrices share one, here {size}.", f"{module}.weight")
    symmetric, ordered = (all(getattr(scheme, name) for scheme in schemes.values()) for name in ("symmetric", "ordered"))
    return dict.fromkeys(schemes, Scheme(bits, size, symmetric, ordered))


def tensors_of(record: LowBitTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The fields of a matrix, first zero-point convention."""
    grid = with_zero_points(grid_of(record, permuted=True))
    _, moved = signed_bits(grid)
    columns, size = record.layout.in_features, scheme.group_size
    codes, groups = (grid.values - moved + (1 << (scheme.bits - 1))), torch.arange(columns) // size
    if grid.order is not None:
        codes = torch.empty_like(codes).index_copy_(1, grid.order.long(), codes)
        groups = torch.empty_like(groups).index_copy_(0, grid.order.long(), groups)
    zero, scale = (grid.spread(v, size) for v in (_zeros(grid, scheme.bits, moved), grid.scale))
    return {
        "qweight": words_of(codes, scheme.bits).T.contiguous(),
        "qzeros": words_of((zero - 1).T, scheme.bits),
        "scales": scale.T.to(torch.float16).contiguous(),
        "g_idx": groups.to(torch.int32),
    }


def _zeros(grid: Grid, bits: int, moved: int) -> Tensor:
    """Zero points of the unsigned codes, int16 ``[out, groups]``."""
    half = 1 << (bits - 1)
    zero = (torch.zeros_like(grid.scale, dtype=torch.int16) if grid.zero is None else grid.zero) - moved + half
    if int(zero.min()) < 1 or int(zero.max()) > 2 * half:
        raise Misfit("a zero point", f"{int(zero.min())} to {int(zero.max())}", f"it must lie in 1 .. {2 * half}.")
    return zero


def settings_of(schemes: Mapping[str, Scheme], dense: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of matrices that share a scheme."""
    kind = next(iter(schemes.values()))
    held = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": kind.bits, "group_size": kind.group_size}
    return held | {"sym": kind.symmetric, "desc_act": not kind.ordered, "true_sequential": True, "lm_head": False}


register(
    Target(
        "gptq",
        "whole-number levels of up to 8 bits with fp16 scales, one width and group size for all matrices",
        "--method rtn --levels uniform --group-size 32 --scale-bits 16 --no-quantize-embeddings",
        scheme_of,
        together,
        tensors_of,
        settings_of,
    )
)
