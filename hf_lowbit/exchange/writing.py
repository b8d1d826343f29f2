"""Targets: formats of other tools that records can be written in, and what each can express."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.tensor import LowBitTensor


class Scheme(NamedTuple):
    """How a matrix is coded in a target; matrices of one scheme share an entry of its settings.

    Attributes:
        bits: of a code.
        group_size: columns per scale; 0 where there is one per row.
        symmetric: whether there are no zero points.
        ordered: whether the columns of a group lie side by side.
    """

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool = True


@dataclass(frozen=True)
class Target:
    """A checkpoint format of safetensors files.

    Attributes:
        name: what ``--to`` takes.
        summary: what it can express.
        advice: options of ``quantize`` whose result it can.
        scheme: the scheme of a matrix, or :class:`~hf_lowbit.exchange.misfit.Misfit`; None writes all matrices dense.
        together: schemes that may stand side by side in one checkpoint, from those of its matrices.
        tensors: the fields of a matrix ``MODULE`` by the name behind ``MODULE.``.
        settings: ``quantization_config``, from the scheme of each module and the linear layers that stay dense.
    """

    name: str
    summary: str
    advice: str
    scheme: Callable[[LowBitTensor, torch.dtype], Scheme] | None = None
    together: Callable[[Mapping[str, Scheme]], Mapping[str, Scheme]] = dict
    tensors: Callable[[LowBitTensor, Scheme, torch.dtype], dict[str, Tensor]] | None = None
    settings: Callable[[Mapping[str, Scheme], Sequence[str]], dict[str, Any]] | None = None


TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Make a target known by its name."""
    TARGETS[target.name] = target
    return target


def target_of(name: str) -> Target:
    """A target by its name.

    Raises:
        BadRequest: there is none.
    """
    if name not in TARGETS:
        raise BadRequest(unknown_name("target", name, TARGETS))
    return TARGETS[name]


DENSE = register(
    Target(
        "dense",
        "any method; each weight rounded once to --dtype; transforms are multiplied in, rounded activations are not",
        "--method codebook",
    )
)
