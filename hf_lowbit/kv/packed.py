"""What a cache layer hands to attention in place of keys and values: a handle, which is decoded only if somebody insists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from hf_lowbit.kv.layer import LowBitLayer


class Packed:
    """The keys (``side`` 0) or values (1) of a layer.

    Attention that knows the class reads the packed cache through ``layer``. Anything else that touches the handle, be it a
    torch function or an attribute of tensors, gets all keys or values decoded: right, at the price of a whole dense layer.
    """

    def __init__(self, layer: LowBitLayer, side: int, pair: dict[int, Tensor]) -> None:
        self.layer, self.side, self.pair = layer, side, pair

    def dense(self) -> Tensor:
        """All keys or values ``[batch, heads, length, dim]`` in order, in the dtype of the model."""
        if not self.pair:
            self.pair |= enumerate(self.layer.dense())
        return self.pair[self.side]

    @property
    def shape(self) -> torch.Size:
        """Of the dense tensor."""
        return self.layer.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense tensor."""
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.layer.device

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, Packed) else x, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("layer", "side", "pair"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __len__(self) -> int:
        return self.shape[0]
