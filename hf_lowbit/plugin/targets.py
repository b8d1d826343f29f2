"""Which parameters of a model become low-bit, and why each other large matrix does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowbit.errors import BadRequest, FallbackError, unknown_name
from hf_lowbit.format.spec import Spec
from hf_lowbit.plugin.config import LowBitConfig, matches
from hf_lowbit.plugin.experts import is_experts, stacks_of, to_low_bit
from hf_lowbit.plugin.modules import LowBitEmbedding, LowBitLinear, LowBitModule, LowBitTiedHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["linear", "embedding", "head", "experts"]
# Smaller matrices left in high precision do not make `strict` fail.
LARGE = 1 << 12
# Gates and scores with fewer rows or columns cost nothing as they are, and decide much.
FEWEST = 8


@dataclass
class Targets:
    """The outcome of :func:`find_targets`: parameter name -> kind, and parameter name -> reason it is kept."""

    chosen: dict[str, Kind] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def spec(self, full: str, config: LowBitConfig) -> Spec:
        """The spec of a chosen parameter."""
        return config.spec(place_of(full), embedding=self.chosen[full] in ("embedding", "head"))


def find_targets(model: PreTrainedModel, config: LowBitConfig) -> Targets:
    """Walk a model (on any device, meta included) and decide for every parameter of two or more axes.

    Raises:
        BadRequest: a pattern of the config matches no module.
        FallbackError: ``strict`` and a large matrix would stay in high precision unasked.
    """
    _check_patterns(model, config)
    out, unasked = Targets(), []
    ends = ends_of(model)
    tied = tied_head(model)
    for name, module in model.named_modules():
        for parameter, tensor in module._parameters.items():
            if tensor is None or tensor.ndim < 2 or parameter.endswith("bias"):
                continue
            full = f"{name}.{parameter}" if name else parameter
            kind = _kind(module, parameter, module is ends[0])
            places = [place_of(name) for name in (tied if tied and full in tied else [full])]  # tied: one table, two names
            asked = [p for p in config.modules_to_not_convert if any(matches(place, p) for place in places)]
            if asked:
                out.kept[full] = f"modules_to_not_convert names {asked[0]!r}"
            elif module in ends and not config.quantize_embeddings:
                out.kept[full] = "quantize_embeddings is off"
            elif module is ends[1] and tied and kind == "linear":
                continue  # the head of a tied pair: its table is the embedding's
            elif kind == "embedding" and _shared_beyond_head(model, full):
                out.kept[full] = "its table is tied to more than the output head"
            elif kind is not None:
                out.chosen[full] = "head" if module is ends[1] and kind == "linear" else kind
            else:
                out.kept[full] = _why_not(module, parameter, tensor)
                if tensor.numel() >= LARGE and not _small_part(module, tensor):
                    unasked.append(full)
    if config.strict and unasked:
        reasons = "; ".join(f"{name}: {out.kept[name]}" for name in unasked[:5])
        raise FallbackError(
            f"strict: {len(unasked)} matrices would stay in high precision ({reasons}). "
            "Name them in modules_to_not_convert (--skip), or leave strict out."
        )
    return out


def place_of(full: str) -> str:
    """What patterns are matched against: a module's name, or an expert stack's ``module.parameter``."""
    return full.removesuffix(".weight")


def ends_of(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and output head, where the model has them."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            found.append(None)
    return found[0], found[1]


def tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """Parameter names ``(head, embedding)`` if the head shares the input embedding's table."""
    table, head = ends_of(model)
    if table is None or head is None or table is head:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    pair = (f"{names.get(id(head))}.weight", f"{names.get(id(table))}.weight")
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return pair if ties.get(pair[0]) == pair[1] or ties.get(pair[1]) == pair[0] else None


def _shared_beyond_head(model: PreTrainedModel, table: str) -> bool:
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    partners = {a if b == table else b for a, b in ties.items() if table in (a, b)}
    pair = tied_head(model)
    return bool(partners - {pair[0] if pair else None})


