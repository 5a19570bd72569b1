"""Packing and unpacking in Triton. `format.py` has the format, `launch.py` starts what is here.

Everywhere a warp has a tile, a lane of it 32 words, and all tensors are [warps, 32]: one element a lane, so that
nothing is moved between lanes but by prefix sums.

**Unpacking.** A lane reads two words of level-0 codes and counts the escapes in them. A prefix sum over the lanes says
where its level-1 codes begin: it takes them as a window of the stream, counts the escapes in these, and after a second
prefix sum takes its level-2 codes. From there on eight words are done at once. Eight codes of one octet, as the nibbles
of a word, are what the instruction `prmt` takes to choose bytes by: where there is an escape, the nibble is replaced by
the number of the escape (`_choose`), and the same instruction takes the byte of the table or the next byte of the level
above. So level 1 is made from level 2 and level 0 from level 1. A raw group goes the same way, and has other bytes in
the end. Exceptions, of which most programs have one or two, are written by the program that owns the words, after a
barrier.

**Packing** counts exponents (`histogram`), ranks them (`rank`), counts what is in each tile and, once the host knows
how many bytes that makes, writes it (`pack`, twice). Bits are put with `atomic_or` into zeroed words, so that the
result does not depend on the order.

Imports Triton; imported only by `launch.py`.
"""
# Triton's language, which Triton compiles:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from layerstream.codec import format as form
from layerstream.codec.intrinsics import (
    funnel,
    load,
    load_16,
    load_64,
    load_64_if,
    load_if,
    ones,
    ones_below,
    permute,
    shift_pair,
    store_16_if,
    store_128_if,
)

HEAD = tl.constexpr(form.HEAD_WORDS)
CODES = tl.constexpr(form.CODE_WORDS)
GROUP = tl.constexpr(form.GROUP_WORDS)
LEVEL_1 = tl.constexpr(form.LEVEL_1)
LEVEL_2 = tl.constexpr(form.LEVEL_2)
RANKS = tl.constexpr(form.NUM_RANKS)
MOST_OF_LEVEL_2 = tl.constexpr(form.MOST_OF_LEVEL_2)

# -------------------------------------------------------------------------------------------------------- unpacking


@triton.jit
def _choose(codes, escapes, table, low, high, ptx: tl.constexpr):
    """Bytes by eight nibbles: of the table, or the next of (high:low) where there is an escape; and how many there are.

    Args:
        codes: nibbles 0 to 3.
        escapes: 1 in each nibble that is one.
    """
    is_escape = escapes * 7
    number = escapes * 0x11111110  # in each nibble: how many escapes there are below it
    total = (number + escapes) >> 28
    in_first_four = (number >> 13) & 0x78  # eight times the number of escapes there
    number = (number - in_first_four * 0x02222000) | 0x44444444  # the last four count anew; the bytes are 4 to 7
    selector = codes ^ ((codes ^ number) & is_escape)
    first = permute(table, low, selector, ptx)
    last = permute(table, funnel(low, high, in_first_four, ptx), selector >> 16, ptx)
    return first, last, total


@triton.jit
def _two_bits_to_nibbles(codes, ptx: tl.constexpr):
    """The low eight codes of two bits."""
    zero = codes & 0
    x = permute(codes, zero, zero + 0x4140, ptx)
    x = (x | (x << 4)) & 0x0F0F0F0F
    return (x | (x << 2)) & 0x33333333


@triton.jit
def _three_bits_to_nibbles(codes):
    """The low eight codes of three bits."""
    x = (codes & 0xFFF) | ((codes << 4) & 0xFFFFF000)
    x = (x & 0x003F003F) | ((x << 2) & 0xFFC0FFC0)
    return ((x & 0x07070707) | ((x << 1) & 0xF8F8F8F8)) & 0x77777777


