"""A decoder that follows `layerstream/codec/format.py` word by word, and shares nothing with the others. Slow."""

from __future__ import annotations

import struct


def decode(wire: bytes, num_words: int) -> list[int]:
    """The 16-bit words of a packed run, by what its bytes alone and their number say."""
    groups, tiles = -(-num_words // 8192), -(-num_words // 1024)
    marks_at = up(44 * groups)
    codes_at = up(marks_at + 1024 * tiles)
    heads = [struct.unpack_from("<5I10HI", wire, 44 * group) for group in range(groups)]
    num_code_words = end_of_codes(heads[-1])
    exceptions_at = up(codes_at + 4 * (num_code_words + 4))
    words: list[int] = []
    for group, head in enumerate(heads):
        exponents = group_of_exponents(wire[codes_at:], head)
        for place in range(min(8192, num_words - 8192 * group)):
            mark = wire[marks_at + 8192 * group + place]
            words.append((mark & 128) << 8 | exponents[place] << 7 | mark & 127)
        for number in range(head[14]):
            (exception,) = struct.unpack_from("<I", wire, exceptions_at + 4 * (head[15] + number))
            words[8192 * group + (exception >> 16)] = exception & 0xFFFF
    return words


def up(offset: int) -> int:
    return (offset + 255) // 256 * 256


def end_of_codes(head: tuple[int, ...]) -> int:
    size = 2048 if head[0] >> 31 else 512 + (head[13] + 31) // 32
    return (head[0] & 0x7FFFFFFF) + size + size % 2


def turned(byte: int) -> int:
    """An exponent as it was before it was rotated right by one bit."""
    return (byte << 1 | byte >> 7) & 255


def group_of_exponents(codes: bytes, head: tuple[int, ...]) -> list[int]:
    first = 4 * (head[0] & 0x7FFFFFFF)
    if head[0] >> 31:
        return [turned(byte) for byte in codes[first : first + 8192]]
    table = [*struct.pack("<I", head[1])[:3], *struct.pack("<I", head[2])[:3], *struct.pack("<2I", *head[3:5])]
    stream = int.from_bytes(codes[first + 2048 : first + 2048 + 4 * ((head[13] + 31) // 32)], "little")
    ranks = [0] * 8192
    for tile in range(8):
        at, below = head[5 + tile], head[6 + tile]
        of_level_2: list[list[int]] = []
        for lane in range(32):
            of_level_2.append([])
            for half in range(2):
                (word,) = struct.unpack_from("<I", codes, first + 4 * (64 * tile + 32 * half + lane))
                for octet in range(2):
                    for number in range(8):
                        place = 1024 * tile + 512 * half + 256 * octet + 8 * lane + number
                        ranks[place] = word >> 4 * number + 2 * octet & 3
                        if ranks[place] == 3:
                            ranks[place] += stream >> at & 3
                            at += 2
                            if ranks[place] == 6:
                                of_level_2[-1].append(place)
        for places in of_level_2:
            below -= 3 * len(places)
            for number, place in enumerate(places):
                ranks[place] += stream >> below + 3 * number & 7
        assert below == at, "level-1 codes end where level-2 codes begin"
    return [turned(table[rank]) for rank in ranks]
