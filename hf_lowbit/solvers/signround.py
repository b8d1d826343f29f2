"""``signround``: a rounding offset per weight learned by the signs of its gradients, on any level table.

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

OPTIONS = {**GRAM_OPTIONS, **LEARN_OPTIONS, "optimizer": "sign", "code_rate": 5e-3, "scale_rate": 5e-4, "table_rate": 1e-3}


@solver(
    "signround",
    summary="rounding offsets and scales learned by signed gradients against the outputs of each block",
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
