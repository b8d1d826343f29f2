"""The scale search all table-based solvers share: near the optimum, exact on a grid, careful when scales are coded."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.format import Levels
from hf_lowbit.format.scales import decode, encode
from hf_lowbit.solvers.scale_search import codes_of, error_of, least_squares, search_scales, store_scales


def groups(rows: int, count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, count, size, generator=torch.Generator().manual_seed(seed))


def left(values: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, importance=None) -> torch.Tensor:
    """Error per group that the nearest levels leave."""
    return error_of(values, table[codes_of(values, scale, table).long()], scale, importance)


@pytest.mark.parametrize(
    ("levels", "signed"),
    [
        (Levels("uniform", 4), False),
        (Levels("uniform_zero_free", 2), False),
        (Levels("integer", 3), True),
        (Levels("normal_float", 4), True),
    ],
    ids=lambda value: getattr(value, "family", None),
)
def test_scale_search_comes_near_the_brute_force_optimum(levels, signed):
    values, table = groups(512, 1, 64), levels.table()
    full = values.abs().amax(-1, keepdim=True) / table.abs().max()
    best = torch.full_like(full, float("inf"))
    for ratio in torch.linspace(0.3, 1.1, 161):
        for sign in (1, -1) if signed else (1,):
            coded = table[codes_of(values, full * ratio * sign, table).long()]
            scale, _ = least_squares(values, coded, None)
            best = torch.minimum(best, error_of(values, coded, scale, None))
    assert left(values, search_scales(values, table, None, signed), table).sum() <= 1.0025 * best.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("family", ["uniform", "uniform_zero_free", "normal_float"])
def test_weights_on_a_grid_are_found_exactly(family, bits):
    table = Levels(family, bits).table()
    codes = torch.randint(0, 2**bits, (64, 2, 32), generator=torch.Generator().manual_seed(bits))
    codes[..., 0] = table.abs().argmax()
    scale = torch.rand(64, 2, 1, generator=torch.Generator().manual_seed(7)) + 0.1
    found = search_scales(table[codes] * scale, table, None, signed=False)
    assert torch.allclose(found, scale, rtol=1e-5)


def test_either_sign_is_tried_where_the_table_is_lopsided():
    values, table = groups(64, 1, 32), Levels("integer", 3).table()
    both, one = (left(values, search_scales(values, table, None, signed), table) for signed in (True, False))
    assert (both <= one * 1.0001).float().mean() > 0.95
    assert both.sum() < 0.95 * one.sum()


def test_weights_of_no_importance_do_not_count():
    values, table = groups(32, 1, 32), Levels("uniform", 4).table()
    importance = torch.ones(1, 1, 32)
    importance[..., 20:] = 0
    found = left(values, search_scales(values, table, importance, False), table, importance).sum()
    alone = left(
        values[..., :20].contiguous(), search_scales(values[..., :20].contiguous(), table, None, False), table
    ).sum()
    assert found <= 1.05 * alone


@pytest.mark.parametrize(("scale_bits", "bound"), [(6, 0.82), (8, 0.955)])
def test_coded_scales_are_chosen_by_the_error_they_leave(scale_bits, bound):
    # At eight bits a weight, where the rounding of scales costs most: near codes and smaller super-scales must pay.
    values, table = groups(64, 16, 32), Levels("uniform", 8).table()
    scale = search_scales(values, table, None, False)
    nearest, _, _ = encode(scale.squeeze(-1), 32, scale_bits)
    kept, fields = store_scales(values, scale, table, None, 32, scale_bits)
    assert torch.equal(decode(fields["scale"], fields["scale_super"], 16, 32, scale_bits), kept.squeeze(-1))
    assert left(values, kept, table).sum() <= bound * left(values, nearest[..., None], table).sum()


@pytest.mark.parametrize("scale_bits", [16, 8, 6])
def test_a_scale_of_zero_stays_zero(scale_bits):
    values, table = groups(2, 16, 32), Levels("uniform", 4).table()
    scale = search_scales(values, table, None, False)
    scale[:, 3] = 0
    values[:, 3] = 0
    scale[1] = 0
    values[1] = 0
    kept, _ = store_scales(values, scale, table, None, 32, scale_bits)
    assert not kept[:, 3].any() and not kept[1].any() and kept[0, :3].all()


def test_least_squares_is_the_best_scale_and_knows_its_gain():
    values, levels = groups(16, 1, 32), groups(16, 1, 32, seed=1)
    importance = torch.rand(1, 1, 32, generator=torch.Generator().manual_seed(2))
    scale, gain = least_squares(values, levels, importance)
    error = error_of(values, levels, scale, importance)
    assert torch.allclose(error_of(values, levels, torch.zeros_like(scale), importance) - gain, error, rtol=1e-4)
    for other in (0.99, 1.01):
        assert (error_of(values, levels, scale * other, importance) >= error).all()
