"""Transform names, and the bench each works at: the graph of a model, its weights, and what calibration saw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.activations import ActivationSpec
from hf_lowbit.transforms.algebra import Rotate, Scale, Shift, Step, Weights
from hf_lowbit.transforms.graph import Graph, Site
from hf_lowbit.transforms.intake import Before, Intakes

# ``scale``: shifts and scales channels. ``rotation``: mixes them, so that none can follow. ``range``: where to clip.
Kind = Literal["scale", "rotation", "range"]
# What a transform draws on beside the weights: nothing; inputs seen on calibration text if there is any; those in any case;
# those and rounded activations.
Needs = Literal["none", "helped", "inputs", "rounding"]


@dataclass(frozen=True)
class SiteInputs:
    """What calibration saw of a site's tensor, shifts and divisions at run time included.

    Attributes:
        low, high, mean: smallest, largest and mean absolute value of each channel, float32 ``[size]``.
        sample: some tokens, float32 ``[n, size]``.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    sample: Tensor

    @property
    def largest(self) -> Tensor:
        """Largest absolute value of each channel."""
        return torch.maximum(self.high, -self.low)


@dataclass
class Bench(ABC):
    """What a transform works on; the plugin provides calibration.

    Attributes:
        graph: of the model as it is now.
        weights: its parameters.
        low_bit: weights of linear layers that will be low-bit, so that something may stay at run time before them.
        spec: how activations will be rounded; None not at all.
        seed: of random rotations.
        intakes: what stays at run time.
        steps: all that was done, in order.
        skipped: (site, reason) of what was left alone.
    """

    graph: Graph
    weights: Weights
    low_bit: Collection[str]
    spec: ActivationSpec | None
    seed: int = 0
    intakes: Intakes = field(default_factory=Intakes)
    steps: list[Step] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @abstractmethod
    def inputs(self, site: Site) -> SiteInputs | None:
        """What calibration saw of a site as it is now; None where no text reached it or it cannot be watched."""

    @abstractmethod
    def rounded(self, weight: Tensor) -> Tensor:
        """A matrix ``[out, in]`` as low-bit codes would have it."""

    def apply(self, step: Step) -> None:
        """Take a step and note it."""
        step.apply(self.weights)
        self.steps.append(step)

    def skip(self, site: Site, reason: str) -> None:
        """Note that a site was left alone, and why."""
        self.skipped.append((site.name, reason))

    def divide(self, site: Site, factor: Tensor) -> None:
        """Divide a site's channels by ``factor`` ``[size]``: in its producer, or at run time where that cannot be."""
        if site.producer is not None:
            return self.apply(Scale(site, factor))
        for place in self.places(site):
            self.apply(Scale(site, factor, place))
        return None

    def subtract(self, site: Site, offset: Tensor) -> None:
        """Subtract ``offset`` ``[size]`` from a site's channels before they are rounded."""
        for place in self.places(site):
            self.apply(Shift(site, offset, place))

    def rotate(self, site: Site) -> None:
        """Rotate a site's channels at run time."""
        for place in self.places(site):
            self.apply(Rotate(place))

    def places(self, site: Site) -> list[Before]:
        """Where something can stay at run time: before a site's low-bit readers; notes the others."""
        low = [reader for reader in site.readers if reader.weight in self.low_bit]
        for reader in site.readers:
            if reader not in low:
                self.skipped.append((reader.weight, "no low-bit linear layer, so nothing can stay before it at run time"))
        return [Before(self.intakes, reader) for reader in low]

    def watched(self, *kinds: str) -> Iterator[tuple[Site, list[Tensor], SiteInputs]]:
        """Each site of some ``kinds`` (all without) that low-bit matrices read, with those and what calibration saw of it.

        Others, and those that no calibration text reached, are noted as left alone.
        """
        for site in self.graph.sites:
            if kinds and site.kind not in kinds:
                continue
            if not (matrices := self.matrices(site)):
                self.skip(site, "no low-bit linear layer reads all of it in order")
            elif (seen := self.inputs(site)) is None:
                self.skip(site, "no calibration text reached it")
            else:
                yield site, matrices, seen

    def matrices(self, site: Site) -> list[Tensor]:
        """The low-bit readers of a site as float32 ``[out, in]``, their inputs in the order of the site's channels."""
        found = []
        for reader in site.readers:
            weight = self.weights[reader.weight].transpose(reader.axis, -1)
            if reader.weight in self.low_bit and torch.equal(reader.columns, torch.arange(site.size)):
                found.append(weight.reshape(-1, weight.shape[-1]).float())
        return found


