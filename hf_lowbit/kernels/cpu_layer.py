"""The fused decoder layer: a block of the Llama family for a few tokens in two calls of compiled code.

The first call does the norm, q/k/v from activations rounded once, the norms of heads and rotary positions; the second,
once the host's cache has taken keys and values, does attention, o, norm, gate/up, SiLU and down, with both residuals.
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
    """``LowbitLayer`` of ``cpu/decoder_layer.h``."""

    _fields_ = (
        ("matrices", c_void_p * 7),
        ("bytes", c_int64 * 7),
        ("biases", c_void_p * 7),
        ("norms", c_void_p * 4),
        ("epsilon", c_float * 4),
        ("scale", c_float),
        *((name, c_int32) for name in ("dtype", "hidden", "heads", "kv_heads", "dim", "inner", "mode", "threads")),
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
        self._library = loaded()
        self._ready: tuple[tuple[object, ...], _Layer] | None = None

    def start(self, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of new tokens, with their positions.

        Args:
            x: hidden states ``[batch, tokens, hidden]``, float32 or bfloat16.
            cosines, sines: ``[1 or batch, tokens, dim]`` in the dtype of ``x``.

        Returns:
            Queries float32 ``[batch, tokens, heads, dim]``, keys and values ``[batch, kv_heads, tokens, dim]`` like ``x``.
        """
        shape, (batch, tokens, width) = self.shape, x.shape
        positions = (len(cosines), tokens, shape.dim)
        if x.dtype not in DTYPES or width != shape.hidden or cosines.shape != positions or sines.shape != positions:
            raise BadRequest(
                f"the fused layer takes float32 or bfloat16 hidden states of width {shape.hidden} and positions of "
                f"{shape.dim} numbers, got {x.dtype} {list(x.shape)} and {list(cosines.shape)}."
            )
        x, cosines, sines = x.contiguous(), cosines.to(x.dtype).contiguous(), sines.to(x.dtype).contiguous()
        layer, kept = self._filled(x.dtype)
        queries = torch.empty(batch, tokens, shape.heads, shape.dim)
        keys = x.new_empty(batch, shape.kv_heads, tokens, shape.dim)
        values = torch.empty_like(keys)
        checked(
            self._library.lowbit_layer_start(
                layer, x.data_ptr(), batch, tokens, cosines.data_ptr(), sines.data_ptr(), len(cosines),
                queries.data_ptr(), keys.data_ptr(), values.data_ptr(),
            )
        )  # fmt: skip
        del kept
        return queries, keys, values

    def finish(self, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The layer's output ``[batch, tokens, hidden]`` in the dtype of ``x``.

        Args:
            x, queries: as given to and returned by :meth:`start`.
            keys, values: the whole cache, ``[batch, kv_heads, length, dim]`` in the dtype of ``x``, last axis contiguous.
            mask: bool (true is seen) or float (added to scores), ``[batch, 1, tokens, length]`` or axes of size 1 that are
                repeated; None for causal.
        """
        shape, (batch, tokens, _) = self.shape, x.shape
        length = keys.shape[2]
        expected = (batch, shape.kv_heads, length, shape.dim)
        if keys.shape != expected or values.shape != expected or keys.dtype != x.dtype or values.dtype != x.dtype:
            raise BadRequest(
                f"the fused layer takes keys and values {list(expected)} of {x.dtype}, got {list(keys.shape)} of "
                f"{keys.dtype} and {list(values.shape)} of {values.dtype}."
            )
        keys, values = (t if t.stride(3) == 1 else t.contiguous() for t in (keys, values))
        x = x.contiguous()
        cache = _Cache(keys=keys.data_ptr(), values=values.data_ptr(), length=length)
        cache.key_strides[:], cache.value_strides[:] = keys.stride()[:3], values.stride()[:3]
        seen = _Mask()
        if mask is not None:
            mask = (mask if mask.dtype == torch.bool else mask.float()).expand(batch, 1, tokens, length)
            first, _, query, key = mask.stride()
            seen.data, seen.kind = mask.data_ptr(), 1 if mask.dtype == torch.bool else 2
            seen.strides[:] = first, query, key
        layer, kept = self._filled(x.dtype)
        y = torch.empty_like(x)
        checked(
            self._library.lowbit_layer_finish(
                layer, x.data_ptr(), queries.data_ptr(), ctypes.byref(cache), ctypes.byref(seen), batch, tokens, y.data_ptr()
            )
        )
        del kept
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
        layer, kept = self._filled(x.dtype)
        y = torch.empty_like(x)
        checked(self._library.lowbit_layer_output(layer, x.data_ptr(), mixed.data_ptr(), batch * tokens, y.data_ptr()))
        del kept
        return y

    def _filled(self, dtype: torch.dtype) -> tuple[object, list[Tensor]]:
        """A struct for one call, and the tensors made for it alone, which must outlive the call.

        Where norms and biases are as the kernels want them, the struct serves until one is replaced. Another takes its
        place then, since a second thread may be using it.
        """
        threads, mode = torch.get_num_threads(), cpu.mode()
        tensors = [(tensor, dtype) for tensor in self.norms] + [(tensor, torch.float32) for tensor in self.biases]
        state = (dtype, threads, mode, *(tensor is not None and tensor.data_ptr() for tensor, _ in tensors))
        ready = self._ready
        if ready is not None and ready[0] == state:
            return ctypes.byref(ready[1]), []
        kept = [None if tensor is None else tensor.detach().to(wanted).contiguous() for tensor, wanted in tensors]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in kept]
        layer = _Layer.from_buffer_copy(self._layer)
        layer.norms[:], layer.biases[:] = pointers[: len(self.norms)], pointers[len(self.norms) :]
        layer.dtype, layer.mode, layer.threads = DTYPES[dtype], mode, threads
        if all(tensor is None or tensor.data_ptr() == own for (tensor, _), own in zip(tensors, pointers, strict=True)):
            self._ready = state, layer
        return ctypes.byref(layer), [tensor for tensor in kept if tensor is not None]
