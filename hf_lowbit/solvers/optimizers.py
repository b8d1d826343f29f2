"""Adam, sign descent and Lion over parameter groups that each have their own rate, decaying to zero.

Own code, since ``torch.optim`` imports the compiler (1 s), and since Adam has to work on gradients of 1e-12: the loss is a
share of the output's energy, spread over all weights of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowbit.solvers.relaxation import ParameterGroup

OPTIMIZERS = ("adam", "sign", "lion")
ADAM_BETAS = (0.9, 0.99)
LION_BETAS = (0.9, 0.95)
TINY = 1e-30


class Optimizer:
    """Moves the parameters of ``groups`` along their gradients.

    Args:
        groups: what to move and how fast.
        rule: ``adam`` (arXiv 1412.6980); ``sign`` (SignSGD as in AutoRound, arXiv 2309.05516), whose rate falls linearly; or
            ``lion`` (arXiv 2302.06675). The rates of ``adam`` and ``lion`` fall as a cosine.
    """

    def __init__(self, groups: Sequence[ParameterGroup], rule: str) -> None:
        self.groups, self.rule = groups, rule
        self.first = [[torch.zeros_like(p) for p in group.parameters] for group in groups if rule != "sign"]
        self.second = [
            [torch.zeros_like(p[..., :1] if group.shared else p) for p in group.parameters]
            for group in groups
            if rule == "adam"
        ]
        self.steps = 0

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """One step with the gradients found, which are dropped; ``progress`` is the share of the steps done."""
        self.steps += 1
        decay = 1 - progress if self.rule == "sign" else 0.5 + 0.5 * math.cos(math.pi * progress)
        for number, group in enumerate(self.groups):
            for place, parameter in enumerate(group.parameters):
                if parameter.grad is None:
                    continue
                parameter -= group.rate * decay * self._direction(parameter.grad, number, place, group.shared)
                parameter.grad = None

    def _direction(self, grad: Tensor, number: int, place: int, shared: bool) -> Tensor:
        if self.rule == "sign":
            return grad.sign()
        first = self.first[number][place]
        if self.rule == "lion":
            direction = torch.lerp(grad, first, LION_BETAS[0]).sign_()
            first.lerp_(grad, 1 - LION_BETAS[1])
            return direction
        second = self.second[number][place]
        square = grad.square()
        first.lerp_(grad, 1 - ADAM_BETAS[0])
        second.lerp_(square.mean(-1, keepdim=True) if shared else square, 1 - ADAM_BETAS[1])
        share_first, share_second = (1 - beta**self.steps for beta in ADAM_BETAS)
        return first / share_first / (second / share_second).add_(TINY).sqrt_()
