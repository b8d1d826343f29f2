"""Hadamard rotations of any size: Sylvester's doubling over Paley's matrices, block by block where no whole one is known.

Source: R. E. A. C. Paley, "On orthogonal matrices" (1933): order ``q + 1`` for a prime ``q = 3 mod 4``, ``2 (q + 1)`` for a
prime ``q = 1 mod 4``; a Kronecker product of Hadamard matrices is one.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# The dense factor of an online rotation costs its order in multiplications per channel.
LARGEST_FACTOR = 1024


@lru_cache
def factor_of(size: int) -> tuple[int, int]:
    """``(order, block)``: the order of the rotation's dense factor and its block size, a power of two times that.

    The block is the whole ``size`` where its odd part has a Paley matrix of at most 1024, else the largest power of two
    that divides it.
    """
    power = size & -size
    odd = size // power
    if odd == 1:
        return 1, size
    order = 4 * odd
    while order <= LARGEST_FACTOR and size % order == 0:
        if _paley_prime(order) is not None:
            return order, size
        order *= 2
    return 1, power


def rotate(x: Tensor) -> Tensor:
    """``x H`` for ``x`` ``[.., n]`` and the orthonormal block-diagonal Hadamard matrix of size n."""
    width = x.shape[-1]
    order, block = factor_of(width)
    doubling = block // order
    y = x.reshape(*x.shape[:-1], width // block, order, doubling)
    half = 1
    while half < doubling:
        y = y.reshape(*y.shape[:-1], doubling // (2 * half), 2, half)
        y = torch.stack((y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]), -2).flatten(-3)
        half *= 2
    if order > 1:
        y = paley(order).to(y).T @ y
    return (y * block**-0.5).reshape(x.shape)


def unrotate(x: Tensor) -> Tensor:
    """``x H^T``, the inverse of :func:`rotate`."""
    width = x.shape[-1]
    order, block = factor_of(width)
    if order == 1:
        return rotate(x)
    doubling = block // order
    y = x.reshape(*x.shape[:-1], width // block, order, doubling)
    y = (paley(order).to(y) @ y) * order**-0.5
    flat = y.reshape(*x.shape[:-1], width // doubling, doubling)
    return rotate(flat).reshape(x.shape) if doubling > 1 else y.reshape(x.shape)


@lru_cache
def paley(order: int) -> Tensor:
    """A Hadamard matrix of entries 1 and -1, int8 ``[order, order]``; orders :func:`factor_of` names."""
    prime = _paley_prime(order)
    assert prime is not None, order
    squares = {(i * i) % prime for i in range(1, prime)}
    symbol = torch.tensor([0, *(1 if i in squares else -1 for i in range(1, prime))], dtype=torch.int64)
    places = torch.arange(prime)
    core = symbol[(places[:, None] - places[None, :]) % prime]
    bordered = torch.zeros(prime + 1, prime + 1, dtype=torch.int64)
    bordered[1:, 1:] = core
    bordered[0, 1:] = 1
    if prime % 4 == 3:
        bordered[1:, 0] = -1
        return (bordered + torch.eye(prime + 1, dtype=torch.int64)).to(torch.int8)
    bordered[1:, 0] = 1
    eye = torch.eye(prime + 1, dtype=torch.int64)
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return (torch.kron(bordered, plus) + torch.kron(eye, minus)).to(torch.int8)


def _paley_prime(order: int) -> int | None:
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    prime = order // 2 - 1
    return prime if order % 4 == 0 and prime % 4 == 1 and _is_prime(prime) else None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