@dataclass(frozen=True)
class Extremes:
    """Lowest and highest value of each part of an activation that has a step of its own, by token: ``[tokens, steps]``."""

    low: Tensor
    high: Tensor


@dataclass
class RangeBench(ABC):
    """What a transform of kind ``range`` works on, once the matrices are low-bit.

    Attributes:
        extremes: of each activation quantizer, by module name.
        bits: it rounds to.
    """

    extremes: dict[str, Extremes]
    bits: int

    @abstractmethod
    def set(self, ranges: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Use (lowest, highest) values ``[steps]`` for each quantizer from now on."""

    @abstractmethod
    def loss(self) -> float:
        """Error that rounding makes at the model's outputs with the ranges in force."""

    @abstractmethod
    def batches(self) -> int:
        """Batches of calibration text that ranges can be learned on."""

    @abstractmethod
    def error(self, ranges: Mapping[str, tuple[Tensor, Tensor]], batch: int) -> Tensor:
        """The same on one batch with these ranges, and with gradients to them."""


Body = Callable[[Any, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Transform:
    """One entry of the table.

    Attributes:
        name: what users write.
        run: rewrites a model at its bench.
        kind: what may follow it.
        needs: what it needs beside the weights.
        summary: one line for users.
        options: names and defaults of its own settings.
    """

    name: str
    run: Body
    kind: Kind
    needs: Needs
    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)


TRANSFORMS: dict[str, Transform] = {}


def transform(
    name: str, *, kind: Kind, needs: Needs, summary: str, options: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Body], Body]:
    """Register the decorated function as transform ``name``."""

    def register(run: Body) -> Body:
        if name in TRANSFORMS:
            raise ValueError(f"transform {name!r} is registered twice")
        TRANSFORMS[name] = Transform(name, run, kind, needs, summary, options)
        return run

    return register


def parse_transforms(asked: Sequence[Any]) -> list[tuple[Transform, dict[str, Any]]]:
    """Entries and their settings for what a user wrote: names, or mappings of ``name`` and settings.

    Raises:
        BadRequest: an unknown name or setting, one transform twice, or an order that cannot compose.
    """
    found: list[tuple[Transform, dict[str, Any]]] = []
    for item in asked:
        settings = dict(item) if isinstance(item, Mapping) else {"name": item}
        name = settings.pop("name", None)
        if name not in TRANSFORMS:
            raise BadRequest(unknown_name("transform", name, TRANSFORMS))
        entry = TRANSFORMS[name]
        for key, value in settings.items():
            if key not in entry.options:
                known = entry.options or {"none": None}
                raise BadRequest(unknown_name(f"setting of transform {name!r}", key, known))
            default = entry.options[key]
            if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, (bool, int, float)):
                raise BadRequest(f"setting {key!r} of transform {name!r} takes a value like {default!r}, got {value!r}.")
        if any(name == before.name for before, _ in found):
            raise BadRequest(f"transform {name!r} is asked for twice; the second time it would have nothing left to do.")
        mixed = next((before.name for before, _ in found if before.kind == "rotation"), None)
        if mixed is not None and entry.kind != "range":
            what = "mix the channels again" if entry.kind == "rotation" else "scale single channels"
            raise BadRequest(
                f"transform {name!r} cannot come after {mixed!r}: it would {what}, and the rotation has mixed them. "
                + (f"Put {name!r} first." if entry.kind == "scale" else "Use one of the two.")
            )
        found.append((entry, dict(entry.options) | settings))
    return found
