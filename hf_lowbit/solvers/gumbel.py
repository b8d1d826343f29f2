"""``gumbel``: codes as a softmax over the nearest levels that hardens while it is learned, with Gumbel noise on request.

GSQ (arXiv 2604.18556): logits start at the codes of error feedback, Gumbel noise explores, the temperature falls and the
logits' scale rises until one level is left. Up to five candidate levels per weight; group scales are learned along.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.calibrated import GRAM_OPTIONS
from hf_lowbit.solvers.candidates import Candidates, sharpness
from hf_lowbit.solvers.code_space import Mixture
from hf_lowbit.solvers.gptq import gptq
from hf_lowbit.solvers.reconstruct import LEARN_OPTIONS
from hf_lowbit.solvers.registry import solver
from hf_lowbit.solvers.relaxation import relaxation
from hf_lowbit.solvers.rows import Rows

TEMPERATURE = (2.0, 0.05)
# Without noise 100 steps take KL at 2 bits from 0.089 to 0.073 on the 4 M reference model. The paper draws noise over
# thousands of steps, which is ``noise=1``: in 100 steps that gained nothing over the start (eval/README.md).
OPTIONS = {**GRAM_OPTIONS, **LEARN_OPTIONS, "noise": 0.0}


@solver(
    "gumbel",
    summary="codes of a hardening softmax over the nearest levels, learned against the outputs of each block",
    evidence="block",
    optional=False,
    options=OPTIONS,
)
def gumbel(rows: Rows, spec: Spec) -> tuple[Stage, dict[str, Tensor]]:
    """Tables and scales of the level family, a fitted table unless another is asked for."""
    return gptq(rows, spec)


def temperature(progress: float) -> float:
    """Temperature of the Gumbel softmax after a share ``progress`` of the steps."""
    return TEMPERATURE[0] * (TEMPERATURE[1] / TEMPERATURE[0]) ** progress


@relaxation("gumbel")
class GumbelCodes(Candidates):
    """Candidates mixed by a Gumbel softmax."""

    def levels(self, tables: Tensor, progress: float) -> Tensor:
        """Mixtures of levels, float32 ``[n, in]``."""
        logits = self.logits * sharpness(progress)
        if self.options["noise"]:
            # A Gumbel variable is minus the log of an exponential one; it cools as the temperature does.
            noise = torch.empty_like(logits).exponential_(generator=self.generator).log_()
            logits = logits - self.options["noise"] / temperature(progress) * noise
        mixed: Tensor = Mixture.apply(tables, logits.softmax(-1), self.low, self.coding.ids)
        return mixed
