"""``Layout``: the static half of a low-bit tensor, from which names, dtypes and shapes of its stored tensors follow.

Everything that walks over the stored tensors (saving, loading, module buffers, meta tensors, the ledger, the torch ops)
asks :meth:`Layout.fields`, so there is one list of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import torch

from hf_lowbit.errors import FormatError
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.packing import packed_width
from hf_lowbit.format.scales import SCALE_BITS, WIDE, coded_width, group_count, super_count


class Field(NamedTuple):
    """One stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One additive term: ``scale[o, g] * (levels[t(o)][codes[o, i]] (- zero[o, g])) (+ offset[o, g])``.

    Attributes:
        levels: the level family; its ``bits`` is the code width.
        group_size: weights per scale.
        scale_bits: width of a stored scale (and offset).
        offset: whether groups carry an offset.
        zero: whether groups carry a zero point, a whole number of -128 .. 127 that is subtracted from the level before it is
            scaled. An offset of ``-scale * zero`` would have to be rounded.
        tables: number of fitted tables; table ``t`` serves the ``t``-th equal block of rows unless ``table_ids``.
        table_ids: whether a uint8 table number is stored per row.
        rows: number of rows this term covers, with their indices stored; None covers all rows.
    """

    levels: Levels
    group_size: int
    scale_bits: int = 16
    offset: bool = False
    tables: int = 1
    table_ids: bool = False
    rows: int | None = None
    zero: bool = False

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.levels.bits

    def fields(self, rows: int, in_features: int) -> dict[str, Field]:
        """Stored tensors of this term for a ``[rows, in_features]`` matrix."""
        rows = rows if self.rows is None else self.rows
        groups = group_count(in_features, self.group_size)
        out = {"codes": Field(torch.uint8, (rows, packed_width(in_features, self.bits)))}
        for name in ["scale", "offset"][: 1 + self.offset]:
            if self.scale_bits in (16, WIDE):
                out[name] = Field(torch.int16 if self.scale_bits == 16 else torch.int32, (rows, groups))
            else:
                out[name] = Field(torch.uint8, (rows, coded_width(groups, self.scale_bits)))
                out[f"{name}_super"] = Field(torch.int16, (rows, super_count(groups, self.group_size)))
        if self.zero:
            out["zero"] = Field(torch.int8, (rows, groups))
        if self.levels.stored:
            out["levels"] = Field(torch.int16, (self.tables, 2**self.bits))
        if self.table_ids:
            out["table_ids"] = Field(torch.uint8, (rows,))
        if self.rows is not None:
            out["row_ids"] = Field(torch.int32, (self.rows,))
        return out

    def to_json(self) -> dict:
        """JSON values; what equals its default is left out."""
        out: dict = {"bits": self.bits, "levels": self.levels.to_json(), "group_size": self.group_size}
        out["scale_bits"] = self.scale_bits
        for name, default in (("offset", False), ("tables", 1), ("table_ids", False), ("rows", None), ("zero", False)):
            if getattr(self, name) != default:
                out[name] = getattr(self, name)
        return out

    @classmethod
    def from_json(cls, values: Mapping) -> Stage:
        """Inverse of :meth:`to_json`; errors are wrapped by :meth:`Layout.from_json`."""
        values = dict(values)
        levels = Levels(bits=values.pop("bits"), **values.pop("levels"))
        stage = cls(levels=levels, **values)
        if stage.group_size < 1 or stage.scale_bits not in (*SCALE_BITS, WIDE) or stage.tables < 1:
            raise FormatError(f"impossible stage {values}")
        return stage


@dataclass(frozen=True)
class Layout:
    """Static description of one low-bit tensor.

    Attributes:
        shape: logical shape, ``(out, in)`` or ``(experts, out, in)``; all leading axes are rows.
        stages: the additive terms, at least one.
        shift: every stored float is relative to ``2**shift``.
        method: the solver that made it (provenance only).
        outliers: number of fp16 corrections, stored by row (CSR).
        rank: rank of the low-rank term, 0 for none.
        permuted: whether stored column ``j`` holds logical column ``permutation[j]``.
    """

    shape: tuple[int, ...]
    stages: tuple[Stage, ...]
    shift: int = 0
    method: str = ""
    outliers: int = 0
    rank: int = 0
    permuted: bool = False

    @property
    def in_features(self) -> int:
        """Weights per row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """All leading axes together."""
        return prod(self.shape[:-1])

    @property
    def numel(self) -> int:
        """Logical weights."""
        return prod(self.shape)

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Name -> dtype and shape of every stored tensor, in their canonical order."""
        out: dict[str, Field] = {}
        for number, stage in enumerate(self.stages):
            for name, field in stage.fields(self.rows, self.in_features).items():
                out[stage_field(name, number)] = field
        if self.permuted:
            out["permutation"] = Field(torch.int32, (self.in_features,))
        if self.outliers:
            narrow = self.in_features <= 65536
            out["outlier_values"] = Field(torch.int16, (self.outliers,))
            out["outlier_columns"] = Field(torch.uint16 if narrow else torch.int32, (self.outliers,))
            out["outlier_starts"] = Field(torch.int32, (self.rows + 1,))
        if self.rank:
            out["low_rank_a"] = Field(torch.int16, (self.rank, self.in_features))
            out["low_rank_b"] = Field(torch.int16, (self.rows, self.rank))
        return out

    def with_rows(self, rows: int, outliers: int) -> Layout:
        """The layout of a pick of ``rows`` rows as a 2-D tensor: where tables go by row block, each row has its own."""
        stages = tuple(replace(s, tables=rows) if s.tables > 1 and not s.table_ids else s for s in self.stages)
        return replace(self, shape=(rows, self.in_features), stages=stages, outliers=outliers)

    def to_json(self) -> dict:
        """JSON values; what equals its default is left out."""
        out: dict = {"shape": list(self.shape), "stages": [stage.to_json() for stage in self.stages]}
        for name, default in (("shift", 0), ("method", ""), ("outliers", 0), ("rank", 0), ("permuted", False)):
            if getattr(self, name) != default:
                out[name] = getattr(self, name)
        return out

    def dumps(self) -> str:
        """Compact JSON text; :func:`parse_layout` is the inverse."""
        return json.dumps(self.to_json(), separators=(",", ":"))

    @classmethod
    def from_json(cls, values: Mapping) -> Layout:
        """Inverse of :meth:`to_json`.

        Raises:
            FormatError: a key is missing or unknown, or a value is impossible.
        """
        try:
            values = dict(values)
            stages = tuple(Stage.from_json(stage) for stage in values.pop("stages"))
            layout = cls(shape=tuple(values.pop("shape")), stages=stages, **values)
            if len(layout.shape) not in (2, 3) or min(layout.shape) < 1 or not stages:
                raise FormatError(f"impossible shape {layout.shape} or no stage")
            if any(layout.rows % stage.tables for stage in stages if not stage.table_ids):
                raise FormatError(f"{layout.rows} rows do not divide among the level tables")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"unreadable layout {str(values)[:200]}: {error}") from error
        return layout


def stage_field(name: str, number: int) -> str:
    """Stored name of a stage's field: the first stage's are bare, later ones carry their number."""
    return name if number == 0 else f"{name}_{number}"


@lru_cache(maxsize=4096)
def parse_layout(text: str) -> Layout:
    """Layout of its compact JSON text; cached, since the torch ops carry layouts as text."""
    return Layout.from_json(json.loads(text))
