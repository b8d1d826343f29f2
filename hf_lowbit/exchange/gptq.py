"""GPTQ checkpoints: ``qweight`` packed along the inputs, ``qzeros``, fp16 ``scales``, and ``g_idx``, each input's group.

``value[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o])``. The first convention (``checkpoint_format`` "gptq", which
files that state none follow, too) stores ``z - 1``, the second ("gptq_v2") stores ``z``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from hf_lowbit.exchange.bit_stream import codes_of
from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.exchange.reading import Reader, integer_record, order_of, reader, setting, tensor_of
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
