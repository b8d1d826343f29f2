"""``LowBitTensor``: the one record every solver returns and every backend reads.

    value[o, i] = 2**shift * ( sum over stages of  scale[o, g(i)] * (levels[t(o)][codes[o, i]] - zero[o, g(i)])
                                                   + offset[o, g(i)]
                               + (B A)[o, i] + outliers[o, i] )

with logical column ``permutation[j]`` held at stored column ``j``. It is pure data: a :class:`Layout` and the tensors
the layout names. It works on the meta device, where only shapes exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.errors import FormatError
from hf_lowbit.format.layout import Layout, Stage, stage_field
from hf_lowbit.format.outliers import add_outliers, select_outlier_rows
from hf_lowbit.format.packing import unpack
from hf_lowbit.format.scales import decode, from_f16_bits, group_count

# Rows are decoded in blocks of at most this many weights: temporaries stay near 40 MB whatever the matrix.
DECODE_BLOCK = 1 << 22


@dataclass(frozen=True)
class LowBitTensor:
    """A quantized matrix or stack of matrices.

    Attributes:
        layout: the static description.
        tensors: exactly the tensors ``layout.fields`` names.

    Raises:
        FormatError: a tensor is missing, superfluous, or of another dtype or shape than the layout says.
    """

    layout: Layout
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        fields = self.layout.fields
        for name in [*fields, *self.tensors]:
            if name not in self.tensors:
                raise FormatError(f"stored tensor {name!r} is missing.")
            if name not in fields:
                raise FormatError(f"stored tensor {name!r} is not part of the layout ({', '.join(fields)}).")
            found, field = self.tensors[name], fields[name]
            if found.dtype != field.dtype or tuple(found.shape) != field.shape:
                raise FormatError(
                    f"stored tensor {name!r} should be {field.dtype} {list(field.shape)}, "
                    f"found {found.dtype} {list(found.shape)}."
                )

    @classmethod
    def empty(cls, layout: Layout, device: torch.device | str = "meta") -> LowBitTensor:
        """Uninitialised tensors of the right dtypes and shapes."""
        return cls(layout, {n: torch.empty(f.shape, dtype=f.dtype, device=device) for n, f in layout.fields.items()})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.layout.shape

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return self.tensors["codes"].device

    def to(self, device: torch.device | str) -> LowBitTensor:
        """The same record on another device."""
        return LowBitTensor(self.layout, {name: tensor.to(device) for name, tensor in self.tensors.items()})

    def stage_tensors(self, number: int) -> dict[str, Tensor]:
        """Tensors of one stage under their bare names."""
        names = self.layout.stages[number].fields(self.layout.rows, self.layout.in_features)
        return {name: self.tensors[stage_field(name, number)] for name in names}

    def codes(self, number: int = 0) -> Tensor:
        """Codes of one stage, uint8 ``[rows, in]`` in stored column order."""
        stage = self.layout.stages[number]
        return unpack(self.tensors[stage_field("codes", number)], stage.bits, self.layout.in_features)

    def scales(self, number: int = 0) -> Tensor:
        """Scales of one stage with the shift applied, float32 ``[rows, groups]``."""
        return torch.ldexp(self._group_values("scale", number), torch.tensor(self.layout.shift))

    def offsets(self, number: int = 0) -> Tensor | None:
        """Offsets of one stage with the shift applied, float32 ``[rows, groups]``, or None."""
        if not self.layout.stages[number].offset:
            return None
        return torch.ldexp(self._group_values("offset", number), torch.tensor(self.layout.shift))

    def table(self, number: int = 0) -> Tensor:
        """Level tables of one stage, float32 ``[tables, 2**bits]``."""
        stage = self.layout.stages[number]
        if stage.levels.stored:
            return from_f16_bits(self.tensors[stage_field("levels", number)])
        return stage.levels.table()[None].to(self.device)

    def rows(self, ids: Tensor) -> LowBitTensor:
        """A 2-D record of the rows ``ids`` (integer ``[n]``, any order, repeats allowed)."""
        layout, picked = self.layout, {}
        ids = ids.to(torch.int64)
        count, outliers = int(ids.numel()), 0
        for number, stage in enumerate(layout.stages):
            if stage.rows is not None:
                raise NotImplementedError("rows() of a stage that covers a subset of rows: decode the whole tensor")
            for name, tensor in self.stage_tensors(number).items():
                if name == "levels" and not stage.table_ids:
                    tensor = tensor[ids // (layout.rows // stage.tables)] if stage.tables > 1 else tensor
                elif name != "levels":
                    tensor = tensor[ids]
                picked[stage_field(name, number)] = tensor
        for name in ("permutation", "low_rank_a"):
            if name in self.tensors:
                picked[name] = self.tensors[name]
        if layout.rank:
            picked["low_rank_b"] = self.tensors["low_rank_b"][ids]
        if layout.outliers:
            values, columns, starts = select_outlier_rows(self.tensors, ids)
            outliers = values.numel()
            if outliers:
                picked |= {"outlier_values": values, "outlier_columns": columns, "outlier_starts": starts}
        return LowBitTensor(layout.with_rows(count, outliers), picked)

    def expert(self, number: int) -> LowBitTensor:
        """One matrix of a stack, as a 2-D record."""
        each = self.layout.shape[-2]
        start = number * each
        return self.rows(torch.arange(start, start + each, device=self.device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense values in ``dtype``, logical shape; the arithmetic is float32 whatever ``dtype`` is."""
        layout = self.layout
        out = torch.empty(layout.rows, layout.in_features, dtype=dtype, device=self.device)
        for start, stop, block in self._decode_blocks():
            if layout.permuted:
                unpermuted = torch.empty_like(block)
                unpermuted[:, self.tensors["permutation"].long()] = block
                block = unpermuted
            out[start:stop] = torch.ldexp(block, torch.tensor(layout.shift)).to(dtype)
        return out.view(layout.shape)

    def _decode_blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of rows ``(start, stop, float32 [n, in])`` in stored column order, before the shift."""
        layout = self.layout
        step = max(1, DECODE_BLOCK // layout.in_features)
        stages = [self.stage_tensors(number) for number in range(len(layout.stages))]
        for start in range(0, layout.rows, step):
            stop = min(start + step, layout.rows)
            block = torch.zeros(stop - start, layout.in_features, device=self.device)
            for number, stage in enumerate(layout.stages):
                where, values = self._decode_stage(stage, stages[number], self.table(number), start, stop)
                if where is None:
                    block += values
                else:
                    block[where - start] += values
            if layout.rank:
                b = from_f16_bits(self.tensors["low_rank_b"][start:stop])
                block += b @ from_f16_bits(self.tensors["low_rank_a"])
            if layout.outliers:
                add_outliers(block, self.tensors, start, stop)
            yield start, stop, block

    def _decode_stage(
        self, stage: Stage, fields: Mapping[str, Tensor], table: Tensor, start: int, stop: int
    ) -> tuple[Tensor | None, Tensor]:
        """One stage over rows ``start .. stop``: the rows it touches (None: all of them) and their values."""
        where: Tensor | None = None
        pick: slice | Tensor = slice(start, stop)
        if stage.rows is not None:
            ids = fields["row_ids"].long()
            pick = ((ids >= start) & (ids < stop)).nonzero()[:, 0]
            where = ids[pick]
        in_features = self.layout.in_features
        groups = group_count(in_features, stage.group_size)
        codes = unpack(fields["codes"][pick], stage.bits, in_features).to(torch.int32)
        if table.shape[0] > 1:
            rows = torch.arange(start, stop, device=codes.device) if where is None else where
            ids = fields["table_ids"][pick].int() if stage.table_ids else (rows // (self.layout.rows // stage.tables)).int()
            codes = codes + ids[:, None] * table.shape[1]
        values = table.flatten().index_select(0, codes.flatten()).view(codes.shape)
        padding = groups * stage.group_size - in_features
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        grouped = values.view(values.shape[0], groups, stage.group_size)
        if stage.zero:
            grouped = grouped - fields["zero"][pick][..., None]
        scale = decode(fields["scale"][pick], _part(fields, "scale_super", pick), groups, stage.group_size, stage.scale_bits)
        grouped = grouped * scale[..., None]
        if stage.offset:
            supers = _part(fields, "offset_super", pick)
            offset = decode(fields["offset"][pick], supers, groups, stage.group_size, stage.scale_bits)
            grouped = grouped + offset[..., None]
        return where, grouped.flatten(1)[:, :in_features]

    def _group_values(self, name: str, number: int) -> Tensor:
        stage, fields = self.layout.stages[number], self.stage_tensors(number)
        groups = group_count(self.layout.in_features, stage.group_size)
        return decode(fields[name], fields.get(f"{name}_super"), groups, stage.group_size, stage.scale_bits)


def _part(fields: Mapping[str, Tensor], name: str, pick: slice | Tensor) -> Tensor | None:
    return fields[name][pick] if name in fields else None
