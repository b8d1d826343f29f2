"""``gptq``: error feedback, then coordinate descent, over any level table.

GPTQ (Frantar et al., arXiv 2210.17323) with static groups and act-order. Tables and scales are first fitted to the weights
under the diagonal of the Gram matrix by the data-free solver of the level family; ``hf_lowbit.solvers.calibrated`` does the
rest. With ``levels="affine"`` and the options ``target="own", sweeps=0`` it is the field's plain GPTQ.
"""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.calibrated import GRAM_OPTIONS
from hf_lowbit.solvers.registry import SOLVERS, solver, without_data
from hf_lowbit.solvers.rows import Rows


@solver(
    "gptq",
    summary="codes by error feedback and coordinate descent under the Gram matrix of the inputs, any level table",
    evidence="gram",
    optional=False,
    options=GRAM_OPTIONS,
)
def gptq(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Tables and scales of the level family, a fitted table unless another is asked for."""
    plain = without_data(spec)
    return SOLVERS[plain.method].solve(rows, plain)
