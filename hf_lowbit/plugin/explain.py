"""``explain``: for each matrix of a model, how it is stored, what it costs, what runs it, and why the rest is kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.ledger import ledger
from hf_lowbit.plugin.modules import describe
from hf_lowbit.plugin.targets import ends_of, low_bit_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TensorLine:
    """One low-bit matrix or stack."""

    name: str
    shape: tuple[int, ...]
    method: str
    levels: str
    bits: int
    group_size: int
    bytes: int
    bits_per_weight: float
    backend: str
    reason: str
    activations: str = ""  # what is done to its inputs


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; printing it gives the table."""

    tensors: list[TensorLine] = field(default_factory=list)
    kept: dict[str, tuple[int, str]] = field(default_factory=dict)  # name -> bytes, reason
    left_alone: list[tuple[str, str, str]] = field(default_factory=list)  # place, transform, reason; of a model just made
    bytes: int = 0
    bits_per_weight_linears: float = 0.0
    bits_per_weight_model: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        width = max([len(line.name) for line in self.tensors] + [len(name) for name in self.kept] + [10])
        lines = [
            f"{'matrix':{width}}  {'shape':>16}  {'levels':24} {'bits':>4} {'group':>5} {'bpw':>6} {'bytes':>11}  backend"
        ]
        for line in self.tensors:
            shape = "x".join(map(str, line.shape))
            lines.append(
                f"{line.name:{width}}  {shape:>16}  {line.levels:24} {line.bits:4} {line.group_size:5} "
                f"{line.bits_per_weight:6.3f} {line.bytes:11,}  {line.backend} ({line.reason})"
                + (f"; inputs {line.activations}" if line.activations else "")
            )
        for name, (size, reason) in self.kept.items():
            lines.append(f"{name:{width}}  kept in high precision, {size:,} bytes: {reason}")
        lines += [f"{name:{width}}  left alone by {transform}: {reason}" for name, transform, reason in self.left_alone]
        lines.append(
            f"{self.bytes:,} bytes; {self.bits_per_weight_linears:.3f} bits per weight in the quantized matrices inside "
            f"blocks, {self.bits_per_weight_model:.3f} over the whole model"
        )
        return "\n".join(lines)


def explain(model: PreTrainedModel, strict: bool = False) -> Explanation:
    """Table of a model quantized with hf-lowbit.

    Args:
        strict: raise if any matrix runs on a slower backend than the first of the table.

    Raises:
        BadRequest: the model holds no low-bit matrix.
        FallbackError: see ``strict``.
    """
    tensors, layouts, block_layouts = [], [], []
    ends = ends_of(model)
    for name, module in low_bit_modules(model):
        for parameter, layout in module.layouts.items():
            choice, counted = module.choice(parameter, strict=strict), ledger(layout)
            first = layout.stages[0]
            levels = first.levels.family
            if first.levels.exponent is not None:
                levels += f"({first.levels.exponent:g})"
            tensors.append(
                TensorLine(
                    f"{name}.{parameter}", layout.shape, layout.method, levels, first.bits, first.group_size,
                    counted.bytes, counted.bits_per_weight, choice.backend.name, choice.reason, _inputs_of(module),
                )
            )  # fmt: skip
            layouts.append(layout)
            if module not in ends:
                block_layouts.append(layout)
    if not tensors:
        raise BadRequest("the model holds no low-bit matrix: it was not quantized with hf-lowbit, or was dequantized.")
    weights, total = _model_weights(model)
    kept = {}
    quantizer = getattr(model, "hf_quantizer", None)
    for name, reason in (quantizer.targets.kept if quantizer is not None else {}).items():
        found = _parameter(model, name)
        kept[name] = (found.numel() * found.element_size() if found is not None else 0, reason)
    rows = [] if quantizer is None else [row for row in quantizer.report if "left_alone" in row]
    left = [(row["name"], row["transform"], row["left_alone"]) for row in rows]
    blocks = ledger(block_layouts or layouts).bits_per_weight
    return Explanation(tensors, kept, left, total, blocks, 8 * total / weights)


def _inputs_of(module: Any) -> str:
    quantizer = getattr(module, "activation", None)
    if quantizer is None:
        return ""
    reason = module.simulated
    return f"{describe(quantizer.layout)}; " + ("multiplied in whole numbers" if reason is None else f"simulated: {reason}")


def _model_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Logical weights and stored bytes of the whole model; tied tensors count once."""
    weights = total = 0
    seen: set[int] = set()
    packed: set[int] = set()
    for _, module in low_bit_modules(model):
        for parameter, layout in module.layouts.items():
            weights += layout.numel
            packed |= {id(t) for t in module.lowbit(parameter).tensors.values()}
        packed |= {id(t) for t in module.buffers()}  # those of its activation quantizer, too
    for tensor in model.state_dict(keep_vars=True).values():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        total += tensor.numel() * tensor.element_size()
        weights += 0 if id(tensor) in packed else tensor.numel()
    return weights, total


def _parameter(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None
