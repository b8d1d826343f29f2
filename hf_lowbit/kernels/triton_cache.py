"""The GPU kernel of the packed KV cache: ``hf_lowbit::triton_kv_attend``. Importing this module needs no Triton and no GPU.

Like the compiled kernel it reads the stored tensors as they are (``hf_lowbit/kv``), each part of the sequence by several
programs, whose sums one more launch joins in a fixed order: the same call gives the same bytes, and nothing waits for the
device. Queries are brought below 2 by a power of two and multiplied in the dtype of 16-bit rows, else in fp16, like
the weights of values; levels are whole numbers and exact. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowbit.errors import BadRequest
from hf_lowbit.kernels import packed_cache, triton_backend
from hf_lowbit.kernels.triton_plan import byte_planes

# A tile of 64 keys or values of one head must fit the registers of a program.
MOST_DIM = 256


def trouble(device: torch.device, dim: int) -> str | None:
    """Why the kernel cannot serve heads of ``dim`` numbers on a device, or None."""
    return triton_backend.trouble(device) or packed_cache.unfit(dim, MOST_DIM)


def levels(table: Tensor) -> Tensor:
    """A level table as the kernel takes it: the byte planes of fp16, eight words."""
    return byte_planes(table[None], torch.float16)[0]


def _attend(
    queries: Tensor,
    turned: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    mask: Tensor | None,
    scale: float,
    weights: bool,
) -> tuple[Tensor, Tensor]:
    parts = packed_cache.parse(queries, turned, tensors, layout)
    for tensor in (turned, *tensors, *([] if mask is None else [mask])):
        if tensor.device != queries.device:
            raise BadRequest(f"the queries are on {queries.device}, a part of the cache on {tensor.device}: move one there.")
    from hf_lowbit.kernels import triton_cache_launch

    return triton_cache_launch.attend(queries, turned, parts, mask, scale, weights)


attend = packed_cache.register("triton_kv_attend", _attend, "CompositeExplicitAutograd")
