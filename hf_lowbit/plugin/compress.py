"""A dense model through the pipeline: its blocks solved one after the other, and put in place as they are finished."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.serialize import field_name
from hf_lowbit.format.spec import Spec
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.measure.perplexity import vocabulary_of
from hf_lowbit.pipeline.blocks import Block
from hf_lowbit.pipeline.forward import Recorder
from hf_lowbit.pipeline.run import Report, Run, Store
from hf_lowbit.pipeline.share import Share
from hf_lowbit.pipeline.texts import Calibration, read_calibration
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.modules import LowBitModule, put_activations
from hf_lowbit.plugin.ranges import find_ranges
from hf_lowbit.plugin.rewrite import Rewriting, back_to, quantizers, rewrite, unrounded, untie
from hf_lowbit.plugin.sites import Shards, find_blocks
from hf_lowbit.plugin.targets import Targets, find_targets, replace_modules
from hf_lowbit.solvers import SOLVERS, without_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger("hf_lowbit")
# (parts finished, parts in all, name of the part)
Progress = Callable[[int, int, str], None]
# Tokens of one forward pass: enough to keep matrix products efficient, little enough that the largest activations of a
# 7 B block stay below 200 MB.
TOKENS_PER_PASS = 2048
# Name of the part that holds what lies outside the blocks: embedding and head.
ENDS = "ends"


@dataclass(frozen=True)
class Outcome:
    """What :func:`compress` did: the report, and the steps of transforms for the manifest."""

    report: Report
    steps: list[dict[str, str]] = field(default_factory=list)


def needs_calibration(config: LowBitConfig) -> str | None:
    """The method of a config, an override's included, that cannot do without calibration data."""
    for spec in config.specs():
        if not SOLVERS[spec.method].optional:
            return spec.method
    return None


def uses_calibration(config: LowBitConfig) -> bool:
    """Whether any method, transform or static range of a config draws on calibration data."""
    return any(SOLVERS[spec.method].evidence != "none" for spec in config.specs()) or _sees_inputs(config)


def needs_inputs(config: LowBitConfig) -> str | None:
    """What of a config must see inputs: a transform, or static ranges."""
    spec = config.activation_spec()
    asked = config.parsed_transforms()
    wanting = [f"transform {entry.name!r}" for entry, _ in asked if entry.needs in ("inputs", "rounding")]
    return next(iter(wanting), "static activation quantization" if spec is not None and spec.static else None)


def _sees_inputs(config: LowBitConfig) -> bool:
    helped = any(entry.needs == "helped" for entry, _ in config.parsed_transforms())
    return helped or needs_inputs(config) is not None


def is_streamed(config: LowBitConfig) -> bool:
    """Whether matrices can be quantized one by one while they are loaded: no data and no rewriting."""
    return config.calibration is None and not config.transforms


def check_calibration(config: LowBitConfig) -> None:
    """Refuse calibration data that is missing, or that no method of the config would use.

    Raises:
        BadRequest: naming the method and what to do.
    """
    method, source = needs_calibration(config), config.calibration
    if source is None and method is not None:
        free = ", ".join(sorted(name for name, entry in SOLVERS.items() if entry.optional))
        raise BadRequest(
            f"method {method!r} fits codes to calibration data and was given none. Give a text: --calibration FILE, or "
            f"calibration=... in Python. Methods that need none: {free}."
        )
    if source is None and (wanting := needs_inputs(config)) is not None:
        raise BadRequest(
            f"{wanting} needs calibration data and was given none. Give a text: --calibration FILE, or calibration=... in "
            "Python."
        )
    if source is not None and not uses_calibration(config):
        raise BadRequest(f"calibration was given, but method {config.method!r} does not use any; leave it out or use gptq.")


def calibration_for(model: PreTrainedModel, config: LowBitConfig, tokenizer: Any = None) -> Calibration | None:
    """The calibration windows of a run; None where the methods work without and none are given.

    Args:
        config: its ``calibration`` is what ``hf_lowbit.pipeline.texts.read_calibration`` takes.
        tokenizer: of the model; None loads the one beside it.

    Raises:
        BadRequest: data that is missing, not used, or does not fit the model.
    """
    check_calibration(config)
    source = config.calibration
    if source is None:
        return None
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    places = places if isinstance(places, int) and places > 0 else None
    if tokenizer is None and not isinstance(source, Tensor):
        from hf_lowbit.plugin.checkpoint import load_tokenizer

        tokenizer = load_tokenizer(model.name_or_path)
    return read_calibration(
        source,
        tokenizer,
        length=min(512, places or 512),
        seed=config.seed,
        vocabulary=vocabulary_of(model),
        places=places,
    )


def with_provenance(config: LowBitConfig, calibration: Calibration | None) -> LowBitConfig:
    """A copy of a config as the checkpoint carries it: where its calibration came from instead of what it was."""
    saved = copy.copy(config)
    saved.calibration = None if calibration is None else calibration.provenance
    return saved


