"""Packed blocks: codes come back, errors stay within their bound, and the layout is what the kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.kernels.packed_cache import BLOCK
from hf_lowbit.kv import blocks
from hf_lowbit.kv.rows import RowStore, to_int8
from hf_lowbit.kv.tiers import Frame, balance_of, hadamard

WIDTHS = (2, 3, 4)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dim", [8, 64, 96])
def test_codes_come_back_in_as_many_bits_as_promised(bits, dim):
    codes = torch.randint(0, 2**bits, (2, 3, BLOCK, dim), dtype=torch.uint8)
    for pack, unpack in ((blocks.pack_keys, blocks.unpack_keys), (blocks.pack_values, blocks.unpack_values)):
        packed = pack(codes, bits)
        assert packed.shape == (2, 3, BLOCK * dim * bits // 8)
        assert torch.equal(unpack(packed, bits, dim), codes)


def test_where_a_code_lies():
    codes = torch.zeros(BLOCK, 16, dtype=torch.uint8)
    codes[16 * 3 + 5, 4 * 2 + 1] = 2  # tile 3, lane 5; quad 2, channel 1 of it
    assert blocks.pack_keys(codes, 2)[64 * 2 + 4 * 5 + 1] == 2 << 6
    assert blocks.pack_keys(codes, 4)[64 * (4 + 2) + 4 * 5 + 1] == 2 << 4
    words = blocks.pack_values(codes, 2).view(torch.int32)
    assert words[3 * 16 + 9] == 2 << (2 * 5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(WIDTHS), st.booleans(), st.sampled_from([0.01, 1.0, 300.0]))
def test_an_element_is_off_by_at_most_half_a_step(seed, bits, by_channel, size):
    x = torch.randn(3, BLOCK, 16, generator=torch.Generator().manual_seed(seed)) * size
    coded = blocks.encode(x, bits, "affine", by_channel, 16, "range")
    found = blocks.decode(coded, bits, "affine", by_channel)
    # The ends of the range move by the rounding of scale and offset to fp16.
    half = coded.scale.float() / 2 + (coded.scale.float() * 2**bits + coded.offset.float().abs()) * 2**-10
    assert ((found - x).abs() <= half).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("levels", ["affine", "nf", "uniform_zero_free"])
@pytest.mark.parametrize("by_channel", [True, False])
def test_searching_never_adds_error(bits, levels, by_channel):
    x = torch.randn(4, BLOCK, 32, generator=torch.Generator().manual_seed(bits))
    errors = []
    for fit in ("search", "range"):
        coded = blocks.encode(x, bits, levels, by_channel, 32, fit)
        errors.append((blocks.decode(coded, bits, levels, by_channel) - x).square().mean())
    assert errors[0] < 0.9 * errors[1] if bits == 2 else errors[0] <= errors[1]


@pytest.mark.parametrize(("levels", "bits"), [("affine", 3), ("nf", 4), ("uniform_zero_free", 2), ("e2m1", 4)])
def test_levels_are_whole_numbers_a_byte_holds(levels, bits):
    table = blocks.level_table(levels, bits)
    assert torch.equal(table, table.round()) and table.abs().max() <= 127
    assert (table.diff() >= 0).all() and len(table.unique()) >= 2**bits - 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_coding_rows_again_changes_nothing(seed, dtype):
    x = torch.randn(2, 3, 5, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0, 0, 0] = 0
    codes, scale = to_int8(x)
    decoded = codes.float() * scale.float()[..., None]
    again = to_int8(decoded)
    assert torch.equal(codes, again[0]) and torch.equal(scale, again[1])
    assert ((decoded - x.float()).abs() <= scale.float()[..., None] * 0.57).all()


def test_rows_are_rounded_by_the_kernel_as_in_torch():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = torch.randn(2, 2, 7, 24).to(dtype), torch.randn(2, 2, 7, 24).to(dtype)
        x[0, 0, 3] = 0
        by_torch, by_kernel = RowStore(8, dtype), RowStore(8, dtype)
        by_torch.append_encoded(by_torch.encoded(x, y))
        for at in range(7):  # the first append makes room in torch
            by_kernel.append(x[:, :, at : at + 1], y[:, :, at : at + 1])
        for name, tensor in by_torch.filled().items():
            assert torch.equal(tensor, by_kernel.filled()[name]), name


def test_balancing_changes_no_product():
    draw = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, 3, 40, 16, generator=draw, dtype=torch.float64) * 3 for _ in range(2))
    frame = Frame(balance=balance_of(queries, keys).double())
    assert torch.allclose(
        (queries / frame.balance[:, :, None]) @ (keys * frame.balance[:, :, None]).transpose(-1, -2),
        queries @ keys.transpose(-1, -2), rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    most = [x.abs().amax(2) for x in (queries / frame.balance[:, :, None], keys * frame.balance[:, :, None])]
    assert torch.allclose(most[0], most[1])


def test_a_hadamard_matrix_is_its_own_inverse():
    for dim in (8, 64):
        assert torch.allclose(hadamard(dim) @ hadamard(dim), torch.eye(dim), atol=1e-6)
