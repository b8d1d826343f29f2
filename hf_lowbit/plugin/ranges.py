"""Static ranges: calibration text is run through the quantized model, and each rounded input looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.errors import LowBitError
from hf_lowbit.format.activations import Activations
from hf_lowbit.kernels import integer
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.modules import ActivationQuantizer, LowBitLinear
from hf_lowbit.transforms import Extremes, RangeBench

TOKENS_PER_PASS = 2048
# Most tokens that ranges are judged by, beyond four windows: their outputs are kept, which a large vocabulary makes large.
JUDGED = 512


@dataclass
class ModelRanges(RangeBench):
    """The ranges of a model's activations, and the error rounding makes at its outputs."""

    model: Any = None
    windows: Tensor | None = None
    _expected: list[Tensor] = field(default_factory=list)

    @property
    def judged(self) -> int:
        """Windows that :meth:`loss` sees: an eighth of them up to :data:`JUDGED` tokens, and four at least."""
        assert self.windows is not None
        return max(4, min(len(self.windows) // 8, JUDGED // self.windows.shape[1]))

    def set(self, ranges: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Put steps and zero points for (lowest, highest) values ``[steps]`` of each quantizer in place."""
        for name, (low, high) in ranges.items():
            module = self.model.get_submodule(name)
            _put(module, low, high)

    @torch.no_grad()
    def loss(self) -> float:
        """Mean squared error of the model's outputs on some windows, against the same without rounding."""
        assert self.windows is not None
        some = self.windows[: self.judged].split(1)
        if not self._expected:
            with unrounded(self.model):
                self._expected = [self._run(ids) for ids in some]
        errors = [float((self._run(ids) - wanted).pow(2).mean()) for ids, wanted in zip(some, self._expected, strict=True)]
        return sum(errors) / len(errors)

    def batches(self) -> int:
        """Windows that :meth:`loss` does not see, or all where there are no others."""
        assert self.windows is not None
        return max(1, len(self.windows) - self.judged) if len(self.windows) > 1 else 1

    def error(self, ranges: Mapping[str, tuple[Tensor, Tensor]], batch: int) -> Tensor:
        """Mean squared error of the outputs on one window, with gradients to the ranges."""
        assert self.windows is not None
        ids = self.windows[-1 - batch][None]
        with torch.no_grad(), unrounded(self.model):
            wanted = self._run(ids)
        with torch.enable_grad(), replaced(self.model, ranges):
            return (self._run(ids) - wanted).pow(2).mean()

    def _run(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids.to(self.model.device), **_no_cache(self.model))[0].float()


@torch.no_grad()
def find_ranges(model: nn.Module, windows: Tensor, config: LowBitConfig) -> None:
    """Fix the steps of all static activation quantizers: all that was seen, or what a range transform makes of it.

    Raises:
        LowBitError: NaN or infinity on the calibration text.
    """
    spec = config.activation_spec()
    assert spec is not None
    with integer.simulated():  # steps are still moving, and a layer prepared for whole numbers holds its own
        bench = ModelRanges(look(model, windows), spec.bits, model=model, windows=windows)
        bench.set({name: (seen.low.amin(0), seen.high.amax(0)) for name, seen in bench.extremes.items()})
        for entry, settings in config.parsed_transforms():
            if entry.kind == "range":
                entry.run(bench, settings)
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            module.__dict__.pop("_prepared", None)


@torch.no_grad()
def look(model: Any, windows: Tensor) -> dict[str, Extremes]:
    """Lowest and highest value of each part of each activation, token by token, while nothing is rounded."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer) and module.layout.steps:
            handles.append(module.register_forward_pre_hook(_note(found.setdefault(name, []), name)))
    try:
        with unrounded(model):
            for ids in windows.split(max(1, TOKENS_PER_PASS // windows.shape[1])):
                model(input_ids=ids.to(model.device), **_no_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Extremes(torch.cat([low for low, _ in parts]), torch.cat([high for _, high in parts]))
        for name, parts in found.items()
        if parts
    }


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Lets a quantized model run with its activations rewritten but not rounded."""
    with _instead({module: module.activations.exact for module in _quantizers(model).values()}):
        yield


@contextmanager
def replaced(model: nn.Module, ranges: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Lets a quantized model round by (lowest, highest) values ``[steps]`` that gradients reach."""
    found = _quantizers(model)
    with _instead({found[name]: _learning(found[name].activations, *ends) for name, ends in ranges.items()}):
        yield


def _learning(activations: Activations, low: Tensor, high: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: activations(x, activations.steps(low, high))


def _quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


@contextmanager
def _instead(forwards: Mapping[ActivationQuantizer, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    for module, forward in forwards.items():
        module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]


def _note(parts: list[tuple[Tensor, Tensor]], name: str) -> Any:
    def hook(module: ActivationQuantizer, args: tuple) -> None:
        y = module.activations.rewritten(args[0].detach().flatten(0, -2).float())
        if not bool(torch.isfinite(y).all()):
            raise LowBitError(f"what leads to {name} is NaN or infinite on the calibration text. Check the model's weights.")
        parts.append(extremes_of(module.activations, y))

    return hook


def extremes_of(activations: Activations, y: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value ``[n, steps]`` of each part of rewritten inputs ``[n, in]`` that has a step of its own."""
    parts = activations.parts(y)
    return torch.stack([part.amin(-1) for part in parts], -1), torch.stack([part.amax(-1) for part in parts], -1)


def _put(module: Any, low: Tensor, high: Tensor) -> None:
    step, zero = module.activations.steps(low, high)
    device = module.step.device
    module.step = step.float().view(torch.int32).to(device)
    module.zero = zero.to(torch.int32).to(device)


def _no_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}