def compress(
    model: PreTrainedModel,
    config: LowBitConfig,
    targets: Targets,
    calibration: Calibration | None,
    store: Store,
    files: Sequence[Path] = (),
    progress: Progress | None = None,
    share: Share | None = None,
) -> Outcome:
    """Rewrite a dense model as its transforms say and quantize the chosen parameters, in place.

    Args:
        targets: what to quantize.
        store: where finished parts go; those it holds are taken from there.
        files: safetensors files the model came from, to read blocks from; without, blocks are copied from the model.
        progress: called after each part.
        share: this process's share of the work; None asks the environment.

    Returns:
        A row per matrix, one per learned block and one per place that a transform left alone; and what transforms did.
    """
    windows = None if calibration is None else calibration.windows
    rewriting = rewrite(model, config, targets, windows)
    if config.transforms:
        files = ()  # they hold the weights from before
    blocks = find_blocks(model, list(targets.chosen), Shards(files))
    inside = [name for block in blocks for name in block.sites]
    specs = {name: targets.spec(name, config) for name in inside}
    if calibration is None:
        specs = {name: without_data(spec) for name, spec in specs.items()}
    outside = [name for name in targets.chosen if name not in set(inside)]
    parts = len(blocks) + bool(outside)
    report: Report = list(rewriting.left_alone)

    def done(block: Block, tensors: Mapping[str, LowBitTensor], rows: Report) -> None:
        for name, tensor in tensors.items():
            install(model, name, tensor)
        report.extend(rows)
        if progress is not None:
            progress(blocks.index(block) + 1 if block in blocks else parts, parts, block.name)

    was_training = model.training
    model.eval()
    recorder = None if windows is None else Recorder(model, blocks)
    size = 1 if windows is None else max(1, TOKENS_PER_PASS // windows.shape[1])
    try:
        with Share() if share is None else nullcontext(share) as together, unrounded(model, rewriting.intakes):
            Run(blocks, specs, store, recorder, windows, size, done, together)()
            if outside:
                ends = Block(ENDS, model, tuple(outside), _never_opened, blocks[0].weight)
                plain = {name: without_data(targets.spec(name, config)) for name in outside}
                Run([ends], plain, store, done=done, share=together)()
        round_activations(model, config, targets, rewriting, windows)
    finally:
        model.train(was_training)
    return Outcome(report, rewriting.steps)


def _never_opened() -> Any:
    raise AssertionError("what lies outside the blocks is solved from its weights alone")


def prepare_targets(model: PreTrainedModel, config: LowBitConfig) -> Targets:
    """What of a dense model is to be quantized; where a rotation is asked for, a tied head gets its own table first."""
    if any(entry.kind == "rotation" for entry, _ in config.parsed_transforms()) and (cost := untie(model)):
        _LOG.warning(
            "hf-lowbit: a rotated residual stream needs the norm before the head folded into it, which a table shared with "
            "the embedding cannot take: the head gets its own, %s bytes more before quantization.", f"{cost:,}",
        )  # fmt: skip
    return find_targets(model, config)


def round_activations(
    model: PreTrainedModel, config: LowBitConfig, targets: Targets, rewriting: Rewriting, windows: Tensor | None
) -> None:
    """Put in place what is done to the inputs of low-bit matrices, and find static ranges."""
    spec = config.activation_spec()
    if rewriting.dtype is not None:
        back_to(model, rewriting.dtype)
    linear = [full for full, kind in targets.chosen.items() if kind == "linear"]
    sizes = {full: model.get_submodule(full.removesuffix(".weight")).in_features for full in linear}
    put_activations(model, quantizers(targets, sizes, rewriting.intakes, spec))
    if spec is not None and spec.static:
        assert windows is not None
        find_ranges(model, windows, config)


def install(model: PreTrainedModel, full: str, tensor: LowBitTensor) -> None:
    """Put a record in the place of a dense parameter, on the parameter's device."""
    device = model.get_parameter(full).device
    replace_modules(model, [full], model.dtype)
    module: Any = model.get_submodule(full.rpartition(".")[0])
    assert isinstance(module, LowBitModule)
    parameter = full.rpartition(".")[2]
    module.install(parameter, tensor.layout)
    for stored, value in tensor.tensors.items():
        module._buffers[field_name(parameter, stored)] = value.to(device)


def fingerprint(config: LowBitConfig, targets: Targets, calibration: Calibration | None) -> dict[str, Any]:
    """What, besides the model's files, decides the parts of a run."""
    specs: dict[str, Spec] = {name: targets.spec(name, config) for name in targets.chosen}
    plan = {name: replace(spec, options=dict(spec.options)).to_json() for name, spec in specs.items()}
    spec = config.activation_spec()
    rewritten = {"transforms": config.transforms, "activations": None if spec is None else spec.to_json()}
    identity = {"plan": plan, "calibration": None if calibration is None else calibration.provenance["sha256"]}
    return identity | (rewritten if config.transforms else {})
