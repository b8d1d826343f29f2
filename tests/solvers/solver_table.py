"""The table of solvers under test: one row each, with what the generic laws need to know about it.

A new solver is one more row; a test fails until it has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_lowbit.format import Spec


@dataclass(frozen=True)
class Row:
    """One solver with a choice of settings.

    Attributes:
        method: name of the solver.
        bits: narrowest and widest code it takes.
        settings: further keys of ``Spec``.
        rival: settings of the ``rtn`` this row must not be worse than.
        norm: exponent p of the objective ``mean |w - w_hat| ** p`` under which that holds; infinity is the largest error.
        flat_error: share of a constant group's value that may be lost (0: up to the rounding of its scale).
    """

    method: str
    bits: tuple[int, int]
    settings: dict = field(default_factory=dict)
    rival: dict = field(default_factory=dict)
    norm: float = 2.0
    flat_error: float = 0.0

    @property
    def label(self) -> str:
        return "-".join([self.method, *map(str, self.settings.values())])

    @property
    def widths(self) -> range:
        return range(self.bits[0], self.bits[1] + 1)

    @property
    def cases(self) -> list[int]:
        """The widths that per-width laws are run at: all that differ in kind."""
        return [bits for bits in self.widths if bits in (1, 2, 3, 4, 6, 8)]

    @property
    def usual_bits(self) -> int:
        """Four bits, or the nearest width the solver takes."""
        return min(max(4, self.bits[0]), self.bits[1])

    def spec(self, bits: int | None = None, **changes: object) -> Spec:
        """A spec of this row; fp16 scales in groups of 32 unless changed."""
        values = {"group_size": 32, "scale_bits": 16} | self.settings | changes
        return Spec(method=self.method, bits=bits or self.usual_bits, **values)


ROWS = (
    Row("rtn", (1, 8)),
    Row("rtn", (1, 8), {"levels": "affine"}, rival={"levels": "affine"}),
    Row("rtn", (1, 8), {"levels": "integer"}, rival={"levels": "integer"}),
    Row("search", (1, 8), rival={"levels": "integer"}),
    Row("search", (2, 4), {"levels": "power_of_two"}, rival={"levels": "power_of_two"}),
    Row("nf", (2, 8), rival={"levels": "normal_float"}),
    Row("float", (3, 8), rival={"levels": "float"}),
    Row("halfquad", (1, 8), rival={"levels": "affine"}, norm=0.7),
    Row("powerquant", (1, 8)),
    Row("powerquant", (2, 8), {"levels": "power"}),
    Row("codebook", (1, 8)),
    # The rival of the ternary solvers is the 2-bit symmetric integer, whose levels are -1, 0, 1 too.
    Row("tquant", (2, 2), norm=float("inf"), flat_error=1 / 3),
    Row("mquant", (2, 2)),
    Row("ternary", (2, 2)),
)
