"""Level tables: order, size, symmetry and the published values of every family, and the nearest-level rule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowbit.errors import BadRequest, FormatError
from hf_lowbit.format import Levels
from hf_lowbit.format.levels import BITS_OF, FAMILIES, POWER, assign, parse_levels

# The 4-bit table of QLoRA (arXiv 2305.14314, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def all_levels() -> list[Levels]:
    """Every generated family at every width it allows, with a few of its numbers."""
    out = []
    for family in FAMILIES:
        low, high = BITS_OF.get(family, (1, 8))
        for bits in range(low, high + 1):
            if family in POWER:
                out += [Levels(family, bits, exponent=exponent) for exponent in (0.2, 0.55, 1.0, 4.0)]
            elif family == "float":
                out += [Levels(family, bits, mantissa=mantissa) for mantissa in range(bits - 1)]
            elif family != "fitted":
                out.append(Levels(family, bits))
    return out


ALL = all_levels()
every = pytest.mark.parametrize("levels", ALL, ids=[f"{v.family}{v.bits}-{v.exponent or v.mantissa}" for v in ALL])


@every
def test_tables_are_finite_ascending_and_full(levels):
    table = levels.table()
    assert table.dtype == torch.float32 and table.shape == (2**levels.bits,)
    assert torch.isfinite(table).all()
    # Equal neighbours are codes that a family leaves unused, and the two zeros of a float.
    repeats = {"uniform": 1, "power": 1, "ternary": 1, "float": 1}.get(levels.family, 0)
    assert (table.diff() >= 0).all()
    assert (table.diff() == 0).sum() == repeats


@every
def test_symmetric_families_hold_the_negative_of_every_level(levels):
    table = set(levels.table().tolist())
    assert (table == {-value for value in table}) == levels.symmetric


@every
def test_zero_is_held_exactly_where_the_family_says(levels):
    zero_free = levels.family in ("uniform_zero_free", "power_zero_free", "power_of_two")
    assert (0.0 in levels.table().tolist()) != zero_free


@every
def test_tables_leave_room_for_an_fp16_scale(levels):
    # Weights are brought to 2**9; a level far above that makes the scale a subnormal fp16 number without digits.
    assert levels.table().abs().max() <= 256


def test_normal_float_4_is_the_published_table():
    assert torch.allclose(Levels("normal_float", 4).table(), torch.tensor(NF4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_levels_are_normal_quantiles(bits):
    # The inner levels of the upper half cut the normal distribution into equal probabilities.
    table = Levels("normal_float", bits).table().double()
    assert table[0] == -1 and table[-1] == 1 and table[2 ** (bits - 1) - 1] == 0
    edge = 1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2
    top = torch.special.ndtri(torch.tensor(edge, dtype=torch.float64))
    steps = torch.special.ndtr(table[2 ** (bits - 1) - 1 :] * top).diff()
    assert torch.allclose(steps, torch.full_like(steps, (edge - 0.5) / 2 ** (bits - 1)), rtol=1e-4)


def same_up_to_factor(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one / one.max(), other / other.max(), rtol=1e-6, atol=1e-7)


def test_e2m1_has_the_values_of_fp4():
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert same_up_to_factor(Levels("float", 4, mantissa=1).table(), torch.cat([-positive.flip(0), positive]))


@pytest.mark.parametrize("bits", range(3, 9))
def test_a_float_with_one_exponent_bit_is_uniform(bits):
    levels = Levels("float", bits, mantissa=bits - 2).table().unique()
    assert same_up_to_factor(levels, Levels("uniform", bits).table().unique())


@pytest.mark.parametrize(
    ("bits", "mantissa", "largest"), [(8, 2, 1.75 * 2.0**30), (8, 3, 1.875 * 2.0**14), (6, 2, 1.75 * 2.0**6)]
)
def test_float_ratios_reach_the_ends_of_the_format(bits, mantissa, largest):
    # Largest over smallest positive value: (2 - 2**-m) * 2**(E - 2) over 2**-m, with E the number of exponents.
    positive = Levels(family="float", bits=bits, mantissa=mantissa).table().double()
    positive = positive[positive > 0]
    assert positive.max() / positive.min() == largest * 2**mantissa


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("power", "plain"), [("power", "uniform"), ("power_zero_free", "uniform_zero_free")])
def test_exponent_one_is_uniform(power, plain, bits):
    assert same_up_to_factor(Levels(power, bits, exponent=1.0).table(), Levels(plain, bits).table())


def test_power_levels_by_the_formula():
    expected = [math.copysign((abs(k) / 3) ** (1 / 0.5), k) for k in (-3, -2, -1, 0, 1, 2, 3, 3)]
    assert torch.allclose(Levels("power", 3, exponent=0.5).table(), torch.tensor(expected), atol=1e-7)


def test_power_of_two_levels():
    assert Levels("power_of_two", 3).table().tolist() == [-1, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5, 1]


def test_integer_families_hold_integers():
    assert Levels("integer", 3).table().tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert Levels("affine", 2).table().tolist() == [0, 1, 2, 3]
    assert Levels("uniform", 3).table().tolist() == [-3, -2, -1, 0, 1, 2, 3, 3]
    assert Levels("uniform_zero_free", 2).table().tolist() == [-3, -1, 1, 3]
    assert Levels("ternary", 2).table().tolist() == [-1, 0, 1, 1]


@every
def test_json_gives_the_same_levels_back(levels):
    assert Levels(bits=levels.bits, **levels.to_json()) == levels


@given(st.sampled_from(ALL), st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=30))
def test_assign_is_the_true_nearest(levels, numbers):
    table = levels.table()
    values = torch.tensor(numbers) * table.abs().max()
    codes = assign(values, table)
    assert codes.dtype == torch.int32
    distances = (values.double()[:, None] - table.double()).abs()
    chosen = distances.gather(1, codes.long()[:, None])[:, 0]
    # Cell borders are float32, so a value on a border may fall to either side, by a rounding error.
    assert (chosen <= distances.min(1).values + 1e-6 * table.abs().max()).all()


def test_ties_go_to_the_lower_level():
    assert assign(torch.tensor([-0.5, 0.5, 1.5]), torch.tensor([-1.0, 0.0, 1.0, 2.0])).tolist() == [0, 1, 2]


def test_a_fitted_table_cannot_be_generated():
    assert Levels("fitted", 4).stored
    with pytest.raises(FormatError, match="stored with its tensor"):
        Levels("fitted", 4).table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "unifrom", "bits": 4}, "unknown level family 'unifrom'. Did you mean 'uniform'"),
        ({"family": "ternary", "bits": 3}, "levels 'ternary' need 2 to 2 bits, got 3"),
        ({"family": "uniform", "bits": 1}, "levels 'uniform' need 2 to 8 bits, got 1"),
        ({"family": "integer", "bits": 9}, "levels 'integer' need 1 to 8 bits, got 9"),
        ({"family": "float", "bits": 2, "mantissa": 0}, "levels 'float' need 3 to 8 bits, got 2"),
        ({"family": "power", "bits": 4}, "levels 'power' and exponent None do not go together"),
        ({"family": "uniform", "bits": 4, "exponent": 0.5}, "levels 'uniform' and exponent 0.5 do not go together"),
        ({"family": "power", "bits": 4, "exponent": 0.0}, "a power exponent must lie in 0.2 .. 4.0, got 0.0"),
        ({"family": "power", "bits": 4, "exponent": math.inf}, "must lie in 0.2 .. 4.0, got inf"),
        ({"family": "power", "bits": 4, "exponent": math.nan}, "must lie in 0.2 .. 4.0, got nan"),
        ({"family": "float", "bits": 4}, "levels 'float' and None mantissa bits do not go together"),
        ({"family": "float", "bits": 4, "mantissa": 3}, "a 4-bit float has 0 to 2 mantissa bits, got 3"),
    ],
)
def test_impossible_levels_are_refused(arguments, message):
    with pytest.raises(BadRequest) as caught:
        Levels(**arguments)
    assert message in str(caught.value)


def test_words_for_levels():
    assert parse_levels("nf") == ("normal_float", None)
    assert parse_levels("e2m1") == ("float", 1)
    assert parse_levels("e3m4", 8) == ("float", 4)
    assert parse_levels("power") == ("power", None)
    with pytest.raises(BadRequest, match=r"unknown level family 'normal_flot'\. Did you mean 'normal_float'"):
        parse_levels("normal_flot")
    with pytest.raises(BadRequest, match=r"levels 'e2m1' are 4 bits wide \(sign, exponent, mantissa\), got bits=8"):
        parse_levels("e2m1", 8)


def test_qlora_is_the_published_table_to_the_bit():
    assert Levels("qlora", 4).table().tolist() == NF4
