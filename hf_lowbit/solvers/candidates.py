"""A logit for each of the levels nearest to a weight: the variable of JLCM and of GSQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.solvers.code_space import start_in_cells
from hf_lowbit.solvers.coding import Coding
from hf_lowbit.solvers.relaxation import ParameterGroup, Relaxation

# Levels a weight can move to, its own among them (GSQ, arXiv 2604.18556); memory goes with it.
CANDIDATES = 5
# What logits are multiplied by, from the first step to the last: GSQ's logits of 0.01 * 6 / 2 squared distances, times 100
# to 500, over temperatures 2 to 0.05. At the end nothing is left of the mixture but weights within 0.005 of a border.
SHARPNESS = (3.0, 600.0)


def sharpness(progress: float) -> float:
    """Factor of the logits after a share ``progress`` of the steps."""
    return SHARPNESS[0] * (SHARPNESS[1] / SHARPNESS[0]) ** progress


class Candidates(Relaxation):
    """Logits over up to five consecutive levels around the starting code of each weight.

    Attributes:
        low: int64 ``[n, in]``, the first of them.
        logits: float32 leaf ``[n, in, candidates]``, minus half the squared distance in codes at the start.
    """

    shared = False

    def __init__(self, coding: Coding, weight: Tensor, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(coding, weight, options, seed)
        count = min(CANDIDATES, coding.tables.shape[1])
        self.low = (coding.codes - count // 2).clamp_(0, coding.tables.shape[1] - count)
        distance = self.low[..., None] + torch.arange(count) - start_in_cells(coding, weight)[..., None]
        self.logits = (-0.5 * distance.square_()).requires_grad_()

    def codes(self) -> Tensor:
        """Codes of the largest logits, int64 ``[n, in]``."""
        return self.low + self.logits.detach().argmax(-1)

    def code_groups(self) -> list[ParameterGroup]:
        """The logits."""
        return [ParameterGroup([self.logits], self.options["code_rate"], self.shared)]
