"""The ordered table of backends and the choice among them, with the reason for each refusal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, FallbackError, unknown_name
from hf_lowbit.format.layout import Layout
from hf_lowbit.format.tensor import LowBitTensor


class Verdict(NamedTuple):
    """Whether a backend can run a tensor, and why or why not."""

    ok: bool
    reason: str


class Backend(ABC):
    """One way to multiply by a low-bit matrix.

    ``prepare`` may repack the record for its kernel; what it returns is opaque, lives in memory only, and is given back
    to ``linear`` and ``embedding``.
    """

    name: str
    # Types of device it is written for; on any other it is no candidate, rather than one that refuses. None: all.
    devices: tuple[str, ...] | None = None

    @abstractmethod
    def supports(self, layout: Layout, device: torch.device) -> Verdict:
        """Whether tensors of this layout can run on ``device``."""

    @abstractmethod
    def prepare(self, tensor: LowBitTensor) -> Any:
        """The record in the form the kernel wants."""

    @abstractmethod
    def linear(self, x: Tensor, prepared: Any, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias`` for ``x`` ``[..., in]``, in the dtype of ``x``, differentiable in ``x`` and ``bias``."""

    @abstractmethod
    def embedding(self, ids: Tensor, prepared: Any, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` (integers, any shape) of ``W`` in ``dtype``."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs a tensor, why, and why each one before it in the table does not."""

    backend: Backend
    reason: str
    refused: tuple[tuple[str, str], ...]

    @property
    def fell_back(self) -> bool:
        """Whether a faster backend refused."""
        return bool(self.refused)


_TABLE: list[Backend] = []


def register_backend(backend: Backend, before: str | None = None) -> None:
    """Put a backend into the table: before the named one, or last."""
    if any(backend.name == known.name for known in _TABLE):
        raise ValueError(f"backend {backend.name!r} is registered twice")
    names = [known.name for known in _TABLE]
    _TABLE.insert(len(names) if before is None else names.index(before), backend)


def backends() -> list[Backend]:
    """All backends, fastest first."""
    return list(_TABLE)


def select(layout: Layout, device: torch.device, only: str | None = None, strict: bool = False) -> Choice:
    """The first backend of the table, of those for the device, that supports the tensor.

    Args:
        only: name of the one backend wanted.
        strict: raise instead of falling back.

    Raises:
        BadRequest: ``only`` names no backend, or one that refuses this tensor.
        FallbackError: ``strict`` and the first backend for the device refuses.
    """
    table = [b for b in _TABLE if only == b.name or (only is None and (b.devices is None or device.type in b.devices))]
    if not table:
        raise BadRequest(unknown_name("backend", only, [backend.name for backend in _TABLE]))
    refused: list[tuple[str, str]] = []
    for backend in table:
        verdict = backend.supports(layout, device)
        if verdict.ok:
            if strict and refused:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
                raise FallbackError(f"strict: a faster backend refused a tensor of shape {layout.shape} ({reasons}).")
            return Choice(backend, verdict.reason, tuple(refused))
        refused.append((backend.name, verdict.reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    raise BadRequest(f"no backend runs a tensor of shape {layout.shape} on {device} ({reasons}).")
