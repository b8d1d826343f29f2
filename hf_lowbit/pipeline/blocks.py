"""Blocks and sites: what the pipeline works on, without knowing the host library.

A block is one repeated layer of the model; a site is one matrix (or stack of matrices) in it. The plugin opens blocks as
float32 working copies; the pipeline runs them, watches the inputs of sites, and puts quantized values in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Told the number of the matrix in its stack (0 for a plain one) and its inputs [tokens, in].
Sink = Callable[[int, Tensor], None]


class Site(Protocol):
    """One matrix ``[out, in]`` or stack ``[experts, out, in]`` of an open block."""

    name: str
    stacked: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The dense parameter in the working copy, in the module's own order of axes."""

    @property
    def local(self) -> str:
        """Its name within the block."""

    def turned(self, values: Tensor) -> Tensor:
        """From the module's order of axes to ``[.., out, in]``, or back: a transposition or nothing."""

    def watch(self, sink: Sink) -> Any:
        """Call ``sink`` with the inputs of every use, until the returned handle's ``remove``."""


@dataclass(frozen=True)
class Block:
    """One block of a model that may not be in memory.

    Attributes:
        name: module name in the model.
        module: the model's own module, for recording how it is called; its weights are not touched.
        sites: names of the parameters to quantize.
        open: makes a float32 working copy and its sites by name.
        weight: reads one site ``[.., out, in]`` in float32.
    """

    name: str
    module: nn.Module
    sites: tuple[str, ...]
    open: Callable[[], OpenBlock]
    weight: Callable[[str], Tensor]


@dataclass
class OpenBlock:
    """A float32 working copy of block ``number`` and its sites by full parameter name."""

    number: int
    module: nn.Module
    sites: Mapping[str, Site]

    def __call__(self, hidden: Tensor, call: Call) -> Tensor:
        """Hidden states ``[b, T, D]`` through the block."""
        return call.run(self.module, hidden)


@dataclass(frozen=True)
class Call:
    """How the model calls a block, apart from the hidden states.

    Attributes:
        args, kwargs: the other arguments.
        keyword: name under which hidden states are passed; None for the first positional argument.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    keyword: str | None = None

    def run(self, module: Any, hidden: Tensor) -> Tensor:
        """The hidden states the module returns."""
        if self.keyword is not None:
            out = module(*self.args, **self.kwargs, **{self.keyword: hidden})
        else:
            out = module(hidden, *self.args, **self.kwargs)
        return out if isinstance(out, Tensor) else out[0]


class Stop(Exception):
    """Ends a forward pass that has shown what it was run for."""


@contextmanager
def stopping() -> Iterator[None]:
    """A forward pass that may be ended by :class:`Stop`, without gradients."""
    with torch.no_grad(), suppress(Stop):
        yield


@dataclass(frozen=True)
class Group:
    """Sites that read the same inputs, in the order they run.

    Attributes:
        names: of the sites.
        seen: whether the probe batch reached them at all.
    """

    names: tuple[str, ...]
    seen: bool = True


def find_groups(block: OpenBlock, hidden: Tensor, call: Call) -> list[Group]:
    """Group the sites of a block by shared input, in running order (q, k, v; o; gate, up; down in a Llama block).

    Args:
        hidden: one batch ``[b, T, D]``, run through the block once.
    """
    order: list[tuple[str, Tensor]] = []  # holds the inputs, so that no address is used twice

    def note(name: str) -> Sink:
        return lambda number, x: None if any(name == known for known, _ in order) else order.append((name, x))

    handles = [site.watch(note(name)) for name, site in block.sites.items()]
    with stopping():
        block(hidden, call)
    for handle in handles:
        handle.remove()
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, x in order:
        shared = last is not None and x.data_ptr() == last.data_ptr() and x.shape == last.shape
        if shared and not block.sites[name].stacked:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    missing = [name for name in block.sites if all(name != known for known, _ in order)]
    return [Group(tuple(names)) for names in groups] + [Group((name,), seen=False) for name in missing]