@triton.jit
def _store_octet(pointer, keep, marks_0, marks_1, exponents_0, exponents_1, is_wide: tl.constexpr, ptx: tl.constexpr):
    """Write eight words of these bytes of sign and mantissa and of rotated exponents."""
    high_0 = (marks_0 & 0x80808080) | (exponents_0 & 0x7F7F7F7F)
    low_0 = (marks_0 & 0x7F7F7F7F) | (exponents_0 & 0x80808080)
    high_1 = (marks_1 & 0x80808080) | (exponents_1 & 0x7F7F7F7F)
    low_1 = (marks_1 & 0x7F7F7F7F) | (exponents_1 & 0x80808080)
    zero = low_0 & 0
    a = permute(low_0, high_0, zero + 0x5140, ptx)
    b = permute(low_0, high_0, zero + 0x7362, ptx)
    c = permute(low_1, high_1, zero + 0x5140, ptx)
    d = permute(low_1, high_1, zero + 0x7362, ptx)
    if is_wide:
        store_128_if(pointer, a << 16, a & 0xFFFF0000, b << 16, b & 0xFFFF0000, keep, ptx)
        store_128_if(pointer + 2, c << 16, c & 0xFFFF0000, d << 16, d & 0xFFFF0000, keep, ptx)
    else:
        store_128_if(pointer, a, b, c, d, keep, ptx)


@triton.jit
def _write_exceptions(
    head_row,
    exceptions_ptr,
    out_ptr,
    group,
    first_tile,
    is_wide: tl.constexpr,
    warps: tl.constexpr,
    ptx: tl.constexpr,
):
    """Those of the group that are in this program's tiles."""
    number = (tl.load(head_row + 9) >> 16) & 0xFFFF
    if number > 0:
        first = tl.load(head_row + 10)
        tl.debug_barrier()  # other lanes have written these words with what their codes say
        at = tl.arange(0, warps)[:, None] * 32 + tl.arange(0, 32)[None, :]
        begin = number * 0
        while begin < number:  # a range of what was loaded is more than the interpreter of Triton 3.6 can do
            is_one = begin + at < number
            found = load_if(exceptions_ptr + (first + begin + at), is_one, ptx)
            place = (found >> 16).to(tl.int32)
            tile = group * 8 + (place >> 10)
            is_ours = is_one & (tile >= first_tile) & (tile < first_tile + warps)
            word = group.to(tl.int64) * GROUP + place
            if is_wide:
                word = word * 2 + 1
            store_16_if(out_ptr.to(tl.pointer_type(tl.int16)) + word, found, is_ours, ptx)
            begin = begin + warps * 32


