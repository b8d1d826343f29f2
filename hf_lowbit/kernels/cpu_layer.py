"""The fused decoder layer: a block of the Llama family for a few tokens in one or two calls of compiled code.

The first half is the norm, q/k/v from activations rounded once, the norms of heads and rotary positions; the second is
attention, o, norm, gate/up, SiLU and down, with both residuals. In between keys and values go into the cache: written there
by the first half where the cache has room for them, else handed to the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.kernels import cpu
from hf_lowbit.kernels.cpu_repack import checked, loaded

# What hidden states, norms and caches may hold.
DTYPES = {dtype: cpu.DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16)}
# Heads of other widths have no whole vectors of 16 numbers.
HEAD_STEP = 16


class _Layer(ctypes.Structure):
    """``LowbitLayer`` of ``cpu/decoder_layer.h``; ``kept`` is what it points to."""

    kept: list[Tensor | None]

    _fields_ = (
        ("matrices", c_void_p * 7),
        ("bytes", c_int64 * 7),
        ("biases", c_void_p * 7),
        ("norms", c_void_p * 4),
        ("epsilon", c_float * 4),
        ("scale", c_float),
        *((name, c_int32) for name in ("dtype", "hidden", "heads", "kv_heads", "dim", "inner", "mode", "threads")),
    )


class _Tokens(ctypes.Structure):
    """``LowbitTokens``."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "cosines", "sines")),
        *((name, c_int32) for name in ("batch", "tokens", "position_rows")),
    )


