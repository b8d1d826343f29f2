"""Low-bit layers of other libraries, each from a dense one on the device; what is not installed raises what it raises."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def bitsandbytes_nf4(linear: nn.Linear, batch: int) -> nn.Module:
    """4-bit NF4 of bitsandbytes in its groups of 64."""
    bnb = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(linear.weight.device)


def torchao_int4(linear: nn.Linear, batch: int) -> nn.Module:
    """Int4 weights of torchao in groups of 64."""
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(linear, quantization.Int4WeightOnlyConfig(group_size=64))
    return linear


def gemlite_int4(linear: nn.Linear, batch: int) -> nn.Module:
    """Int4 of gemlite, quantized by HQQ in groups of 64."""
    helper = importlib.import_module("gemlite.helper")
    hqq = importlib.import_module("hqq.core.quantize")
    dtype, device = linear.weight.dtype, str(linear.weight.device)
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return helper.A16Wn(device=device).from_hqqlinear(hqq.HQQLinear(linear, config, compute_dtype=dtype))


def flute_nf4(linear: nn.Linear, batch: int) -> nn.Module:
    """4-bit NormalFloat of FLUTE in groups of 64, its kernel tuned for the batch."""
    base = importlib.import_module("flute.integrations.base")
    model = nn.Sequential(linear)
    base.prepare_model_flute("", model, num_bits=4, group_size=64, example_batch_size=batch, prepare_bnb_layers=False)
    return model


class Marlin(nn.Module):
    """Int4 of Marlin in groups of 128, which takes float16; its codes are whatever lay in memory."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        marlin = importlib.import_module("marlin")
        self.layer = marlin.Layer(linear.in_features, linear.out_features, groupsize=128).to(linear.weight.device)

    def forward(self, x: torch.Tensor) -> Any:
        """``x`` in float16, which it should be in when time is taken."""
        return self.layer(x.half())


PEERS: dict[str, Callable[[nn.Linear, int], nn.Module]] = {
    "bitsandbytes NF4": bitsandbytes_nf4,
    "torchao int4": torchao_int4,
    "gemlite int4": gemlite_int4,
    "FLUTE NF4": flute_nf4,
    "Marlin int4": lambda linear, batch: Marlin(linear),
}


def why_not(reason: Exception) -> str:
    """What a table says of a peer that could not be measured, whatever it raised."""
    return f"not measured: {type(reason).__name__}: {str(reason)[:100]}"
