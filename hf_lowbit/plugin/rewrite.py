"""Transforms on a Transformers model: its graph, its bench, and what stays at run time before its low-bit matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_lowbit.errors import BadRequest, LowBitError, WeightError
from hf_lowbit.format.activations import ActivationLayout, Activations, ActivationSpec
from hf_lowbit.format.spec import Spec
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.experts import is_experts
from hf_lowbit.plugin.modules import ActivationQuantizer
from hf_lowbit.plugin.targets import Targets, ends_of, tied_head, untie_record
from hf_lowbit.transforms import Bench, Graph, Site, SiteInputs, find_graph
from hf_lowbit.transforms.algebra import Weights
from hf_lowbit.transforms.intake import Intakes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens kept of each site for searches and fits: so many at least, and more where channels are few.
SAMPLE, SAMPLE_NUMBERS = 2048, 1 << 21
# Tokens of one forward pass that gathers them.
TOKENS_PER_PASS = 2048
# A range found on fewer tokens is that of those tokens.
FEWEST_TOKENS = 128
PROBE_TOKENS = 5
# Where a dequantized model remembers what was done to it.
DONE = "hf_lowbit_transforms"


@dataclass
class Rewriting:
    """What was done to a dense model.

    Attributes:
        intakes: what stays at run time, by weight name.
        steps: what was done, for the manifest.
        left_alone: a row for the report of each site or matrix that a transform left alone, and why.
        bench: for undoing it.
        dtype: of the model before, for what stays in high precision.
    """

    intakes: Intakes = field(default_factory=Intakes)
    steps: list[dict[str, str]] = field(default_factory=list)
    left_alone: list[dict[str, str]] = field(default_factory=list)
    bench: Bench | None = None
    dtype: torch.dtype | None = None


@dataclass
class ModelBench(Bench):
    """A bench whose calibration runs the model itself.

    Attributes:
        model: dense, float32.
        windows: int64 ``[n, T]``; None without calibration.
        matrix: width and grouping of the matrices.
    """

    model: Any = None
    windows: Tensor | None = None
    matrix: Spec = field(default_factory=Spec)
    _seen: dict[int, SiteInputs] = field(default_factory=dict)

    def inputs(self, site: Site) -> SiteInputs | None:
        """What calibration saw of a site as it is now."""
        if not self._seen and self.windows is not None:
            self._seen = _gather(self.model, self.graph.sites, self.windows, self.intakes)
        return self._seen.get(site.source)

    def rounded(self, weight: Tensor) -> Tensor:
        """A matrix ``[out, in]`` rounded to nearest at the width and grouping asked for, with scales that just reach.

        What method ``rtn`` does, but for the rounding of scales; thirty times faster, and searches round a lot.
        """
        top, size = max(1, (1 << (self.matrix.bits - 1)) - 1), self.matrix.groups_of(weight.shape[1])
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
        scale = padded.abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
        return ((padded / scale).round() * scale).flatten(1)[:, : weight.shape[1]]

    @property
    def looked(self) -> bool:
        """Whether calibration was drawn upon since the model last changed."""
        return bool(self._seen)

    def forget(self) -> None:
        """Drop what calibration saw: the model has changed."""
        self._seen = {}


def untie(model: PreTrainedModel) -> int:
    """Give the head a table of its own, where it shares the embedding's; returns the bytes that costs.

    Config and lists of tied parameters follow, so that the saved checkpoint loads with stock classes.
    """
    pair = tied_head(model)
    if pair is None:
        return 0
    head: Any = ends_of(model)[1]
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    untie_record(model, pair)
    model.config.tie_word_embeddings = False
    return head.weight.numel() * head.weight.element_size()


def rewrite(model: PreTrainedModel, config: LowBitConfig, targets: Targets, windows: Tensor | None) -> Rewriting:
    """Apply the transforms of a config to a dense model, which becomes float32, in place; without any, nothing happens.

    Args:
        targets: what will be low-bit.
        windows: calibration windows int64 ``[n, T]``; None without.

    Raises:
        BadRequest: a model whose graph cannot be found or that a transform does not fit, one that was transformed before, or
            too little calibration text.
        WeightError: a weight that a fold would overflow.
    """
    asked = config.parsed_transforms()
    before = list(getattr(model.config, DONE, None) or [])
    for entry, _ in asked:
        if entry.name in before:
            raise BadRequest(
                f"transform {entry.name!r} was applied to this model before ({', '.join(before)}). Start from the original."
            )
    _check_tokens(config, windows)
    if not asked:
        return Rewriting()
    done = Rewriting(dtype=model.dtype)
    _to_dtype(model, torch.float32)
    low_bit = {name for name, kind in targets.chosen.items() if kind == "linear"}
    done.bench = bench = ModelBench(
        graph_of(model), Weights.of(model), low_bit, config.activation_spec(), config.seed, done.intakes,
        model=model, windows=windows, matrix=config.spec(),
    )  # fmt: skip
    unread = low_bit - {reader.weight for site in bench.graph.sites for reader in site.readers}
    for entry, settings in asked:
        if entry.kind == "range":
            continue
        count, left = len(bench.steps), len(bench.skipped)
        bench.forget()
        with torch.no_grad():
            entry.run(bench, settings)
        if (
            len(bench.steps) == count and not bench.looked
        ):  # with calibration text it may have found every site fine as it is
            reasons = "; ".join(f"{site}: {why}" for site, why in [*bench.skipped, *bench.graph.report()][:3])
            raise BadRequest(f"transform {entry.name!r} found nothing it can do in {type(model).__name__} ({reasons}).")
        done.steps += [{"transform": entry.name, **step.describe()} for step in bench.steps[count:]]
        bench.skipped += [(name, "the traced pass did not reach it") for name in sorted(unread)]
        done.left_alone += [
            {"name": name, "transform": entry.name, "left_alone": reason}
            for name, reason in dict.fromkeys(bench.skipped[left:])
        ]
    return done


def _check_tokens(config: LowBitConfig, windows: Tensor | None) -> None:
    tokens, spec = 0 if windows is None else windows.numel(), config.activation_spec()
    wanted = ("inputs", "rounding") if windows is None else ("inputs", "rounding", "helped")
    asked = [f"transform {entry.name!r}" for entry, _ in config.parsed_transforms() if entry.needs in wanted]
    if spec is not None and spec.static:
        asked.append("a static range")
    if asked and tokens < FEWEST_TOKENS:
        raise BadRequest(
            f"{asked[0]} needs at least {FEWEST_TOKENS} tokens of calibration text to see the range of each "
            f"channel, got {tokens}. Give more: --calibration FILE --sequences N --length T."
        )


def graph_of(model: PreTrainedModel) -> Graph:
    """The graph of a model, from a forward pass on a few tokens.

    Raises:
        BadRequest: the model cannot be run or traced.
    """
    ids = torch.arange(1, PROBE_TOKENS + 1, device=model.device)[None]
    training = model.training
    model.eval()
    keep = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    try:
        return find_graph(model, lambda: model(input_ids=ids, **keep), is_experts)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, AttributeError) as error:
        raise BadRequest(
            f"transforms cannot follow {type(model).__name__}: {type(error).__name__}: {str(error)[:160]}. "
            "Leave transforms out."
        ) from error
    finally:
        model.train(training)


@contextmanager
def unrounded(model: nn.Module, intakes: Intakes) -> Iterator[None]:
    """Let a dense model run with what stays at run time before its matrices, without rounding."""
    handles = []
    for weight, intake in intakes.items():
        exact = _Exact(intake.activations(None))
        handles.append(model.get_submodule(weight.removesuffix(".weight")).register_forward_pre_hook(exact))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Exact:
    """A pre-hook; a class, so that copies of a module share it."""

    def __init__(self, activations: Activations) -> None:
        self.activations = activations

    def __deepcopy__(self, memo: dict) -> _Exact:
        return self

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (self.activations.exact(args[0]), *args[1:])


@torch.no_grad()
def _gather(model: Any, sites: Sequence[Site], windows: Tensor, intakes: Intakes) -> dict[int, SiteInputs]:
    """Run the calibration windows once and look at every site."""
    kept = {site.source: max(SAMPLE, SAMPLE_NUMBERS // site.size) for site in sites}
    sums = {source: _Sums(max(1, windows.numel() // tokens)) for source, tokens in kept.items()}
    handles = []
    with unrounded(model, intakes):
        for site in sites:
            for reader in site.readers:
                module: Any = _owner(model, reader.weight)
                if module is None or not torch.equal(reader.columns, torch.arange(site.size)):
                    continue
                intake = intakes.get(reader.weight)
                look = sums[site.source].hook(None if intake is None else intake.activations(None))
                handles.append(module.register_forward_pre_hook(look, prepend=True))
                break
        try:
            for ids in windows.split(max(1, TOKENS_PER_PASS // windows.shape[1])):
                model(input_ids=ids.to(model.device), **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
        finally:
            for handle in handles:
                handle.remove()
    return {number: found.finish() for number, found in sums.items() if found.count}


def _owner(model: nn.Module, weight: str) -> nn.Module | None:
    """The module whose only input is multiplied by a weight; None for stacks."""
    name, _, parameter = weight.rpartition(".")
    module = model.get_submodule(name)
    return None if parameter != "weight" or is_experts(module) else module


class _Sums:
    def __init__(self, stride: int) -> None:
        self.stride, self.count = stride, 0
        self.parts: list[Tensor] = []
        self.low = self.high = self.total = torch.zeros(0)

    def hook(self, activations: Activations | None) -> Any:
        """A pre-hook that adds what a module is given."""

        def look(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2).float().cpu()
            x = x if activations is None else activations.rewritten(x)
            if not bool(torch.isfinite(x).all()):
                raise LowBitError("the model yields NaN or infinity on the calibration text. Check its weights.")
            low, high, total = x.amin(0), x.amax(0), x.abs().sum(0)
            if self.count:
                low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
                total = total + self.total
            self.low, self.high, self.total = low, high, total
            self.parts.append(x[(-self.count) % self.stride :: self.stride].clone())
            self.count += len(x)

        return look

    def finish(self) -> SiteInputs:
        """What was seen."""
        return SiteInputs(self.low, self.high, self.total / self.count, torch.cat(self.parts))


def quantizers(
    targets: Targets, sizes: Mapping[str, int], intakes: Intakes, spec: ActivationSpec | None
) -> dict[str, ActivationQuantizer]:
    """For each linear layer that rounds or rewrites its inputs, by module name, what does that; static steps are still 1.

    Args:
        sizes: inputs of each chosen matrix.
    """
    found = {}
    for full, kind in targets.chosen.items():
        if kind != "linear" or (spec is None and full not in intakes):
            continue
        plain = Activations(ActivationLayout(sizes[full], spec), {})
        made = intakes[full].activations(spec) if full in intakes else plain
        tensors = dict(made.tensors)
        if made.layout.steps:
            tensors |= {"step": torch.ones(made.layout.steps).view(torch.int32)}
            tensors |= {"zero": torch.zeros(made.layout.steps, dtype=torch.int32)}
        found[full.removesuffix(".weight")] = ActivationQuantizer(made.layout, tensors)
    return found


def back_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what stayed in high precision the dtype it had before the rewriting.

    Raises:
        WeightError: a number that it cannot hold.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            largest = float(parameter.detach().abs().max())
            if largest > torch.finfo(dtype).max:
                raise WeightError(
                    f"{name}: transforms made it as large as {largest:.3g}, which {dtype} cannot hold. "
                    "Load the model in bfloat16 or float32."
                )
    _to_dtype(model, dtype)
    for module in model.modules():
        if "dtype_like" in module._buffers:
            module._buffers["dtype_like"] = torch.empty(0, dtype=dtype)


def _to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
