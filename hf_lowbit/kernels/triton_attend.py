"""Attention over a packed cache: rows and blocks each by programs of their own, whose sums are then joined.

A program holds the queries of one head of keys and walks over 64 tokens at a time of one split of a part. It leaves the
weighted sum of values, and per query the largest score and the sum of weights relative to it (online softmax); a part of
the sequence is one or more *slots* of such results.
"""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton_cache_decode import key_tile, value_tile
from hf_lowbit.kernels.triton_decode import load_planes

# What changes from token to token: one compiled kernel serves all its values.
ROWS_VARY = ("count", "first", "room", "position_room", "each", "length", "slot", "raw_at", "raw_width", "mask_key")
BLOCKS_VARY = ("count", "each", "slot", "mask_key")
JOIN_VARY = ("slots",)
WEIGHTS_VARY = ("width",)


@triton.jit
def load_queries(q_ptr, q, queries, dim, BLOCK_D: tl.constexpr):
    """Queries float32 ``[q, BLOCK_D]`` brought below 2 by a power of two, which rounds nothing, and that power."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(q_ptr + q[:, None] * dim + channel, mask=(q < queries)[:, None] & (channel < dim), other=0.0)
    most = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    power = (most.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return x / power[:, None], power


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """``a @ b`` in float32; ``WIDE`` first makes them so, since Triton's interpreter has no arithmetic of bfloat16."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32)) if WIDE else tl.dot(a, b)


@triton.jit
def hidden(mask_ptr, position, seen, b, q, tokens, mask_batch, mask_query, mask_key, MASK: tl.constexpr):
    """What the mask adds to scores ``[q, positions]``: 0 or minus infinity (``MASK`` 1: bool), or numbers (2)."""
    where = mask_ptr + b * mask_batch + (q % tokens)[:, None] * mask_query + position[None, :] * mask_key
    found = tl.load(where, mask=seen[None, :], other=0)
    if MASK == 1:
        found = tl.where(found != 0, 0.0, float("-inf"))
    return found


@triton.jit
def soften(scores, top, total):
    """Scores ``[q, n]`` to weights relative to a new largest score: weights, that score, what fades, sum of weights."""
    highest = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - safe[:, None])
    fade = tl.exp(top - safe)
    return weights, highest, fade, total * fade + tl.sum(weights, 1)


@triton.jit
def store_slot(out_ptr, top_ptr, total_ptr, out, top, total, slot, head, heads, q, queries, dim, BLOCK_D: tl.constexpr):
    """Leave the results of a program: ``out [slots, heads, queries, dim]``, and the others ``[slots, heads, queries]``."""
    at = (slot * heads + head).to(tl.int64) * queries + q
    channel = tl.arange(0, BLOCK_D)[None, :]
    known = q < queries
    tl.store(out_ptr + at[:, None] * dim + channel, out, mask=known[:, None] & (channel < dim))
    tl.store(top_ptr + at, top, mask=known)
    tl.store(total_ptr + at, total, mask=known)


