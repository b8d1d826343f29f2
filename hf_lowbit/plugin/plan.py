"""``hf-lowbit plan``: what quantizing a checkpoint will need, without reading a weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.pipeline.estimate import BlockShape, Estimate, estimate
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.sites import Shards, find_blocks, is_flipped
from hf_lowbit.plugin.targets import find_targets
from hf_lowbit.solvers import without_data


def plan(source: str, config: LowBitConfig) -> Estimate:
    """Estimate ``quantize_checkpoint(source, ..., config)`` from the model's ``config.json``.

    Raises:
        BadRequest: no such model, or a config it cannot be quantized with.
    """
    from hf_lowbit.plugin.auto import resolve  # which plans, too

    model = described_for(source)
    return plan_model(model, resolve(config, model))


def described_for(source: str) -> Any:
    """The dense model of a checkpoint's config, on the meta device.

    Raises:
        BadRequest: no such model, or one that is quantized already.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        described = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(described)
    except (OSError, ValueError) as error:
        raise BadRequest(f"cannot read the config of {source!r}: {error}") from error
    if getattr(described, "quantization_config", None):
        raise BadRequest(f"{source!r} is quantized already; quantize the original it was made from.")
    return model


def plan_model(model: Any, config: LowBitConfig) -> Estimate:
    """:func:`plan` of a model that is built already, on any device."""
    targets = find_targets(model, config)

    def shape(full: str) -> tuple[int, ...]:
        found = tuple(model.get_parameter(full).shape)
        flipped = is_flipped(model.get_submodule(full.rpartition(".")[0]))
        return (*found[:-2], found[-1], found[-2]) if flipped else found

    windows, length = _calibration_size(config, model.config)
    blocks = find_blocks(model, list(targets.chosen), Shards())
    width = model.config.get_text_config().hidden_size
    shapes = [
        BlockShape({n: shape(n) for n in block.sites}, sum(p.numel() for p in block.module.parameters()), width)
        for block in blocks
    ]
    inside = {name for block in blocks for name in block.sites}
    outside = {name: shape(name) for name in targets.chosen if name not in inside}
    specs = {name: targets.spec(name, config) for name in targets.chosen}
    specs = {name: spec if windows and name in inside else without_data(spec) for name, spec in specs.items()}
    quantized = sum(model.get_parameter(name).numel() for name in targets.chosen)
    dense = sum(parameter.numel() for parameter in model.parameters()) - quantized
    found = estimate(shapes, specs, outside, dense, windows, length)
    if config.transforms:  # they rewrite the whole model, in float32
        found = replace(found, peak_bytes=found.peak_bytes + 4 * (quantized + dense))
    return found


def _calibration_size(config: LowBitConfig, described: Any) -> tuple[int, int]:
    source = config.calibration
    if source is None:
        return 0, 0
    if isinstance(source, torch.Tensor):
        return len(source), source.shape[1]
    places = getattr(described.get_text_config(), "max_position_embeddings", None) or 512
    asked = source if isinstance(source, dict) else {}
    return int(asked.get("sequences", 128)), int(asked.get("length", min(512, places)))
