"""``powerquant``: levels spaced by a power law, its exponent and the group scales searched together.

PowerQuant (arXiv 2301.09858): the only continuous maps of the positive reals that keep products are powers, so a whole
family of non-uniform grids is searched through one number. The joint scale search and the zero-free variant are
reconstructed (weights notes 1.1).
"""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.fixed_table import sample_error, search_table
from hf_lowbit.solvers.parallel import in_parallel
from hf_lowbit.solvers.registry import solver
from hf_lowbit.solvers.rows import Rows

RANGE = (0.4, 1.3)
COARSE_POINTS = 10
TOLERANCE = 0.01
GOLDEN = 0.6180339887498949


@solver(
    "powerquant",
    families=("power", "power_zero_free"),
    summary="power-law levels, exponent and scales searched together; no zero level at 3 bits and below",
)
def powerquant(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """The best exponent for the tensor, then searched scales; above 3 bits the better of both variants on a sample."""
    families = [spec.levels] if spec.levels else ["power_zero_free"] if spec.bits <= 3 else ["power_zero_free", "power"]
    fits = [search_exponent(rows, spec.bits, family) for family in families]
    return search_table(rows, spec, min(fits, key=lambda fit: fit[1])[0])


def search_exponent(rows: Rows, bits: int, family: str) -> tuple[Levels, float]:
    """The exponent with the least error on a sample: a coarse grid, then golden-section search to 0.01."""
    errors: dict[float, float] = {}

    def error(exponent: float) -> float:
        exponent = round(exponent, 3)
        if exponent not in errors:
            errors[exponent] = sample_error(rows, Levels(family, bits, exponent=exponent))
        return errors[exponent]

    if bits == 1 or (bits == 2 and family == "power"):
        return Levels(family, bits, exponent=1.0), error(1.0)  # the table is +-1 (and 0) whatever the exponent
    step = (RANGE[1] - RANGE[0]) / (COARSE_POINTS - 1)
    points = [RANGE[0] + step * k for k in range(COARSE_POINTS)]
    centre = points[min(enumerate(in_parallel(error, points)), key=lambda pair: pair[1])[0]]
    low, high = max(RANGE[0], centre - step), min(RANGE[1], centre + step)
    while high - low > TOLERANCE:
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        if error(left) < error(right):
            high = right
        else:
            low = left
    best = min(errors, key=lambda exponent: errors[exponent])
    return Levels(family, bits, exponent=best), errors[best]
