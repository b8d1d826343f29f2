"""Parts of all Triton kernels: from the words of the canonical record to levels and scales, in registers.

A *unit* is what whole 32-bit words of a row hold: 4 columns at 8 bits, 8 at 4, 16 at 2 and 32 at every other width, whose
``BITS`` words are the bit planes of the packer. Units of a row follow each other, so that neighbouring threads read
neighbouring words and a thread reads four of them, 16 bytes, at once (of bit planes a word each).

Levels of 2, 3 and 4 bits come out of registers. The codes of a unit are brought into *octets*, words with a code in each
nibble, which are the selectors of a byte permutation (``prmt``) over the low and the high bytes of the table in 16-bit
floats, two of which come out in a word: 1.4, 1.6 and 2.6 instructions a level, and no memory. All other widths, and
processors without that instruction, look levels up in a float32 table that stays in the first-level cache.
"""

import triton
import triton.language as tl


@triton.jit
def permute(a, b, selector, ASM: tl.constexpr):
    """Bytes of the pair ``a, b`` (numbered 0 to 7) that the four low nibbles of ``selector`` name."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    pair = (b.to(tl.int64) << 32) | (a.to(tl.int64) & 0xFFFFFFFF)
    out = (pair >> (8 * (selector & 7))) & 255
    for byte in tl.static_range(1, 4):
        out |= ((pair >> (8 * ((selector >> (4 * byte)) & 7))) & 255) << (8 * byte)
    return out.to(tl.int32)


@triton.jit
def low_half(pair, KIND: tl.constexpr):
    """The 16-bit float in the low half of a word."""
    return pair.to(tl.int16).to(KIND, bitcast=True)


@triton.jit
def high_half(pair, KIND: tl.constexpr):
    """The 16-bit float in the high half of a word."""
    return (pair >> 16).to(tl.int16).to(KIND, bitcast=True)


@triton.jit
def four_levels(selector, blend, planes, BITS: tl.constexpr, ASM: tl.constexpr):
    """Levels of the four low nibbles: two words of two 16-bit floats. ``planes`` are eight words, low bytes first."""
    l0, l1, l2, l3, h0, h1, h2, h3 = planes
    low = permute(l0, l1, selector, ASM)
    high = permute(h0, h1, selector, ASM)
    if BITS == 4:
        low = permute(low, permute(l2, l3, selector, ASM), blend, ASM)
        high = permute(high, permute(h2, h3, selector, ASM), blend, ASM)
    return permute(low, high, 0x5140, ASM), permute(low, high, 0x7362, ASM)


@triton.jit
def octet_pairs(octet, planes, BITS: tl.constexpr, ASM: tl.constexpr):
    """Levels of words with a code in each nibble, in their order: four words of two 16-bit floats."""
    selector, blend = octet, octet
    if BITS == 4:
        # A selector reaches eight bytes; the fourth bit of a code chooses between the two halves of the table.
        selector = octet & 0x77777777
        blend = ((octet >> 1) & 0x44444444) | 0x32103210
    p0, p1 = four_levels(selector, blend, planes, BITS, ASM)
    p2, p3 = four_levels(selector >> 16, blend >> 16, planes, BITS, ASM)
    return p0, p1, p2, p3


@triton.jit
def octet_levels(octet, planes, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr, factor=None):
    """Levels ``[rows, units, 8]`` of words ``[rows, units]`` with a code in each nibble, in the order of the nibbles.

    ``factor`` ``[rows, units]``, words of the same number twice, multiplies them, rounded to ``KIND``.
    """
    p0, p1, p2, p3 = octet_pairs(octet, planes, BITS, ASM)
    if factor is not None:
        zero = octet * 0
        p0 = fused_pair(p0, factor, zero, KIND, ASM)
        p1 = fused_pair(p1, factor, zero, KIND, ASM)
        p2 = fused_pair(p2, factor, zero, KIND, ASM)
        p3 = fused_pair(p3, factor, zero, KIND, ASM)
    even = tl.join(
        tl.join(low_half(p0, KIND), low_half(p2, KIND)),
        tl.join(low_half(p1, KIND), low_half(p3, KIND)),
    )
    odd = tl.join(
        tl.join(high_half(p0, KIND), high_half(p2, KIND)),
        tl.join(high_half(p1, KIND), high_half(p3, KIND)),
    )
    return tl.reshape(tl.join(even, odd), (octet.shape[0], octet.shape[1], 8))


@triton.jit
def load_planes(planes_ptr, table_of_row, PER_ROW: tl.constexpr, ASM: tl.constexpr):
    """The eight words of a table's bytes: numbers, or ``[rows, 1]`` where each row has a table of its own."""
    base = planes_ptr
    if PER_ROW:
        base = planes_ptr + table_of_row[:, None] * 8
    return (
        load_plane(base, PER_ROW, ASM),
        load_plane(base + 1, PER_ROW, ASM),
        load_plane(base + 2, PER_ROW, ASM),
        load_plane(base + 3, PER_ROW, ASM),
        load_plane(base + 4, PER_ROW, ASM),
        load_plane(base + 5, PER_ROW, ASM),
        load_plane(base + 6, PER_ROW, ASM),
        load_plane(base + 7, PER_ROW, ASM),
    )


