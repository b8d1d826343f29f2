"""AWQ checkpoints in the layout "gemm": 4-bit codes packed along the outputs, eight to a word in a shuffled order.

``value[o, i] = scales[g, o] * (q[i, o] - z[g, o])``; nibble ``k`` of a word holds output ``ORDER[k]`` of its eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.exchange.bit_stream import codes_of
from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.exchange.reading import Reader, integer_record, reader, setting, tensor_of
from hf_lowbit.format.tensor import LowBitTensor

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@reader("awq")
def open_awq(settings: Mapping[str, Any]) -> Reader:
    """Of 4 bits; the layouts "gemv", "marlin" and "exllama" are other files."""
    setting(settings, "bits" if "bits" in settings else "w_bit", (BITS,))
    layout = settings.get("version", settings.get("format", "gemm"))
    if not isinstance(layout, str) or layout.lower() != "gemm":
        raise Misfit("quantization_config['version']", repr(layout), "it can be imported where it is 'gemm'.")
    size = settings.get("group_size", settings.get("q_group_size", 128))
    if not isinstance(size, int) or (size < 1 and size != -1):
        raise Misfit("quantization_config['group_size']", repr(size), "a whole number, or -1 for one scale per row.")
    return Reader("awq", "qweight", ("qweight", "qzeros", "scales"), partial(_record, size=size), BITS, size)


def _record(tensors: Mapping[str, Tensor], size: int) -> LowBitTensor:
    codes, scales = _in_order(tensor_of(tensors, "qweight")), tensor_of(tensors, "scales")
    zero = _in_order(tensor_of(tensors, "qzeros"))
    return integer_record(codes.T, scales.T, zero.T, BITS, codes.shape[0] if size == -1 else size, "awq")


def _in_order(words: Tensor) -> Tensor:
    """int32 ``[n, out / 8]`` to uint8 ``[n, out]``."""
    nibbles = codes_of(words, BITS, words.shape[1] * 8).view(words.shape[0], -1, 8)
    return nibbles[..., torch.argsort(torch.tensor(ORDER))].flatten(1)
