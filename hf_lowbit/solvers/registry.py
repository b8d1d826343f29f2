"""Solver names: what each is, which level families it takes, and those that a later release brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import BITS_OF, FAMILIES, parse_levels
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.rows import Rows

StageSolver = Callable[[Rows, Spec], tuple[Stage, dict[str, Tensor]]]

# Names the design fixes whose solvers need calibration data; they are refused until their pipeline exists.
CALIBRATED = ("nupes", "jlcm", "gptq", "squeezellm")


@dataclass(frozen=True)
class Solver:
    """One entry of the table: the function that solves one additive term, and what it accepts."""

    name: str
    solve: StageSolver
    families: tuple[str, ...]
    bits: tuple[int, int]
    summary: str

    def check(self, spec: Spec) -> None:
        """Refuse a spec this solver cannot serve.

        Raises:
            BadRequest: a width or level family it does not take.
        """
        low, high = self.bits
        if not low <= spec.bits <= high:
            raise BadRequest(f"method {self.name!r} works at {low} to {high} bits, got bits={spec.bits}.")
        if spec.levels is None:
            return
        family, _ = parse_levels(spec.levels)
        if family not in self.families:
            raise BadRequest(f"method {self.name!r} takes levels {', '.join(self.families)}, got {spec.levels!r}.")
        low, high = BITS_OF.get(family, (1, 8))
        if not low <= spec.bits <= high:
            raise BadRequest(f"levels {spec.levels!r} need {low} to {high} bits, got bits={spec.bits}.")


SOLVERS: dict[str, Solver] = {}


def solver(
    name: str, *, families: tuple[str, ...] = FAMILIES, bits: tuple[int, int] = (1, 8), summary: str
) -> Callable[[StageSolver], StageSolver]:
    """Register the decorated function as solver ``name``."""

    def register(solve: StageSolver) -> StageSolver:
        if name in SOLVERS:
            raise ValueError(f"solver {name!r} is registered twice")
        SOLVERS[name] = Solver(name, solve, families, bits, summary)
        return solve

    return register


def get_solver(spec: Spec) -> Solver:
    """The solver a spec names, checked against the rest of the spec.

    Raises:
        BadRequest: an unknown or not yet available method, or a spec it cannot serve.
    """
    if spec.method in CALIBRATED:
        raise BadRequest(
            f"method {spec.method!r} fits codes to calibration data, which this release cannot do yet. "
            f"Data-free methods: {', '.join(sorted(SOLVERS))}."
        )
    if spec.method not in SOLVERS:
        raise BadRequest(unknown_name("method", spec.method, SOLVERS))
    SOLVERS[spec.method].check(spec)
    return SOLVERS[spec.method]
