"""SVFit's parametrization inside a LoRA layer: fixed singular directions, a trainable number for each.

``y = Q(W) x + U_r (delta * (V_r^T x))`` (SVFit, arXiv 2409.05926; the form on a quantized base and how it starts are
reconstructed). ``lora_A`` holds ``V_r^T`` and ``lora_B`` shows ``U_r diag(delta)``, so that the adapter is saved as a plain
LoRA, which any process loads; read back into a layer of this kind, it gives its numbers back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EXACT = 1024
OVERSAMPLED = 16


class Directions(nn.Module):
    """The right singular directions, as a linear map without a trainable weight.

    Args:
        weight: float32 ``[r, in]``.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.bias = None
        self.register_buffer("weight", weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., r]``."""
        return nn.functional.linear(x, self.get_buffer("weight"))


class SingularValues(nn.Module):
    """``U diag(values)`` as a linear map; only the values are trained.

    Args:
        directions: float32 ``[out, r]``, orthonormal columns.
        values: float32 ``[r]``.
    """

    def __init__(self, directions: Tensor, values: Tensor) -> None:
        super().__init__()
        self.bias = None
        self.register_buffer("directions", directions.contiguous(), persistent=False)
        self.values = nn.Parameter(values.clone())

    @property
    def weight(self) -> Tensor:
        """``[out, r]``."""
        return self.get_buffer("directions") * self.values

    def forward(self, x: Tensor) -> Tensor:
        """``[..., r]`` to ``[..., out]``."""
        return nn.functional.linear(x * self.values, self.get_buffer("directions"))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            state_dict[f"{prefix}values"] = (self.get_buffer("directions") * weight.to(self.values)).sum(0)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def top_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular triples of a float matrix ``[out, in]``: ``u [out, r]``, ``s [r]``, ``v [in, r]``.

    Exact up to :data:`EXACT` rows or columns, beyond that by seeded random projection (Halko et al. 2011) with 8 rounds.
    What ``rank`` asks for beyond the number of rows or columns is zero.
    """
    if min(weight.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], vh[:rank].T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight.float(), q=min(rank + OVERSAMPLED, *weight.shape), niter=8)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    lacking = (0, rank - len(s))
    return tuple(nn.functional.pad(part, lacking) for part in (u, s, v))  # type: ignore[return-value]
