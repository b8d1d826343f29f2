"""What one layer of the cache holds: rows of newest and of important tokens, packed tiers of all others.

Each head of keys chooses its own important tokens, all heads the same number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_lowbit.kv.attend import SLAB, Segment
from hf_lowbit.kv.rows import RowStore
from hf_lowbit.kv.settings import CacheSettings
from hf_lowbit.kv.tiers import BlockTier, Frame, RowTier, balance_of

SHORT_POSITIONS = 1 << 15


class Holdings:
    """Stored tokens of one layer, and the attention they got.

    Attributes:
        length: tokens of the sequence, those that are not stored yet included.
        solid: newest tokens that all heads hold as rows.
        kept, recent: rows of important and of newest tokens, each with its ``score``; the kept ones with their ``position``.
        tiers: lower precisions, most bits first.
        frame: the coordinates of the lower tiers, for good once ``frozen``.
        starts: int64 ``[batch]``, first position of each sequence that is no padding, or None.
        observed: queries counted in the scores.
        pending: weights the last tokens gave to all rows ``[batch, heads, n, rows]``, not counted yet: they may be cropped.
        moves: ``(length, bits of keys, tokens of each head)`` of everything that was moved down.
    """

    def __init__(
        self, settings: CacheSettings, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.settings, self.batch, self.heads, self.dim = settings, batch, heads, dim
        self.dtype, self.device = dtype, device
        self.length = self.solid = 0
        half = dtype if dtype.itemsize == 2 or settings.exact else torch.float16
        self.kept = RowStore(settings.high_bits, half, endless=not settings.lower)
        self.recent = RowStore(settings.tail_bits, half, endless=not self.moving)
        self.tiers: list[BlockTier | RowTier] = [
            BlockTier(tier, settings, dim) if tier.packed else RowTier(tier, dtype) for tier in settings.lower
        ]
        self.frame = Frame(hadamard=settings.hadamard)
        self.frozen = False
        self.starts: Tensor | None = None
        self.observed: list[range] = []
        self.pending: Tensor | None = None
        self.moves: list[tuple[int, int, int]] = []

    @property
    def counts(self) -> bool:
        """Whether scores are of use."""
        return bool(self.settings.lower)

    @property
    def moving(self) -> bool:
        """Whether tokens ever leave the newest ones."""
        return self.counts or self.settings.tail_bits != self.settings.high_bits

    @property
    def older(self) -> int:
        """Stored tokens before the newest ones."""
        return self.kept.length + sum(tier.length for tier in self.tiers)

    @property
    def stored(self) -> int:
        """Tokens held as rows or packed."""
        return self.older + self.recent.length

    @property
    def position_dtype(self) -> torch.dtype:
        """Of positions."""
        return torch.int16 if self.length <= SHORT_POSITIONS else torch.int32

    def grow(self, tokens: int) -> None:
        """Count tokens that came, or went."""
        self.length += tokens
        self.solid += tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add newest tokens ``[batch, heads, n, dim]``."""
        beside = {"score": keys.new_zeros(keys.shape[:3], dtype=torch.float32)} if self.counts else {}
        self.recent.append(keys, values, **beside)

    def crop(self, count: int) -> None:
        """Take back the newest ``count`` tokens, all of which are rows."""
        newest = min(count, self.recent.length)
        self.recent.crop(self.recent.length - newest)
        self.kept.crop(self.kept.length - (count - newest))
        if self.pending is not None:
            left = self.pending.shape[2] - count
            self.pending = self.pending[:, :, :left, : self.pending.shape[3] - count] if left > 0 else None
        self.grow(-count)

    def positions(self, part: RowStore) -> Tensor:
        """Positions of the rows of a part, int64 ``[batch, heads, n]``; a prompt follows the newest tokens."""
        if part is self.kept:
            return part.tensors["position"][:, :, : part.length].long()
        first = self.older + (0 if part is self.recent else self.recent.length)
        return torch.arange(first, first + part.length, device=self.device).expand(self.batch, self.heads, -1)

    def add_scores(self, sums: Tensor, tokens: int) -> None:
        """Count attention of ``tokens`` further queries: ``sums [batch, heads, rows]`` is what kept and newest rows got.

        What older queries gave fades meanwhile (``decay``).
        """
        fade = self.settings.decay**tokens
        for store, part in ((self.kept, sums[..., : self.kept.length]), (self.recent, sums[..., self.kept.length :])):
            if store.length:
                store.tensors["score"][:, :, : store.length].mul_(fade).add_(part)

    def find_padding(self, mask: Tensor) -> None:
        """Left padding: what the last token does not see of the first ones, once a sequence."""
        if self.starts is None and self.length == mask.shape[2]:
            last = mask[:, 0, -1]
            seen = last if mask.dtype == torch.bool else last > torch.finfo(mask.dtype).min / 2
            starts = seen.to(torch.int8).argmax(-1)
            if bool(starts.any()):
                self.starts = starts.expand(self.batch).clone()

    def freeze(self, queries: Tensor | None, keys: Tensor) -> None:
        """Set the coordinates of low tiers, from the first prompt or the first tokens that move down.

        Args:
            queries: ``[batch, heads, group, n, dim]``, or None where none are known.
            keys: ``[batch, heads, n, dim]``.
        """
        if self.frozen or not self.tiers:
            return
        self.frozen = True
        if self.settings.balanced and queries is not None:
            self.frame.balance = balance_of(queries.flatten(2, 3), keys.float())

    def rows(self) -> Iterator[Segment]:
        """Important and newest tokens, decoded some at a time."""
        for part in (self.kept, self.recent):
            for first in range(0, part.length, SLAB):
                last = min(first + SLAB, part.length)
                positions: Tensor | int = self.older + first
                if part is self.kept:
                    positions = part.tensors["position"][:, :, first:last].long()
                yield Segment(*part.dense(first, last), positions)

    def packed(self) -> Iterator[Segment]:
        """Lower tiers in their coordinates, decoded some at a time."""
        for tier in self.tiers:
            for keys, values, where in tier.slabs(SLAB):
                yield Segment(keys, values, where, low=True)

    def apply(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        """Replace every tensor, batch first; there are ``batch`` sequences then."""
        for part in (self.kept, self.recent, *self.tiers, self.frame):
            part.apply(change)
        self.starts = None if self.starts is None else change(self.starts)
        self.pending = None if self.pending is None else change(self.pending)
        self.batch = batch
