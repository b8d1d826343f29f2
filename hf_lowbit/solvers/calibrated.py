"""From fitted tables and scales to codes that fit the calibration inputs: the road every calibrated solver takes.

With ``X0`` the inputs in the original model and ``X`` those behind the quantized prefix, the layer's error on the original
outputs is ``|W X0 - W_hat X|^2 = tr((W* - W_hat) H (W* - W_hat)^T) + constant``, where ``H = X X^T`` and
``W* = W X0 X^T H^-1``. So everything is solved for ``W*`` instead of ``W`` (asymmetric calibration, arXiv 2504.02692; the
closed form is ours). On the 4 M reference model this lowers KL by a fifth at 3 and 4 bits and by a quarter at 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.spec import Spec
from hf_lowbit.solvers.coding import Coding
from hf_lowbit.solvers.descent import descend, objective
from hf_lowbit.solvers.feedback import Factor, factor, feed_back
from hf_lowbit.solvers.parallel import all_threads
from hf_lowbit.solvers.registry import Solver
from hf_lowbit.solvers.statistics import Statistics

# Rows that tell whether error feedback helped, and how large the layer's output is: three products with the whole Gram
# matrix, of every row, would cost as much as a sweep.
SAMPLE_ROWS = 256
# Settings that every solver on Gram matrices has.
GRAM_OPTIONS: dict[str, Any] = {"damping": 0.01, "order": "activation", "target": "original", "sweeps": 3}


class Calibrated:
    """The calibrated solve of one matrix or stack; made once, used for each additive term.

    Args:
        entry: the solver, for its options.
        statistics: one entry per matrix of the stack.

    Attributes:
        notes: what the report says: ``damping``, ``precision``, ``fallback`` (what was done instead, and why) and ``error``
            (what is left of the layer's output, as a share of its energy).
    """

    def __init__(self, entry: Solver, spec: Spec, statistics: Sequence[Statistics]) -> None:
        self.entry, self.spec, self.statistics = entry, spec, statistics
        self._only: Factor | None = None
        self.notes: dict[str, Any] = {}
        self.energy = 0.0

    def targets(self, weight: Tensor) -> Tensor:
        """Factorize, and return what the codes should stand for: float32, the shape of ``weight`` ``[rows, in]``."""
        out = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        each = len(weight) // len(self.statistics)
        for number, found in enumerate(self.statistics):
            made = self._factor(number)
            if made is None:
                self.notes["fallback"] = "nearest rounding: the inputs were zero or their Gram matrix cannot be factorized"
                continue
            self.notes["damping"] = max(self.notes.get("damping", 0.0), made.damping)
            self.notes["precision"] = max(self.notes.get("precision", ""), made.precision)
            if found.cross is not None and self.option("target") == "original":
                rows = out[number * each : (number + 1) * each]
                ridge = made.damping * float(found.gram.diagonal().mean())
                with all_threads():
                    right = rows @ found.cross
                    right += ridge * rows
                    rows.copy_(made.divide(right))
        return out

    def recode(self, stage: Stage, fields: dict[str, Tensor], target: Tensor, excluded: Tensor | None) -> Tensor:
        """Choose the codes of one term anew under the Gram matrices, in place in ``fields``.

        Args:
            target: float32 ``[rows, in]`` relative to ``2**shift``.
            excluded: flat indices of outliers.

        Returns:
            ``target`` with the values outliers should have in place of theirs.
        """
        each = len(target) // len(self.statistics)
        wanted = target if excluded is None else target.clone()
        left, first = 0.0, not self.energy
        for number in range(len(self.statistics)):
            made = self._factor(number)
            if made is None:
                continue
            start, stop = number * each, (number + 1) * each
            part = target[start:stop]
            coding = Coding.read(stage, fields, target.shape[1], start, stop, number)
            if excluded is not None:
                coding.free, coding.held = _free(excluded, start, stop, target.shape[1]), part.clone()
            few, picked = coding.sample(SAMPLE_ROWS)
            nearest, before = objective(few, part[picked], made.gram), coding.codes.clone()
            feed_back(coding, part, made)
            if objective(coding.sample(SAMPLE_ROWS)[0], part[picked], made.gram) > nearest:
                coding.codes.copy_(before)  # a very coarse grid can make feedback run away
                coding.held = None if excluded is None else part.clone()
            left += descend(coding, part, made.gram, self.option("sweeps"))[1]
            if first:
                through = part[picked] @ made.gram
                self.energy += float((through * part[picked]).sum(dtype=torch.float64)) * len(part) / len(picked)
            coding.write(fields, start, stop, number)
            if coding.held is not None and coding.free is not None:
                wanted[start:stop] = torch.where(coding.free, coding.held, part)
        if self.energy > 0:
            self.notes["error"] = left / self.energy
        return wanted

    def _factor(self, number: int) -> Factor | None:
        """The factor of one matrix; kept for a plain one, made anew for those of a stack, which would fill the memory."""
        if self._only is None:
            made = factor(self.statistics[number].gram, self.option("damping"), self.option("order"))
            if len(self.statistics) > 1:
                return made
            self._only = made
        return self._only

    def option(self, name: str) -> Any:
        """A setting of the solver."""
        return self.entry.option(self.spec, name)


def _free(excluded: Tensor, start: int, stop: int, in_features: int) -> Tensor:
    """Mask bool ``[stop - start, in]`` of the outliers of some rows."""
    mask = torch.zeros((stop - start) * in_features, dtype=torch.bool)
    low, high = torch.searchsorted(excluded, torch.tensor([start * in_features, stop * in_features])).tolist()
    mask[excluded[low:high] - start * in_features] = True
    return mask.view(-1, in_features)
