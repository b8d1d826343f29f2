"""``quantize``: a model or checkpoint in, a low-bit model out, in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.serialize import field_name
from hf_lowbit.pipeline.run import MemoryStore
from hf_lowbit.plugin.auto import resolve
from hf_lowbit.plugin.compress import (
    Outcome,
    calibration_for,
    compress,
    is_streamed,
    prepare_targets,
    round_activations,
    with_provenance,
)
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.quantizer import LowBitQuantizer, quantize_into
from hf_lowbit.plugin.rewrite import Rewriting
from hf_lowbit.plugin.targets import Targets, replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantize(
    model: PreTrainedModel | str | Path, config: LowBitConfig, tokenizer: Any = None, calibration: Any = None
) -> PreTrainedModel:
    """Quantize a Transformers model.

    Args:
        model: a loaded ``PreTrainedModel``, changed in place, or a path or Hub id to load.
        config: what to do.
        tokenizer: of the model, for calibration texts; None loads the one beside the model.
        calibration: what calibrated methods run on, in any form ``config.calibration`` takes; goes before that.

    Returns:
        The model; ``save_pretrained``, ``push_to_hub`` and ``dequantize`` work on it as after ``from_pretrained``.
        ``model.hf_quantizer.report`` has a row for each matrix a calibrated method solved and each place a transform left
        alone.

    Raises:
        BadRequest: calibration data is missing, not used or unfit, or the model is quantized already.
        WeightError: a weight holds NaN or infinity. The model is then unchanged up to that matrix.
        LowBitError: a block yields NaN.
    """
    config = copy.copy(config)
    config.calibration = config.calibration if calibration is None else calibration
    if isinstance(model, (str, Path)):
        from transformers import AutoModelForCausalLM

        if config.calibration is None:
            return AutoModelForCausalLM.from_pretrained(str(model), quantization_config=config)
        model = AutoModelForCausalLM.from_pretrained(str(model), dtype="auto")
    if getattr(model, "is_quantized", False):
        raise BadRequest("the model is quantized already; dequantize() it first or load the original.")
    found = calibration_for(model, config, tokenizer)
    config = resolve(config, model)
    targets = prepare_targets(model, config)
    if is_streamed(config):
        _solve_in_place(model, config, targets)
        round_activations(model, config, targets, Rewriting(), None)
        outcome = Outcome([])
    else:
        outcome = compress(model, config, targets, found, MemoryStore())
    finish(model, with_provenance(config, found), targets, outcome)
    return model


@torch.no_grad()
def _solve_in_place(model: PreTrainedModel, config: LowBitConfig, targets: Targets) -> None:
    """Quantize matrix by matrix, whatever the structure of the model."""
    for full in targets.chosen:
        weight = model.get_parameter(full)
        replace_modules(model, [full], model.dtype)
        module: Any = model.get_submodule(full.rpartition(".")[0])
        fields = quantize_into(module, full, weight, targets.spec(full, config))
        for stored, tensor in fields.items():
            module._buffers[field_name(full.rpartition(".")[2], stored)] = tensor


def finish(model: PreTrainedModel, config: LowBitConfig, targets: Targets, outcome: Outcome) -> None:
    """Make a model whose matrices were replaced a quantized one in the eyes of the host."""
    quantizer = LowBitQuantizer(config, pre_quantized=False)
    quantizer.targets, quantizer.report, quantizer.steps = targets, outcome.report, outcome.steps
    quantizer.in_memory = True
    model.hf_quantizer = quantizer
    model.quantization_method = config.quant_method
    quantizer.postprocess_model(model)
    model.is_quantized = True
