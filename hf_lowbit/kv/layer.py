"""One layer of the cache: newest tokens, important tokens and lower tiers, and what moves tokens from one to the other.

Newest and important tokens are rows; the others are packed, for good. Each head of keys chooses its own important tokens,
all heads the same number of them. Tokens move down only at the start of an update, when those before it are certain: what
``crop`` takes back has left no trace.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_lowbit.errors import BadRequest
from hf_lowbit.kv import importance, kernel
from hf_lowbit.kv.attend import SLAB, Segment, attend, weights
from hf_lowbit.kv.packed import Packed
from hf_lowbit.kv.rows import RowStore, gather, joined
from hf_lowbit.kv.settings import BLOCK, CacheSettings
from hf_lowbit.kv.tiers import BlockTier, Frame, RowTier, balance_of

# Up to this many tokens at once are stored before they are attended to; more of them attend to each other as they come.
FEW = 8
# Blocks quantized at a time.
BATCH = 16
SHORT_POSITIONS = 1 << 15
# Tokens beyond the tail that move over to the important ones together.
RIPE = 16


class LowBitLayer(CacheLayerMixin):
    """Keys and values of one layer at several precisions.

    Args:
        settings: what holds for this layer.
        positions: most tokens the model takes, or None.

    Attributes:
        length: tokens held.
        kept, recent: rows of important and of newest tokens, each with its ``score``; the kept ones with their ``position``.
        tiers: lower precisions, most bits first.
        moves: ``(length, bits of keys, tokens of each head)`` of everything that was moved down.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, settings: CacheSettings, positions: int | None = None) -> None:
        super().__init__()
        self.settings, self.positions = settings, positions
        self._clear()

    def _clear(self) -> None:
        self.is_initialized, self.length = False, 0
        self.shape = torch.Size((0, 0, 0, 0))
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.kept: RowStore = RowStore(self.settings.high_bits, self.dtype, endless=not self.settings.lower)
        self.recent: RowStore = RowStore(self.settings.tail_bits, self.dtype, endless=not self._moving)
        self.solid = 0  # newest tokens all heads hold as rows
        self.tiers: list[BlockTier | RowTier] = []
        self.frame = Frame()
        self.frozen = False  # whether the frame is set
        self.center: Tensor | None = None  # subtracted from all keys, which changes no attention weight
        self.starts: Tensor | None = None  # first position of each sequence that is no padding
        self.observed: list[range] = []  # queries counted in the scores
        self.pending: Tensor | None = None  # weights the last tokens gave, not yet counted: they may be cropped
        self.incoming: tuple[Tensor, Tensor] | None = None  # tokens not stored yet
        self.moves: list[tuple[int, int, int]] = []
        self._owner: weakref.ref[Any] | None = None

    # What the host calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes and dtype from the first tokens."""
        batch, heads, _, dim = key_states.shape
        self.settings.check_head(dim)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.shape = torch.Size((batch, heads, 0, dim))
        half = self.dtype if self.dtype.itemsize == 2 or self.settings.exact else torch.float16
        self.kept.dtype = self.recent.dtype = half
        self.tiers = [
            BlockTier(tier, self.settings, dim) if tier.packed else RowTier(tier, self.dtype) for tier in self.settings.lower
        ]
        self.frame.hadamard = self.settings.hadamard
        if self.settings.center and not self.settings.exact:
            self.center = key_states.float().mean(2, keepdim=True)
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add tokens ``[batch, heads, n, dim]``.

        Returns:
            Handles that attention reads the cache through, or plain tensors where all is kept in the dtype of the model.

        Raises:
            BadRequest: another shape or dtype than before, or more tokens than the model has positions; nothing has changed
                then.
        """
        key_states, value_states = key_states.detach(), value_states.detach()
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._store_incoming(None)
        self._settle()
        tokens = key_states.shape[2]
        if tokens <= FEW or self.settings.exact:
            self._append(self._centered(key_states), value_states)
        else:
            self.incoming = key_states, value_states
        self._grow(tokens)
        if self.settings.exact:
            return self.recent.dense()
        decoded: dict[int, Tensor] = {}
        return Packed(self, 0, decoded), Packed(self, 1, decoded)

    @torch.compiler.disable
    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a mask for ``query_length`` more tokens covers."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens.

        Raises:
            BadRequest: a positive number, or more tokens than are still kept as rows; nothing has changed then.
        """
        self.check_crop(tokens_to_remove)
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        self._store_incoming(None)
        newest = min(count, self.recent.length)
        self.recent.crop(self.recent.length - newest)
        self.kept.crop(self.kept.length - (count - newest))
        if self.pending is not None:
            left = self.pending.shape[2] - count
            self.pending = self.pending[:, :, :left, : self.pending.shape[3] - count] if left > 0 else None
        self._grow(-count)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what :meth:`crop` cannot do."""
        if tokens_to_remove > 0:
            raise BadRequest(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}.")
        held = self.solid
        if -tokens_to_remove > held and self.is_initialized:
            raise BadRequest(
                f"crop({tokens_to_remove}): this cache of {self.length} tokens can take back its newest {held}, older "
                f"ones are packed. Use a larger recent (it is {self.settings.recent}), or reset()."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences ``beam_idx`` in place of those held."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only sequences ``indices``."""
        if self.is_initialized:
            self._apply(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        if self.is_initialized:
            self._apply(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to its device."""
        self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    # What attention calls.

    @torch.compiler.disable
    def attend(self, query: Tensor, mask: Tensor | None, scale: float, module: Any, stock: Callable[..., Tensor]) -> Tensor:
        """Attention of the tokens last added over all tokens.

        Args:
            query: ``[batch, heads, n, dim]``.
            mask: bool or float ``[1 or batch, 1, n, length]``, or None for causal.
            module: the attention module, whose cache this is from now on.
            stock: the host's own attention over dense keys and values, which serves prompts without a past.

        Returns:
            ``[batch, n, heads, dim]`` in the dtype of ``query``.
        """
        self._claim(module)
        queries = query.detach().unflatten(1, (self.shape[1], -1))
        if mask is not None:
            mask = mask[..., : self.length].expand(-1, -1, -1, self.length)
            self._find_padding(mask)
        if self.incoming is None:
            return self._attend_few(queries, mask, scale).to(query.dtype)
        if not self.older + self.recent.length:
            out = stock(*self.incoming)
            chosen = importance.observed(self.length, self.settings) if self._counts else range(0)
            sums = importance.column_sums(queries, self.incoming[0], mask, scale, chosen) if chosen else None
        else:
            out, chosen, sums = self._attend_behind(queries, mask, scale)
        if chosen:
            self.observed.append(chosen)
        self._freeze(queries, self._centered(self.incoming[0]))
        self._store_incoming(sums)
        return out.to(query.dtype)

    def attend_few(self, queries: Tensor, mask: Tensor | None, module: Any) -> Tensor:
        """As :meth:`attend`, for up to eight tokens: queries float32 ``[batch, n, heads, dim]``, as is the result."""
        if mask is not None:
            mask = mask[..., : self.length]
        return self.attend(queries.transpose(1, 2), mask, module.scaling, module, _no_prompt)

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``[batch, heads, length, dim]`` in order, in the dtype of the model."""
        out = [torch.zeros(self.shape, dtype=self.dtype, device=self.device) for _ in range(2)]
        for segment in self._segments():
            rows = (segment.keys, segment.values)
            if segment.low:
                rows = self.frame.keys_back(segment.keys), self.frame.rotated(segment.values)
            if self.center is not None:
                rows = rows[0] + self.center, rows[1]
            for whole, part in zip(out, rows, strict=True):
                if isinstance(segment.positions, int):
                    whole[:, :, segment.positions : segment.positions + part.shape[2]] = part
                else:
                    whole.scatter_(2, segment.positions[..., None].expand(part.shape), part.to(whole.dtype))
        return out[0], out[1]

    # What saving and loading need.

    def store_pending(self) -> None:
        """Store tokens and count weights that wait for the next update."""
        self._store_incoming(None)
        self._count_pending()

    def restore_length(self, length: int, solid: int) -> None:
        """Set the number of tokens held to what was loaded."""
        self._grow(length - self.length)
        self.solid = solid

    # How tokens come in.

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape != values.shape:
            raise BadRequest(f"keys {list(keys.shape)} and values {list(values.shape)} of one width are needed.")
        if self.is_initialized:
            if keys.shape[0] != self.shape[0]:
                raise BadRequest(
                    f"the cache holds {self.shape[0]} sequences, {keys.shape[0]} were given. Use batch_select_indices or "
                    "batch_repeat_interleave to change the batch, or a new cache."
                )
            expected, found = (*self.shape[1::2], self.dtype), (keys.shape[1], keys.shape[3], keys.dtype)
            if found != expected:
                raise BadRequest(
                    f"the cache holds {expected[0]} heads of {expected[1]} numbers in {expected[2]}, got {found[0]} of "
                    f"{found[1]} in {found[2]}: is it another model's? Use a new cache."
                )
        if self.positions is not None and self.length + keys.shape[2] > self.positions:
            raise BadRequest(
                f"the model has {self.positions} positions, {self.length} are taken and {keys.shape[2]} more tokens were "
                "given. Shorten the text, or use a new cache."
            )

    def _claim(self, module: Any) -> None:
        owner = self._owner() if self._owner is not None else None
        if owner is None:
            self._owner = weakref.ref(module)
        elif owner is not module:
            raise BadRequest("this cache is in use by another model; its tokens mean nothing to this one. Use a new cache.")

    def _centered(self, keys: Tensor) -> Tensor:
        return keys if self.center is None else (keys.float() - self.center).to(self.dtype)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        beside = {"score": keys.new_zeros(keys.shape[:3], dtype=torch.float32)} if self._counts else {}
        self.recent.append(keys, values, **beside)

    def _grow(self, tokens: int) -> None:
        self.length += tokens
        self.solid += tokens
        self.shape = torch.Size((*self.shape[:2], self.length, self.shape[3]))

    @property
    def _counts(self) -> bool:
        """Whether scores are of use."""
        return bool(self.settings.lower)

    def _store_incoming(self, sums: Tensor | None) -> None:
        """Store tokens that attention has seen; ``sums [batch, heads, n]`` is what they got of it, None where unknown."""
        if self.incoming is None:
            return
        (keys, values), self.incoming = self.incoming, None
        keys, tokens = self._centered(keys), keys.shape[2]
        if tokens <= self.settings.recent or not self._moving:
            self._append(keys, values)
            if sums is not None:
                self.recent.tensors["score"][:, :, self.recent.length - tokens : self.recent.length] += sums
            return
        self._count_pending()
        staged = RowStore(16, self.dtype, {"key": keys, "value": values})
        if self._counts:
            staged.tensors["score"] = keys.new_zeros(keys.shape[:3], dtype=torch.float32) if sums is None else sums
        self._settle(staged)

    # How tokens move down.

    @property
    def _moving(self) -> bool:
        return self._counts or self.settings.tail_bits != self.settings.high_bits

    def _count_pending(self) -> None:
        if self.pending is None:
            return
        sums, tokens = self.pending.sum(2), self.pending.shape[2]
        self.pending = None
        for store, part in ((self.kept, sums[..., : self.kept.length]), (self.recent, sums[..., self.kept.length :])):
            if store.length:
                store.tensors["score"][:, :, : store.length] += part
        last = self.observed[-1] if self.observed else None
        if last is not None and last.step == 1 and last.stop == self.length - tokens:
            self.observed[-1] = range(last.start, self.length)
        else:
            self.observed.append(range(self.length - tokens, self.length))

    def _settle(self, staged: RowStore | None = None) -> None:
        """Move down what exceeds the share of important tokens."""
        self._count_pending()
        if not self._moving or not self.is_initialized:
            return
        settings = self.settings
        total = self.kept.length + self.recent.length + (staged.length if staged else 0)
        over = total - settings.most_high(self.length)
        blocks = min(-(-over // BLOCK), (total - settings.recent - settings.sinks) // BLOCK) if self.tiers else 0
        if blocks > 0 or staged is not None:
            self._divide(max(0, blocks), [self.kept, self.recent, *([staged] if staged else [])])
        elif self.recent.bits != self.kept.bits and self.recent.length >= settings.tail + RIPE:
            self._keep_oldest(self.recent.length - settings.tail)

    def _keep_oldest(self, count: int) -> None:
        """Move the oldest of the newest tokens over to the important ones, where they may wait to be moved down."""
        old = {name: tensor[:, :, :count] for name, tensor in self.recent.filled().items()}
        beside = {"score": old["score"]} if self._counts else {}
        positions = self._positions(self.recent)[:, :, :count].to(self._position_dtype)
        if self.kept.length:
            self.kept.tensors["position"] = self.kept.tensors["position"].to(positions.dtype)
        self.kept.append(old["key"], old["value"], position=positions, **beside)
        rest = {name: tensor[:, :, count:] for name, tensor in self.recent.filled().items()}
        self.recent = RowStore(self.recent.bits, self.recent.dtype)
        self.recent.append_encoded(rest)

    def _divide(self, count: int, parts: list[RowStore]) -> None:
        """Share out all rows anew: the ``count * 64`` least important go to lower tiers, the newest stay recent."""
        parts = [part for part in parts if part.length]
        positions = torch.cat([self._positions(part) for part in parts], 2)
        total = positions.shape[2]
        stay = torch.ones_like(positions, dtype=torch.bool)
        if count:
            order = self._rank(parts, positions).topk(count * BLOCK, 2, largest=False).indices
            stay.scatter_(2, order, False)
            self._move_down(count, order, parts, positions)
        slots = torch.arange(total, device=self.device).expand_as(stay)[stay].unflatten(0, (*stay.shape[:2], -1))
        newest = min(self.settings.tail, slots.shape[2])
        cut = slots.shape[2] - newest
        kept, recent = slots[..., :cut], slots[..., cut:]
        moved = [self._moved(parts, store, where) for store, where in ((self.kept, kept), (self.recent, recent))]
        moved[0]["position"] = positions.gather(2, kept).to(self._position_dtype)
        self.kept = RowStore(self.kept.bits, self.kept.dtype, moved[0], self.kept.endless)
        self.recent = RowStore(self.recent.bits, self.recent.dtype)
        self.recent.append_encoded(moved[1])
        if count:
            self.solid = min(self.solid, self.settings.recent)

    def _positions(self, part: RowStore) -> Tensor:
        """Positions of the rows of a part, int64 ``[batch, heads, n]``; a prompt follows the newest tokens."""
        if part is self.kept:
            return part.tensors["position"][:, :, : part.length].long()
        first = self.older + (0 if part is self.recent else self.recent.length)
        return torch.arange(first, first + part.length, device=self.device).expand(*self.shape[:2], -1)

    @property
    def older(self) -> int:
        """Tokens before the newest ones."""
        return self.kept.length + sum(tier.length for tier in self.tiers)

    @property
    def _position_dtype(self) -> torch.dtype:
        return torch.int16 if self.length <= SHORT_POSITIONS else torch.int32

    def _rank(self, parts: list[RowStore], positions: Tensor) -> Tensor:
        """Importance of rows ``[batch, heads, n]``; infinite for those that must stay or go."""
        if self.observed:
            scores = torch.cat([part.tensors["score"][:, :, : part.length] for part in parts], 2)
            rank = scores / importance.counts(positions, self.observed).clamp_min(1)
        else:
            rank = importance.from_keys(torch.cat([part.dense()[0].float() for part in parts], 2))
        if parts[0] is self.kept:
            rank[:, :, : self.kept.length] *= importance.HYSTERESIS
        place = positions if self.starts is None else positions - self.starts[:, None, None]
        rank.masked_fill_(place < 0, -torch.inf)
        pinned = ((place >= 0) & (place < self.settings.sinks)) | (positions >= self.length - self.settings.recent)
        return rank.masked_fill_(pinned, torch.inf)

    def _move_down(self, count: int, order: Tensor, parts: list[RowStore], positions: Tensor) -> None:
        """Give the slots ``order`` (least important first) to the tiers whose share is least filled."""
        dense = [part.dense() for part in parts]
        keys, values = dense[0] if len(parts) == 1 else [torch.cat(side, 2) for side in zip(*dense, strict=True)]
        self._freeze(None, keys)
        wanted = self._tiers_for(count)
        first = 0
        for tier in reversed(self.tiers):  # fewest bits first
            last = first + wanted.count(tier) * BLOCK
            slots = order[:, :, first:last].sort(2).values
            for at in range(0, slots.shape[2], BATCH * BLOCK):
                part = slots[:, :, at : at + BATCH * BLOCK]
                rows = gather({"key": keys, "value": values, "position": positions}, part)
                stored = self.frame.keys(rows["key"]), self.frame.rotated(rows["value"].float())
                tier.append(*stored, rows["position"].to(self._position_dtype))
            if last > first:
                self.moves.append((self.length, tier.tier.key_bits, last - first))
            first = last

    def _tiers_for(self, count: int) -> list[BlockTier | RowTier]:
        held = {id(tier): float(tier.length) for tier in self.tiers}
        out = []
        for _ in range(count):
            tier = min(self.tiers, key=lambda tier: held[id(tier)] / tier.tier.share)
            held[id(tier)] += BLOCK
            out.append(tier)
        return out

    @staticmethod
    def _moved(parts: list[RowStore], store: RowStore, slots: Tensor) -> dict[str, Tensor]:
        """Slots of all parts as ``store`` holds rows; codes are copied where they are of its kind."""
        rest = {"position"}
        if all(part.bits == store.bits and part.dtype == store.dtype for part in parts):
            found = [{name: tensor for name, tensor in part.filled().items() if name not in rest} for part in parts]
            return gather(joined(found), slots)
        dense = [part.dense() for part in parts]
        keys, values = (torch.cat(side, 2) for side in zip(*dense, strict=True))
        rows = gather({"key": keys, "value": values}, slots)
        new = store.encoded(rows["key"], rows["value"])
        if "score" in parts[0].tensors:
            score = torch.cat([part.tensors["score"][:, :, : part.length] for part in parts], 2)
            new["score"] = score.gather(2, slots)
        return new

    def _freeze(self, queries: Tensor | None, keys: Tensor) -> None:
        """Set the coordinates of low tiers, from the first prompt or the first tokens that move down."""
        if self.frozen or not self.tiers:
            return
        self.frozen, seen = True, keys.float()
        if self.settings.balanced and queries is not None:
            self.frame.balance = balance_of(queries.flatten(2, 3), seen)

    def _find_padding(self, mask: Tensor) -> None:
        """Left padding: what the last token does not see of the first ones, once a sequence."""
        if self.starts is None and self.length == mask.shape[2]:
            last = mask[:, 0, -1]
            seen = last if mask.dtype == torch.bool else last > torch.finfo(mask.dtype).min / 2
            starts = seen.to(torch.int8).argmax(-1)
            if bool(starts.any()):
                self.starts = starts.expand(self.shape[0]).clone()

    # How tokens are attended to.

    def _segments(self) -> Iterator[Segment]:
        for part in (self.kept, self.recent):
            for first in range(0, part.length, SLAB):
                last = min(first + SLAB, part.length)
                positions: Tensor | int = self.older + first
                if part is self.kept:
                    positions = part.tensors["position"][:, :, first:last].long()
                yield Segment(*part.dense(first, last), positions)
        for tier in self.tiers:
            for keys, values, where in tier.slabs(SLAB):
                yield Segment(keys, values, where, low=True)
        if self.incoming is not None:
            keys, values = self.incoming
            yield Segment(self._centered(keys), values, self.older + self.recent.length)

    def _attend_few(self, queries: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Tokens that are stored already; their weights wait to be counted."""
        if kernel.refusal(self) is None:
            out, rows = kernel.attend(self, queries, mask, scale)
        else:
            queries = queries.float()
            found = attend(queries, self._segments(), mask, scale, self.frame, self.length)
            out = found.out.permute(0, 3, 1, 2, 4).flatten(2, 3)
            rows = self._weights(queries, found.normalizer, mask, scale) if self._counts else None
        self.pending = rows
        return out

    def _weights(self, queries: Tensor, normalizer: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Weights of queries to all rows, ``[batch, heads, n, kept and recent and incoming]``."""
        plain = [segment for segment in self._segments() if not segment.low]
        return torch.cat([weights(queries, normalizer, part, mask, scale, self.length) for part in plain], -1)

    def _attend_behind(self, queries: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, range, Tensor | None]:
        """A prompt behind what is stored: its output, the queries counted, and what attention its own tokens got."""
        found = attend(queries.float(), self._segments(), mask, scale, self.frame, self.length)
        out = found.out.permute(0, 3, 1, 2, 4).flatten(2, 3)
        tokens = queries.shape[3]
        chosen = importance.observed(tokens, self.settings) if self._counts else range(0)
        if not chosen:
            return out, chosen, None
        first, sums = self.length - tokens, torch.zeros(())
        full = (
            torch.ones(1, 1, tokens, self.length, dtype=torch.bool, device=out.device).tril(first) if mask is None else mask
        )
        for at in range(0, len(chosen), 64):
            part = torch.tensor(chosen[at : at + 64], device=out.device)
            rows = self._weights(queries[:, :, :, part].float(), found.normalizer[..., part], full[:, :, part], scale)
            sums = sums + rows.sum(2)
        stored = self.kept.length + self.recent.length
        for store, part in ((self.kept, sums[..., : self.kept.length]), (self.recent, sums[..., self.kept.length : stored])):
            if store.length:
                store.tensors["score"][:, :, : store.length] += part
        return out, range(first + chosen.start, first + chosen.stop, chosen.step), sums[..., stored:]

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, batch first."""
        for part in (self.kept, self.recent, *self.tiers, self.frame):
            part.apply(change)
        self.starts = None if self.starts is None else change(self.starts)
        self.center = None if self.center is None else change(self.center)
        self.pending = None if self.pending is None else change(self.pending)
        if self.incoming is not None:
            self.incoming = change(self.incoming[0]), change(self.incoming[1])
        first = next((part["key"] for part in (self.kept.tensors, self.recent.tensors) if part), None)
        batch = self.incoming[0] if self.incoming is not None else first
        if batch is not None:
            self.shape = torch.Size((batch.shape[0], *self.shape[1:]))


def _no_prompt(keys: Tensor, values: Tensor) -> Tensor:
    raise AssertionError("tokens that are stored at once wait for no prompt")
