"""The ledger: where every stored byte of a low-bit tensor goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from hf_lowbit.format.layout import Layout

_KINDS = ("codes", "scale", "offset", "zero", "levels", "table_ids", "row_ids", "permutation", "outlier", "low_rank")


@dataclass(frozen=True)
class Ledger:
    """Bytes by kind of stored tensor, over ``numel`` logical weights."""

    bytes_by_kind: dict[str, int]
    numel: int

    @property
    def bytes(self) -> int:
        """All stored bytes."""
        return sum(self.bytes_by_kind.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, metadata included, per logical weight."""
        return 8 * self.bytes / self.numel if self.numel else 0.0


def ledger(layouts: Layout | Iterable[Layout]) -> Ledger:
    """Ledger of one layout or of several together; padding is counted where it is stored."""
    layouts = [layouts] if isinstance(layouts, Layout) else list(layouts)
    totals: dict[str, int] = {}
    for layout in layouts:
        for name, field in layout.fields.items():
            kind = next(kind for kind in _KINDS if name.startswith(kind))
            totals[kind] = totals.get(kind, 0) + prod(field.shape) * field.dtype.itemsize
    return Ledger(totals, sum(layout.numel for layout in layouts))
