"""How a model calls its blocks: recorded once per batch with the blocks themselves left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.errors import LowBitError
from hf_lowbit.pipeline.blocks import Block, Call, Stop, stopping

# Rows of a head that are float32 at once: 128 MB at 4,096 inputs.
HALF_ROWS = 1 << 13


@dataclass
class Batch:
    """One batch of calibration windows on its way through the blocks.

    Attributes:
        ids: int64 ``[b, T]``.
        hidden: float32 ``[b, T, D]``, behind the quantized prefix.
        original: the same in the original model.
        calls: how each block is called.
    """

    ids: Tensor
    hidden: Tensor
    original: Tensor
    calls: Sequence[Call]


class Recorder:
    """Runs everything of a model but its blocks.

    Args:
        model: called as ``model(input_ids=..., use_cache=False)``.
        blocks: in running order.
    """

    def __init__(self, model: Any, blocks: Sequence[Block]) -> None:
        self.model, self.blocks = model, blocks
        self.as_tuple = False
        self._known: dict[int, list[Call]] = {}

    def batch(self, ids: Tensor) -> Batch:
        """Embed ``ids`` ``[b, T]`` and record how every block would be called.

        Raises:
            LowBitError: blocks run in another order than they are listed, or more than once.
        """
        if not self._known:
            self._learn_form(ids)
        calls: list[Call] = []
        seen: list[Tensor] = []

        def stand_in(number: int, hidden: Tensor, call: Call) -> Tensor:
            if number != len(calls):
                raise LowBitError(
                    f"the model runs {self.blocks[number].name} as its block number {len(calls)}; calibration needs blocks "
                    "that run once, in order. Use a data-free method, such as codebook."
                )
            calls.append(call)
            seen.append(hidden)
            if number + 1 == len(self.blocks):
                raise Stop
            return hidden

        with self._without_blocks(stand_in), stopping():
            self.model(input_ids=ids.to(self.model.device), use_cache=False)
        if len(calls) != len(self.blocks):
            raise LowBitError(f"the model ran {len(calls)} of its {len(self.blocks)} blocks; calibration needs all of them.")
        first = self._known.setdefault(len(ids), calls)
        calls = [_shared(call, known) for call, known in zip(calls, first, strict=True)]
        hidden = seen[0].cpu().float().clone()
        return Batch(ids, hidden, hidden, calls)

    def tail(self, ids: Tensor, hidden: Tensor) -> Any:
        """What follows the last block: the model's output for final hidden states ``[b, T, D]``, with gradients."""

        def stand_in(number: int, before: Tensor, call: Call) -> Tensor:
            return hidden.to(before.device, before.dtype) if number + 1 == len(self.blocks) else before

        with self._without_blocks(stand_in), _half_products_in_float32(self.model):
            return self.model(input_ids=ids.to(self.model.device), use_cache=False)

    def _learn_form(self, ids: Tensor) -> None:
        """Whether blocks return hidden states or a tuple that starts with them."""
        found: list[Any] = []

        def stand_in(number: int, hidden: Tensor, call: Call) -> Tensor:
            module, hidden = self.blocks[0].open().module, hidden.cpu().float()
            name = {} if call.keyword is None else {call.keyword: hidden}
            first = () if call.keyword is not None else (hidden,)
            found.append(module(*first, *call.args, **call.kwargs, **name))
            raise Stop

        with self._without_blocks(stand_in), stopping():
            self.model(input_ids=ids[:1].to(self.model.device), use_cache=False)
        self.as_tuple = bool(found) and not isinstance(found[0], Tensor)

    @contextmanager
    def _without_blocks(self, stand_in: Any) -> Iterator[None]:
        def forward_of(number: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split(args, kwargs)
                out = stand_in(number, hidden, call)
                return (out, None) if self.as_tuple else out

            return forward

        for number, block in enumerate(self.blocks):
            block.module.forward = forward_of(number)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.module.forward


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    rest = {name: _as_float(value) for name, value in kwargs.items()}
    if args:
        return args[0], Call(tuple(_as_float(value) for value in args[1:]), rest)
    keyword = next(name for name, value in kwargs.items() if isinstance(value, Tensor) and value.dim() == 3)
    del rest[keyword]
    return kwargs[keyword], Call((), rest, keyword)


def _as_float(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_as_float(item) for item in value)
    return value


def _shared(call: Call, known: Call) -> Call:
    """``known`` where both are equal, so that masks and rotary tables are kept once."""
    return known if _equal((call.args, dict(call.kwargs)), (known.args, dict(known.kwargs))) else call


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


def check_finite(hidden: Tensor, where: str) -> None:
    """Refuse hidden states with NaN or infinity.

    Raises:
        LowBitError: naming the block.
    """
    if not torch.isfinite(hidden).all():
        raise LowBitError(
            f"{where} yields NaN or infinity on the calibration text. The checkpoint is damaged or overflows there: "
            "check its weights, or use other text."
        )


class _HalfProduct(torch.autograd.Function):
    """``x @ weight.T`` for a half-precision weight in float32, some rows of it at a time, with the gradient by ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """``[..., out]`` of ``x`` ``[..., in]`` and ``weight`` ``[out, in]``, in the dtype of ``x``."""
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return torch.cat([x.float() @ part.float().T for part in weight.split(HALF_ROWS)], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Gradient by ``x``."""
        (weight,) = ctx.saved_tensors
        pairs = zip(grads[0].split(HALF_ROWS, -1), weight.split(HALF_ROWS), strict=True)
        return sum((grad.float() @ part.float() for grad, part in pairs), torch.zeros(())).to(ctx.dtype), None


@contextmanager
def _half_products_in_float32(model: Any) -> Iterator[None]:
    """Products by half-precision weights in float32: on CPUs without such units a head takes 2.2 s instead of 0.03 s."""
    changed: list[Any] = []
    for module in model.modules():
        plain = type(module) is torch.nn.Linear and module.bias is None and "forward" not in module.__dict__
        if plain and module.weight.dtype in (torch.float16, torch.bfloat16) and module.weight.device.type == "cpu":
            module.forward = _product_by(module.weight)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _product_by(weight: Tensor) -> Any:
    return lambda x: _HalfProduct.apply(x, weight)
