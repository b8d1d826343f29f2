"""Readers of other tools' checkpoints, by the ``quant_method`` of their ``quantization_config``, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.exchange.misfit import Misfit
from hf_lowbit.format.layout import Layout, Stage
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.packing import pack
from hf_lowbit.format.scales import group_count, store_exactly
from hf_lowbit.format.tensor import LowBitTensor


@dataclass(frozen=True)
class Reader:
    """How the matrices of one checkpoint are read.

    Attributes:
        source: name of the foreign format, for provenance.
        marker: field that every quantized module has.
        fields: all fields a quantized module may have; a tensor is named ``MODULE.FIELD``.
        record: the fields of one matrix to a record that decodes to the same numbers.
        bits, group_size: as the checkpoint states them.
    """

    source: str
    marker: str
    fields: tuple[str, ...]
    record: Callable[[Mapping[str, Tensor]], LowBitTensor]
    bits: int
    group_size: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def sites(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Module name -> field -> tensor name, of a checkpoint's tensors."""
        held = set(names)
        ending = f".{self.marker}"
        modules = sorted(name.removesuffix(ending) for name in held if name.endswith(ending))
        return {module: {f: f"{module}.{f}" for f in self.fields if f"{module}.{f}" in held} for module in modules}


READERS: dict[str, Callable[[Mapping[str, Any]], Reader]] = {}


def reader(method: str) -> Callable[[Callable[[Mapping[str, Any]], Reader]], Callable[[Mapping[str, Any]], Reader]]:
    """Register a function from a ``quantization_config`` to its :class:`Reader`."""

    def register(make: Callable[[Mapping[str, Any]], Reader]) -> Callable[[Mapping[str, Any]], Reader]:
        READERS[method] = make
        return make

    return register


def open_reader(settings: Mapping[str, Any]) -> Reader:
    """The reader of a checkpoint.

    Raises:
        BadRequest: a method nobody reads.
        Misfit: a setting we cannot hold.
    """
    method = settings.get("quant_method")
    if method not in READERS:
        raise BadRequest(unknown_name("quant_method", method, READERS))
    return READERS[method](settings)


def setting(settings: Mapping[str, Any], name: str, allowed: Iterable[Any], default: Any = None) -> Any:
    """The value of a setting, which must be one of ``allowed``.

    Raises:
        Misfit: naming it.
    """
    value, known = settings.get(name, default), tuple(allowed)
    if value not in known:
        words = ", ".join(map(repr, known))
        raise Misfit(f"quantization_config[{name!r}]", repr(value), f"it can be imported where it is {words}.")
    return value


def tensor_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A field that must be there.

    Raises:
        Misfit: naming it.
    """
    if name not in tensors:
        raise Misfit(name, "missing", "the files must hold it. A shard is missing or damaged.")
    return tensors[name]


def order_of(groups: Tensor, group_size: int) -> Tensor | None:
    """The order of columns in which groups follow each other, from the group of each column; None if it is the given one.

    Args:
        groups: integers ``[in]``.

    Returns:
        int32 ``[in]``: the logical column at each stored one.

    Raises:
        Misfit: groups that are not all of ``group_size`` columns (but the last).
    """
    wanted = torch.arange(groups.numel()) // group_size
    if torch.equal(groups.long(), wanted):
        return None
    order = torch.argsort(groups.long(), stable=True)
    if not torch.equal(groups.long()[order], wanted):
        raise Misfit("g_idx", "uneven", f"each group must have {group_size} columns to be imported.")
    return order.to(torch.int32)


def integer_record(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, source: str, order: Tensor | None = None
) -> LowBitTensor:
    """The record of ``scale * (code - zero)``, exactly.

    Args:
        codes: uint8 ``[out, in]``, logical columns.
        scale: any float dtype ``[out, groups]``.
        zero: integers ``[out, groups]``, of the same origin as the codes; None is the middle code.
        order: int32 ``[in]``, where columns of a group do not lie side by side.

    Raises:
        Misfit: a scale that is not finite, a zero point out of reach, or tensors that do not fit each other.
    """
    rows, columns = codes.shape
    groups = group_count(columns, group_size)
    for name, value in (("scales", scale), ("zero points", zero)):
        if value is not None and tuple(value.shape) != (rows, groups):
            raise Misfit(f"the shape of the {name}", list(value.shape), f"[{rows}, {groups}] is what the codes ask for.")
    if not bool(torch.isfinite(scale).all()):
        raise Misfit("a scale", "not finite", "mend the checkpoint first.")
    away = None if zero is None else zero.to(torch.int64) - (1 << (bits - 1))
    if away is not None and not bool(away.any()):
        away = None
    if away is not None and (int(away.min()) < -128 or int(away.max()) > 127):
        raise Misfit("a zero point", int(away.abs().max()), "it must lie within 128 of the middle code.")
    shift, width, stored = store_exactly(scale)
    stage = Stage(Levels("integer", bits), group_size, width, zero=away is not None)
    fields = {"codes": pack(codes if order is None else codes[:, order.long()], bits), "scale": stored}
    if away is not None:
        fields["zero"] = away.to(torch.int8)
    if order is not None:
        fields["permutation"] = order
    layout = Layout((rows, columns), (stage,), shift, source, permuted=order is not None)
    return LowBitTensor(layout, {name: value.contiguous() for name, value in fields.items()})