def _kind(module: Any, parameter: str, is_table: bool) -> Kind | None:
    if parameter == "weight" and type(module) in (nn.Linear, Conv1D):
        return "linear" if min(module.weight.shape) >= FEWEST else None
    if parameter == "weight" and is_table and isinstance(module, nn.Embedding) and module.max_norm is None:
        plain = type(module).forward is nn.Embedding.forward
        return "embedding" if plain or hasattr(module, "embed_scale") else None
    if is_experts(module) and parameter in stacks_of(module):
        return "experts"
    return None


def _why_not(module: nn.Module, parameter: str, tensor: torch.Tensor) -> str:
    if isinstance(module, nn.Embedding):
        return "a look-up table that is not the input embedding (positions, types)"
    if tensor.ndim == 2 and "router" in type(module).__name__.lower():
        return "a router: small, and a wrong choice of expert costs more than its bytes"
    if type(module) in (nn.Linear, Conv1D):
        return f"fewer than {FEWEST} inputs or outputs: nothing to gain"
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} is a subclass of Linear whose forward is not known"
    return f"{type(module).__name__}.{parameter} is not a linear layer, embedding or expert stack known to hf-lowbit"


def _small_part(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Parameters nobody expects to be quantized: position tables, routers, convolutions over few channels."""
    return isinstance(module, nn.Embedding) or "router" in type(module).__name__.lower() or tensor.ndim == 4


def _check_patterns(model: PreTrainedModel, config: LowBitConfig) -> None:
    names = [place_of(name) for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.ndim > 1]
    for pattern in [*config.overrides, *config.modules_to_not_convert]:
        if not any(matches(name, pattern) for name in names):
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise BadRequest(unknown_name("module", pattern, parts))


def replace_modules(model: PreTrainedModel, chosen: Iterable[str], dtype: torch.dtype) -> None:
    """Put low-bit modules in the place of dense ones, still without low-bit tensors.

    Linear and embedding modules keep their meta ``weight`` parameter until :meth:`LowBitModule.install`, biases stay the
    host's own parameters. A tied head becomes a view of its embedding.
    """
    for full in chosen:
        name, _, _ = full.rpartition(".")
        module = model.get_submodule(name)
        if isinstance(module, LowBitModule):
            continue
        if is_experts(module):
            to_low_bit(module)
        elif isinstance(module, nn.Embedding):
            _replace_embedding(model, name, module, dtype)
        else:
            model.set_submodule(name, _linear_like(module))


def _linear_like(module: Any) -> LowBitLinear:
    weight = module.weight
    transposed = isinstance(module, Conv1D)
    out_features, in_features = weight.shape[::-1] if transposed else weight.shape
    with torch.device("meta"):
        new = LowBitLinear(in_features, out_features, bias=False, transposed=transposed)
    new.bias = module.bias
    new.register_parameter("weight", weight)
    new.train(module.training)
    return new


def _replace_embedding(model: PreTrainedModel, name: str, module: Any, dtype: torch.dtype) -> None:
    pair = tied_head(model)
    weight = module.weight
    new = LowBitEmbedding(module, dtype)
    del module.weight
    new.register_parameter("weight", weight)
    new.train(module.training)
    model.set_submodule(name, new)
    if pair is not None and pair[1] == f"{name}.weight":
        head_name = pair[0].removesuffix(".weight")
        model.set_submodule(head_name, LowBitTiedHead(new, model.get_submodule(head_name).bias))
        untie_record(model, pair)


def untie_record(model: PreTrainedModel, pair: tuple[str, str]) -> None:
    """Take a pair off the host's lists of tied parameters: the tied head now holds its embedding itself.

    The config keeps ``tie_word_embeddings``; :func:`retie_record` brings the lists back.
    """
    model.all_tied_weights_keys = _without(model.all_tied_weights_keys, pair)
    model._tied_weights_keys = _without(model._tied_weights_keys or {}, pair)


def _without(ties: dict[str, str], pair: tuple[str, str]) -> dict[str, str]:
    return {target: source for target, source in ties.items() if {target, source} != set(pair)}


def retie_record(model: PreTrainedModel) -> None:
    """Undo :func:`untie_record` once the dense modules are back, and tie them."""
    model.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def low_bit_modules(model: PreTrainedModel) -> Iterator[tuple[str, LowBitModule]]:
    """All modules that own low-bit parameters."""
    for name, module in model.named_modules():
        if isinstance(module, LowBitModule) and getattr(module, "layouts", None):
            yield name, module
