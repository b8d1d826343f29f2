"""The Transformers quantizer: builds the low-bit skeleton, quantizes while tensors stream in, or loads packed ones.

Every difference between host versions lives in this file. The host calls, in order: ``validate_environment``,
``_process_model_before_weight_loading`` on the meta model, ``param_needs_quantization`` and the op's ``convert`` per
tensor, then ``_process_model_after_weight_loading``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, _IdentityOp
from transformers.quantizers import HfQuantizer

from hf_lowbit.errors import BadRequest, FormatError, LowBitError, WeightError
from hf_lowbit.format.serialize import Record, checksum, field_name, read_record
from hf_lowbit.format.spec import Spec
from hf_lowbit.kernels import cpu_library
from hf_lowbit.kernels.triton_backend import Triton
from hf_lowbit.pipeline.run import MemoryStore
from hf_lowbit.plugin.auto import resolve
from hf_lowbit.plugin.belonging import (
    by_model_name,
    check_complete,
    check_shape,
    check_shapes,
    has_parameter,
    is_whole,
    safetensors_of,
)
from hf_lowbit.plugin.compress import (
    calibration_for,
    check_calibration,
    compress,
    is_streamed,
    prepare_targets,
    round_activations,
    with_provenance,
)
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.default_cache import use_low_bit_cache
from hf_lowbit.plugin.dense import dequantize_modules
from hf_lowbit.plugin.experts import LowBitExperts
from hf_lowbit.plugin.fused import fuse
from hf_lowbit.plugin.hub import give_card
from hf_lowbit.plugin.modules import (
    ActivationQuantizer,
    LowBitLinear,
    LowBitModule,
    put_activations,
)
from hf_lowbit.plugin.origin import MADE_FROM, note_origin
from hf_lowbit.plugin.rewrite import DONE, Rewriting
from hf_lowbit.plugin.targets import Targets, ends_of, find_targets, low_bit_modules, replace_modules
from hf_lowbit.solvers import solve

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LowBitQuantizer(HfQuantizer):
    """Makes ``from_pretrained`` produce low-bit models: on the fly from dense checkpoints, as stored from ours."""

    requires_calibration = False
    quantization_config: LowBitConfig

    def __init__(self, quantization_config: LowBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets = Targets()
        self.failure: LowBitError | None = None
        self.report: list[dict[str, Any]] = []
        self.steps: list[dict[str, str]] = []  # what was done to the model before it was quantized
        self.in_memory = False  # whether quantize() did the work
        self._dense_files: list[Path] | None = None  # of a dense checkpoint to calibrate once it is loaded

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device that is not there before anything is read."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(str(place).startswith("cuda") for place in places) and not torch.cuda.is_available():
            raise BadRequest("device 'cuda' was asked for, but torch finds no CUDA device here. Use device_map='cpu'.")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        dtype = model.dtype
        if self.pre_quantized:
            files = safetensors_of(kwargs.get("checkpoint_files"))
            record = read_record(files)
            layouts = by_model_name(model, record.layouts)
            self.targets = Targets(kept=record.kept)
            check_shapes(model, layouts)
            replace_modules(model, layouts, dtype)
            for full, layout in layouts.items():
                name, _, parameter = full.rpartition(".")
                module = model.get_submodule(name)
                if not isinstance(module, LowBitModule):
                    raise FormatError(
                        f"config.json ties {full!r} to the input embedding, the file holds it apart. "
                        "Config and weights are not of one checkpoint."
                    )
                module.install(parameter, layout)
                hold_place(module, parameter)
            put_activations(model, {name: ActivationQuantizer(layout) for name, layout in record.activations.items()})
            self.steps = list(record.transforms)
            check_complete(model, files)
            return
        config = self.quantization_config = resolve(self.quantization_config, model)
        check_calibration(config)
        self.targets = find_targets(model, config)
        if not is_streamed(config):
            self._dense_files = [Path(file) for file in safetensors_of(kwargs.get("checkpoint_files"))]
        else:
            replace_modules(model, self.targets.chosen, dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the loader hands this tensor to our op."""
        return not self.pre_quantized and self._dense_files is None and param_name in self.targets.chosen

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element for device maps; stored scales of the default grouping take a quarter of a bit."""
        if self.param_needs_quantization(model, param_name):
            return (self.targets.spec(param_name, self.quantization_config).bits + 0.25) / 8
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """The op the loader runs on each tensor to quantize."""
        return QuantizeOp(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.failure is not None:
            raise self.failure
        if self._dense_files is not None:
            self._calibrate(model, self._dense_files)
        elif not self.pre_quantized and self.failure is None and not self.in_memory:
            round_activations(model, self.quantization_config, self.targets, Rewriting(), None)
        self._keep_what_is_new(model)
        for _, module in low_bit_modules(model):
            for parameter in module.layouts:
                module.__dict__.pop(parameter, None)
        prepare(model)
        fuse(model)
        use_low_bit_cache(model, self.quantization_config.kv_cache)
        # Saved names are module names: the host's renamings on save would miss the header's record.
        model._weight_conversions = []
        if not self.pre_quantized:
            note_origin(model)
        give_card(model)

    def _calibrate(self, model: PreTrainedModel, files: list[Path]) -> None:
        """Quantize the dense model that was just loaded."""
        self._dense_files, config = None, self.quantization_config
        found = calibration_for(model, config)
        self.targets = prepare_targets(model, config)
        outcome = compress(model, config, self.targets, found, MemoryStore(), files)
        self.report, self.steps = outcome.report, outcome.steps
        self.quantization_config = model.config.quantization_config = with_provenance(config, found)

    def _keep_what_is_new(self, model: PreTrainedModel) -> None:
        """Give back their dense modules to matrices the checkpoint does not hold: a new head, never a part of the model."""
        for full in [full for full in self.targets.chosen if has_parameter(model, full)]:
            if is_whole(model):
                raise FormatError(
                    f"the files lack {full!r}, which config.json asks for. "
                    "Config and weights are not of one checkpoint, or a file is missing."
                )
            name = full.rpartition(".")[0]
            module = model.get_submodule(name)
            if isinstance(module, LowBitLinear):
                dense: Any = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                dense.weight, dense.bias = module.weight, module.bias
                model.set_submodule(name, dense)
            del self.targets.chosen[full]
            self.targets.kept[full] = "new: the checkpoint it was loaded from does not hold it"

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """The header entries of every file ``save_pretrained`` writes."""
        return None, record_of(model, self.targets.kept, self.steps).to_metadata()

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dequantize_modules(model, dtype or torch.float32)
        vars(model.config).pop(MADE_FROM, None)
        if self.steps:  # so that nobody applies them again
            setattr(model.config, DONE, list(dict.fromkeys(step["transform"] for step in self.steps)))
        return model

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through low-bit layers to adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Low-bit layers trace without graph breaks."""
        return True


