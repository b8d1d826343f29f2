"""``hf-lowbit plan --for TARGET``: whether what a config would make can be exported, without reading a weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from hf_lowbit.exchange import Misfit, Scheme, Target, target_of
from hf_lowbit.exchange.gguf_blocks import block_of
from hf_lowbit.exchange.gguf_file import architecture_of
from hf_lowbit.exchange.grid import exactly
from hf_lowbit.format.spec import Spec
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.plugin.auto import resolve
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.export import DENSE_ENDS, DTYPES
from hf_lowbit.plugin.plan import described_for
from hf_lowbit.plugin.sites import is_flipped
from hf_lowbit.plugin.targets import ends_of, find_targets
from hf_lowbit.solvers import solve, without_data

# Rows of the random matrices that stand for the model's; a multiple of 32 more than theirs divided by it leaves over.
ROWS = 32


@dataclass
class Answer:
    """Whether an export would work.

    Attributes:
        target: of the export.
        exportable: as far as settings and shapes decide; a value may still be beyond a target, and the export says so.
        reason: what the first unfit matrix has, and what it would have to have.
        advice: options of ``quantize`` that would do.
        forms: number of matrices by form.
    """

    target: str
    exportable: bool
    reason: str | None = None
    advice: str | None = None
    forms: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All attributes."""
        return asdict(self)


def exportable(source: str, config: LowBitConfig, to: str, dtype: str | None = None) -> Answer:
    """Solve a few rows of random weights as each matrix would be solved, and offer them to a target.

    Raises:
        BadRequest: an unknown target, no such model, or a config it cannot be quantized with.
    """
    target = target_of(to)
    model: Any = described_for(source)
    config = resolve(config, model)
    answer = Answer(to, True)
    try:
        if config.activation_spec() is not None:
            raise Misfit("activation_bits", config.activation_bits, "inputs that are rounded have no place there.")
        if to == "gguf":
            architecture_of(model.config.to_dict())
        schemes: dict[str, Scheme] = {}
        wanted = getattr(torch, dtype) if dtype in DTYPES else model.dtype
        for full, form in _forms(model, config, target, wanted):
            name = form if isinstance(form, str) else f"{form.bits} bits, groups of {form.group_size or 'a row'}"
            if isinstance(form, Scheme):
                schemes[full.removesuffix(".weight")] = form
            answer.forms[name] = answer.forms.get(name, 0) + 1
        if schemes:
            target.together(schemes)
    except Misfit as misfit:
        answer.exportable, answer.reason, answer.advice, answer.forms = False, str(misfit), target.advice, {}
    return answer


def _forms(model: Any, config: LowBitConfig, target: Target, dtype: torch.dtype) -> list[tuple[str, Scheme | str]]:
    """Each chosen parameter and what it becomes."""
    targets = find_targets(model, config)
    probes: dict[Any, LowBitTensor] = {}
    out: list[tuple[str, Scheme | str]] = []
    for full in targets.chosen:
        module = model.get_submodule(full.rpartition(".")[0])
        shape = tuple(model.get_parameter(full).shape)
        shape = (*shape[:-2], shape[-1], shape[-2]) if is_flipped(module) else shape
        spec = without_data(targets.spec(full, config))
        try:
            if target.name != "dense" and len(shape) == 2:
                key = (repr(spec), shape[0] % ROWS, shape[1])
                record = probes[key] if key in probes else probes.setdefault(key, _probe(spec, shape))
            out.append((full, _form(target, module, model, shape, record if target.name != "dense" else None, dtype)))
        except Misfit as misfit:
            raise misfit.at(full) from misfit
    return out


def _form(
    target: Target, module: Any, model: Any, shape: tuple[int, ...], record: LowBitTensor | None, dtype: torch.dtype
) -> Scheme | str:
    if record is None:
        return str(dtype).removeprefix("torch.")
    if len(shape) != 2:
        raise Misfit("the shape", list(shape), "stacks of experts can be exported as dense alone.")
    if target.scheme is None:
        return block_of(record)[0]
    if module in ends_of(model):
        exactly(record.dequantize(), dtype, "a value", DENSE_ENDS)
        return str(dtype).removeprefix("torch.")
    if is_flipped(module):
        raise Misfit("the module", "a Conv1D", "only linear layers can be written; --to dense holds it.")
    return target.scheme(record, dtype)


def _probe(spec: Spec, shape: tuple[int, ...]) -> LowBitTensor:
    # Of a size whose scales are far from fp16's smallest numbers: values are the export's to check.
    weight = 0.25 * torch.randn(ROWS + shape[0] % ROWS, shape[1], generator=torch.Generator().manual_seed(0))
    return solve(weight, replace(spec, options=dict(spec.options)))
