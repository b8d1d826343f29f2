"""The format "pack-quantized" of compressed-tensors: signed integers packed along the inputs, a scale per group or row.

``value = weight_scale * (q - weight_zero_point)`` with ``q`` and zero point stored plus ``2**(bits - 1)``. Columns of a
group need not lie side by side (``weight_g_idx``, of older releases).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.exchange.bit_stream import codes_of, words_of
from hf_lowbit.exchange.grid import Grid, exactly, grid_of, signed_bits, with_zero_points
from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.exchange.reading import Reader, integer_record, order_of, reader, setting, tensor_of
from hf_lowbit.exchange.writing import Scheme, Target, register
from hf_lowbit.format.tensor import LowBitTensor

FORMAT = "pack-quantized"
FIELDS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@reader("compressed-tensors")
def open_packed(settings: Mapping[str, Any]) -> Reader:
    """Integers of 2 to 8 bits, symmetric or not, a scale per group, row or tensor; weights only."""
    setting(settings, "format", (FORMAT,))
    setting(settings, "kv_cache_scheme", (None,))
    setting(settings, "sparsity_config", (None, {}))
    groups = settings.get("config_groups") or {}
    widths, sizes = set(), set()
    for name, group in groups.items():
        weights = group.get("weights") or {}
        where = f"quantization_config['config_groups'][{name!r}]"
        for part in ("input_activations", "output_activations"):
            if group.get(part) is not None:
                raise Misfit(
                    f"{where}[{part!r}]", "set", "only checkpoints whose weights alone are quantized can be imported."
                )
        for key, allowed in (("type", ("int",)), ("strategy", ("group", "channel", "tensor"))):
            if weights.get(key) not in allowed:
                raise Misfit(f"{where}['weights'][{key!r}]", repr(weights.get(key)), f"allowed: {', '.join(allowed)}.")
        if group.get("format") not in (None, FORMAT):
            raise Misfit(f"{where}['format']", repr(group["format"]), f"it can be imported where it is {FORMAT!r}.")
        widths.add(weights["num_bits"])
        sizes.add(weights.get("group_size") or -1)
    if not widths:
        raise Misfit("quantization_config['config_groups']", "empty", "it must say how weights are quantized.")
    return Reader("compressed-tensors", "weight_packed", FIELDS, _record, min(widths), min(sizes))


def _record(tensors: Mapping[str, Tensor]) -> LowBitTensor:
    packed, scale = tensor_of(tensors, "weight_packed"), tensor_of(tensors, "weight_scale")
    rows, columns = tensor_of(tensors, "weight_shape").tolist()
    bits = next((b for b in range(2, 9) if -(-columns * b // 32) == packed.shape[1]), None)
    if bits is None or packed.shape[0] != rows:
        raise Misfit(
            "the shape of weight_packed", list(packed.shape), f"no width makes that of [{rows}, {columns}] weights."
        )
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    groups = tensors.get("weight_g_idx")
    if columns % scale.shape[1]:
        raise Misfit("the shape of weight_scale", list(scale.shape), f"its groups do not divide {columns} columns.")
    size = columns // scale.shape[1]
    order = None if groups is None or bool((groups == -1).all()) else order_of(groups, size)
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        zero = _zero_points(zero, bits, rows, scale.shape[1])
    return integer_record(codes_of(packed, bits, columns), scale, zero, bits, size, "compressed-tensors", order)


def _zero_points(stored: Tensor, bits: int, rows: int, groups: int) -> Tensor:
    """Zero points of the unsigned codes ``[rows, groups]``: packed along the rows, or one signed byte each."""
    if stored.element_size() == 1:
        return stored.long().reshape(-1, groups).expand(rows, groups) + (1 << (bits - 1))
    return codes_of(stored.T, bits, rows).T


def scheme_of(record: LowBitTensor, dtype: torch.dtype) -> Scheme:
    """The scheme that holds a record exactly.

    Raises:
        Misfit: none does.
    """
    grid = with_zero_points(grid_of(record))
    bits, moved = signed_bits(grid)
    columns, size = record.layout.in_features, grid.group_size
    if columns % size:
        raise Misfit("group_size", size, f"it must divide the {columns} columns.")
    _zero_of(grid, bits, moved)
    exactly(grid.scale, dtype, "scale", "--scale-bits 16 makes fp16 ones; --dtype float32 holds any.")
    return Scheme(bits, 0 if size == columns else size, grid.zero is None and not moved)


def tensors_of(record: LowBitTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The fields of a matrix."""
    grid = with_zero_points(grid_of(record))
    bits, moved = signed_bits(grid)
    half = 1 << (bits - 1)
    out = {
        "weight_packed": words_of(grid.values - moved + half, bits),
        "weight_scale": grid.scale.to(dtype),
        "weight_shape": torch.tensor(record.shape),
    }
    if not scheme.symmetric:
        out["weight_zero_point"] = words_of((_zero_of(grid, bits, moved) + half).T, bits).T.contiguous()
    return out


def _zero_of(grid: Grid, bits: int, moved: int) -> Tensor:
    zero = (torch.zeros_like(grid.scale, dtype=torch.int16) if grid.zero is None else grid.zero) - moved
    half = 1 << (bits - 1)
    if int(zero.min()) < -half or int(zero.max()) >= half:
        raise Misfit("a zero point", int(zero.abs().max()), f"it must lie in -{half} .. {half - 1}, as the codes do.")
    return zero


def settings_of(schemes: Mapping[str, Scheme], dense: Sequence[str]) -> dict[str, Any]:
    """``quantization_config``: one group for each scheme; a single one is that of all linear layers."""
    groups = {}
    kinds = list(dict.fromkeys(schemes.values()))
    for number, kind in enumerate(kinds):
        weights = {"num_bits": kind.bits, "type": "int", "symmetric": kind.symmetric, "dynamic": False, "observer": "minmax"}
        weights |= {"strategy": "group" if kind.group_size else "channel", "group_size": kind.group_size or None}
        named = [module for module, scheme in schemes.items() if scheme == kind]
        targets = ["Linear"] if len(kinds) == 1 else named
        groups[f"group_{number}"] = {"targets": targets, "weights": weights, "format": FORMAT}
    held = {"quant_method": "compressed-tensors", "format": FORMAT, "quantization_status": "compressed"}
    return {**held, "config_groups": groups, "ignore": list(dense)}


register(
    Target(
        "compressed-tensors",
        "whole-number levels of up to 8 bits (uniform, integer, float, ternary) with a scale per group or row",
        "--method rtn --levels uniform --group-size 32 --scale-bits 16 --no-quantize-embeddings",
        scheme_of,
        tensors=tensors_of,
        settings=settings_of,
    )
)
