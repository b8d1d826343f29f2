"""Codings to try the calibrated solvers on: fields as a data-free solver leaves them, and the reading of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowbit.format import Layout, LowBitTensor, Spec
from hf_lowbit.format.layout import Stage
from hf_lowbit.format.scales import from_f16_bits, to_f16_bits
from hf_lowbit.solvers import SOLVERS, without_data
from hf_lowbit.solvers.coding import Coding
from hf_lowbit.solvers.rows import Rows

# Settings of gptq that differ in kind: fitted, generated and affine tables; fp16 and coded scales.
KINDS = {
    "fitted": {"levels": None, "scale_bits": 16},
    "fitted-6": {"levels": None, "scale_bits": 6},
    "power": {"levels": "power", "scale_bits": 8},
    "zero-free": {"levels": "power_zero_free", "scale_bits": 16},
    "affine": {"levels": "affine", "scale_bits": 16},
    "affine-8": {"levels": "affine", "scale_bits": 8},
    "integer-6": {"levels": "integer", "scale_bits": 6},
}


def kinds(bits: int) -> dict[str, dict]:
    """Those of ``KINDS`` that have tables of this width."""
    return {name: values for name, values in KINDS.items() if bits > 1 or name != "power"}


@dataclass
class Case:
    """A weight relative to its shift (0), one stage of it, and its coding."""

    weight: Tensor
    stage: Stage
    fields: dict[str, Tensor]
    coding: Coding

    def decoded(self) -> Tensor:
        """What the fields of the coding, written back, decode to."""
        self.coding.write(self.fields, 0, len(self.weight))
        layout = Layout(tuple(self.weight.shape), (self.stage,))
        return LowBitTensor(layout, self.fields).dequantize()


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, size: int, seed: int = 0) -> Tensor:
    """Correlated inputs ``[tokens, size]`` of unequal channels."""
    mixed = gauss(tokens, size, seed=seed) @ gauss(size, size, seed=seed + 1) / size**0.5
    return mixed * torch.linspace(0.2, 2.0, size) + gauss(tokens, 1, seed=seed + 2)


def gram_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def make(
    rows: int = 24, size: int = 64, bits: int = 3, kind: str = "fitted", tables: int = 1, seed: int = 0, group: int = 16
) -> Case:
    """A data-free coding of a random matrix; with ``tables`` rows choose at random among variants of the fitted one."""
    weight = gauss(rows, size, seed=seed)
    spec = without_data(Spec(method="gptq", bits=bits, group_size=group, **KINDS[kind]))
    stage, fields = SOLVERS[spec.method].solve(Rows(weight, group, 0), spec)
    if tables > 1:
        one = from_f16_bits(fields["levels"])
        spread = one * torch.linspace(0.7, 1.3, tables)[:, None]
        ids = torch.randint(tables, (rows,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        stage = replace(stage, tables=tables, table_ids=True)
        fields |= {"levels": to_f16_bits(spread), "table_ids": ids}
    return Case(weight, stage, fields, Coding.read(stage, fields, size, 0, rows))
