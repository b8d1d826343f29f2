"""The one packer: integer codes of 1 to 8 bits to bytes and back, row by row.

A row of ``count`` codes is padded with zeros to a multiple of ``block`` codes. Widths 1, 2, 4 and 8 lie little-endian
within each byte. Widths 3, 5, 6 and 7 lie as bit planes: each block holds ``bits`` planes of ``block / 8`` bytes, lowest
bit first, so both layouts take exactly ``bits`` bits per padded code.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE_BLOCK = 32
SCALE_BLOCK = 8
_WHOLE = (1, 2, 4, 8)


def packed_width(count: int, bits: int, block: int = CODE_BLOCK) -> int:
    """Bytes one packed row of ``count`` codes occupies: ``ceil(count / block) * block * bits / 8``."""
    return -(-count // block) * block * bits // 8


def pack(codes: Tensor, bits: int, block: int = CODE_BLOCK) -> Tensor:
    """Pack ``codes`` (any integer dtype, ``[..., count]``, values in ``0 .. 2**bits - 1``) to uint8 ``[..., width]``."""
    _check(bits, block)
    codes = codes.to(torch.uint8)
    count = codes.shape[-1]
    padding = -count % block
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    lead = codes.shape[:-1]
    if bits == 8:
        return codes.contiguous()
    if bits in _WHOLE:
        per_byte = 8 // bits
        lanes = codes.reshape(*lead, -1, per_byte)
        packed = lanes[..., 0].clone()
        for lane in range(1, per_byte):
            packed |= lanes[..., lane] << (lane * bits)
        return packed
    lanes = codes.reshape(*lead, -1, block // 8, 8)
    planes = torch.zeros(*lead, lanes.shape[-3], bits, block // 8, dtype=torch.uint8, device=codes.device)
    for plane in range(bits):
        for lane in range(8):
            planes[..., plane, :] |= ((lanes[..., lane] >> plane) & 1) << lane
    return planes.flatten(-3)


def unpack(packed: Tensor, bits: int, count: int, block: int = CODE_BLOCK) -> Tensor:
    """Inverse of :func:`pack`: uint8 ``[..., width]`` to uint8 codes ``[..., count]``."""
    _check(bits, block)
    lead = packed.shape[:-1]
    if bits == 8:
        return packed[..., :count]
    if bits in _WHOLE:
        per_byte, mask = 8 // bits, (1 << bits) - 1
        lanes = [(packed >> (lane * bits)) & mask for lane in range(per_byte)]
        return torch.stack(lanes, -1).flatten(-2)[..., :count]
    planes = packed.reshape(*lead, packed.shape[-1] * 8 // (block * bits), bits, block // 8)
    codes = torch.zeros(*lead, planes.shape[-3], block // 8, 8, dtype=torch.uint8, device=packed.device)
    for lane in range(8):
        for plane in range(bits):
            codes[..., lane] |= ((planes[..., plane, :] >> lane) & 1) << plane
    return codes.flatten(-3)[..., :count]


def _check(bits: int, block: int) -> None:
    if bits not in range(1, 9) or block % 8:
        raise ValueError(f"packing needs 1 to 8 bits and a block that is a multiple of 8, got {bits} and {block}")