@triton.jit
def load_plane(word_ptr, PER_ROW: tl.constexpr, ASM: tl.constexpr):
    """A word, in a register of each thread.

    A number that all threads load alike goes to the uniform registers, which permutations cannot read: copying it from there
    before each was 1 instruction in 5 to 6. Adding a zero that the compiler does not know for one keeps it.
    """
    word = tl.load(word_ptr)
    if ASM and not PER_ROW:
        word = tl.inline_asm_elementwise(
            "{ .reg .u32 zero; mov.u32 zero, %laneid; shr.u32 zero, zero, 5; add.u32 $0, $1, zero; }", "=r,r", [word],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return word


@triton.jit
def load_octets(words_ptr, mask, BITS: tl.constexpr):
    """The octets of units of 2, 3 or 4 bits, four words that repeat where there are fewer.

    ``words_ptr`` ``[rows, units]`` points to the first word of each unit. Nibble ``k`` of octet ``j`` of ``J`` (1 at 4 bits,
    2 at 2, 4 at 3) is column ``J * k + j`` of its unit.
    """
    a = tl.load(words_ptr, mask=mask, other=0)
    if BITS == 4:
        o0, o1, o2, o3 = a, a, a, a
    elif BITS == 2:
        o0, o1 = a & 0x33333333, (a >> 2) & 0x33333333
        o2, o3 = o0, o1
    else:
        b = tl.load(words_ptr + 1, mask=mask, other=0)
        c = tl.load(words_ptr + 2, mask=mask, other=0)
        o0 = (a & 0x11111111) | ((b << 1) & 0x22222222) | ((c << 2) & 0x44444444)
        o1 = ((a >> 1) & 0x11111111) | (b & 0x22222222) | ((c << 1) & 0x44444444)
        o2 = ((a >> 2) & 0x11111111) | ((b >> 1) & 0x22222222) | (c & 0x44444444)
        o3 = ((a >> 3) & 0x11111111) | ((b >> 2) & 0x22222222) | ((c >> 1) & 0x44444444)
    return o0, o1, o2, o3


@triton.jit
def permuted_levels(words_ptr, mask, planes, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr, factor=None):
    """Levels ``[rows, units, columns of a unit]`` of 2, 3 or 4 bits by permutation, from ``words_ptr`` ``[rows, units]``."""
    o0, o1, o2, o3 = load_octets(words_ptr, mask, BITS)
    levels = octet_levels(o0, planes, BITS, KIND, ASM, factor)
    if BITS != 4:
        second = octet_levels(o1, planes, BITS, KIND, ASM, factor)
        if BITS == 3:
            third = octet_levels(o2, planes, BITS, KIND, ASM, factor)
            fourth = octet_levels(o3, planes, BITS, KIND, ASM, factor)
            levels, second = tl.join(levels, third), tl.join(second, fourth)
        levels = tl.reshape(tl.join(levels, second), (o0.shape[0], o0.shape[1], 32 // BITS if BITS == 2 else 32))
    return levels


@triton.jit
def fused_pair(a, b, c, KIND: tl.constexpr, ASM: tl.constexpr):
    """``a * b + c`` of words of two 16-bit floats, each rounded once."""
    if ASM and tl.float16 == KIND:
        out = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    elif ASM:
        out = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low = wide(low_half(a, KIND)) * wide(low_half(b, KIND)) + wide(low_half(c, KIND))
        high = wide(high_half(a, KIND)) * wide(high_half(b, KIND)) + wide(high_half(c, KIND))
        out = join_halves(low.to(KIND).to(tl.int16, bitcast=True), high.to(KIND).to(tl.int16, bitcast=True))
    return out


@triton.jit
def wide(x):
    """As float32."""
    return x.to(tl.float32)


@triton.jit
def join_halves(low, high):
    """Words of two int16."""
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def octet_pairs_of(x):
    """Int16 ``[units, 8]`` as four words ``[1, units]``: columns 0 and 1, 2 and 3, and so on."""
    low, high = tl.split(tl.reshape(x, (x.shape[0], 4, 2)))
    even, odd = tl.split(tl.reshape(join_halves(low, high), (x.shape[0], 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0[None, :], w1[None, :], w2[None, :], w3[None, :]


@triton.jit
def octet_sum(octet, planes, x, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """``sum_k level[k] * x[k]`` float32 ``[rows, units]`` of an octet: two sums of four, each step rounded to ``KIND``."""
    p0, p1, p2, p3 = octet_pairs(octet, planes, BITS, ASM)
    x0, x1, x2, x3 = x
    total = fused_pair(p0, x0, octet * 0, KIND, ASM)
    total = fused_pair(p1, x1, total, KIND, ASM)
    total = fused_pair(p2, x2, total, KIND, ASM)
    total = fused_pair(p3, x3, total, KIND, ASM)
    return wide(low_half(total, KIND)) + wide(high_half(total, KIND))


@triton.jit
def paired_sums(words_ptr, mask, planes, x, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """``sum over a unit of level * x``, float32 ``[rows, units]``, of 2, 3 or 4 bits.

    Args:
        words_ptr: ``[rows, units]``, the first word of each unit.
        x: 16-bit floats as int16 ``[units, columns of a unit]``.
    """
    o0, o1, o2, o3 = load_octets(words_ptr, mask, BITS)
    if BITS == 4:
        total = octet_sum(o0, planes, octet_pairs_of(x), BITS, KIND, ASM)
    elif BITS == 2:
        x0, x1 = tl.split(tl.reshape(x, (x.shape[0], 8, 2)))
        total = octet_sum(o0, planes, octet_pairs_of(x0), BITS, KIND, ASM)
        total += octet_sum(o1, planes, octet_pairs_of(x1), BITS, KIND, ASM)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], 8, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        total = octet_sum(o0, planes, octet_pairs_of(x0), BITS, KIND, ASM)
        total += octet_sum(o1, planes, octet_pairs_of(x1), BITS, KIND, ASM)
        total += octet_sum(o2, planes, octet_pairs_of(x2), BITS, KIND, ASM)
        total += octet_sum(o3, planes, octet_pairs_of(x3), BITS, KIND, ASM)
    return total


@triton.jit
def load_words(words_ptr, mask, COUNT: tl.constexpr):
    """The words of units, up to seven; those that a unit has not are its first."""
    first = tl.load(words_ptr, mask=mask, other=0)
    return (
        first,
        tl.load(words_ptr + 1, mask=mask, other=0) if COUNT > 1 else first,
        tl.load(words_ptr + 2, mask=mask, other=0) if COUNT > 2 else first,
        tl.load(words_ptr + 3, mask=mask, other=0) if COUNT > 3 else first,
        tl.load(words_ptr + 4, mask=mask, other=0) if COUNT > 4 else first,
        tl.load(words_ptr + 5, mask=mask, other=0) if COUNT > 5 else first,
        tl.load(words_ptr + 6, mask=mask, other=0) if COUNT > 6 else first,
    )


@triton.jit
def lane(words, number: tl.constexpr, BITS: tl.constexpr):
    """Four codes in the bytes of a word: columns ``number``, ``number + lanes``, and so on of each unit."""
    if BITS == 8:
        codes = words[0]
    elif 32 % BITS == 0:
        codes = (words[0] >> (number * BITS)) & (((1 << BITS) - 1) * 0x01010101)
    else:
        codes = (words[0] >> number) & 0x01010101
        for plane in tl.static_range(1, BITS):
            codes |= ((words[plane] >> number) & 0x01010101) << plane
    return codes


@triton.jit
def looked_up(words, table_ptr, FIRST: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr):
    """Levels ``[rows, units, 4 LANES]`` of the lanes ``FIRST, FIRST + STEP, ...``.

    ``table_ptr`` is a pointer, or ``[rows, 1]`` of them.

    Halves the lanes until one is left; joining puts what tells the halves apart into the last axis. Look-ups go by tiles of
    the shape of the words, so that they keep the layout of the words and a thread holds all columns of its units.
    """
    if LANES == 1:
        four = lane(words, FIRST, BITS)
        even = tl.join(tl.load(table_ptr + (four & 255)), tl.load(table_ptr + ((four >> 16) & 255)))
        odd = tl.join(tl.load(table_ptr + ((four >> 8) & 255)), tl.load(table_ptr + ((four >> 24) & 255)))
    else:
        even = looked_up(words, table_ptr, FIRST, 2 * STEP, LANES // 2, BITS)
        odd = looked_up(words, table_ptr, FIRST + STEP, 2 * STEP, LANES // 2, BITS)
    return tl.reshape(tl.join(even, odd), (words[0].shape[0], words[0].shape[1], 4 * LANES))


@triton.jit
def table_levels(words_ptr, mask, table_ptr, table_of_row, BITS: tl.constexpr, UNIT: tl.constexpr, PER_ROW: tl.constexpr):
    """Levels float32 ``[rows, units, columns of a unit]`` of any width, from a table in memory."""
    words = load_words(words_ptr, mask, UNIT * BITS // 32)
    base = table_ptr
    if PER_ROW:
        base = table_ptr + (table_of_row * (1 << BITS))[:, None]
    return looked_up(words, base, 0, 1, UNIT // 4, BITS)


@triton.jit
def group_values(value_ptr, super_ptr, row, stride, supers, group, per_super, mask, CODED: tl.constexpr):
    """Scales or offsets float32 of rows and groups (broadcast together): fp16, or bytes less 128 under fp16 super-scales."""
    value = tl.load(value_ptr + row * stride + group, mask=mask, other=0)
    if CODED:
        above = tl.load(super_ptr + row * supers + group // per_super, mask=mask, other=0)
        return (value.to(tl.float32) - 128.0) * above.to(tl.float32)
    return value.to(tl.float32)
