"""A dense model through the pipeline: its blocks solved one after the other, and put in place as they are finished."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
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
from hf_lowbit.plugin.modules import LowBitModule
from hf_lowbit.plugin.sites import Shards, find_blocks
from hf_lowbit.plugin.targets import Targets, replace_modules
from hf_lowbit.solvers import SOLVERS, without_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (parts finished, parts in all, name of the part)
Progress = Callable[[int, int, str], None]
# Tokens of one forward pass: enough to keep matrix products efficient, little enough that the largest activations of a
# 7 B block stay below 200 MB.
TOKENS_PER_PASS = 2048
# Name of the part that holds what lies outside the blocks: embedding and head.
ENDS = "ends"


def needs_calibration(config: LowBitConfig) -> str | None:
    """The method of a config, an override's included, that cannot do without calibration data."""
    for spec in config.specs():
        if not SOLVERS[spec.method].optional:
            return spec.method
    return None


def uses_calibration(config: LowBitConfig) -> bool:
    """Whether any method of a config draws on calibration data."""
    return any(SOLVERS[spec.method].evidence != "none" for spec in config.specs())


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
) -> Report:
    """Quantize the chosen parameters of a dense model in place.

    Args:
        targets: what to quantize.
        store: where finished parts go; those it holds are taken from there.
        files: safetensors files the model came from, to read blocks from; without, blocks are copied from the model.
        progress: called after each part.
        share: this process's share of the work; None asks the environment.

    Returns:
        The report: a row per matrix, and one per learned block.
    """
    blocks = find_blocks(model, list(targets.chosen), Shards(files))
    inside = [name for block in blocks for name in block.sites]
    specs = {name: targets.spec(name, config) for name in inside}
    if calibration is None:
        specs = {name: without_data(spec) for name, spec in specs.items()}
    outside = [name for name in targets.chosen if name not in set(inside)]
    parts = len(blocks) + bool(outside)
    report: Report = []

    def done(block: Block, tensors: Mapping[str, LowBitTensor], rows: Report) -> None:
        for name, tensor in tensors.items():
            install(model, name, tensor)
        report.extend(rows)
        if progress is not None:
            progress(blocks.index(block) + 1 if block in blocks else parts, parts, block.name)

    was_training = model.training
    model.eval()
    windows = None if calibration is None else calibration.windows
    recorder = None if windows is None else Recorder(model, blocks)
    size = 1 if windows is None else max(1, TOKENS_PER_PASS // windows.shape[1])
    try:
        with Share() if share is None else nullcontext(share) as together:
            Run(blocks, specs, store, recorder, windows, size, done, together)()
            if outside:
                ends = Block(ENDS, model, tuple(outside), _never_opened, blocks[0].weight)
                plain = {name: without_data(targets.spec(name, config)) for name in outside}
                Run([ends], plain, store, done=done, share=together)()
    finally:
        model.train(was_training)
    return report


def _never_opened() -> Any:
    raise AssertionError("what lies outside the blocks is solved from its weights alone")


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
    return {"plan": plan, "calibration": None if calibration is None else calibration.provenance["sha256"]}
