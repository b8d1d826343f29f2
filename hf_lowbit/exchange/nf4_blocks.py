"""NF4 as bitsandbytes serializes it: blocks of consecutive weights, one absolute maximum each, themselves coded or not.

``value = absmax[block] * quant_map[code]``, the first of two codes in the high nibble. Maxima that are coded once more
(``nested_*``) are 8-bit indices into a table of 256, times an fp32 maximum per 256 of them, plus a mean. That is an fp32
number and kept as one: exact, but 4.5 bits per weight at blocks of 64 where the file has 4.13.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.exchange.reading import Reader, reader, setting, tensor_of
from hf_lowbit.format.layout import Layout, Stage
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.packing import pack
from hf_lowbit.format.scales import store_exactly
from hf_lowbit.format.tensor import LowBitTensor

STATE = "weight.quant_state.bitsandbytes__nf4"
FIELDS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", STATE)
LEVELS = Levels("qlora", 4)


@reader("bitsandbytes")
def open_nf4(settings: Mapping[str, Any]) -> Reader:
    """4-bit matrices of the type nf4, stored in bytes."""
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        raise Misfit("quantization_config['load_in_8bit']", True, "only 4-bit NF4 checkpoints can be imported.")
    setting(settings, "load_in_4bit", (True,), settings.get("_load_in_4bit"))
    setting(settings, "bnb_4bit_quant_type", ("nf4",))
    setting(settings, "bnb_4bit_quant_storage", ("uint8",), "uint8")
    return Reader("bitsandbytes", "weight.absmax", FIELDS, _record, 4, 64)


def _record(tensors: Mapping[str, Tensor]) -> LowBitTensor:
    state = json.loads(bytes(tensor_of(tensors, STATE).tolist()))
    (rows, columns), size = state["shape"], state["blocksize"]
    if columns % size:
        raise Misfit("blocksize", size, f"a block must not run over the end of a row, which has {columns} weights.")
    if not torch.equal(tensor_of(tensors, "weight.quant_map"), LEVELS.table()):
        raise Misfit("quant_map", "another table", "the 16 levels must be NF4's.")
    maxima = tensor_of(tensors, "weight.absmax")
    if "weight.nested_absmax" in tensors:
        outer = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: maxima.numel()]
        maxima = tensor_of(tensors, "weight.nested_quant_map")[maxima.long()] * outer + state["nested_offset"]
    packed = tensor_of(tensors, "weight").flatten()
    codes = torch.stack((packed >> 4, packed & 15), -1).view(rows, columns)
    shift, width, stored = store_exactly(maxima.view(rows, -1))
    layout = Layout((rows, columns), (Stage(LEVELS, size, width),), shift, "bitsandbytes")
    return LowBitTensor(layout, {"codes": pack(codes, 4), "scale": stored})