@triton.jit(do_not_specialize=ROWS_VARY)
def rows_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    positions_ptr,
    mask_ptr,
    raw_ptr,
    out_ptr,
    top_ptr,
    total_ptr,
    heads,
    tokens,
    queries,
    dim,
    scale,
    mask_batch,
    mask_query,
    mask_key,
    count,
    first,
    room,
    position_room,
    each,
    length,
    slot,
    raw_at,
    raw_width,
    INT8: tl.constexpr,
    POSITIONS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAW: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows ``each * split`` to ``each * (split + 1)`` of a store of ``count``; scores go to ``raw_ptr`` with ``RAW``."""
    split, head = tl.program_id(0), tl.program_id(1)
    all_heads = tl.num_programs(1)
    q = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    x, power = load_queries(q_ptr + head.to(tl.int64) * queries * dim, q, queries, dim, BLOCK_D)
    KIND: tl.constexpr = tl.float16 if INT8 else keys_ptr.dtype.element_ty
    x = x.to(KIND)
    base = head.to(tl.int64) * room
    channel = tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.minimum(count, (split + 1) * each)
    for start in range(split * each, last, 64):
        row = start + tl.arange(0, 64)
        seen = row < last
        place = (base + row) * dim
        within = seen[:, None] & (channel < dim)[None, :]
        keys = tl.load(keys_ptr + place[:, None] + channel[None, :], mask=within, other=0).to(KIND)
        scores = product(x, tl.trans(keys), WIDE) * (power * scale)[:, None]
        if INT8:
            scores *= tl.load(key_scale_ptr + base + row, mask=seen, other=0.0).to(tl.float32)[None, :]
        position = first + row
        if POSITIONS:
            position = tl.load(positions_ptr + head.to(tl.int64) * position_room + row, mask=seen, other=0).to(tl.int32)
        if MASK > 0:
            scores += hidden(mask_ptr, position, seen, head // heads, q, tokens, mask_batch, mask_query, mask_key, MASK)
        elif CAUSAL:
            scores = tl.where(position[None, :] > (length - tokens + q % tokens)[:, None], float("-inf"), scores)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        if RAW:
            where = raw_ptr + (head.to(tl.int64) * queries + q)[:, None] * raw_width + raw_at + row[None, :]
            tl.store(where, scores, mask=(q < queries)[:, None] & seen[None, :])
        weights, top, fade, total = soften(scores, top, total)
        values = tl.load(values_ptr + place[:, None] + channel[None, :], mask=within, other=0).to(KIND)
        if INT8:
            factor = tl.load(value_scale_ptr + base + row, mask=seen, other=0.0).to(tl.float32)
            most = tl.maximum(tl.max(factor, 0), 1e-30)
            mixed = product((weights * (factor / most)[None, :]).to(KIND), values, WIDE) * most
        else:
            mixed = product(weights.to(KIND), values, WIDE)
        out = out * fade[:, None] + mixed
    store_slot(out_ptr, top_ptr, total_ptr, out, top, total, slot + split, head, all_heads, q, queries, dim, BLOCK_D)


@triton.jit(do_not_specialize=BLOCKS_VARY)
def blocks_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    key_offset_ptr,
    value_scale_ptr,
    value_offset_ptr,
    key_planes_ptr,
    value_planes_ptr,
    positions_ptr,
    mask_ptr,
    out_ptr,
    top_ptr,
    total_ptr,
    heads,
    tokens,
    queries,
    dim,
    scale,
    mask_batch,
    mask_query,
    mask_key,
    count,
    each,
    slot,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEYS_BY_CHANNEL: tl.constexpr,
    VALUES_BY_CHANNEL: tl.constexpr,
    MASK: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Blocks ``each * split`` to ``each * (split + 1)`` of a tier of ``count``, all of which lie before every query.

    Scales and offsets stay out of the products: those of channels go into the queries or come after the sum of values,
    those of tokens go into scores or weights.
    """
    split, head = tl.program_id(0), tl.program_id(1)
    all_heads = tl.num_programs(1)
    q = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    x, power = load_queries(q_ptr + head.to(tl.int64) * queries * dim, q, queries, dim, BLOCK_D)
    sums = tl.sum(x, 1)
    key_planes = load_planes(key_planes_ptr, split, False, ASM)
    value_planes = load_planes(value_planes_ptr, split, False, ASM)
    channel, token = tl.arange(0, BLOCK_D), tl.arange(0, 64)
    known = channel < dim
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for number in range(split * each, tl.minimum(count, (split + 1) * each)):
        block = head.to(tl.int64) * count + number
        keys = key_tile(keys_ptr + block * (2 * KEY_BITS) * dim, dim // 4, key_planes, KEY_BITS, BLOCK_D, ASM)
        if KEYS_BY_CHANNEL:
            factor = tl.load(key_scale_ptr + block * dim + channel, mask=known, other=0.0).to(tl.float32)
            offset = tl.load(key_offset_ptr + block * dim + channel, mask=known, other=0.0).to(tl.float32)
            most = tl.maximum(tl.max(tl.abs(factor), 0), 1e-30)
            folded = (x * (factor / most)[None, :]).to(tl.float16)
            scores = product(folded, keys, WIDE) * most + tl.sum(x * offset[None, :], 1)[:, None]
        else:
            factor = tl.load(key_scale_ptr + block * 64 + token).to(tl.float32)
            offset = tl.load(key_offset_ptr + block * 64 + token).to(tl.float32)
            scores = product(x.to(tl.float16), keys, WIDE) * factor[None, :] + sums[:, None] * offset[None, :]
        scores *= (power * scale)[:, None]
        if MASK > 0:
            position = tl.load(positions_ptr + block * 64 + token).to(tl.int32)
            scores += hidden(
                mask_ptr, position, position >= 0, head // heads, q, tokens, mask_batch, mask_query, mask_key, MASK
            )
        weights, top, fade, total = soften(scores, top, total)
        values = value_tile(values_ptr + block * (2 * VALUE_BITS) * dim, dim, value_planes, VALUE_BITS, BLOCK_D, ASM)
        if VALUES_BY_CHANNEL:
            factor = tl.load(value_scale_ptr + block * dim + channel, mask=known, other=0.0).to(tl.float32)
            offset = tl.load(value_offset_ptr + block * dim + channel, mask=known, other=0.0).to(tl.float32)
            mixed = product(weights.to(tl.float16), values, WIDE) * factor[None, :]
            mixed += tl.sum(weights, 1)[:, None] * offset[None, :]
        else:
            factor = tl.load(value_scale_ptr + block * 64 + token).to(tl.float32)
            offset = tl.load(value_offset_ptr + block * 64 + token).to(tl.float32)
            most = tl.maximum(tl.max(tl.abs(factor), 0), 1e-30)
            mixed = product((weights * (factor / most)[None, :]).to(tl.float16), values, WIDE) * most
            mixed += tl.sum(weights * offset[None, :], 1)[:, None]
        out = out * fade[:, None] + mixed
    store_slot(out_ptr, top_ptr, total_ptr, out, top, total, slot + split, head, all_heads, q, queries, dim, BLOCK_D)


@triton.jit(do_not_specialize=JOIN_VARY)
def join_kernel(
    out_ptr,
    top_ptr,
    total_ptr,
    y_ptr,
    normalizer_ptr,
    heads,
    tokens,
    queries,
    dim,
    slots,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``y [batch, tokens, heads, dim]`` of one query from all its slots, and the log of its softmax sum."""
    head, q = tl.program_id(0), tl.program_id(1)
    step = tl.num_programs(0) * queries
    at = head * queries + q
    slot = tl.arange(0, SLOTS)
    tops = tl.load(top_ptr + slot * step + at, mask=slot < slots, other=float("-inf"))
    highest = tl.max(tops, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    totals = tl.load(total_ptr + slot * step + at, mask=slot < slots, other=0.0)
    total = tl.sum(totals * tl.exp(tops - safe), 0)
    channel = tl.arange(0, BLOCK_D)
    y = tl.zeros((BLOCK_D,), tl.float32)
    for number in range(0, slots):
        place = (number * step + at).to(tl.int64)
        part = tl.load(out_ptr + place * dim + channel, mask=channel < dim, other=0.0)
        y += part * tl.exp(tl.load(top_ptr + place) - safe)
    y = tl.where(total > 0, y / tl.where(total > 0, total, 1.0), 0.0)
    group = queries // tokens
    row = (head // heads * tokens + q % tokens) * heads * group + head % heads * group + q // tokens
    tl.store(y_ptr + row.to(tl.int64) * dim + channel, y, mask=channel < dim)
    # Of nothing seen: weights of zero.
    tl.store(normalizer_ptr + at, tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), float("inf")))


@triton.jit(do_not_specialize=WEIGHTS_VARY)
def weights_kernel(raw_ptr, normalizer_ptr, weights_ptr, tokens, queries, width, BLOCK: tl.constexpr):
    """``weights [heads, tokens, width]`` from scores ``[heads, queries, width]``, averaged over the heads of a group."""
    head, token = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for q in range(token, queries, tokens):
        row = head.to(tl.int64) * queries + q
        scores = tl.load(raw_ptr + row * width + column, mask=column < width, other=float("-inf"))
        total += tl.exp(scores - tl.load(normalizer_ptr + row))
    share = tokens / queries
    tl.store(weights_ptr + (head * tokens + token).to(tl.int64) * width + column, total * share, mask=column < width)