@triton.jit(do_not_specialize=["num_octets", "num_tiles"])
def unpack(
    head_ptr,
    marks_ptr,
    codes_ptr,
    exceptions_ptr,
    out_ptr,
    num_octets,
    num_tiles,
    is_wide: tl.constexpr,
    warps: tl.constexpr,
    ptx: tl.constexpr,
):
    """One tile a warp. Pointers to int32 (head, codes, exceptions) and int64 (marks, out), divisible by 16."""
    first_tile = tl.program_id(0) * warps
    tile = first_tile + tl.arange(0, warps)[:, None]
    lane = tl.arange(0, 32)[None, :]
    left = num_octets - (tile * 128 + lane)  # a lane's octet of half h, number j is written if more than 64 h + 32 j
    tile = tl.minimum(tile, num_tiles - 1)  # a warp with nothing to do does the last tile, and writes nothing
    octet = tile.to(tl.int64) * 128 + lane
    head = head_ptr + ((tile >> 3) * HEAD + lane * 0)
    first_word = load(head, ptx)
    offset = (head + 5).to(tl.pointer_type(tl.uint16)) + (tile & 7)
    start = load_16(offset, ptx)
    end = load_16(offset + 1, ptx)
    m000, m001 = load_64(marks_ptr + octet, ptx)
    m010, m011 = load_64(marks_ptr + octet + 32, ptx)
    m100, m101 = load_64(marks_ptr + octet + 64, ptx)
    m110, m111 = load_64(marks_ptr + octet + 96, ptx)
    is_raw = (first_word >> 31) != 0
    words = codes_ptr + (first_word & 0x7FFFFFFF).to(tl.int64)
    raw_bytes = words.to(tl.pointer_type(tl.int64)) + ((tile & 7) * 128 + lane)
    stream = words + CODES
    c0 = load(words + ((tile & 7) * 64 + lane), ptx)
    c1 = load(words + ((tile & 7) * 64 + lane + 32), ptx)
    table_0 = load(head + 1, ptx)
    table_1 = load(head + 2, ptx)
    table_2 = load(head + 3, ptx)
    table_3 = load(head + 4, ptx)

    # This lane's level-1 codes: of half 0 in d0, of half 1 in d1.
    e0 = c0 & (c0 >> 1) & 0x55555555
    e1 = c1 & (c1 >> 1) & 0x55555555
    in_half_0 = ones(e0, ptx)
    escapes = in_half_0 + ones(e1, ptx)
    at = start + 2 * (tl.cumsum(escapes.to(tl.int32), 1).to(tl.uint32) - escapes)
    window = stream + (at >> 5).to(tl.int32)
    a = load(window, ptx)
    b = load(window + 1, ptx)
    c = load(window + 2, ptx)
    d0 = funnel(a, b, at & 31, ptx)
    d1 = funnel(d0, funnel(b, c, at & 31, ptx), 2 * in_half_0, ptx)

    # And its level-2 codes, in f0 and f1.
    of_level_2_in_half_0 = ones_below(d0 & (d0 >> 1) & 0x55555555, 2 * in_half_0, ptx)
    of_level_2 = of_level_2_in_half_0 + ones_below(d1 & (d1 >> 1) & 0x55555555, 2 * (escapes - in_half_0), ptx)
    at = end - 3 * tl.cumsum(of_level_2.to(tl.int32), 1).to(tl.uint32)
    window = stream + (at >> 5).to(tl.int32)
    a = load(window, ptx)
    b = load(window + 1, ptx)
    c = load(window + 2, ptx)
    f0 = funnel(a, b, at & 31, ptx)
    f1 = funnel(f0, funnel(b, c, at & 31, ptx), 3 * of_level_2_in_half_0, ptx)

    for half in tl.static_range(2):
        codes = c0 if half == 0 else c1
        is_escape = e0 if half == 0 else e1
        level_1 = d0 if half == 0 else d1
        level_2 = _three_bits_to_nibbles(f0 if half == 0 else f1)
        bytes_0 = permute(table_2, table_3, level_2, ptx)
        bytes_1 = permute(table_2, table_3, level_2 >> 16, ptx)
        for j in tl.static_range(2):
            nibbles = _two_bits_to_nibbles(level_1, ptx)
            is_escape_1 = nibbles & (nibbles >> 1) & 0x11111111
            x0, x1, _ = _choose(nibbles, is_escape_1, table_1, bytes_0, bytes_1, ptx)
            is_escape_0 = (is_escape >> (2 * j)) & 0x11111111
            x0, x1, total = _choose((codes >> (2 * j)) & 0x33333333, is_escape_0, table_0, x0, x1, ptx)
            if j == 0:
                level_1 = level_1 >> (2 * total)
                bytes_0, bytes_1 = shift_pair(bytes_0, bytes_1, ones_below(is_escape_1, 4 * total, ptx) * 8, ptx)
            raw_0, raw_1 = load_64_if(raw_bytes + (64 * half + 32 * j), is_raw, ptx)
            x0 = tl.where(is_raw, raw_0, x0)
            x1 = tl.where(is_raw, raw_1, x1)
            marks_0 = (m000 if j == 0 else m010) if half == 0 else (m100 if j == 0 else m110)
            marks_1 = (m001 if j == 0 else m011) if half == 0 else (m101 if j == 0 else m111)
            out = out_ptr + (octet + (64 * half + 32 * j)) * (4 if is_wide else 2)
            _store_octet(out, left > 64 * half + 32 * j, marks_0, marks_1, x0, x1, is_wide, ptx)

    group = first_tile >> 3
    _write_exceptions(head_ptr + group * HEAD, exceptions_ptr, out_ptr, group, first_tile, is_wide, warps, ptx)


# ---------------------------------------------------------------------------------------------------------- packing


