"""The packer: exact inverse for every width, exact size, and a byte layout that may never change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowbit.format.packing import CODE_BLOCK, SCALE_BLOCK, pack, packed_width, unpack

BITS = range(1, 9)
BLOCKS = (SCALE_BLOCK, CODE_BLOCK)


@st.composite
def code_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Codes with zero to two leading axes, their width and the block they are packed with."""
    bits, block = draw(st.sampled_from(BITS)), draw(st.sampled_from(BLOCKS))
    shape = [*draw(st.lists(st.integers(1, 4), max_size=2)), draw(st.integers(1, 3 * CODE_BLOCK + 1))]
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, 2**bits, shape, generator=generator).to(dtype), bits, block


@given(code_tensors())
def test_unpack_inverts_pack(drawn):
    codes, bits, block = drawn
    packed = pack(codes, bits, block)
    unpacked = unpack(packed, bits, codes.shape[-1], block)
    assert packed.dtype == unpacked.dtype == torch.uint8
    assert torch.equal(unpacked.to(codes.dtype), codes)


@given(code_tensors())
def test_size_is_exactly_the_bits_of_the_padded_codes(drawn):
    codes, bits, block = drawn
    count = codes.shape[-1]
    padded = (count + block - 1) // block * block
    assert packed_width(count, bits, block) * 8 == padded * bits
    assert pack(codes, bits, block).shape == (*codes.shape[:-1], packed_width(count, bits, block))


@given(code_tensors())
def test_input_need_not_be_contiguous(drawn):
    codes, bits, block = drawn
    spread = torch.stack([codes, torch.zeros_like(codes)], -1)[..., 0]
    packed = pack(spread, bits, block)
    assert torch.equal(packed, pack(codes, bits, block))
    sliced = torch.stack([packed, torch.full_like(packed, 255)], -1)[..., 0]
    assert torch.equal(unpack(sliced, bits, codes.shape[-1], block), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", BLOCKS)
def test_packing_leaves_its_input_alone(bits, block):
    codes = torch.full((2, block), 2**bits - 1, dtype=torch.uint8)
    packed = pack(codes, bits, block)
    unpack(packed, bits, block, block)
    assert codes.unique().tolist() == [2**bits - 1]
    assert packed.unique().tolist() == [255]


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_packed_apart(bits):
    # Rows of a matrix are sliced and gathered in their packed form, so no byte may hold codes of two rows.
    codes = torch.randint(0, 2**bits, (5, 37), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    for row in range(5):
        assert torch.equal(packed[row], pack(codes[row], bits))


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero(bits):
    codes = torch.full((1, 5), 2**bits - 1)
    assert not unpack(pack(codes, bits), bits, CODE_BLOCK)[:, 5:].any()


@pytest.mark.parametrize(
    ("bits", "block", "codes", "expected"),
    [
        # Two codes a byte, the first in the low half; 5 codes are padded to 32, which is 16 bytes.
        (4, 32, [1, 2, 15, 0, 9], "21 0f 09 00 00 00 00 00 00 00 00 00 00 00 00 00"),
        # Three planes of 4 bytes, lowest bit first. Codes 0 1 2 ... 7 0 1 ...: plane 0 alternates, and so on.
        (3, 32, [0, 1, 2, 3, 4, 5, 6, 7] * 4, "aa aa aa aa cc cc cc cc f0 f0 f0 f0"),
        # A second block starts its own planes.
        (3, 32, [0] * 32 + [5], "00 00 00 00 00 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00 01 00 00 00"),
        (1, 32, [1, 0, 0, 0, 0, 0, 0, 1, 1], "81 01 00 00"),
        (2, 8, [3, 0, 1, 2], "93 00"),
        # Six-bit scale codes: six planes of one byte.
        (6, 8, [63, 1, 32], "03 01 01 01 01 05"),
        (8, 8, [7, 255], "07 ff 00 00 00 00 00 00"),
    ],
)
def test_bytes_on_disk(bits, block, codes, expected):
    packed = pack(torch.tensor([codes]), bits, block)
    assert bytes(packed[0].tolist()).hex(" ") == expected
    assert unpack(packed, bits, len(codes), block)[0].tolist() == codes


@pytest.mark.parametrize(("bits", "block"), [(0, 32), (9, 32), (4, 12)])
def test_impossible_widths_and_blocks_are_refused(bits, block):
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"1 to 8 bits and a block that is a multiple of 8, got {bits} and {block}"):
        pack(codes, bits, block)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack(codes, bits, 8, block)
