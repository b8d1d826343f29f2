"""Solver names: what each is, what it accepts, and what of calibration it uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import BITS_OF, FAMILIES, parse_levels
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.rows import Rows
from hf_lowbit.solvers.statistics import Statistics

StageSolver = Callable[[Rows, Spec], tuple[Stage, dict[str, Tensor]]]
# (weight [rows, in], spec, statistics) -> sorted flat indices (int64) of the weights kept beside the codes.
OutlierRule = Callable[[Tensor, Spec, Sequence[Statistics]], Tensor]
# What a solver draws from calibration: nothing; the Gram matrix of the inputs; the Fisher diagonal of the weights; or
# first the Gram matrix of each input and then the outputs of the whole block, against which codes are learned.
Evidence = Literal["none", "gram", "fisher", "block"]


@dataclass(frozen=True)
class Solver:
    """One entry of the table.

    Attributes:
        name: what users write.
        solve: fits tables, scales and codes of one additive term to the weights alone.
        families: level families it takes.
        bits: narrowest and widest code.
        summary: one line for users.
        evidence: what it draws from calibration.
        optional: whether it works without calibration too.
        options: names and defaults of its own settings.
        outliers: how it chooses them; None takes the largest magnitudes.
    """

    name: str
    solve: StageSolver
    families: tuple[str, ...]
    bits: tuple[int, int]
    summary: str
    evidence: Evidence = "none"
    optional: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    outliers: OutlierRule | None = None

    def check(self, spec: Spec) -> None:
        """Refuse a spec this solver cannot serve.

        Raises:
            BadRequest: a width or level family it does not take.
        """
        low, high = self.bits
        if not low <= spec.bits <= high:
            raise BadRequest(f"method {self.name!r} works at {low} to {high} bits, got bits={spec.bits}.")
        check_options(self.name, self.options, spec.options)
        if spec.levels is None:
            return
        family, _ = parse_levels(spec.levels)
        if family not in self.families:
            raise BadRequest(f"method {self.name!r} takes levels {', '.join(self.families)}, got {spec.levels!r}.")
        low, high = BITS_OF.get(family, (1, 8))
        if not low <= spec.bits <= high:
            raise BadRequest(f"levels {spec.levels!r} need {low} to {high} bits, got bits={spec.bits}.")

    def option(self, spec: Spec, name: str) -> Any:
        """The value of one of this solver's own settings."""
        return spec.options.get(name, self.options[name])


SOLVERS: dict[str, Solver] = {}


def solver(
    name: str,
    *,
    families: tuple[str, ...] = FAMILIES,
    bits: tuple[int, int] = (1, 8),
    summary: str,
    evidence: Evidence = "none",
    optional: bool = True,
    options: Mapping[str, Any] = MappingProxyType({}),
    outliers: OutlierRule | None = None,
) -> Callable[[StageSolver], StageSolver]:
    """Register the decorated function as solver ``name``."""

    def register(solve: StageSolver) -> StageSolver:
        if name in SOLVERS:
            raise ValueError(f"solver {name!r} is registered twice")
        SOLVERS[name] = Solver(name, solve, families, bits, summary, evidence, optional, options, outliers)
        return solve

    return register


def get_solver(spec: Spec) -> Solver:
    """The solver a spec names, checked against the rest of the spec.

    Raises:
        BadRequest: an unknown method, or a spec it cannot serve.
    """
    if spec.method not in SOLVERS:
        raise BadRequest(unknown_name("method", spec.method, SOLVERS))
    SOLVERS[spec.method].check(spec)
    return SOLVERS[spec.method]


def without_data(spec: Spec) -> Spec:
    """What to ask for where a method has no calibration data: itself if it can do without, else the data-free fit."""
    if SOLVERS[spec.method].optional:
        return spec
    method = FITTER[parse_levels(spec.levels or "fitted")[0]]
    return replace(spec, method=method, options={})


# The data-free solver that fits tables and scales of a level family best.
FITTER = {
    "fitted": "codebook",
    "power": "powerquant",
    "power_zero_free": "powerquant",
    "normal_float": "nf",
    "qlora": "rtn",
    "float": "float",
    "affine": "rtn",
    "ternary": "ternary",
    "uniform": "search",
    "uniform_zero_free": "search",
    "integer": "search",
    "power_of_two": "search",
}


def check_options(method: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse options a method does not have, or values of another kind than its default or outside its choices.

    Raises:
        BadRequest: naming the option, what was found and what it takes.
    """
    for name, value in given.items():
        if name not in known:
            raise BadRequest(unknown_name(f"option of method {method!r}", name, known) if known else
                             f"method {method!r} has no options, got {name!r}.")  # fmt: skip
        default = known[name]
        if isinstance(default, str):
            if value not in CHOICES[name]:
                raise BadRequest(unknown_name(f"value of option {name!r}:", value, CHOICES[name]))
        elif isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, (int, float)):
            raise BadRequest(f"option {name!r} takes a value like {default!r}, got {value!r}.")
        elif isinstance(default, int) and not float(value).is_integer():
            raise BadRequest(f"option {name!r} takes a whole number, got {value!r}.")
        elif value < 0:
            raise BadRequest(f"option {name!r} cannot be negative, got {value!r}.")


# What options whose value is a word may say.
CHOICES: dict[str, tuple[str, ...]] = {
    "order": ("activation", "given"),
    "target": ("original", "own"),
    "loss": ("mse", "weighted", "cosine"),
    "optimizer": ("adam", "sign", "lion"),
    "learn": ("codes", "codes_scales", "all"),
    "source": ("gptq", "awq", "bitsandbytes", "compressed-tensors"),
}