@triton.jit
def _words(words_ptr, at, keep, is_wide: tl.constexpr):
    """The 16-bit words of these numbers, zeros elsewhere; with is_wide the high halves of 32 bits."""
    where = at * 2 + 1 if is_wide else at
    return tl.load(words_ptr + where, mask=keep, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit(do_not_specialize=["num_words"])
def histogram(words_ptr, histogram_ptr, is_lossy_ptr, num_words, is_wide: tl.constexpr):
    """One group a program: how often each exponent occurs (int16 [groups, 256]), and whether some low half is not zero
    (int32 [groups])."""
    group = tl.program_id(0)
    at = group.to(tl.int64) * GROUP + tl.arange(0, GROUP)
    is_word = at < num_words
    found = tl.histogram(((_words(words_ptr, at, is_word, is_wide) >> 7) & 255).to(tl.int32), 256)
    exponent = tl.arange(0, 256)
    padding = tl.maximum((group + 1).to(tl.int64) * GROUP - num_words, 0).to(tl.int32)
    found = tl.where(exponent == 0, found - padding, found)
    tl.store(histogram_ptr + group * 256 + exponent, found.to(tl.int16))
    if is_wide:
        low = tl.load(words_ptr + at * 2, mask=is_word, other=0)
        tl.store(is_lossy_ptr + group, tl.max((low != 0).to(tl.int32), 0))


@triton.jit
def rank(histogram_ptr, ranks_ptr, tables_ptr):
    """One group a program: the rank of each exponent (uint8 [groups, 256]), and the rotated exponents by rank (uint8
    [groups, 16])."""
    group = tl.program_id(0)
    counts = histogram_ptr + group * 256
    exponent = tl.arange(0, 256)
    key = tl.load(counts + exponent).to(tl.int32) * 256 + (255 - exponent)  # no two are equal
    ranks = exponent * 0
    for begin in tl.static_range(0, 256, 32):
        other = begin + tl.arange(0, 32)
        other_key = tl.load(counts + other).to(tl.int32) * 256 + (255 - other)
        ranks = ranks + tl.sum((other_key[None, :] > key[:, None]).to(tl.int32), 1)
    tl.store(ranks_ptr + group * 256 + exponent, ranks.to(tl.uint8))
    rotated = (exponent >> 1) | ((exponent & 1) << 7)
    tl.store(tables_ptr + group * 16 + ranks, rotated.to(tl.uint8), mask=ranks < RANKS)


@triton.jit
def _put(stream, at, bits, keep):
    """Write 64 bits at most from each position on."""
    shift = (at & 31).to(tl.uint64)
    low = bits << shift
    word = stream + (at >> 5).to(tl.int32)
    a = (low & 0xFFFFFFFF).to(tl.uint32)
    b = (low >> 32).to(tl.uint32)
    c = ((bits >> 32) >> (32 - shift)).to(tl.uint32)
    tl.atomic_or(word, a.to(tl.int32, bitcast=True), mask=keep & (a != 0), sem="relaxed")
    tl.atomic_or(word + 1, b.to(tl.int32, bitcast=True), mask=keep & (b != 0), sem="relaxed")
    tl.atomic_or(word + 2, c.to(tl.int32, bitcast=True), mask=keep & (c != 0), sem="relaxed")


@triton.jit
def _list_exceptions(words_ptr, exceptions_ptr, first, is_exception, tile, lane, keep, is_wide: tl.constexpr):
    """Write a tile's exceptions by place: octet by octet, of these lane by lane.

    Args:
        first: of the tile, in the section.
        is_exception: a bit for each of the lane's words, by half, octet and number.
    """
    for octet in range(4):  # not unrolled: so the kernel compiles in 5 s rather than 13
        bits = (is_exception >> (8 * octet)) & 255
        number = ones(bits, False).to(tl.int32)
        at = first + tl.cumsum(number, 1) - number
        first = first + tl.sum(number, 1)[:, None]
        for i in range(8):
            is_one = (((bits >> i) & 1) != 0) & keep
            place = (tile & 7) * 1024 + (32 * octet + lane) * 8 + i
            word = _words(words_ptr, (tile >> 3).to(tl.int64) * GROUP + place, is_one, is_wide)
            tl.store(exceptions_ptr + at, (word | (place.to(tl.uint32) << 16)).to(tl.int32, bitcast=True), mask=is_one)
            at = at + ((bits >> i) & 1).to(tl.int32)


@triton.jit(do_not_specialize=["num_words", "num_tiles"])
def pack(
    words_ptr,
    ranks_ptr,
    counts_ptr,
    head_ptr,
    marks_ptr,
    codes_ptr,
    exceptions_ptr,
    first_exception_ptr,
    num_words,
    num_tiles,
    is_wide: tl.constexpr,
    writes: tl.constexpr,
    warps: tl.constexpr,
):
    """One tile a warp. Without `writes` it counts: int32 [groups, tiles, 3], words of level 1 or 2, of level 2, and
    exceptions; only the first three pointers are used. With it, it writes all but the head, which it reads."""
    tile = tl.program_id(0) * warps + tl.arange(0, warps)[:, None]
    lane = tl.arange(0, 32)[None, :]
    zero = (tile * 0 + lane * 0).to(tl.uint32)
    escapes, of_level_2, num_exceptions, is_exception = zero, zero, zero, zero
    codes_0, codes_1 = zero, zero
    level_1, level_2 = zero.to(tl.uint64), zero.to(tl.uint64)
    ranks = ranks_ptr + (tile >> 3) * 256
    if writes:
        head = head_ptr + ((tile >> 3) * HEAD + lane * 0)
        first_word = tl.load(head)
        is_raw = first_word < 0
        words = codes_ptr + (first_word & 0x7FFFFFFF).to(tl.int64)
        raw_bytes = words.to(tl.pointer_type(tl.int64)) + ((tile & 7) * 128 + lane)
    for half in tl.static_range(2):
        in_half = zero
        for j in tl.static_range(2):
            octet = tile.to(tl.int64) * 128 + (64 * half + 32 * j + lane)
            marks, exponents = zero.to(tl.uint64), zero.to(tl.uint64)
            for i in tl.static_range(8):
                is_word = octet * 8 + i < num_words
                word = _words(words_ptr, octet * 8 + i, is_word, is_wide)
                exponent = (word >> 7) & 255
                r = tl.load(ranks + exponent.to(tl.int32)).to(tl.uint32)
                r = tl.where(is_word, r, 0)
                is_one = (r >= RANKS) | ((r >= LEVEL_2) & (in_half >= MOST_OF_LEVEL_2))
                r = tl.where(is_one, 0, r)
                code = tl.minimum(r, 3) << (4 * i + 2 * j)
                if half == 0:
                    codes_0 = codes_0 | code
                else:
                    codes_1 = codes_1 | code
                code_1 = tl.where(r >= LEVEL_1, tl.minimum(r - LEVEL_1, 3), 0).to(tl.uint64)
                level_1 = level_1 | (code_1 << (2 * escapes).to(tl.uint64))
                code_2 = tl.where(r >= LEVEL_2, r - LEVEL_2, 0).to(tl.uint64)
                level_2 = level_2 | (code_2 << (3 * of_level_2).to(tl.uint64))
                escapes = escapes + (r >= LEVEL_1).to(tl.uint32)
                of_level_2 = of_level_2 + (r >= LEVEL_2).to(tl.uint32)
                in_half = in_half + (r >= LEVEL_2).to(tl.uint32)
                num_exceptions = num_exceptions + is_one.to(tl.uint32)
                is_exception = is_exception | (is_one.to(tl.uint32) << (16 * half + 8 * j + i))
                marks = marks | ((((word >> 8) & 0x80) | (word & 0x7F)).to(tl.uint64) << (8 * i))
                exponents = exponents | (((exponent >> 1) | ((exponent & 1) << 7)).to(tl.uint64) << (8 * i))
            if writes:
                tl.store(marks_ptr + octet, marks.to(tl.int64, bitcast=True), mask=tile + lane * 0 < num_tiles)
                tl.store(raw_bytes + (64 * half + 32 * j), exponents.to(tl.int64, bitcast=True), mask=is_raw)
    if writes:
        keep = is_raw == 0
        code_words = words + ((tile & 7) * 64 + lane)
        tl.store(code_words, codes_0.to(tl.int32, bitcast=True), mask=keep)
        tl.store(code_words + 32, codes_1.to(tl.int32, bitcast=True), mask=keep)
        offset = (head + 5).to(tl.pointer_type(tl.uint16)) + (tile & 7)
        start = tl.load(offset).to(tl.uint32)
        end = tl.load(offset + 1).to(tl.uint32)
        before_1 = tl.cumsum(escapes.to(tl.int32), 1).to(tl.uint32) - escapes
        _put(words + CODES, start + 2 * before_1, level_1, keep)
        _put(words + CODES, end - 3 * tl.cumsum(of_level_2.to(tl.int32), 1).to(tl.uint32), level_2, keep)
        first = tl.load(first_exception_ptr + tile + lane * 0)
        _list_exceptions(words_ptr, exceptions_ptr, first, is_exception, tile, lane, keep, is_wide)
    else:
        counts = counts_ptr + tile * 3
        # Summed without a sign: of a sum of int32 the interpreter of Triton 3.2 stores eight bytes.
        tl.store(counts, tl.sum(escapes, 1)[:, None].to(tl.int32))
        tl.store(counts + 1, tl.sum(of_level_2, 1)[:, None].to(tl.int32))
        tl.store(counts + 2, tl.sum(num_exceptions, 1)[:, None].to(tl.int32))
