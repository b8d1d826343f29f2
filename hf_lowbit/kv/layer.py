"""One layer of the cache as the host knows layers: tokens come in, attention reads them, sequences are moved about.

A few tokens are stored before they are attended to; a prompt waits until attention has told what in it is important.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_lowbit.errors import BadRequest
from hf_lowbit.kv import demotion, importance, reading
from hf_lowbit.kv.attend import Segment
from hf_lowbit.kv.center import Center
from hf_lowbit.kv.holdings import Holdings
from hf_lowbit.kv.packed import Packed
from hf_lowbit.kv.settings import CacheSettings

# Up to so many tokens at once are stored before they are attended to, by the kernel that reads packed blocks; more of them
# attend to each other as they come, behind decoded slabs. Measured where the one gets slower than the other
# (``eval/kv_crossover.py``). A first prompt is the host's own attention from a few tokens on.
FEW, FIRST = 32, 8


class LowBitLayer(CacheLayerMixin):
    """Keys and values of one layer at several precisions.

    Args:
        settings: what holds for this layer.
        positions: most tokens the model takes, or None.

    Attributes:
        held: what is stored.
        center: subtracted from all keys and values that are stored.
        incoming: keys and values of a prompt that is not stored yet, as they came.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, settings: CacheSettings, positions: int | None = None) -> None:
        super().__init__()
        self.settings, self.positions = settings, positions
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.held: Holdings = Holdings(self.settings, 0, 0, 0, self.dtype, self.device)
        self.center = Center()
        self.incoming: tuple[Tensor, Tensor] | None = None
        self._owner: weakref.ref[Any] | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.held.length

    @property
    def shape(self) -> torch.Size:
        """Of all keys, and of all values."""
        return torch.Size((self.held.batch, self.held.heads, self.held.length, self.held.dim))

    # What the host calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes and dtype from the first tokens."""
        batch, heads, _, dim = key_states.shape
        self.settings.check_head(dim)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.held = self._holdings(batch, heads, dim)
        if self.settings.center and not self.settings.exact:
            self.center = Center.of(key_states, value_states)
        self.is_initialized = True

    def _holdings(self, batch: int, heads: int, dim: int) -> Holdings:
        return Holdings(self.settings, batch, heads, dim, self.dtype, self.device)

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
        demotion.settle(self.held)
        tokens = key_states.shape[2]
        if tokens <= (FEW if self.held.stored else FIRST) or self.settings.exact:
            self.held.append(*self.center.taken(key_states, value_states))
        else:
            self.incoming = key_states, value_states
        self.held.grow(tokens)
        if self.settings.exact:
            return self.held.recent.dense()
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
        if tokens_to_remove and self.is_initialized:
            self._store_incoming(None)
            self.held.crop(-tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what :meth:`crop` cannot do."""
        if tokens_to_remove > 0:
            raise BadRequest(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}.")
        if -tokens_to_remove > self.held.solid and self.is_initialized:
            raise BadRequest(
                f"crop({tokens_to_remove}): this cache of {self.length} tokens can take back its newest {self.held.solid}, "
                f"older ones are packed. Use a larger recent (it is {self.settings.recent}), or reset()."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences ``beam_idx`` in place of those held."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only sequences ``indices``."""
        if self.is_initialized:
            count = int(indices.sum()) if indices.dtype == torch.bool else len(indices)
            self._apply(lambda tensor: tensor[indices.to(tensor.device)], count)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        if self.is_initialized:
            self._apply(lambda tensor: tensor.repeat_interleave(repeats, 0), self.held.batch * repeats)

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True), self.held.batch)

    def prefetch(self) -> None:
        """Move everything back to its device."""
        self._apply(lambda tensor: tensor.to(self.device, non_blocking=True), self.held.batch)

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
        held = self.held
        queries = query.detach().unflatten(1, (held.heads, -1))
        if mask is not None:
            mask = mask[..., : held.length].expand(-1, -1, -1, held.length)
            held.find_padding(mask)
        if self.incoming is None:
            return self.center.seen(reading.attend_stored(held, queries, mask, scale)).to(query.dtype)
        keys, values = self.center.taken(*self.incoming)
        if not held.stored:
            out = stock(*self.incoming)
            chosen = importance.observed(held.length, self.settings) if held.counts else range(0)
            sums = None
            if chosen:
                sums = importance.column_sums(queries, keys, mask, scale, chosen, self.settings.decay)
        else:
            out, chosen, sums = reading.attend_behind(held, (keys, values), queries, mask, scale)
            out = self.center.seen(out)
        if chosen:
            held.observed.append(chosen)
        held.freeze(queries, keys)
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
        frame = self.held.frame
        for segment in self.held.rows():
            self._write(out, segment)
        for segment in self.held.packed():
            keys, values = frame.keys_back(segment.keys), frame.rotated(segment.values)
            self._write(out, segment._replace(keys=keys, values=values))
        if self.incoming is not None:
            self._write(out, Segment(*self.center.taken(*self.incoming), self.held.stored))
        return out[0], out[1]

    def _write(self, out: list[Tensor], segment: Segment) -> None:
        rows = self.center.given_back(segment.keys, segment.values)
        for whole, part in zip(out, rows, strict=True):
            if isinstance(segment.positions, int):
                whole[:, :, segment.positions : segment.positions + part.shape[2]] = part
            else:
                whole.scatter_(2, segment.positions[..., None].expand(part.shape), part.to(whole.dtype))

    def store_pending(self) -> None:
        """Store tokens and count weights that wait for the next update, so that all there is lies in ``held``."""
        self._store_incoming(None)
        demotion.count_pending(self.held)

    # How it does that.

    def _check(self, keys: Tensor, values: Tensor) -> None:
        held = self.held
        if keys.shape != values.shape:
            raise BadRequest(f"keys {list(keys.shape)} and values {list(values.shape)} of one width are needed.")
        if self.is_initialized:
            if keys.device != self.device:
                raise BadRequest(
                    f"the cache is on {self.device}, {keys.device} tokens were given. Load a saved cache with "
                    f"device={str(keys.device)!r}, or use a new one."
                )
            if keys.shape[0] != held.batch:
                raise BadRequest(
                    f"the cache holds {held.batch} sequences, {keys.shape[0]} were given. Use batch_select_indices or "
                    "batch_repeat_interleave to change the batch, or a new cache."
                )
            expected, found = (held.heads, held.dim, self.dtype), (keys.shape[1], keys.shape[3], keys.dtype)
            if found != expected:
                raise BadRequest(
                    f"the cache holds {expected[0]} heads of {expected[1]} numbers in {expected[2]}, got {found[0]} of "
                    f"{found[1]} in {found[2]}: is it another model's? Use a new cache."
                )
        if self.positions is not None and held.length + keys.shape[2] > self.positions:
            raise BadRequest(
                f"the model has {self.positions} positions, {held.length} are taken and {keys.shape[2]} more tokens were "
                "given. Shorten the text, or use a new cache."
            )

    def _claim(self, module: Any) -> None:
        owner = self._owner() if self._owner is not None else None
        if owner is None:
            self._owner = weakref.ref(module)
        elif owner is not module:
            raise BadRequest("this cache is in use by another model; its tokens mean nothing to this one. Use a new cache.")

    def _store_incoming(self, sums: Tensor | None) -> None:
        """Store a prompt that waited; ``sums [batch, heads, n]`` is what it got of attention, None where unknown."""
        if self.incoming is not None:
            incoming, self.incoming = self.incoming, None
            demotion.store(self.held, *self.center.taken(*incoming), sums)

    def _apply(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        """Replace every tensor, batch first; there are ``batch`` sequences then."""
        self.held.apply(change, batch)
        self.center.apply(change)
        if self.incoming is not None:
            self.incoming = change(self.incoming[0]), change(self.incoming[1])


def _no_prompt(keys: Tensor, values: Tensor) -> Tensor:
    raise AssertionError("tokens that are stored at once wait for no prompt")