def prepare(model: PreTrainedModel) -> None:
    """Repack every matrix that is on its device for its kernel now, not under the first token; say once what is missing."""
    for _, module in low_bit_modules(model):
        for parameter in module.layouts if not isinstance(module, LowBitExperts) else ():
            if module.lowbit(parameter).device.type != "meta":
                module.prepared(parameter)
    if cpu_library.trouble() and next(model.parameters()).device.type == "cpu":
        _warn_once(f"hf-lowbit runs on its slow reference path: {cpu_library.trouble()}")
    if (message := decoded_on_gpu(model)) is not None:
        _warn_once(message)


def decoded_on_gpu(model: PreTrainedModel) -> str | None:
    """How many matrices on a GPU are decoded for every product because the kernels refused, and why; None if none."""
    reasons: Counter[str] = Counter()
    total = 0
    for _, module in low_bit_modules(model):
        for parameter in module.layouts:
            total += 1
            reason = dict(module.choice(parameter).refused).get(Triton.name)
            reasons.update([reason] if reason is not None else [])
    if not reasons:
        return None
    found = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
    return f"hf-lowbit: {reasons.total()} of {total} matrices run on the slow reference path of the GPU ({found})"


@lru_cache
def _warn_once(message: str) -> None:
    logging.getLogger("hf_lowbit").warning(message)


class QuantizeOp(ConversionOps):
    """Quantizes one loaded tensor and hands the loader its stored fields."""

    def __init__(self, quantizer: LowBitQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict) -> QuantizeOp:
        return self  # the loader copies ops per tensor; the quantizer they report to must stay one

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """``{name: [tensor]}`` to ``{stored name: tensor}``; the first error is kept and raised after loading.

        Raising here would end as a generic RuntimeError under a page of load report.
        """
        assert model is not None
        (weight,) = (value[0] if isinstance(value, list) else value for value in input_dict.values())
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        if self.quantizer.failure is not None:
            return {}
        try:
            wanted = module.get_parameter(full_layer_name.rpartition(".")[2]).shape
            check_shape(full_layer_name, list(wanted), list(weight.shape))
            spec = self.quantizer.targets.spec(full_layer_name, self.quantizer.quantization_config)
            fields = quantize_into(module, full_layer_name, weight, spec)
        except LowBitError as error:
            self.quantizer.failure = error
            return {}
        hold_place(module, full_layer_name.rpartition(".")[2])
        return {field_name(full_layer_name, stored): tensor for stored, tensor in fields.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving writes stored fields as they are."""
        return _IdentityOp()


def hold_place(module: nn.Module, parameter: str) -> None:
    """Leave an empty, already initialised tensor under a dense parameter's name until loading ends.

    The host initialises what a checkpoint lacks by walking all modules, and some families reach into their children by
    name (``mlp.c_proj.weight``); tensors marked as initialised are skipped there.
    """
    placeholder: Any = torch.empty(0)
    placeholder._is_hf_initialized = True
    module.__dict__[parameter] = placeholder


def quantize_into(module: LowBitModule, full_name: str, weight: Tensor, spec: Spec) -> dict[str, Tensor]:
    """Solve one dense weight and install its (still meta) buffers on ``module``; returns the stored fields.

    Raises:
        WeightError: naming the parameter.
    """
    if getattr(module, "transposed", False):
        weight = weight.T
    elif getattr(module, "is_transposed", False):
        weight = weight.transpose(1, 2)
    try:
        tensor = solve(weight, spec)
    except WeightError as error:
        raise WeightError(f"{full_name}: {error}") from error
    module.install(full_name.rpartition(".")[2], tensor.layout)
    return dict(tensor.tensors)


def record_of(model: PreTrainedModel, kept: dict[str, str], steps: Sequence[dict[str, str]] = ()) -> Record:
    """Header record of a model: layouts and checksums of everything in its state dict."""
    layouts, ends = {}, []
    activations = {}
    for name, module in low_bit_modules(model):
        if isinstance(module, LowBitLinear) and module.activation is not None:
            activations[name] = module.activation.layout
        for parameter, layout in module.layouts.items():
            layouts[f"{name}.{parameter}"] = layout
            if module in ends_of(model):
                ends.append(f"{name}.{parameter}")
    state, ties = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
    checksums = {}
    for name, tensor in state.items():
        source = state.get(ties.get(name))
        stored_there = source is not None and source.data_ptr() == tensor.data_ptr()
        if not tensor.is_meta and not stored_there:
            checksums[name] = checksum(tensor)
    return Record(layouts, checksums, kept, tuple(ends), activations, tuple(steps))
