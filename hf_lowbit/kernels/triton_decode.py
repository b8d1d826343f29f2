"""Parts of all Triton kernels: from the words of the canonical record to levels and scales, in registers.

A *unit* is what whole 32-bit words of a row hold: 4 columns at 8 bits, 8 at 4, 16 at 2 and 32 at every other width, whose
``BITS`` words are the bit planes of the packer. Units of a row follow each other, so that neighbouring threads read
neighbouring words and a thread reads four of them, 16 bytes, at once (of bit planes a word each).

Levels of 2, 3 and 4 bits come out of registers. The codes of a unit are brought into *octets*, words with a code in each
nibble, which are the selectors of a byte permutation (``prmt``) over the low and the high bytes of the table in 16-bit
floats: 1.4, 1.6 and 2.6 instructions a level, and no memory. All other widths, and processors without that instruction,
look levels up in a float32 table that stays in the first-level cache.
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
def octet_levels(octet, planes, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Levels ``[rows, units, 8]`` of words ``[rows, units]`` with a code in each nibble, in the order of the nibbles."""
    selector, blend = octet, octet
    if BITS == 4:
        # A selector reaches eight bytes; the fourth bit of a code chooses between the two halves of the table.
        selector = octet & 0x77777777
        blend = ((octet >> 1) & 0x44444444) | 0x32103210
    p0, p1 = four_levels(selector, blend, planes, BITS, ASM)
    p2, p3 = four_levels(selector >> 16, blend >> 16, planes, BITS, ASM)
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
def load_planes(planes_ptr, table_of_row, PER_ROW: tl.constexpr):
    """The eight words of a table's bytes: numbers, or ``[rows, 1]`` where each row has a table of its own."""
    base = planes_ptr
    if PER_ROW:
        base = planes_ptr + table_of_row[:, None] * 8
    return (
        tl.load(base),
        tl.load(base + 1),
        tl.load(base + 2),
        tl.load(base + 3),
        tl.load(base + 4),
        tl.load(base + 5),
        tl.load(base + 6),
        tl.load(base + 7),
    )


@triton.jit
def permuted_levels(words_ptr, mask, planes, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Levels ``[rows, units, columns of a unit]`` of 2, 3 or 4 bits by permutation.

    ``words_ptr`` ``[rows, units]`` points to the first word of each unit.
    """
    if BITS == 4:
        word = tl.load(words_ptr, mask=mask, other=0)
        levels = octet_levels(word, planes, BITS, KIND, ASM)
    elif BITS == 2:
        word = tl.load(words_ptr, mask=mask, other=0)
        even = octet_levels(word & 0x33333333, planes, BITS, KIND, ASM)
        odd = octet_levels((word >> 2) & 0x33333333, planes, BITS, KIND, ASM)
        levels = tl.reshape(tl.join(even, odd), (word.shape[0], word.shape[1], 16))
    else:
        a = tl.load(words_ptr, mask=mask, other=0)
        b = tl.load(words_ptr + 1, mask=mask, other=0)
        c = tl.load(words_ptr + 2, mask=mask, other=0)
        o0 = (a & 0x11111111) | ((b << 1) & 0x22222222) | ((c << 2) & 0x44444444)
        o1 = ((a >> 1) & 0x11111111) | (b & 0x22222222) | ((c << 1) & 0x44444444)
        o2 = ((a >> 2) & 0x11111111) | ((b >> 1) & 0x22222222) | (c & 0x44444444)
        o3 = ((a >> 3) & 0x11111111) | ((b >> 2) & 0x22222222) | ((c >> 1) & 0x44444444)
        first = octet_levels(o0, planes, BITS, KIND, ASM)
        second = octet_levels(o1, planes, BITS, KIND, ASM)
        third = octet_levels(o2, planes, BITS, KIND, ASM)
        fourth = octet_levels(o3, planes, BITS, KIND, ASM)
        levels = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (a.shape[0], a.shape[1], 32))
    return levels


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
