"""The constants a layer takes from all its keys and values, so that few bits are spent on what tokens have in common.

A constant on all keys moves all scores of a query alike and changes no attention weight. One on all values comes back as it
is, since the weights of a query add up to one. Both are exact. What is left of the values no longer leans to one side, so
that rounding errors of many tokens cancel where attention is spread over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# A mean over fewer tokens says little, and the first token alone is unlike all others.
LEAST_TOKENS = 16


@dataclass
class Center:
    """Means of the first keys and values, float32 ``[batch, heads, 1, dim]``, or None where nothing is subtracted."""

    keys: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Center:
        """The means of a prompt ``[batch, heads, n, dim]``; none of a prompt of few tokens."""
        if keys.shape[2] < LEAST_TOKENS:
            return cls()
        return cls(keys.float().mean(2, keepdim=True), values.float().mean(2, keepdim=True))

    def taken(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, n, dim]`` without their means, in the dtype they come in."""
        if self.keys is None or self.values is None:
            return keys, values
        return (keys.float() - self.keys).to(keys.dtype), (values.float() - self.values).to(values.dtype)

    def given_back(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`taken`."""
        if self.keys is None or self.values is None:
            return keys, values
        return keys + self.keys, values + self.values

    def seen(self, out: Tensor) -> Tensor:
        """What attention over values without their mean gave, ``[batch, n, heads, dim]``, with it; changes ``out``."""
        if self.values is not None:
            batch, heads, _, dim = self.values.shape
            out.unflatten(2, (heads, -1)).add_(self.values.view(batch, 1, heads, 1, dim))
        return out

    def tensors(self) -> dict[str, Tensor]:
        """By the names of their fields."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor."""
        for name, tensor in self.tensors().items():
            setattr(self, name, change(tensor))
