"""Packing and unpacking in plain torch, on any device: the oracle of the kernels, and what does without them.

Both work through a run by chunks of groups that stay in a processor's cache. Where a kernel has a byte permutation,
there is a table of 65,536 entries here, looked up for four words at once.
"""

from __future__ import annotations

import functools

import torch

from layerstream.codec.format import (
    CODE_WORDS,
    GROUP_TILES,
    GROUP_WORDS,
    GUARD_WORDS,
    HEAD_WORDS,
    LANES,
    LEVEL_1,
    LEVEL_2,
    MOST_OF_LEVEL_2,
    NUM_RANKS,
    OCTET_WORDS,
    RAW_WORDS,
    TILE_WORDS,
    PackedRun,
    Section,
)
from layerstream.codec.heads import Heads, heads

_CHUNK_GROUPS = 128  # 2 MiB of words: with 64 it is 10 to 15 % slower on two cores, with 256 no faster
_BYTES = 0x0101010101010101


def section(wire: torch.Tensor, place: Section, dtype: torch.dtype) -> torch.Tensor:
    """A section of a packed run (uint8 [num_bytes]), as a view."""
    return wire[place.offset : place.end].view(dtype)


# ---------------------------------------------------------------------------------------------------------- packing


def encode(words: torch.Tensor, word_bytes: int, most_bytes: int) -> tuple[torch.Tensor, PackedRun] | None:
    """Pack a run, on its device. Takes about as much memory again as it returns; blocks the host.

    Args:
        words: int16 [n], the 16-bit words; with word_bytes 4 [2 n], each after a zero.
        word_bytes: 2 or 4.
        most_bytes: of the packed run, for it to be of use.
    Returns: uint8 [num_bytes] and what it is; None: it would have more bytes, or a low half is not zero.
    """
    if word_bytes == 4:
        low, words = words.view(-1, 2).unbind(1)
        if low.any():
            return None
    parts: list[tuple[Heads, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    num_code_words = num_exceptions = 0
    for begin in range(0, words.numel(), _CHUNK_GROUPS * GROUP_WORDS):
        part = _pack(words[begin : begin + _CHUNK_GROUPS * GROUP_WORDS])
        part[0].head[:, 0] += num_code_words
        part[0].head[:, 10] += num_exceptions
        parts.append(part)
        num_code_words += part[2].numel()
        num_exceptions += part[3].numel()
    layout = PackedRun(words.numel(), word_bytes, num_code_words, num_exceptions)
    if layout.num_bytes > most_bytes:
        return None
    wire = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=words.device)
    torch.cat([each[0].head.flatten() for each in parts], out=section(wire, layout.head, torch.int32))
    torch.cat([each[1] for each in parts], out=section(wire, layout.marks, torch.uint8))
    torch.cat([each[2] for each in parts], out=section(wire, layout.codes, torch.int32)[:-GUARD_WORDS])
    torch.cat([each[3] for each in parts], out=section(wire, layout.exceptions, torch.int32))
    return wire, layout


def _pack(words: torch.Tensor) -> tuple[Heads, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads, marks, code words and exceptions of some groups, as if they were a run of their own."""
    num_words = words.numel()
    tiles = -(-num_words // TILE_WORDS)
    if padding := -num_words % GROUP_WORDS:
        words = torch.cat([words, words.new_zeros(padding)])
    words = words.view(-1, GROUP_WORDS)
    marks = (((words >> 8) & 0x80) | (words & 0x7F)).to(torch.uint8)
    exponents = (words >> 7) & 0xFF
    ranks, by_rank = _ranks(exponents, num_words)

    is_exception = ranks >= NUM_RANKS
    ranks.masked_fill_(is_exception, 0)
    _thin_out(ranks, is_exception)
    octets = ranks.view(-1, GROUP_TILES, 2, 2, LANES, OCTET_WORDS)
    level_0 = _nibbles(octets.clamp(max=LEVEL_1))
    level_1, num_1 = _row(_nibbles(octets.clamp(LEVEL_1 - 1, LEVEL_2) - (LEVEL_1 - 1)), 2)
    level_2, num_2 = _row(_nibbles(octets.clamp(min=LEVEL_2 - 1) - (LEVEL_2 - 1)), 3)
    num_exceptions = is_exception.view(-1, GROUP_TILES, TILE_WORDS).sum(-1)
    found = heads(by_rank, torch.stack([num_1.sum((2, 3)), num_2.sum((2, 3)), num_exceptions], -1))

    codes = words.new_zeros(int(found.totals[0]) + GUARD_WORDS, dtype=torch.int32)
    base = torch.where(found.is_raw, 0, found.first_word + CODE_WORDS) * 32  # nothing is put for a raw group
    keep = ~found.is_raw
    size = 2 * num_1.sum((2, 3)) + 3 * num_2.sum((2, 3))
    end = base[:, None] + size.cumsum(1)
    before_1 = num_1.flatten(2).cumsum(2) - num_1.flatten(2)
    _put(codes, level_1.flatten(2), (end - size)[..., None] + 2 * before_1, keep)
    after_2 = num_2.sum(-1).cumsum(-1)[..., None] - torch.stack([torch.zeros_like(num_2[..., 0]), num_2[..., 0]], -1)
    _put(codes, level_2, end[..., None, None] - 3 * after_2, keep)

    normal, raw = keep.nonzero().flatten(), found.is_raw.nonzero().flatten()
    words_0 = (level_0[:, :, :, 0] | level_0[:, :, :, 1] << 2).to(torch.int32).view(-1, CODE_WORDS)
    _place(codes, found.first_word[normal], words_0[normal])
    rotated = exponents[raw] >> 1 | (exponents[raw] & 1) << 7
    _place(codes, found.first_word[raw], rotated.to(torch.uint8).view(torch.int32))

    at = (is_exception & keep[:, None]).flatten().nonzero().flatten()
    exceptions = (words.flatten()[at].long() & 0xFFFF) | (at % GROUP_WORDS) << 16
    return found, marks.flatten()[: tiles * TILE_WORDS], codes[:-GUARD_WORDS], exceptions.to(torch.int32)


def _ranks(exponents: torch.Tensor, num_words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [groups, GROUP_WORDS], the rank of each word, 0 for padding; uint8 [groups, 256], the rotated exponents by
    rank."""
    groups = exponents.shape[0]
    exponents = exponents.long()
    numbers = torch.arange(groups, device=exponents.device)[:, None] * 256
    histogram = torch.bincount((exponents + numbers).flatten()[:num_words], minlength=groups * 256).view(groups, 256)
    order = torch.sort(histogram, dim=1, descending=True, stable=True).indices
    rank_of = torch.empty(groups, 256, dtype=torch.uint8, device=order.device)
    rank_of.scatter_(1, order, torch.arange(256, dtype=torch.uint8, device=order.device).expand(groups, 256))
    ranks = rank_of.gather(1, exponents)
    ranks.view(-1)[num_words:] = 0
    return ranks, ((order >> 1) | (order & 1) << 7).to(torch.uint8)


def _thin_out(ranks: torch.Tensor, is_exception: torch.Tensor) -> None:
    """Make exceptions of what is of level 2 and has eight such before it in its lane and half."""
    ranks = ranks.view(-1, GROUP_TILES, 2, 2, LANES, OCTET_WORDS)
    is_exception = is_exception.view_as(ranks)
    in_octets = (((ranks >= LEVEL_2).view(torch.int64) * _BYTES) >> 56).squeeze(-1)
    group, tile, half, lane = (in_octets.sum(3) > MOST_OF_LEVEL_2).nonzero().unbind(1)
    if not group.numel():
        return
    crowded = ranks[group, tile, half, :, lane]
    of_level_2 = crowded >= LEVEL_2
    is_late = of_level_2 & (of_level_2.flatten(1).cumsum(1).view_as(of_level_2) > MOST_OF_LEVEL_2)
    ranks[group, tile, half, :, lane] = crowded.masked_fill(is_late, 0)
    is_exception[group, tile, half, :, lane] |= is_late


def _nibbles(octets: torch.Tensor) -> torch.Tensor:
    """Eight bytes below 16 as the nibbles of 32 bits: uint8 [..., 8] to int64 [...]."""
    x = octets.contiguous().view(torch.int64).squeeze(-1)
    x = (x | x >> 4) & 0x00FF00FF00FF00FF
    x = (x | x >> 8) & 0x0000FFFF0000FFFF
    return (x | x >> 16) & 0xFFFFFFFF


def _row(nibbles: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of each lane and half one behind the other, and how many there are: int64 [groups, tiles, lanes, 2].

    Args:
        nibbles: int64 [groups, tiles, 2, 2, lanes], the eight nibbles of each octet: 0, or a code plus 1.
        width: of a code, in bits.
    """
    table = _packing_table(width).to(nibbles.device)
    row = torch.zeros_like(nibbles[:, :, :, 0])
    number = torch.zeros_like(row)
    for octet in range(2):
        for shift in (0, 16):
            found = _look_up(table, (nibbles[:, :, :, octet] >> shift) & 0xFFFF).long()
            row |= (found & 0xFFFF) << (width * number)
            number += found >> 16
    return row.transpose(2, 3).contiguous(), number.transpose(2, 3).contiguous()


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, index.flatten()).view(index.shape)


def _put(codes: torch.Tensor, row: torch.Tensor, at: torch.Tensor, keep: torch.Tensor) -> None:
    """Write bits (32 at most each) at these positions, where the groups are kept. Adding does it: no two overlap."""
    row, at = row[keep].flatten(), at[keep].flatten()
    bits = row << (at & 31)
    codes.index_add_(0, at >> 5, bits.to(torch.int32))
    codes.index_add_(0, (at >> 5) + 1, (bits >> 32).to(torch.int32))


def _place(codes: torch.Tensor, first_word: torch.Tensor, words: torch.Tensor) -> None:
    """Write rows of words, each from its first word on."""
    codes[first_word[:, None] + torch.arange(words.shape[1], device=codes.device)] = words


@functools.cache
def _packing_table(width: int) -> torch.Tensor:
    """By four nibbles (0: no code, otherwise the code + 1): the codes one behind the other, plus their number << 16."""
    nibbles = torch.arange(65536, device="cpu")[:, None] >> torch.arange(0, 16, 4, device="cpu") & 15
    is_code = (nibbles > 0).long()
    before = is_code.cumsum(1) - is_code
    packed = ((nibbles - 1).clamp(min=0) & (1 << width) - 1) << width * before
    return (packed.sum(1) | is_code.sum(1) << 16).to(torch.int32)


# -------------------------------------------------------------------------------------------------------- unpacking


def decode(wire: torch.Tensor, layout: PackedRun, target: torch.Tensor) -> None:
    """Write a run's bytes, on its device. On the CPU it uses as many threads as torch has.

    Args:
        wire: uint8 [>= num_bytes].
        target: uint8 [raw_bytes].
    Raises:
        ValueError: a size does not fit.
    """
    layout.check_sizes(wire.numel(), target.numel())
    head = section(wire, layout.head, torch.int32).view(-1, HEAD_WORDS)
    marks = section(wire, layout.marks, torch.uint8)
    codes = section(wire, layout.codes, torch.int32)
    out = target.view(-1, layout.word_bytes)
    if layout.word_bytes == 4:
        out[:, :2] = 0
    for first in range(0, layout.num_groups, _CHUNK_GROUPS):
        begin = first * GROUP_WORDS
        stop = min(begin + _CHUNK_GROUPS * GROUP_WORDS, layout.num_words)
        exponents = _unpack(head[first : first + _CHUNK_GROUPS], codes)[: stop - begin]
        mark = marks[begin:stop]
        out[begin:stop, -2] = (exponents & 0x80) | (mark & 0x7F)
        out[begin:stop, -1] = (mark & 0x80) | (exponents & 0x7F)
    if layout.num_exceptions:
        exceptions = section(wire, layout.exceptions, torch.int32)
        in_group = head[:, 9] >> 16 & 0xFFFF
        group = torch.arange(layout.num_groups, device=wire.device).repeat_interleave(in_group.long())
        at = group * GROUP_WORDS + (exceptions >> 16 & 0xFFFF)
        out[at, -2:] = exceptions.view(torch.uint8).view(-1, 4)[:, :2]


def _unpack(head: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The exponents of some groups, rotated: uint8 [groups * GROUP_WORDS]."""
    groups = head.shape[0]
    first = head[:, 0].long() & 0x7FFFFFFF
    is_raw = head[:, 0] < 0
    offsets = head[:, 5:10].contiguous().view(torch.int16).long() & 0xFFFF
    offsets = offsets[:, :, None] + (first[:, None, None] + CODE_WORDS) * 32
    start, end = offsets[:, :GROUP_TILES], offsets[:, 1 : GROUP_TILES + 1]

    at = first[:, None] + torch.arange(CODE_WORDS, device=head.device)
    level_0 = _look_up(codes, at).view(groups, GROUP_TILES, 2, LANES).transpose(2, 3).contiguous()
    num_1 = _ones(level_0 & level_0 >> 1)
    before_1 = num_1.flatten(2).cumsum(2) - num_1.flatten(2)
    level_1 = _window(codes, start + 2 * before_1).view_as(level_0)
    is_used = (1 << 2 * num_1.long()) - 1
    num_2 = _ones((level_1 & level_1 >> 1 & is_used).to(torch.int32)).long()
    after_2 = num_2.sum(-1).cumsum(-1)[..., None] - torch.stack([torch.zeros_like(num_2[..., 0]), num_2[..., 0]], -1)
    level_2 = _window(codes, end - 3 * after_2.flatten(2)).view_as(level_0)

    ranks = torch.empty(groups, GROUP_TILES, 2, 2, LANES, 2, dtype=torch.int32, device=head.device)
    upper, lower = (table.to(head.device) for table in _unpacking_tables())
    for octet in range(2):
        pairs = (level_0 >> 2 * octet) & 0x33333333
        pairs = (pairs | pairs >> 2) & 0x0F0F0F0F
        pairs = (pairs | pairs >> 4) & 0x00FF00FF
        for part in range(2):
            found = _look_up(upper, pairs >> 16 * part & 0xFF | (level_1 & 0xFF) << 8)
            level_1 >>= found >> 10 & 0x0E
            added = _look_up(lower, found >> 3 & 0x0F | (level_2 & 0xFFF) << 4)
            level_2 >>= 3 * (found >> 19 & 0x07)
            four = (found & 0x07070707) + added
            ranks[:, :, :, octet, :, part] = four.transpose(2, 3)

    by_rank = head[:, 1:5].contiguous().view(torch.uint8)
    kept = torch.tensor([0, 1, 2, 4, 5, 6, *range(8, 16)], device=head.device)
    exponents = by_rank[:, kept].gather(1, ranks.view(torch.uint8).view(groups, GROUP_WORDS).long())
    raw = is_raw.nonzero().flatten()
    if raw.numel():
        at = first[raw, None] + torch.arange(RAW_WORDS, device=head.device)
        exponents[raw] = _look_up(codes, at).view(torch.uint8)
    return exponents.flatten()


def _ones(bits: torch.Tensor) -> torch.Tensor:
    """How many bits at even places are set: int32 to int32."""
    x = bits & 0x55555555
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return x * 0x01010101 >> 24


def _window(codes: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The 33 bits and more that begin at each position: int64 to int64. What lies above them is not zero."""
    word = at >> 5
    low = _look_up(codes, word).long() & 0xFFFFFFFF
    return (low | _look_up(codes, word + 1).long() << 32) >> (at & 31)


@functools.cache
def _unpacking_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Two tables, int32 [65536], for four words at once.

    The upper one, by four level-0 codes and the next four level-1 codes << 8: a rank (6: level 2) in the low three bits
    of each byte. Above them, which words are of level 2 at bits 3 to 6, how many are escapes at bits 11 to 13, and how
    many of these are of level 2 at bits 19 to 21.
    The lower one, by which words are of level 2 and the next four level-2 codes << 4: what is added to the rank.
    """
    index = torch.arange(65536, device="cpu")[:, None]
    number = torch.arange(4, device="cpu")
    level_0 = index >> 2 * number & 3
    is_escape = level_0 == 3
    before = is_escape.long().cumsum(1) - is_escape.long()
    ranks = torch.where(is_escape, 3 + (index >> 8 + 2 * before & 3), level_0)
    is_level_2 = ranks == LEVEL_2
    upper = (ranks << 8 * number).sum(1) | (is_level_2.long() << number).sum(1) << 3
    upper |= is_escape.sum(1) << 11 | is_level_2.sum(1) << 19

    is_level_2 = (index >> number & 1) == 1
    before = is_level_2.long().cumsum(1) - is_level_2.long()
    lower = torch.where(is_level_2, index >> 4 + 3 * before & 7, 0) << 8 * number
    return upper.to(torch.int32), lower.sum(1).to(torch.int32)