class _Cache(ctypes.Structure):
    """``LowbitCache``."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        ("length", c_int64),
    )


class _Mask(ctypes.Structure):
    """``LowbitMask``."""

    _fields_ = (("data", c_void_p), ("strides", c_int64 * 3), ("kind", c_int32))


_CAUSAL = _Mask()
_byref, _Strides = ctypes.byref, c_int64 * 3


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder layer: width ``hidden``, ``heads`` over ``kv_heads`` of ``dim`` numbers, an MLP ``inner`` wide."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int

    @property
    def unfit(self) -> str | None:
        """Why no fused layer has these sizes, or None."""
        if self.heads % self.kv_heads:
            return f"{self.heads} heads do not divide among {self.kv_heads} heads of keys"
        return f"heads of {self.dim} numbers, not a multiple of {HEAD_STEP}" if self.dim % HEAD_STEP else None


class FusedLayer:
    """One decoder layer with everything but its cache.

    Args:
        matrices: prepared q, k, v, o, gate, up and down (``Cpu.prepare``), which are kept alive.
        biases: float32 or None, one entry for each.
        norms: weights before attention and MLP, ``[hidden]``, and of query and key heads, ``[dim]`` or None; float32 or
            bfloat16, read at every call.
        epsilons: of the norms.
        scale: of the attention scores.
    """

    def __init__(
        self,
        shape: Shape,
        matrices: Sequence[cpu.Prepared],
        biases: Sequence[Tensor | None],
        norms: Sequence[Tensor | None],
        epsilons: Sequence[float],
        scale: float,
    ) -> None:
        self.shape, self.matrices, self.biases, self.norms = shape, list(matrices), list(biases), list(norms)
        layer = _Layer(scale=scale, hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads)
        layer.dim, layer.inner = shape.dim, shape.inner
        for number, matrix in enumerate(self.matrices):
            layer.matrices[number], layer.bytes[number] = matrix.matrix.data_ptr(), matrix.matrix.numel()
        for number, epsilon in enumerate(epsilons):
            layer.epsilon[number] = epsilon
        self._layer = layer
        self._read = [*self.norms, *self.biases]
        self._library = loaded()
        self._ready: tuple[tuple[object, ...], _Layer] | None = None

    def whole(self, x: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The layer's output ``[batch, tokens, hidden]`` in the dtype of ``x``.

        Args:
            x: hidden states ``[batch, tokens, hidden]``, float32 or bfloat16.
            cosines, sines: ``[1 or batch, tokens, dim]``.
            keys, values: the cache ``[batch, kv_heads, length, dim]`` in the dtype of ``x``, last axis contiguous, its last
                places free: the keys and values of these tokens are written there.
            mask: bool (true is seen) or float (added to scores), ``[batch, 1, tokens, length]`` or axes of size 1 that are
                repeated; None for causal.
        """
        x = x.contiguous()
        tokens, *kept = self._tokens(x, cosines, sines)
        cache, layer, y = self._cache(x, keys, values), self._filled(x.dtype), torch.empty_like(x)
        seen, mask = self._seen(x, keys.shape[2], mask)
        checked(self._library.lowbit_layer(_byref(layer), _byref(tokens), _byref(cache), _byref(seen), y.data_ptr()))
        del kept
        return y

    def start(self, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of new tokens, with their positions, for a cache that takes them itself.

        Returns:
            Queries float32 ``[batch, tokens, heads, dim]``, keys and values ``[batch, kv_heads, tokens, dim]`` like ``x``.
        """
        tokens, *kept = self._tokens(x, cosines, sines)
        shape, (batch, count, _) = self.shape, x.shape
        queries = torch.empty(batch, count, shape.heads, shape.dim)
        keys = x.new_empty(batch, shape.kv_heads, count, shape.dim)
        values = torch.empty_like(keys)
        cache, layer = self._cache(x, keys, values), self._filled(x.dtype)
        checked(self._library.lowbit_layer_start(_byref(layer), _byref(tokens), queries.data_ptr(), _byref(cache)))
        del kept
        return queries, keys, values

    def finish(self, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """What :meth:`whole` returns, after :meth:`start`: ``keys`` and ``values`` are the whole cache."""
        keys, values = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (keys, values))
        x = x.contiguous()
        tokens = _Tokens(x=x.data_ptr(), batch=x.shape[0], tokens=x.shape[1], position_rows=1)
        cache, layer, y = self._cache(x, keys, values), self._filled(x.dtype), torch.empty_like(x)
        seen, mask = self._seen(x, keys.shape[2], mask)
        checked(
            self._library.lowbit_layer_finish(
                _byref(layer), _byref(tokens), queries.data_ptr(), _byref(cache), _byref(seen), y.data_ptr()
            )
        )
        return y

    def output(self, x: Tensor, mixed: Tensor) -> Tensor:
        """:meth:`finish` where attention was done elsewhere: ``mixed`` is float32 ``[batch, tokens, heads, dim]``."""
        shape, (batch, tokens, _) = self.shape, x.shape
        expected = (batch, tokens, shape.heads, shape.dim)
        if mixed.shape != expected or mixed.dtype != torch.float32:
            raise BadRequest(
                f"the fused layer takes float32 attention output {list(expected)}, got {mixed.dtype} {list(mixed.shape)}."
            )
        x, mixed = x.contiguous(), mixed.contiguous()
        layer, y = self._filled(x.dtype), torch.empty_like(x)
        checked(
            self._library.lowbit_layer_output(_byref(layer), x.data_ptr(), mixed.data_ptr(), batch * tokens, y.data_ptr())
        )
        return y

    def _tokens(self, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[_Tokens, Tensor, Tensor, Tensor]:
        """The struct, and the tensors it points to."""
        dim, (batch, count, width) = self.shape.dim, x.shape
        positions = (len(cosines), count, dim)
        if x.dtype not in DTYPES or width != self.shape.hidden or cosines.shape != positions or sines.shape != positions:
            raise BadRequest(
                f"the fused layer takes float32 or bfloat16 hidden states of width {self.shape.hidden} and positions of "
                f"{dim} numbers, got {x.dtype} {list(x.shape)} and {list(cosines.shape)}."
            )
        x, cosines, sines = x.contiguous(), cosines.to(x.dtype).contiguous(), sines.to(x.dtype).contiguous()
        struct = _Tokens(x.data_ptr(), cosines.data_ptr(), sines.data_ptr(), batch, count, positions[0])
        return struct, x, cosines, sines

    def _cache(self, x: Tensor, keys: Tensor, values: Tensor) -> _Cache:
        length = keys.shape[2]
        expected = (x.shape[0], self.shape.kv_heads, length, self.shape.dim)
        if keys.shape != expected or values.shape != expected or keys.dtype != x.dtype or values.dtype != x.dtype:
            raise BadRequest(
                f"the fused layer takes keys and values {list(expected)} of {x.dtype}, got {list(keys.shape)} of "
                f"{keys.dtype} and {list(values.shape)} of {values.dtype}."
            )
        (*key, key_step), (*value, value_step) = keys.stride(), values.stride()
        if key_step != 1 or value_step != 1:
            raise BadRequest("the fused layer takes keys and values whose last axis is contiguous.")
        return _Cache(keys.data_ptr(), values.data_ptr(), _Strides(*key), _Strides(*value), length)

    @staticmethod
    def _seen(x: Tensor, length: int, mask: Tensor | None) -> tuple[_Mask, Tensor | None]:
        """The struct, and the tensor it points to."""
        if mask is None:
            return _CAUSAL, None
        kind = 1 if mask.dtype == torch.bool else 2
        mask = (mask if kind == 1 else mask.float()).expand(x.shape[0], 1, x.shape[1], length)
        first, _, query, key = mask.stride()
        return _Mask(mask.data_ptr(), _Strides(first, query, key), kind), mask

    def _filled(self, dtype: torch.dtype) -> _Layer:
        """The struct for a call, which keeps what it points to alive.

        It serves until a norm or bias is replaced. Another takes its place then, since a second thread may be using it.
        """
        threads, mode = torch.get_num_threads(), cpu.mode()
        state = (dtype, threads, mode, *[tensor is not None and tensor.data_ptr() for tensor in self._read])
        ready = self._ready
        if ready is not None and ready[0] == state:
            return ready[1]
        wanted = [dtype] * len(self.norms) + [torch.float32] * len(self.biases)
        kept = [
            None if tensor is None else tensor.detach().to(to).contiguous()
            for tensor, to in zip(self._read, wanted, strict=True)
        ]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in kept]
        layer = _Layer.from_buffer_copy(self._layer)
        layer.norms[:], layer.biases[:] = pointers[: len(self.norms)], pointers[len(self.norms) :]
        layer.dtype, layer.mode, layer.threads = DTYPES[dtype], mode, threads
        layer.kept = kept
        if all(tensor is None or tensor.data_ptr() == own for tensor, own in zip(self._read, pointers, strict=True)):
            self._ready = state, layer
        return layer
