"""Orthogonal matrices for the residual stream and for heads, of any size."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.format.hadamard import factor_of, rotate


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that rotations do not depend on what was drawn before."""
    return torch.Generator().manual_seed(seed)


def random_orthogonal(size: int, seed: int) -> Tensor:
    """A uniformly drawn orthogonal matrix, float64 ``[size, size]``."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator(seed)))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)


def random_hadamard(size: int, seed: int) -> Tensor:
    """A Hadamard matrix behind random signs, float64 ``[size, size]``; uniformly drawn where none of the size is known."""
    if factor_of(size)[1] != size:
        return random_orthogonal(size, seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator(seed)).double() * 2 - 1
    return signs * rotate(torch.eye(size, dtype=torch.float64))


def keeping_ones(matrix: Tensor) -> Tensor:
    """A rotation that keeps the all-ones vector, from an orthogonal matrix ``[D - 1, D - 1]`` of what is left.

    Layer norms take the mean away, so only such rotations commute with them; none of their class has to change for it.
    """
    size = len(matrix) + 1
    # The reflection that takes the first unit vector to the all-ones direction.
    ones = torch.full((size,), size**-0.5, dtype=torch.float64)
    normal = ones - torch.eye(size, dtype=torch.float64)[0]
    length = float(normal.norm())
    if length == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    normal = normal / length
    basis = torch.eye(size, dtype=torch.float64) - 2 * normal[:, None] * normal[None]
    return basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), matrix.double()) @ basis.T


def residual_rotation(size: int, centred: bool, seed: int) -> Tensor:
    """A random rotation of a residual stream, float64 ``[size, size]``."""
    return keeping_ones(random_orthogonal(size - 1, seed)) if centred else random_hadamard(size, seed)
