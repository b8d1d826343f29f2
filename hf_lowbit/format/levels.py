"""Level tables: what the codes of a stage stand for.

A family generates its table from a few numbers, so nothing is stored but those numbers; only ``fitted`` tables are kept
as tensors. Tables are sorted ascending. Integer families hold integers, so that a scale equals the usual integer step.

family               levels for ``b`` bits (``K = 2**b``, ``L = 2**(b-1) - 1``)               source
``uniform``          -L .. L, one code unused                                                symmetric integers
``uniform_zero_free`` odd integers -(K-1) .. K-1 (mid-rise)                                  weights notes 0.2
``integer``          -2**(b-1) .. L, meant for scales of either sign                         full two's-complement range
``affine``           0 .. K-1, needs an offset                                               asymmetric integers
``power``            sign(k) * (|k| / L) ** (1/a), k = -L .. L                               PowerQuant, arXiv 2301.09858
``power_zero_free``  +-((k + 1/2) / (K/2 - 1/2)) ** (1/a)                                    reconstructed
``normal_float``     quantiles of N(0, 1), largest 1, holds zero                             QLoRA, arXiv 2305.14314
``qlora``            ``normal_float`` of 4 bits as QLoRA's authors publish it, digit by digit  arXiv 2305.14314, appendix E
``float``            all values of a sign, E-bit exponent, M-bit mantissa format             arXiv 2208.09225
``power_of_two``     +-2**p, p = 0 .. 2**(b-1) - 1, scaled to largest 1                      DenseShift, arXiv 2208.09708
``ternary``          -1, 0, 1 (and 1 again)                                                  arXiv 2306.17442
``fitted``           any table, stored in fp16, one per tensor or per block of rows          JLCM, SqueezeLLM
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, FormatError, unknown_name

FAMILIES = (
    "uniform",
    "uniform_zero_free",
    "integer",
    "affine",
    "power",
    "power_zero_free",
    "normal_float",
    "qlora",
    "float",
    "power_of_two",
    "ternary",
    "fitted",
)
POWER = ("power", "power_zero_free")
SYMMETRIC = ("uniform", "uniform_zero_free", "power", "power_zero_free", "float", "power_of_two", "ternary")
EXPONENT_RANGE = (0.2, 4.0)


@dataclass(frozen=True)
class Levels:
    """One level family with its numbers: ``exponent`` for the power families, ``mantissa`` bits for ``float``."""

    family: str
    bits: int
    exponent: float | None = None
    mantissa: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise BadRequest(unknown_name("level family", self.family, FAMILIES))
        low, high = BITS_OF.get(self.family, (1, 8))
        if not low <= self.bits <= high:
            raise BadRequest(f"levels {self.family!r} need {low} to {high} bits, got {self.bits}.")
        if (self.exponent is not None) != (self.family in POWER):
            raise BadRequest(f"levels {self.family!r} and exponent {self.exponent} do not go together.")
        if self.exponent is not None and not EXPONENT_RANGE[0] <= self.exponent <= EXPONENT_RANGE[1]:
            lowest, highest = EXPONENT_RANGE
            raise BadRequest(f"a power exponent must lie in {lowest} .. {highest}, got {self.exponent}.")
        if (self.mantissa is not None) != (self.family == "float"):
            raise BadRequest(f"levels {self.family!r} and {self.mantissa} mantissa bits do not go together.")
        if self.mantissa is not None and not 0 <= self.mantissa <= self.bits - 2:
            raise BadRequest(f"a {self.bits}-bit float has 0 to {self.bits - 2} mantissa bits, got {self.mantissa}.")

    @property
    def stored(self) -> bool:
        """Whether the table is a tensor of the record rather than generated."""
        return self.family == "fitted"

    @property
    def symmetric(self) -> bool:
        """Whether -level exists for every level, so that the sign of a scale carries no information."""
        return self.family in SYMMETRIC

    def table(self) -> Tensor:
        """The levels as float32 ``[2**bits]``, ascending; computed in float64 and rounded once."""
        if self.stored:
            raise FormatError("a fitted level table is stored with its tensor, it cannot be generated.")
        return _table(self)

    def to_json(self) -> dict:
        """The family and only those numbers it has."""
        out: dict = {"family": self.family}
        if self.exponent is not None:
            out["exponent"] = self.exponent
        if self.mantissa is not None:
            out["mantissa"] = self.mantissa
        return out


BITS_OF = {
    "uniform": (2, 8),
    "power": (2, 8),
    "normal_float": (2, 8),
    "qlora": (4, 4),
    "float": (3, 8),
    "power_of_two": (2, 4),
    "ternary": (2, 2),
}


# Nearest fp32 numbers; quantiles computed in higher precision differ from them by up to 1.8e-7.
_QLORA = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def parse_levels(name: str, bits: int | None = None) -> tuple[str, int | None]:
    """Family and mantissa bits of a user's ``levels`` word; ``e2m1`` and the like mean ``float``.

    Raises:
        BadRequest: no family of that name, with the nearest one offered, or a float format that is not ``bits`` wide.
    """
    short = {"nf": "normal_float"}
    match = re.fullmatch(r"e(\d)m(\d)", name)
    if match:
        width = 1 + int(match[1]) + int(match[2])
        if bits is not None and bits != width:
            raise BadRequest(f"levels {name!r} are {width} bits wide (sign, exponent, mantissa), got bits={bits}.")
        return "float", int(match[2])
    family = short.get(name, name)
    if family not in FAMILIES:
        raise BadRequest(unknown_name("level family", name, [*FAMILIES, "nf", "e2m1"]))
    return family, None


@lru_cache(maxsize=256)
def _table(levels: Levels) -> Tensor:
    with torch.no_grad():
        return _generate(levels).to(torch.float32)


def _generate(levels: Levels) -> Tensor:
    bits, family = levels.bits, levels.family
    count, top = 2**bits, 2 ** (bits - 1) - 1
    codes = torch.arange(count, dtype=torch.float64)
    if family == "affine":
        return codes
    if family == "integer":
        return codes - 2 ** (bits - 1)
    if family == "uniform_zero_free":
        return 2 * codes - (count - 1)
    if family == "uniform":
        return (codes - top).clamp_max(top)
    if family == "ternary":
        return (codes - 1).clamp_max(1)
    if family == "power":
        grid = (codes - top).clamp_max(top)
        return grid.sign() * (grid.abs() / top) ** (1.0 / _exponent(levels))
    if family == "normal_float":
        return _normal_float(bits)
    if family == "qlora":
        return torch.tensor(_QLORA, dtype=torch.float64)
    if family == "float":
        positive = _float_magnitudes(bits, levels.mantissa or 0)
    elif family == "power_of_two":
        positive = 2.0 ** (torch.arange(count // 2, dtype=torch.float64) - (count // 2 - 1))
    else:
        half = torch.arange(count // 2, dtype=torch.float64)
        positive = ((half + 0.5) / (count / 2 - 0.5)) ** (1.0 / _exponent(levels))
    return torch.cat([-positive.flip(0), positive])


def _exponent(levels: Levels) -> float:
    assert levels.exponent is not None
    return levels.exponent


def _normal_float(bits: int) -> Tensor:
    """Quantiles of N(0, 1) at evenly spaced probabilities, 2**(b-1) - 1 below zero, zero, 2**(b-1) above."""
    count = 2**bits
    edge = 1 - (1 / (2 * (count - 1)) + 1 / (2 * count)) / 2
    positive = torch.special.ndtri(torch.linspace(edge, 0.5, count // 2 + 1, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(edge, 0.5, count // 2, dtype=torch.float64)[:-1])
    table = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return table / table.abs().max()


def _float_magnitudes(bits: int, mantissa: int) -> Tensor:
    """Non-negative values of a float format without infinities: subnormals first, bias 1 (a scale absorbs the rest)."""
    exponents = 2 ** (bits - 1 - mantissa)
    fraction = torch.arange(2**mantissa, dtype=torch.float64) / 2**mantissa
    rows = [fraction] + [(1 + fraction) * 2.0 ** (e - 1) for e in range(1, exponents)]
    values = torch.cat(rows)
    # A scale is fp16: beside levels of 2**14 and more it would be subnormal and lose its own digits. Exact, being a power.
    largest = int(torch.frexp(values.max()).exponent)
    return torch.ldexp(values, torch.tensor(-largest, dtype=torch.float64)) if largest > 8 else values


def assign(values: Tensor, table: Tensor) -> Tensor:
    """Codes (int32) of the levels nearest to ``values``; ties go to the lower level.

    Args:
        values: float tensor of any shape, already divided by its scale.
        table: float32 ``[K]``, ascending.
    """
    return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2, out_int32=True)
