"""The table of solvers under test: one row each, with what the generic laws need to know about it.

A new solver is one more row; a test fails until it has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_lowbit.format import LowBitTensor, Spec
from hf_lowbit.solvers import SOLVERS, Statistics, solve


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
        weighs: whether the importance of input channels moves its tables, scales or codes.
        largest_apart: whether the outliers it keeps are the largest magnitudes.
        bends: how many times the error of the other groups may be with one huge outlier, which bends what is fitted to the
            whole matrix (an exponent, a table) towards it.
        alike: whether it starts from the stage of another row's solver, so that one width shows all.
    """

    method: str
    bits: tuple[int, int]
    settings: dict = field(default_factory=dict)
    rival: dict = field(default_factory=dict)
    norm: float = 2.0
    flat_error: float = 0.0
    weighs: bool = True
    largest_apart: bool = True
    bends: float = 1.2
    alike: bool = False

    @property
    def label(self) -> str:
        return "-".join([self.method, *map(str, self.settings.values())])

    @property
    def widths(self) -> range:
        return range(self.bits[0], self.bits[1] + 1)

    @property
    def cases(self) -> list[int]:
        """The widths that per-width laws are run at: all that differ in kind; wide codes on Gram matrices take seconds."""
        kinds = (self.usual_bits,) if self.alike else (1, 2, 4) if self.factorizes else (1, 2, 3, 4, 6, 8)
        return [bits for bits in self.widths if bits in kinds]

    @property
    def factorizes(self) -> bool:
        """Whether a solve factorizes a Gram matrix, whose rounding depends on the number of threads."""
        return SOLVERS[self.method].evidence in ("gram", "block") and not SOLVERS[self.method].optional

    @property
    def usual_bits(self) -> int:
        """Four bits, or the nearest width the solver takes."""
        return min(max(4, self.bits[0]), self.bits[1])

    def spec(self, bits: int | None = None, **changes: object) -> Spec:
        """A spec of this row; fp16 scales in groups of 32 unless changed."""
        values = {"group_size": 32, "scale_bits": 16} | self.settings | changes
        return Spec(method=self.method, bits=bits or self.usual_bits, **values)

    def solve(
        self, weight: torch.Tensor, spec: Spec, importance: torch.Tensor | None = None, white: bool = True
    ) -> LowBitTensor:
        """``solve``, with made-up calibration for solvers that cannot do without.

        Args:
            importance: mean squared input per channel; None is all ones.
            white: whether input channels are uncorrelated and weights equally sensitive but for ``importance``. What
                calibrated solvers minimise is then the weighted squared error of every other solver.
        """
        if SOLVERS[self.method].optional:
            return solve(weight, spec, importance)
        matrices = weight.shape[0] if weight.dim() == 3 else 1
        return solve(weight, spec, statistics=[made_up(weight, importance, white, seed) for seed in range(matrices)])


def made_up(weight: torch.Tensor, importance: torch.Tensor | None, white: bool, seed: int) -> Statistics:
    """Statistics for one matrix of the shape of ``weight``'s last two axes; coloured ones are not of full rank."""
    rows, size = weight.shape[-2:]
    each = torch.ones(size) if importance is None else importance
    if white:
        return Statistics(1000, each.diag(), torch.zeros(size), each.sqrt() * 3, sensitivity=each.repeat(rows, 1))
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size // 2 + 1, size, generator=random) + torch.randn(size // 2 + 1, 1, generator=random)
    inputs *= each.sqrt()
    gram = inputs.T @ inputs / len(inputs)
    other = (inputs + 0.1 * torch.randn(inputs.shape, generator=random)).T @ inputs / len(inputs)
    sensitivity = torch.randn(rows, size, generator=random).square() * each
    return Statistics(len(inputs), gram, inputs.mean(0), inputs.abs().amax(0), cross=other, sensitivity=sensitivity)


ROWS = (
    Row("rtn", (1, 8), weighs=False),
    Row("rtn", (1, 8), {"levels": "affine"}, rival={"levels": "affine"}, weighs=False),
    Row("rtn", (1, 8), {"levels": "integer"}, rival={"levels": "integer"}, weighs=False),
    Row("search", (1, 8), rival={"levels": "integer"}),
    Row("search", (2, 4), {"levels": "power_of_two"}, rival={"levels": "power_of_two"}),
    Row("nf", (2, 8), rival={"levels": "normal_float"}),
    Row("float", (3, 8), rival={"levels": "float"}),
    Row("halfquad", (1, 8), rival={"levels": "affine"}, norm=0.7, weighs=False),
    Row("powerquant", (1, 8)),
    Row("powerquant", (2, 8), {"levels": "power"}),
    Row("codebook", (1, 8)),
    # The rival of the ternary solvers is the 2-bit symmetric integer, whose levels are -1, 0, 1 too.
    Row("tquant", (2, 2), norm=float("inf"), flat_error=1 / 3, weighs=False),
    Row("mquant", (2, 2), weighs=False),
    Row("ternary", (2, 2)),
    Row("gptq", (1, 8)),
    Row("gptq", (1, 8), {"levels": "affine"}, rival={"levels": "affine"}),
    # Without the choice of levels with a zero, a group of one huge weight is stored best by the smallest exponent.
    Row("gptq", (1, 8), {"levels": "power_zero_free"}, bends=2.0),
    Row("squeezellm", (1, 8), largest_apart=False),
    # What these start to learn from; learning is tested in test_reconstruct.py.
    Row("nupes", (1, 8), alike=True),
    Row("jlcm", (1, 8)),
    Row("signround", (1, 8), alike=True),
    Row("gumbel", (1, 8), alike=True),
)
