"""``Coding``: one stage of one matrix, unpacked, while a solver changes its codes, scales and tables.

Stored scales lie on a grid (fp16 numbers, or multiples of a super-scale); every change keeps them on it, so what is
written back decodes to exactly the values the solver weighed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.format.layout import Stage
from hf_lowbit.format.packing import pack, unpack
from hf_lowbit.format.scales import (
    code_limit,
    decode,
    from_f16_bits,
    group_count,
    pack_codes,
    round_f16,
    spread_super,
    to_f16_bits,
)


@dataclass
class Coding:
    """Rows ``[n, in]`` of one stage; all fields are of those rows.

    Attributes:
        stage: the static description, its exponent replaced where a solver learned one.
        codes: int64 ``[n, in]``.
        scale: float32 ``[n, groups]``, on the grid.
        offset: float32 ``[n, groups]`` on the grid, or None.
        step, offset_step: float32 ``[n, groups]``, spacing of coded scales and offsets; None for fp16 ones.
        tables: float32 ``[tables, K]``, ascending.
        ids: int64 ``[n]``, the table of each row; None where there is one.
        free: bool ``[n, in]``, weights that are stored elsewhere in high precision; None where there are none.
        held: float32 ``[n, in]``, the values of free weights.
    """

    stage: Stage
    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    step: Tensor | None
    offset_step: Tensor | None
    tables: Tensor
    ids: Tensor | None = None
    free: Tensor | None = None
    held: Tensor | None = None

    @classmethod
    def read(
        cls, stage: Stage, fields: Mapping[str, Tensor], in_features: int, start: int, stop: int, table: int | None = None
    ) -> Coding:
        """Rows ``start .. stop`` of stored fields.

        Args:
            table: their table where tables go by equal blocks of rows; None reads all rows with all tables.
        """
        groups = group_count(in_features, stage.group_size)

        def values(name: str) -> tuple[Tensor, Tensor | None]:
            supers = fields[f"{name}_super"][start:stop] if stage.scale_bits != 16 else None
            found = decode(fields[name][start:stop], supers, groups, stage.group_size, stage.scale_bits)
            spread = None if supers is None else spread_super(from_f16_bits(supers), groups, stage.group_size)
            return found, spread

        scale, step = values("scale")
        offset, offset_step = values("offset") if stage.offset else (None, None)
        tables = from_f16_bits(fields["levels"]) if stage.levels.stored else stage.levels.table()[None]
        ids = fields["table_ids"][start:stop].long() if stage.table_ids else None
        if ids is None and stage.tables > 1 and table is None:
            ids = torch.arange(start, stop) // (stop // stage.tables)
        elif ids is None and stage.tables > 1:
            assert table is not None
            tables = tables[table : table + 1]
        codes = unpack(fields["codes"][start:stop], stage.bits, in_features).long()
        return cls(stage, codes, scale, offset, step, offset_step, tables, ids)

    def write(self, fields: dict[str, Tensor], start: int, stop: int, table: int | None = None) -> None:
        """Store codes, scales, offsets and tables back into rows ``start .. stop`` of ``fields``."""
        bits = self.stage.scale_bits
        fields["codes"][start:stop] = pack(self.codes, self.stage.bits)
        for name, found, step in (("scale", self.scale, self.step), ("offset", self.offset, self.offset_step)):
            if found is None:
                continue
            if step is None:
                fields[name][start:stop] = to_f16_bits(found)
            else:
                fields[name][start:stop] = pack_codes(torch.where(step > 0, found / step, 0.0).round(), bits)
        if self.stage.levels.stored:
            first = 0 if self.stage.table_ids or self.stage.tables == 1 or table is None else table
            fields["levels"][first : first + len(self.tables)] = to_f16_bits(self.tables)

    @property
    def group_size(self) -> int:
        """Weights per scale."""
        return self.stage.group_size

    def rows(self, start: int, stop: int) -> Coding:
        """A view of some of the rows; in-place changes reach this coding."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[start:stop]

        return Coding(
            self.stage,
            self.codes[start:stop],
            self.scale[start:stop],
            cut(self.offset),
            cut(self.step),
            cut(self.offset_step),
            self.tables,
            cut(self.ids),
            cut(self.free),
            cut(self.held),
        )

    def sample(self, count: int) -> tuple[Coding, Tensor]:
        """A copy of up to ``count`` rows, evenly spread, and their numbers int64 ``[n]``."""
        picked = torch.linspace(0, len(self.codes) - 1, min(count, len(self.codes))).round().long()

        def take(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[picked]

        few = Coding(
            self.stage,
            self.codes[picked],
            self.scale[picked],
            take(self.offset),
            take(self.step),
            take(self.offset_step),
            self.tables,
            take(self.ids),
            take(self.free),
            take(self.held),
        )
        return few, picked

    def spread(self, values: Tensor) -> Tensor:
        """One value per group ``[n, groups]`` to one per weight ``[n, in]``."""
        return values.repeat_interleave(self.group_size, 1)[:, : self.codes.shape[1]]

    def columns(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales, their inverses (0 of 0) and offsets with the rows last, float32 ``[groups, n]``."""
        scale = self.scale.T.contiguous()
        return scale, torch.where(scale != 0, 1 / scale, 0.0), None if self.offset is None else self.offset.T.contiguous()

    def levels(self) -> Tensor:
        """Level of every code, float32 ``[n, in]``."""
        return self.levels_of(self.codes)

    def levels_of(self, codes: Tensor) -> Tensor:
        """Levels of other codes ``[n, m]`` of the same rows."""
        if self.ids is None:
            return self.tables[0][codes]
        return self.tables.flatten()[codes + (self.ids * self.tables.shape[1])[:, None]]

    def dequantize(self) -> Tensor:
        """Values, float32 ``[n, in]``, relative to ``2**shift`` as everything here."""
        values = self.levels() * self.spread(self.scale)
        values = values if self.offset is None else values + self.spread(self.offset)
        return values if self.free is None or self.held is None else torch.where(self.free, self.held, values)


def on_grid(values: Tensor, step: Tensor | None, bits: int) -> Tensor:
    """The storable scales (or offsets) nearest to ``values``: multiples of ``step`` within the code's range, or fp16."""
    if step is None:
        return round_f16(values)
    limit = code_limit(bits)
    return torch.where(step > 0, values / step, 0.0).round().clamp(-limit, limit) * step


class Nearest:
    """Exact nearest codes of single columns and their levels, for one table or a table per row.

    Args:
        coding: whose tables and rows.
    """

    def __init__(self, coding: Coding) -> None:
        middles = (coding.tables[:, 1:] + coding.tables[:, :-1]) / 2
        self.flat = coding.tables.flatten()
        self.one = middles[0].contiguous() if coding.ids is None else None
        self.each = None if coding.ids is None else middles[coding.ids].contiguous()
        self.first = None if coding.ids is None else coding.ids * coding.tables.shape[1]

    def __call__(self, values: Tensor) -> Tensor:
        """Codes int64 ``[n]`` nearest to ``values`` ``[n]``, already divided by their scales."""
        if self.one is not None:
            return torch.bucketize(values, self.one)
        assert self.each is not None
        return torch.searchsorted(self.each, values[:, None])[:, 0]

    def levels(self, codes: Tensor) -> Tensor:
        """Levels float32 ``[n]`` of one column's codes."""
        return self.flat.index_select(0, codes if self.first is None else codes + self.first)
