"""``reconstruct``: the codes, scales and tables of a whole decoder block learned against the block's original outputs.

One loop for every method that learns codes by gradient (weights notes 0.4 C): NUPES, JLCM, SignRound and GSQ bring only
their :class:`~hf_lowbit.solvers.relaxation.Relaxation`. What may be chosen, and which choices matter, follows
"Gradient-Based Post-Training Quantization: Challenging the Status Quo" (arXiv 2308.07662); input mixing is QDrop's
(arXiv 2203.05740). Some sequences are kept out of the steps, and the state that serves those best is what is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.format.spec import Spec
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.solvers.coding import Coding
from hf_lowbit.solvers.optimizers import Optimizer
from hf_lowbit.solvers.registry import SOLVERS
from hf_lowbit.solvers.relaxation import RELAXATIONS

# Settings that every method on whole blocks has. `batch` is sequences per step; rates are per step, of codes in codes, of
# scales relative to themselves, of tables in gaps between levels.
LEARN_OPTIONS: dict[str, Any] = {
    "steps": 100,
    "batch": 4,
    "code_rate": 0.01,
    "scale_rate": 0.001,
    "table_rate": 0.001,
    "loss": "mse",
    "optimizer": "adam",
    "mixing": 0.0,
    "learn": "all",
}
# One sequence in this many is kept out of the steps, to choose the state that is kept by.
HELD_OUT = 8
EVALUATIONS = 4

# (hidden float32 [b, T, D], dense weights by name) -> outputs of the block
Run = Callable[[Tensor, dict[str, Tensor]], Tensor]
# (steps done, steps in all, loss of the step)
Progress = Callable[[int, int, float], None]


@dataclass
class Matrix:
    """One weight of a block.

    Attributes:
        weight: the original, float ``[out, in]`` or ``[experts, out, in]``.
        spec: what was asked for; a method without a relaxation keeps ``tensor`` as it is.
        tensor: the starting point, replaced by what was learned.
    """

    weight: Tensor
    spec: Spec
    tensor: LowBitTensor


def reconstruct(
    matrices: dict[str, Matrix],
    run: Run,
    inputs: Tensor,
    originals: Tensor,
    targets: Tensor,
    options: Mapping[str, Any],
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Learn the low-bit weights of one block; ``matrices`` receive the result.

    The loss never ends above the one it starts at: it is taken of what would be stored, at the start and at intervals.

    Args:
        matrices: by the names ``run`` knows them by.
        run: the block with given dense weights (float32, the shapes of the originals), differentiable in them.
        inputs: float32 ``[N, T, D]``, hidden states behind the quantized prefix.
        originals: float32 ``[N, T, D]``, the same of the original model.
        targets: float32, what the original block makes of ``originals``.
        options: settings of the method; those of ``LEARN_OPTIONS`` at least.
        seed: of batches, mixing and noise.
        progress: called after each step.

    Returns:
        ``loss_before`` and ``loss_after`` (share of the targets' energy), ``steps``, ``kept_step``, ``held_out`` (sequences)
        and ``seconds``.
    """
    started = time.monotonic()
    settings = {**LEARN_OPTIONS, **options}
    learners = {name: _Learner(matrix, seed + number) for number, (name, matrix) in enumerate(matrices.items())}
    kept_out = len(inputs) // HELD_OUT
    training = len(inputs) - kept_out
    measured = slice(training, None) if kept_out else slice(None)
    objective = _Objective(targets, settings["loss"])
    batch, steps = max(1, min(int(settings["batch"]), training)), int(settings["steps"])

    @torch.no_grad()
    def evaluate() -> float:
        weights = {name: matrix.tensor.dequantize() for name, matrix in hardened.items()}
        total = 0.0
        xs, ys = inputs[measured], targets[measured]
        for start in range(0, len(xs), batch):
            part = xs[start : start + batch]
            total += float(objective(run(part, weights), ys[start : start + batch])) * len(part)
        return total / len(xs)

    hardened = {name: replace(matrix) for name, matrix in matrices.items()}
    before = least = evaluate()
    kept_step = 0
    groups = [group for learner in learners.values() for group in learner.groups()]
    optimizer = Optimizer(groups, settings["optimizer"])
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps if groups else 0):
        if len(order) < batch:
            order = torch.randperm(training, generator=generator)
        picked, order = order[:batch], order[batch:]
        hidden = _mix(inputs[picked], originals[picked], settings["mixing"], generator)
        with torch.enable_grad():
            weights = {name: learner.weight(step / steps) for name, learner in learners.items()}
            loss = objective(run(hidden, weights), targets[picked])
            loss.backward()
        optimizer.step(step / steps)
        for learner in learners.values():
            learner.project()
        if progress is not None:
            progress(step + 1, steps, float(loss.detach()))
        if (step + 1) * EVALUATIONS // steps > step * EVALUATIONS // steps:
            for name, learner in learners.items():
                hardened[name].tensor = learner.harden()
            now = evaluate()
            if now < least:
                least, kept_step = now, step + 1
                for name, matrix in matrices.items():
                    matrix.tensor = hardened[name].tensor
    return {
        "loss_before": before,
        "loss_after": least,
        "steps": steps if groups else 0,
        "kept_step": kept_step,
        "held_out": kept_out,
        "seconds": time.monotonic() - started,
    }


