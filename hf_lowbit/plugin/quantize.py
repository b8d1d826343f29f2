"""``quantize``: a model or checkpoint in, a low-bit model out, in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.serialize import field_name
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.quantizer import LowBitQuantizer, quantize_into
from hf_lowbit.plugin.targets import find_targets, replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def quantize(
    model: PreTrainedModel | str | Path, config: LowBitConfig, tokenizer: Any = None, calibration: Any = None
) -> PreTrainedModel:
    """Quantize a Transformers model.

    Args:
        model: a loaded ``PreTrainedModel``, changed in place one matrix at a time, or a path or Hub id to load.
        config: what to do.
        tokenizer, calibration: for calibrated methods, which this release does not have.

    Returns:
        The model; ``save_pretrained``, ``push_to_hub`` and ``dequantize`` work on it as after ``from_pretrained``.

    Raises:
        BadRequest: calibration data was given, or the model is quantized already.
        WeightError: a weight holds NaN or infinity. The model is then unchanged up to that matrix.
    """
    if calibration is not None:
        raise BadRequest("calibration was given, but this release has data-free methods only; leave calibration out.")
    if isinstance(model, (str, Path)):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(model), quantization_config=config)
    if getattr(model, "is_quantized", False):
        raise BadRequest("the model is quantized already; dequantize() it first or load the original.")
    quantizer = LowBitQuantizer(config, pre_quantized=False)
    quantizer.targets = find_targets(model, config)
    for full in quantizer.targets.chosen:
        weight = model.get_parameter(full)
        replace_modules(model, [full], model.dtype)
        module = model.get_submodule(full.rpartition(".")[0])
        fields = quantize_into(module, full, weight, quantizer.targets.spec(full, config))
        for stored, tensor in fields.items():
            module._buffers[field_name(full.rpartition(".")[2], stored)] = tensor
    model.hf_quantizer = quantizer
    model.quantization_method = config.quant_method
    quantizer.postprocess_model(model)
    model.is_quantized = True
    return model
