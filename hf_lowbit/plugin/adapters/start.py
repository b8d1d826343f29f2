"""Adapters that start from the original weights: ``adapt`` gives a low-bit model a LoRA that already mends its error.

The original is read matrix by matrix from its safetensors files; no dense model is ever in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.spec import Spec
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.plugin.adapters.low_rank import Factors, distance, total
from hf_lowbit.plugin.adapters.svfit import Directions, SingularValues, top_directions
from hf_lowbit.plugin.checkpoint import is_low_bit, weight_files
from hf_lowbit.plugin.modules import LowBitLinear
from hf_lowbit.plugin.sites import Shards
from hf_lowbit.solvers import SOLVERS, solve

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

STARTS = ("loftq", "svfit")


@dataclass(frozen=True)
class Start:
    """One matrix under its new adapter.

    Attributes:
        name: module.
        before: relative Frobenius error of the low-bit matrix against the original.
        after: the same with the adapter.
        norm: of the original.
    """

    name: str
    before: float
    after: float
    norm: float


@dataclass(frozen=True)
class Started:
    """What :func:`adapt` made.

    Attributes:
        model: the ``PeftModel``, ready to train.
        rows: one for each adapted matrix.
    """

    model: PeftModel
    rows: list[Start]

    @property
    def before(self) -> float:
        """Relative error over all matrices without the adapter."""
        return total([vars(row) for row in self.rows], "before")

    @property
    def after(self) -> float:
        """Relative error over all matrices with it."""
        return total([vars(row) for row in self.rows], "after")


def adapt(
    model: PreTrainedModel,
    config: LoraConfig,
    init: str = "loftq",
    source: str | None = None,
    iterations: int = 1,
    adapter_name: str = "default",
) -> Started:
    """Put a LoRA on a low-bit model that starts from the original weights instead of from nothing.

    Args:
        model: low-bit, without adapters; changed in place.
        config: a ``LoraConfig``; where ``use_dora`` is on, magnitudes are those of the matrices after the start.
        init: ``loftq``: ``B A`` is the best approximation of rank r of what quantizing lost (LoftQ, arXiv 2310.08659).
            ``svfit``: ``A`` and the directions of ``B`` are the largest singular ones of the original and stay fixed, one
            number for each is trained (SVFit, arXiv 2409.05926, reconstructed); they start where the error is least.
        source: directory or Hub id of the original; may be left out for ``svfit``, which then takes the directions of the
            low-bit matrices and starts from nothing.
        iterations: rounds of LoftQ. From the second on the matrix less ``B A`` is quantized again, so the adapter belongs to
            the model as it is then: save both. With 1 the low-bit weights stay as they are.
        adapter_name: of the adapter.

    Raises:
        BadRequest: another model, config or source than this can work with; nothing was changed then.
    """
    from peft import LoraConfig, get_peft_model

    if init not in STARTS:
        raise BadRequest(unknown_name("start of an adapter", init, STARTS))
    if not isinstance(config, LoraConfig):
        raise BadRequest(f"init={init!r} starts a LoRA; give a LoraConfig, got {type(config).__name__}.")
    if config.init_lora_weights is not True:
        raise BadRequest(f"init={init!r} and init_lora_weights={config.init_lora_weights!r} are two starts; leave one out.")
    if init == "svfit" and (config.use_dora or config.lora_bias):
        raise BadRequest("init='svfit' trains singular values alone; leave use_dora and lora_bias out, or use init='loftq'.")
    if iterations < 1 or (init == "svfit" and iterations != 1):
        raise BadRequest(f"iterations={iterations}: rounds of loftq, 1 or more; svfit has but one.")
    if any(hasattr(module, "merged_adapters") for module in model.modules()):
        raise BadRequest("the model carries an adapter already; start from one without: model.unload().")
    read = _reader(model, init, source)
    specs = {} if iterations == 1 else _specs(model)
    adapted = get_peft_model(model, config, adapter_name)
    rows = []
    for name, layer in model.named_modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, LowBitLinear) and adapter_name in getattr(layer, "lora_A", ()):
            rows.append(_start(name, layer, base, read, init, adapter_name, specs.get(name), iterations))
    if not rows:
        adapted.unload()
        raise BadRequest("target_modules names no low-bit layer, so there is nothing to start from the original.")
    return Started(adapted, rows)


@torch.no_grad()
def _start(
    name: str, layer: Any, base: LowBitLinear, read: Any, init: str, adapter: str, spec: Spec | None, iterations: int
) -> Start:
    first, rank, scaling = base.lowbit(), layer.r[adapter], layer.scaling[adapter]
    stored = first.dequantize()
    weight = read(name, base)
    if init == "svfit":
        u, _, v = top_directions(weight, rank)
        values = torch.einsum("or,oi,ir->r", u, weight - stored, v)
        layer.lora_A[adapter] = Directions(v.T)
        layer.lora_B[adapter] = SingularValues(u, values / scaling)
        found, update = stored, Factors(u * values, v.T)
    else:
        record, update = loftq(weight, first, rank, spec, iterations)
        if record is not first:
            base.put("weight", record)
        layer.lora_A[adapter].weight.copy_(update.a)
        layer.lora_B[adapter].weight.copy_(update.b / scaling)
        if adapter in layer.lora_variant:
            layer.lora_variant[adapter].init(layer, adapter_name=adapter)
        found = record.dequantize()
    after = distance(found + update.b @ update.a, weight)
    return Start(name, distance(stored, weight), after, float(weight.norm()))


def loftq(
    weight: Tensor, record: LowBitTensor, rank: int, spec: Spec | None, iterations: int
) -> tuple[LowBitTensor, Factors]:
    """A record and factors with ``record + b @ a`` near ``weight`` ``[out, in]``: the best of ``iterations`` rounds.

    Args:
        record: the first quantization.
        spec: how to quantize again; may be None for one round.
    """
    rounds: list[tuple[float, LowBitTensor, Factors]] = []
    for _ in range(iterations):
        if rounds:
            assert spec is not None
            _, _, (b, a) = rounds[-1]
            record = solve(weight - b @ a, spec)
        rest = weight - record.dequantize()
        u, s, v = top_directions(rest, rank)
        update = Factors(u * s.sqrt(), (v * s.sqrt()).T)
        rounds.append((float((rest - update.b @ update.a).norm()), record, update))
    _, record, update = min(rounds, key=lambda found: found[0])
    return record, update


def _reader(model: PreTrainedModel, init: str, source: str | None) -> Any:
    """A function ``(module name, layer) -> float32 [out, in]`` of original weights."""
    low_bit = {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}
    if source is None:
        if init != "svfit":
            raise BadRequest(f"init={init!r} mends what quantizing lost, so give source=ORIGINAL.")
        return lambda name, base: base.lowbit().dequantize()
    if getattr(getattr(model, "hf_quantizer", None), "steps", None):
        raise BadRequest(
            "transforms rewrote this model's weights before they were quantized, so the original's are no measure of them. "
            "Use a plain LoRA, or a model quantized without transforms."
        )
    if is_low_bit(source):
        raise BadRequest(f"{source!r} is quantized itself; give the original it was made from.")
    shards, meta = Shards(weight_files(source)), {}
    for name, base in low_bit.items():
        full = f"{name}.weight"
        wanted = [base.in_features, base.out_features] if base.transposed else [base.out_features, base.in_features]
        if (found := shards.shape(full)) != wanted:
            there = f"no {full!r}" if found is None else f"{full!r} as {found}, the model has {wanted}"
            raise BadRequest(f"{source!r} holds {there}; it is not what this model was made from.")
        meta[full] = torch.empty(wanted, device="meta")

    def read(name: str, base: LowBitLinear) -> Tensor:
        full = f"{name}.weight"
        weight = shards.read({full: meta[full]})[full]
        return weight.T.contiguous() if base.transposed else weight

    return read


def _specs(model: PreTrainedModel) -> dict[str, Spec]:
    """How each layer was quantized, for quantizing it again."""
    config: Any = model.config.quantization_config
    specs = {}
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear):
            specs[name] = config.spec(name)
            method = specs[name].method
            if not SOLVERS[method].optional:
                raise BadRequest(
                    f"iterations above 1 quantize matrices again, and method {method!r} needs calibration data for that. "
                    "Use iterations=1, which keeps the calibrated codes."
                )
    return specs
