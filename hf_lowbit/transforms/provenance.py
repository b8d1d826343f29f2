"""Where every number of a forward pass comes from: one traced pass labels each element with the channel that made it.

A *source* is an operation that makes new channels: a matrix, a norm, an attention average, an activation. Its output
carries int64 labels ``source << 32 | channel`` of the output's own shape. Operations that only move numbers (views, slices,
heads, repeated key-value heads, experts' tokens) are run on the labels as well, so fused projections and grouped heads come
out right whatever a model calls them. Every other operation makes a new source and leaves a :class:`Use` on each it read;
what is not understood becomes ``opaque``, which no rewriting passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_lowbit.transforms.norms import Norm, norm_of

CHANNEL_BITS = 32
# Operations that move or cast numbers. The first are run on the labels, the others leave every element in its place.
MOVES = frozenset({
    "view", "reshape", "transpose", "permute", "expand", "expand_as", "unsqueeze", "squeeze", "flatten",
    "unflatten", "__getitem__", "chunk", "split", "tensor_split", "unbind", "cat", "concat", "stack",
    "repeat_interleave", "repeat", "movedim", "swapaxes", "narrow", "select", "index_select", "t", "view_as",
})  # fmt: skip
CASTS = frozenset({
    "contiguous", "clone", "detach", "to", "float", "half", "bfloat16", "double", "type", "type_as",
    "dropout", "alpha_dropout",
})  # fmt: skip
SCALES = frozenset({
    "mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "true_divide", "neg", "__neg__",
})  # fmt: skip
SUMS = frozenset({
    "add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__",
})  # fmt: skip
# Questions about a tensor that do not read its numbers.
METADATA = frozenset({
    "__get__", "size", "dim", "numel", "is_floating_point", "stride", "data_ptr", "__len__", "get_device",
    "element_size", "is_contiguous",
})  # fmt: skip


@dataclass(frozen=True)
class Use:
    """One reading of some channels (int64, sorted) of a source by an operation that made source ``into``."""

    op: str
    channels: Tensor
    into: int


@dataclass
class Source:
    """What made some channels.

    Attributes:
        kind: ``linear``, ``norm``, ``embedding``, ``attention``, ``softmax``, ``relu``, ``scaled``, ``product``, ``sum`` or
            ``opaque``.
        size: number of channels.
        weight, bias: parameter names of linear layers, embeddings and norms.
        axis: of ``weight``, the one that runs over this source's channels.
        parents: for each operand, the label (int64 ``[size]``) that each channel was made from.
        norm: what kind of norm.
        width: channels of a head, for ``attention``.
        made_by: for ``opaque``, the operation.
        uses: everything that read it.
    """

    kind: str
    size: int
    weight: str | None = None
    bias: str | None = None
    axis: int = -1
    parents: tuple[Tensor, ...] = ()
    norm: Norm | None = None
    width: int = 0
    made_by: str = ""
    uses: list[Use] = field(default_factory=list)


@dataclass(frozen=True)
class Read:
    """A matrix multiplying some channels.

    Attributes:
        weight, bias: parameter names.
        axis: of ``weight``, the one that runs over its inputs.
        columns: label of each input, int64 ``[in]``; None where tokens differ in it.
        output: number of the source it makes.
    """

    weight: str
    bias: str | None
    axis: int
    columns: Tensor | None
    output: int


class Trace(TorchFunctionMode):
    """Records sources and reads while a model runs; use as a context around one forward pass in eval mode.

    Args:
        model: whose parameters and norms are to be known.
        is_stack: tells a module that holds its experts' matrices as stacks (``hf_lowbit.plugin.experts``).
    """

    def __init__(self, model: nn.Module, is_stack: Callable[[nn.Module], bool] = lambda module: False) -> None:
        super().__init__()
        self.sources: list[Source] = []
        self.reads: list[Read] = []
        self._labels: dict[int, Tensor] = {}
        self._alive: list[Any] = []  # so that no id is given twice
        self._names = {id(tensor): name for name, tensor in model.named_parameters(remove_duplicate=True)}
        self.taken: set[str] = set()  # parameters that any operation was given
        self._depth = 0
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            norm = norm_of(module, name)
            if norm is not None:
                self._hook(module, lambda _, args, out, norm=norm: self._norm(norm, args[0], out))
            elif is_stack(module):
                self._hook(module, lambda module, args, out, name=name: self._stack(module, name, args[0], out))

    def _hook(self, module: nn.Module, leave: Callable) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            self._depth += 1

        def exit(module: nn.Module, args: Any, out: Any) -> None:
            self._depth -= 1
            leave(module, args, out)

        self._hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(exit)]

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._hooks:
            handle.remove()

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in METADATA:
            self.taken.update(self._names[id(t)] for t in _tensors([args, kwargs]) if id(t) in self._names)
            if self._depth == 0:
                self._record(name, func, args, kwargs, out)
        return out

    def labels(self, tensor: Any) -> Tensor | None:
        """Labels of a tensor, in its shape, or None where nothing known went into it."""
        return self._labels.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def _set(self, tensor: Tensor, labels: Tensor) -> None:
        self._alive.append(tensor)
        self._labels[id(tensor)] = labels

    def _record(self, name: str, func: Callable, args: Any, kwargs: dict, out: Any) -> None:
        if name == "embedding" and (table := self._names.get(id(_argument(args, kwargs, 1, "weight")))) is not None:
            return self._new(Source("embedding", out.shape[-1], table), out)
        known = [t for t in _tensors([args, kwargs]) if id(t) in self._labels]
        if not known:
            return None
        if name == "linear" or (name in ("addmm", "matmul", "__matmul__") and self._names.get(id(_weight_of(name, args)))):
            return self._linear(name, args, kwargs, out)
        if name == "scaled_dot_product_attention":
            return self._sdpa(args, kwargs, out)
        if name in ("matmul", "bmm", "__matmul__") and self._averages(args[0], args[1]):
            return self._attention(args[1], self._labels[id(args[1])], out)
        if name == "softmax":
            self._read(known, "softmax", len(self.sources))
            return self._new(Source("softmax", out.shape[-1]), out)
        if name in ("matmul", "bmm") and self._is_softmax(args[0]):
            return self._elementwise("opaque", known, out, "attention whose weights do not sum to 1")
        if name in MOVES:
            return self._move(func, args, kwargs, out)
        if name in CASTS and isinstance(out, Tensor) and out.shape == known[0].shape:
            return self._set(out, self._labels[id(known[0])]) if out is not known[0] else None
        kind = "opaque"
        if isinstance(out, Tensor) and name in SCALES | SUMS | {"relu"}:
            both = len(known) == 2
            kind = ("product" if both else "scaled") if name in SCALES else "relu" if name == "relu" else "sum"
            kind = "opaque" if (kind == "sum" and not both) or (name in ("div", "__truediv__") and both) else kind
        return self._elementwise(kind, known, out, name)

    def _new(self, source: Source, out: Tensor) -> None:
        """A source whose channels are the positions along the last axis of ``out``."""
        number = len(self.sources)
        self.sources.append(source)
        self._set(out, _label(number, torch.arange(out.shape[-1])).expand(out.shape))

    def _read(self, tensors: Iterable[Tensor], op: str, into: int) -> None:
        for tensor in tensors:
            self.use(self._labels[id(tensor)], op, into)

    def use(self, labels: Tensor, op: str, into: int) -> None:
        """Note that the channels under some labels were read."""
        found = labels.unique()
        for number in (found >> CHANNEL_BITS).unique().tolist():
            if number >= 0:
                channels = channel_of(found[found >> CHANNEL_BITS == number])
                self.sources[number].uses.append(Use(op, channels, into))

    def _elementwise(self, kind: str, known: list[Tensor], out: Any, op: str) -> None:
        """A new source from one or two labelled operands, a channel for each pair of labels that met."""
        number = len(self.sources)
        outs = list(_tensors([out]))
        if kind == "product" and outs[0].shape[-1] > 1:  # one number per token: commutes with all that is done to channels
            wide = [t for t in known if t.shape[-1] > 1]
            if len(wide) == 1:
                self._read([t for t in known if t is not wide[0]], "gate", number)
                kind, known = "scaled", wide
        self._read(known, kind if kind != "opaque" else op, number)
        shaped = len(outs) == 1 and all(_fits(t.shape, outs[0].shape) for t in known)
        if not shaped:
            self.sources.append(Source("opaque", 1, made_by=op))
            for tensor in outs:
                self._set(tensor, _label(number, torch.zeros(1, dtype=torch.int64)).expand(tensor.shape))
            return
        labels = torch.stack([self._labels[id(t)].expand(outs[0].shape) for t in known], -1)
        pairs, places = torch.unique(labels.flatten(0, -2), dim=0, return_inverse=True)
        self.sources.append(Source(kind, len(pairs), parents=tuple(pairs.unbind(-1)), made_by=op))
        self._set(outs[0], _label(number, places.view(outs[0].shape)))

    def _move(self, func: Callable, args: Any, kwargs: dict, out: Any) -> None:
        def swap(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                labels = self._labels.get(id(value))
                return torch.full(value.shape, -1, dtype=torch.int64) if labels is None else labels
            return type(value)(map(swap, value)) if type(value) in (tuple, list) else value

        moved = func(*swap(tuple(args)), **{key: swap(value) for key, value in kwargs.items()})
        for tensor, labels in zip(_tensors([out]), _tensors([moved]), strict=True):
            if id(tensor) not in self._labels or tensor is not args[0]:
                self._set(tensor, labels)

    def _linear(self, name: str, args: Any, kwargs: dict, out: Tensor) -> None:
        if name == "linear":
            x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
            bias, axis = _argument(args, kwargs, 2, "bias"), -1
        else:
            bias, x, weight = args[:3] if name == "addmm" else (None, *args[:2])
            axis = -2
        full = self._names.get(id(weight))
        if full is None or (bias is not None and id(bias) not in self._names) or self.labels(x) is None:
            return self._elementwise("opaque", [t for t in (x, weight, bias) if self.labels(t) is not None], out, name)
        self._reading(full, self._names.get(id(bias)), axis, self._labels[id(x)], out)

    def _reading(self, weight: str, bias: str | None, axis: int, labels: Tensor, out: Tensor) -> None:
        number, rows = len(self.sources), labels.reshape(-1, labels.shape[-1])
        columns = rows[0].clone() if bool((rows == rows[0]).all()) else None
        self.use(labels, "read", number)
        self.reads.append(Read(weight, bias, axis, columns, number))
        self._new(Source("linear", out.shape[-1], weight, bias, -3 - axis), out)

    def _sdpa(self, args: Any, kwargs: dict, out: Tensor) -> None:
        query, key, value = (_argument(args, kwargs, n, name) for n, name in enumerate(("query", "key", "value")))
        self._read([t for t in (query, key) if self.labels(t) is not None], "scores", len(self.sources))
        labels = self._labels[id(value)]
        if labels.shape[-3] != out.shape[-3]:
            labels = labels.repeat_interleave(out.shape[-3] // labels.shape[-3], dim=-3)
        self._attention(value, labels, out)

    def _averages(self, left: Any, right: Any) -> bool:
        """Whether ``left @ right`` averages the rows of ``right``: whole rows of a softmax, which sum to 1."""
        rows = self.labels(left)
        if rows is None or self.labels(right) is None or not self._is_softmax(left):
            return False
        number = int(rows.flatten()[0] >> CHANNEL_BITS)
        source = self.sources[number]
        return rows.shape[-1] == source.size and bool((rows == _label(number, torch.arange(source.size))).all())

    def _is_softmax(self, tensor: Any) -> bool:
        labels = self.labels(tensor)
        number = -1 if labels is None else int(labels.flatten()[0] >> CHANNEL_BITS)
        return number >= 0 and self.sources[number].kind == "softmax"

    def _attention(self, value: Tensor, labels: Tensor, out: Tensor) -> None:
        if not bool((labels == labels[..., :1, :]).all()):  # tokens differ in where their channels come from
            return self._elementwise("opaque", [value], out, "attention")
        number = len(self.sources)
        self.use(labels, "attention", number)
        labels = labels[..., :1, :].expand(out.shape)
        # Not by unique labels: heads that share a key-value head are channels of their own.
        heads = labels.select(-2, 0).reshape(-1, labels.shape[-3] * labels.shape[-1])[0]
        places = torch.arange(len(heads)).view(labels.shape[-3], 1, -1)
        self.sources.append(Source("attention", len(heads), parents=(heads.clone(),), width=labels.shape[-1]))
        self._set(out, _label(number, places).expand(out.shape))

    def _norm(self, norm: Norm, x: Tensor, out: Tensor) -> None:
        labels = self.labels(x)
        if labels is not None and self._depth == 0:
            rows = labels.reshape(-1, labels.shape[-1])
            self.use(labels, "norm", len(self.sources))
            parents = (rows[0].clone(),) if bool((rows == rows[0]).all()) else ()
            self._new(Source("norm", out.shape[-1], norm.weight, norm.bias, 0, parents, norm), out)

    def _stack(self, module: Any, name: str, x: Tensor, out: Tensor) -> None:
        """Experts: both stacks are read as one matrix each would be, and the gate between them is run on labels."""
        labels = self.labels(x)
        if labels is None or self._depth:
            return
        first, axis = "gate_up_proj" if module.has_gate else "up_proj", -2 if module.is_transposed else -1
        inner = torch.zeros(1, getattr(module, first).shape[-3 - axis])

        def bias(stack: str) -> str | None:
            return f"{name}.{stack}_bias" if getattr(module, f"{stack}_bias", None) is not None else None

        self._reading(f"{name}.{first}", bias(first), axis, labels, inner)
        gated = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        self._reading(f"{name}.down_proj", bias("down_proj"), axis, self._labels[id(gated)], out.view(-1, out.shape[-1]))
        number = len(self.sources) - 1
        self._set(out, _label(number, torch.arange(out.shape[-1])).expand(out.shape))


@contextmanager
def tracing(model: nn.Module, is_stack: Callable[[nn.Module], bool] = lambda module: False) -> Iterator[Trace]:
    """A :class:`Trace` of what ``model`` does inside the context."""
    trace = Trace(model, is_stack)
    try:
        with torch.no_grad(), trace:
            yield trace
    finally:
        trace.close()


def source_of(label: Tensor) -> Tensor:
    """Number of the source of each label; negative where there is none."""
    return label >> CHANNEL_BITS


def channel_of(label: Tensor) -> Tensor:
    """Channel of each label."""
    return label & ((1 << CHANNEL_BITS) - 1)


def _label(number: int, channels: Tensor) -> Tensor:
    return (number << CHANNEL_BITS) + channels


def _argument(args: Any, kwargs: dict, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _weight_of(name: str, args: Any) -> Any:
    return args[2 if name == "addmm" else 1] if len(args) > (2 if name == "addmm" else 1) else None


def _fits(shape: torch.Size, out: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, out) == out
    except RuntimeError:
        return False


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
