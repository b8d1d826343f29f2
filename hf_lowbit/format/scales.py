"""Group scales and offsets: 16-bit floats, or 8- or 6-bit integers under one 16-bit super-scale per 256 weights.

All values are relative to ``2**shift`` of their tensor, which keeps fp16 away from its limits. Floats are stored as int16
(or, at 32 bits, int32) bit patterns, since ``module.to(dtype)`` casts floating buffers and would lose them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.format.packing import SCALE_BLOCK, pack, packed_width, unpack

SCALE_BITS = (16, 8, 6)
# Solvers make scales of SCALE_BITS; what is imported from elsewhere may need all 32 bits of a float.
WIDE = 32
SUPER_GROUP = 256
F16_MAX = 65504.0


def to_f16_bits(values: Tensor) -> Tensor:
    """Nearest fp16 of ``values`` (clamped to the finite range) as int16 bit patterns of the same shape."""
    return values.clamp(-F16_MAX, F16_MAX).to(torch.float16).view(torch.int16)


def from_f16_bits(bits: Tensor) -> Tensor:
    """float32 values of fp16 bit patterns."""
    return bits.view(torch.float16).to(torch.float32)


def round_f16(values: Tensor) -> Tensor:
    """``values`` as fp16 would store them, in float32."""
    return from_f16_bits(to_f16_bits(values))


def group_count(in_features: int, group_size: int) -> int:
    """Groups per row; the last one may be partly padding."""
    return -(-in_features // group_size)


def groups_per_super(group_size: int) -> int:
    """Groups that share one super-scale."""
    return max(1, SUPER_GROUP // group_size)


def super_count(groups: int, group_size: int) -> int:
    """Super-scales per row."""
    return -(-groups // groups_per_super(group_size))


def code_limit(scale_bits: int) -> int:
    """Largest magnitude of a scale code: 127 or 31."""
    return 2 ** (scale_bits - 1) - 1


def coded_width(groups: int, scale_bits: int) -> int:
    """Bytes of one row of packed scale codes."""
    return packed_width(groups, scale_bits, SCALE_BLOCK)


def pack_codes(codes: Tensor, scale_bits: int) -> Tensor:
    """Signed scale codes (integers ``[rows, groups]`` within +-limit) to uint8 ``[rows, width]``."""
    return pack((codes + 2 ** (scale_bits - 1)).to(torch.uint8), scale_bits, SCALE_BLOCK)


def spread_super(values: Tensor, groups: int, group_size: int) -> Tensor:
    """Repeat one value per super-group ``[rows, supers]`` to one per group ``[rows, groups]``."""
    return values.repeat_interleave(groups_per_super(group_size), dim=-1)[..., :groups]


def fit_super(scales: Tensor, group_size: int, scale_bits: int) -> Tensor:
    """Smallest super-scales (as fp16, float32 ``[rows, supers]``) that reach the largest of scales ``[rows, groups]``."""
    per, groups = groups_per_super(group_size), scales.shape[-1]
    supers = super_count(groups, group_size)
    padded = torch.nn.functional.pad(scales.abs(), (0, supers * per - groups))
    return round_f16(padded.view(scales.shape[0], supers, per).amax(-1) / code_limit(scale_bits))


def encode(scales: Tensor, group_size: int, scale_bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Store ``scales`` (float32 ``[rows, groups]``) at ``scale_bits``.

    Returns:
        The values as they will be read back, the stored codes, and the super-scales (None at 16 bits).
    """
    if scale_bits == 16:
        bits = to_f16_bits(scales)
        return from_f16_bits(bits), bits, None
    supers = fit_super(scales, group_size, scale_bits)
    spread = spread_super(supers, scales.shape[-1], group_size)
    limit = code_limit(scale_bits)
    codes = torch.where(spread > 0, scales / spread, 0.0).round().clamp(-limit, limit)
    return codes * spread, pack_codes(codes, scale_bits), to_f16_bits(supers)


def store_exactly(values: Tensor) -> tuple[int, int, Tensor]:
    """Floats as a tensor's ``shift``, their width and their stored bits, so that nothing is lost.

    Args:
        values: any float dtype of at most 32 bits, finite.

    Returns:
        A shift under which all are fp16 numbers, 16 and int16 bits; or, where there is none, 0, 32 and int32 bits.
    """
    wide = values.to(torch.float32)
    exponent = int(torch.frexp(wide.abs().max()).exponent)
    for shift in dict.fromkeys((0, exponent - 15)):
        bits = to_f16_bits(torch.ldexp(wide, torch.tensor(-shift)))
        if torch.equal(torch.ldexp(from_f16_bits(bits), torch.tensor(shift)), wide):
            return shift, 16, bits
    return 0, WIDE, wide.contiguous().view(torch.int32)


def decode(stored: Tensor, supers: Tensor | None, groups: int, group_size: int, scale_bits: int) -> Tensor:
    """float32 scales ``[rows, groups]`` of what :func:`encode` or :func:`store_exactly` stored."""
    if scale_bits == 16:
        return from_f16_bits(stored)
    if scale_bits == WIDE:
        return stored.view(torch.float32)
    assert supers is not None
    codes = unpack(stored, scale_bits, groups, SCALE_BLOCK).to(torch.float32) - 2 ** (scale_bits - 1)
    return codes * spread_super(from_f16_bits(supers), groups, group_size)