class _Learner:
    """A matrix and the relaxation of its first term; further terms and outliers stay as they are."""

    def __init__(self, matrix: Matrix, seed: int) -> None:
        tensor = matrix.tensor
        self.tensor, layout = tensor, tensor.layout
        self.relaxation = None
        stage = layout.stages[0]
        self.rest: Tensor | None = tensor.dequantize()
        factory = RELAXATIONS.get(matrix.spec.method)
        if factory is None or layout.permuted or stage.rows is not None:
            return
        coding = Coding.read(stage, tensor.stage_tensors(0), layout.in_features, 0, layout.rows)
        weight = torch.ldexp(matrix.weight.detach().float(), torch.tensor(-layout.shift)).view(layout.rows, -1)
        others = len(layout.stages) > 1 or layout.outliers or layout.rank
        self.rest = self.rest - self._dense(coding.dequantize()) if others else None
        settings = {**LEARN_OPTIONS, **SOLVERS[matrix.spec.method].options, **matrix.spec.options}
        self.relaxation = factory(coding, weight, settings, seed)

    def groups(self) -> list:
        return [] if self.relaxation is None else self.relaxation.parameter_groups()

    def project(self) -> None:
        if self.relaxation is not None:
            self.relaxation.project()

    def weight(self, progress: float) -> Tensor:
        """Dense weight in the shape of the original, differentiable."""
        if self.relaxation is None:
            assert self.rest is not None
            return self.rest
        dense = self._dense(self.relaxation.weight(progress))
        return dense if self.rest is None else dense + self.rest

    def harden(self) -> LowBitTensor:
        """What would be stored now."""
        if self.relaxation is None:
            return self.tensor
        coding, layout = self.relaxation.harden(), self.tensor.layout
        fields = {name: tensor.clone() for name, tensor in self.tensor.stage_tensors(0).items()}
        coding.write(fields, 0, layout.rows)
        layout = replace(layout, stages=(coding.stage, *layout.stages[1:]))
        return LowBitTensor(layout, {**self.tensor.tensors, **fields})

    def _dense(self, values: Tensor) -> Tensor:
        layout = self.tensor.layout
        return (values * 2.0**layout.shift).view(layout.shape)


class _Objective:
    """The loss between outputs and targets ``[b, T, D]``, as a share of the targets' energy."""

    def __init__(self, targets: Tensor, kind: str) -> None:
        self.kind = kind
        energy = targets.square().flatten(0, -2).mean(0)
        self.weight = 1 / energy.clamp_min(1e-12) if kind == "weighted" else 1 / energy.mean().clamp_min(1e-30)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = ((outputs.float() - targets).square() * self.weight).mean()
        if self.kind == "cosine":
            loss = loss + (1 - torch.nn.functional.cosine_similarity(outputs.float(), targets, dim=-1)).mean()
        return loss


def _mix(inputs: Tensor, originals: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """``inputs`` with each element the original's with probability ``share``."""
    if not share:
        return inputs
    return torch.where(torch.rand(inputs.shape, generator=generator) < share, originals, inputs)
