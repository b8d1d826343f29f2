"""From the words of packed cache blocks to tiles of levels in registers (the orders of ``hf_lowbit/kv/blocks.py``).

A block is 64 tokens. A word of keys holds a quad of channels of one token for each tile of 16 tokens that its bits have
room for, a word of values one channel of 32 / bits tokens; 3 bits are a part of 2 and one of 1. Codes are brought into
octets, whose levels ``triton_decode`` permutes out of a table in registers.
"""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton_decode import octet_levels


@triton.jit
def key_tile(words_ptr, quads, planes, BITS: tl.constexpr, BLOCK_D: tl.constexpr, ASM: tl.constexpr):
    """Levels fp16 ``[BLOCK_D, 64]`` of a block of keys of ``4 * quads`` channels; those beyond have some level."""
    QUADS: tl.constexpr = BLOCK_D // 4
    lane = tl.arange(0, 16)[None, :]
    if BITS == 4:
        row = tl.arange(0, 2 * QUADS)[:, None]
        quad, pair = row % QUADS, row // QUADS
        word = tl.load(words_ptr + (pair * quads + quad) * 16 + lane, mask=quad < quads, other=0)
        levels = octet_levels(word, planes, BITS, tl.float16, ASM)
        # pairs of tiles, quads, tokens of a tile, channels of a quad, tiles of a pair
        levels = tl.permute(tl.reshape(levels, (2, QUADS, 16, 4, 2)), (1, 3, 0, 4, 2))
    else:
        quad = tl.arange(0, QUADS)[:, None]
        known = quad < quads
        word = tl.load(words_ptr + quad * 16 + lane, mask=known, other=0)
        even, odd = word & 0x33333333, (word >> 2) & 0x33333333
        if BITS == 3:
            top = tl.load(words_ptr + (quads + quad // 2) * 16 + lane, mask=known, other=0) >> (4 * (quad % 2))
            even |= ((top & 0x01010101) << 2) | ((top & 0x04040404) << 4)
            odd |= ((top & 0x02020202) << 1) | ((top & 0x08080808) << 3)
        levels = tl.join(octet_levels(even, planes, BITS, tl.float16, ASM), octet_levels(odd, planes, BITS, tl.float16, ASM))
        # quads, tokens of a tile, channels of a quad, halves of the tiles, tiles of a half
        levels = tl.permute(tl.reshape(levels, (QUADS, 16, 4, 2, 2)), (0, 2, 3, 4, 1))
    return tl.reshape(levels, (BLOCK_D, 64))


@triton.jit
def value_tile(words_ptr, dim, planes, BITS: tl.constexpr, BLOCK_D: tl.constexpr, ASM: tl.constexpr):
    """Levels fp16 ``[64, BLOCK_D]`` of a block of values of ``dim`` channels; those beyond have some level."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    known = channel < dim
    if BITS == 4:
        word = tl.load(words_ptr + tl.arange(0, 8)[:, None] * dim + channel, mask=known, other=0)
        levels = tl.permute(octet_levels(word, planes, BITS, tl.float16, ASM), (0, 2, 1))
    else:
        chunk = tl.arange(0, 4)[:, None]
        word = tl.load(words_ptr + chunk * dim + channel, mask=known, other=0)
        even, odd = word & 0x33333333, (word >> 2) & 0x33333333
        if BITS == 3:
            top = tl.load(words_ptr + (4 + chunk // 2) * dim + channel, mask=known, other=0) >> (16 * (chunk % 2))
            even |= every_second(top) << 2
            odd |= every_second(top >> 1) << 2
        levels = tl.join(octet_levels(even, planes, BITS, tl.float16, ASM), octet_levels(odd, planes, BITS, tl.float16, ASM))
        levels = tl.permute(levels, (0, 2, 3, 1))
    return tl.reshape(levels, (64, BLOCK_D))


@triton.jit
def every_second(bits):
    """Bits 0, 2, ... 14, one in each nibble."""
    bits &= 0x5555
    bits = (bits | (bits << 8)) & 0x00550055
    bits = (bits | (bits << 4)) & 0x05050505
    return (bits | (bits << 2)) & 0x11111111
