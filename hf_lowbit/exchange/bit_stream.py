"""Codes of 1 to 8 bits as one little-endian stream in 32-bit words, whatever the width; no row starts inside a word."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_lowbit.format.packing import pack, unpack

# Widths that divide a byte; their stream is what our own packer writes.
_WHOLE = (1, 2, 4, 8)


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Codes (integers ``[rows, n]`` of ``0 .. 2**bits - 1``) to int32 ``[rows, ceil(n * bits / 32)]``."""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -count % 32))
    if bits in _WHOLE:
        stream = pack(padded, bits)
    else:
        lanes = np.unpackbits(padded.numpy()[..., None], axis=-1, bitorder="little", count=bits)
        stream = torch.from_numpy(np.packbits(lanes.reshape(rows, -1), axis=-1, bitorder="little"))
    return stream.flatten().view(torch.int32).view(rows, -1)[:, : -(-count * bits // 32)].contiguous()


def codes_of(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`words_of`: uint8 ``[rows, count]``."""
    rows = words.shape[0]
    stream = words.contiguous().view(torch.uint8).view(rows, -1)
    if bits in _WHOLE:
        return unpack(stream, bits, count)
    lanes = np.unpackbits(stream.numpy(), axis=-1, bitorder="little")[:, : count * bits].reshape(rows, count, bits)
    return torch.from_numpy(np.packbits(lanes, axis=-1, bitorder="little")[..., 0])
