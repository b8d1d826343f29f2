"""The table of transforms under test: one row each. A new transform is one more row; a test fails until it has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import families
import torch

from hf_lowbit import LowBitConfig
from hf_lowbit.transforms import TRANSFORMS

IDS = (torch.arange(24).view(2, 12) * 7) % 240 + 3
WINDOWS = (torch.arange(8 * 32).view(8, 32) * 13) % 240 + 3


@dataclass(frozen=True)
class Row:
    """One transform.

    Attributes:
        name: in the registry.
        families: models of tests/plugin/families.py it has something to do in.
        activations: how they are rounded.
        settings: its own, chosen small.
        exact: whether the function stays; else it changes by little.
    """

    name: str
    families: tuple[str, ...]
    activations: Any = 8
    settings: dict[str, Any] = field(default_factory=dict)
    exact: bool = True

    @property
    def asked(self) -> Any:
        """What a user would write."""
        return {"name": self.name, **self.settings} if self.settings else self.name

    @property
    def config(self) -> LowBitConfig:
        """The transform alone at 8 bits, with calibration where it needs some."""
        data = WINDOWS if TRANSFORMS[self.name].needs in ("inputs", "rounding") else None
        settings = {"activation_bits": self.activations, "calibration": data}
        return LowBitConfig(method="rtn", bits=8, transforms=[self.asked], **settings)


def uneven(family: str) -> Any:
    """A model of a family whose norms and biases are not those of a new one."""
    model = families.make_model(family)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


STATIC = {"bits": 8, "per": "tensor", "static": True}
MOST = ("llama", "llama-tied-172", "phi3", "opt", "gpt2", "mixtral")
ROWS = [
    Row("gamma_migration", MOST),
    Row("smoothquant", ("llama", "qwen2-moe", "opt")),
    Row("awq", ("llama", "gpt2"), settings={"grid": 3}),
    Row("outlier_suppression_plus", ("llama", "opt", "gpt2"), settings={"grid": 3}),
    Row("hadamard", (*MOST, "gemma2", "bloom")),
    Row("resq", ("llama", "qwen2-moe", "gemma2", "opt")),
    Row("qllm", ("llama", "gpt2"), 4, settings={"rank": 2, "steps": 3}, exact=False),
    Row("token_wise_clipping", ("llama",), STATIC),
]
CASES = [(row, family) for row in ROWS for family in row.families]
