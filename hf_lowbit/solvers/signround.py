"""``signround``: a rounding offset per weight learned against the outputs of the block, on any level table.

AutoRound / SignRound (arXiv 2309.05516). The offset moves a weight by at most half a code, so at most one code up or down;
scales are learned along. Starting from error feedback instead of nearest rounding, and levels that are not evenly spaced,
are reconstructed.
"""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.calibrated import GRAM_OPTIONS
from hf_lowbit.solvers.code_space import CodeSpace
from hf_lowbit.solvers.gptq import gptq
from hf_lowbit.solvers.reconstruct import LEARN_OPTIONS
from hf_lowbit.solvers.registry import solver
from hf_lowbit.solvers.relaxation import relaxation
from hf_lowbit.solvers.rows import Rows

# The paper's sign descent is ``optimizer="sign"`` with ``code_rate`` 1 / steps. From codes of error feedback it moves
# as many codes for noise as for gain: at 2 bits 100 steps left the loss of the 4 M reference model's first block
# where it was, while Adam's took 3 % off that of its second.
OPTIONS = {**GRAM_OPTIONS, **LEARN_OPTIONS}


@solver(
    "signround",
    summary="rounding offsets and scales learned by gradient against the outputs of each block",
    evidence="block",
    optional=False,
    options=OPTIONS,
)
def signround(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Tables and scales of the level family, a fitted table unless another is asked for."""
    return gptq(rows, spec)


@relaxation("signround")
class RoundingOffset(CodeSpace):
    """Positions that stay within half a code of where they start."""

    reach = 0.5
