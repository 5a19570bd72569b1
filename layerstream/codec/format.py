"""The packed form of a run of weights, "cascade 2-2-3", version 1: written down here and nowhere else. Pure arithmetic.

A run is n words of 16 bits (bf16), n divisible by 8. It may also be n words of 32 bits (fp32) whose low halves are all
zero: then the high halves are packed, and the low ones are written as zeros when it is unpacked. All is little-endian.

**Words.** A word is a sign, eight bits of exponent and seven of mantissa. Sign and mantissa hardly compress and are
kept as they are, in one byte: sign * 128 + mantissa. The exponent takes few values, and is coded.

**Places.** A *group* is 8,192 words and has one table. It is eight *tiles* of 1,024 words, for one warp each. Place p
in a tile belongs to half p div 512, octet (p mod 512) div 256, lane (p mod 256) div 8, and is number p mod 8 in it: a
lane has two halves of two octets, and an octet is eight words that lie together. The last tile and the last group are
filled up with padding: its words have no exponent, are coded as rank 0, and are not counted or written out.

**Ranks.** In each group the exponents are sorted by how often they occur, the smaller one first where two are equal. A
word's rank is that of its exponent. Ranks 0 to 2 are level 0, 3 to 5 level 1, 6 to 13 level 2; any other is an
*exception*. Of the sixteen words of a lane in one half eight may be of level 2; the ninth and all later ones, in order
of octet and number, are exceptions. An exception is coded as rank 0.

**Sections** of the packed run, in this order. Each begins at a multiple of 256 bytes; what lies between is zero.

1. `head`: eleven words of 32 bits for each group.
   0: the group's first word in `codes`, plus 2**31 if it is raw.
   1: exponents of ranks 0 to 2, in bytes 0 to 2. 2: of ranks 3 to 5 likewise. 3 and 4: of ranks 6 to 13. Each exponent
   is rotated right by one bit, (e >> 1) | (e & 1) << 7, as it lies in the bytes of a word.
   5 to 9: ten numbers of 16 bits. Nine are bits in the group's stream: where each tile begins, and the last one ends.
   The tenth is how many exceptions the group has.
   10: the number of its first exception.
2. `marks`: the byte of sign and mantissa of each word, in order; 1,024 bytes for each tile, zeros for padding.
3. `codes`: words of 32 bits, group after group, an even count for each.
   A group has 512 words of level-0 codes, then its stream. Word 64 * tile + 32 * half + lane has sixteen codes of two
   bits, that of octet j and number i at bit 4 i + 2 j: the rank, or 3, an escape, where it is 3 or more.
   The stream has one tile after the other, with nothing between them. A tile begins with the level-1 codes of all its
   escapes, ordered by lane, half, octet and number: rank - 3 in two bits, or 3 where the rank is 6 or more. Then come
   the level-2 codes, rank - 6 in three bits: lanes in *descending* order, in a lane by half, octet and number. So the
   level-2 codes of a lane begin at the tile's end less 3 bits for each such word of this lane and of those below.
   A *raw* group has 2,048 words instead: a byte for each word of the run, its exponent, rotated as above, zero for
   padding. Its nine numbers in `head` are all 4,096: a decoder may then read a stream as everywhere, and what it reads
   lies inside the group.
   Four words of zeros follow the last group, for reads past a stream's end.
4. `exceptions`: a word of 32 bits each, by group and place: the 16-bit word as it was, plus 65,536 times its place in
   the group.

**Raw rule.** A group is raw if its code words (before they are made even) and its exceptions are 2,048 or more
together. It has no exceptions then. So at worst a run takes 16.05 bits a word beside what sections and the last tile
are filled up with.

Source of the format and of what it is measured against: the project's study of lossless codecs for bf16, version 2-2-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

FORMAT_VERSION = 1

OCTET_WORDS = 8
TILE_WORDS = 1024
GROUP_WORDS = 8192
GROUP_TILES = GROUP_WORDS // TILE_WORDS
LANES = 32
HEAD_WORDS = 11
CODE_WORDS = 512  # of level 0, in a group that is not raw
RAW_WORDS = 2048
RAW_OFFSET = 4096  # a raw group's offsets: bits
GUARD_WORDS = 4
LEVEL_1, LEVEL_2, NUM_RANKS = 3, 6, 14  # the first rank of each level, and of none
MOST_OF_LEVEL_2 = 8  # of the sixteen words of a lane in one half
ALIGNMENT = 256
MOST_WORDS = 2**31 - GROUP_WORDS  # places are counted in 32 bits with a sign


class Section(NamedTuple):
    """A range of bytes of the packed run."""

    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class PackedRun:
    """What is known of one packed run without looking at its bytes: all that a decoder is told beside them.

    Attributes:
        num_words: n, padding not counted.
        word_bytes: of the run as it was: 2, or 4 where each word is the high half of 32 bits.
        num_code_words: of all groups, guard words not counted.
        num_exceptions: of all groups.
    """

    num_words: int
    word_bytes: int
    num_code_words: int
    num_exceptions: int

    def __post_init__(self) -> None:
        if self.num_words % OCTET_WORDS or not 0 < self.num_words <= MOST_WORDS:
            raise ValueError(f"{self.num_words} words cannot be packed: it takes 8 to {MOST_WORDS}, divisible by 8")
        if self.word_bytes not in (2, 4):
            raise ValueError(f"words of {self.word_bytes} bytes cannot be packed: they are of 2, or of 4")

    @property
    def num_tiles(self) -> int:
        return -(-self.num_words // TILE_WORDS)

    @property
    def num_groups(self) -> int:
        return -(-self.num_words // GROUP_WORDS)

    @property
    def raw_bytes(self) -> int:
        """Of the run as it was."""
        return self.num_words * self.word_bytes

    @property
    def head(self) -> Section:
        return Section(0, 4 * HEAD_WORDS * self.num_groups)

    @property
    def marks(self) -> Section:
        return Section(_aligned(self.head.end), TILE_WORDS * self.num_tiles)

    @property
    def codes(self) -> Section:
        return Section(_aligned(self.marks.end), 4 * (self.num_code_words + GUARD_WORDS))

    @property
    def exceptions(self) -> Section:
        return Section(_aligned(self.codes.end), 4 * self.num_exceptions)

    @property
    def num_bytes(self) -> int:
        """Of the packed run, a multiple of 256."""
        return _aligned(self.exceptions.end)

    def check_sizes(self, wire_bytes: int, target_bytes: int) -> None:
        """Whether buffers of these sizes can be unpacked from and into.

        Raises:
            ValueError: they cannot.
        """
        if wire_bytes < self.num_bytes or target_bytes != self.raw_bytes:
            raise ValueError(
                f"a run of {self.raw_bytes} bytes packed into {self.num_bytes} cannot be unpacked from {wire_bytes} "
                f"into {target_bytes}"
            )

    def to_ints(self) -> tuple[int, ...]:
        """The same as plain numbers, the version of the format first."""
        return (FORMAT_VERSION, *astuple(self))

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> PackedRun:
        """What `to_ints` gave.

        Raises:
            ValueError: it is of another version of the format, or of none.
        """
        if len(ints) != 5 or ints[0] != FORMAT_VERSION:
            raise ValueError(f"{tuple(ints)} describes no run of version {FORMAT_VERSION}: pack the weights again")
        return cls(*ints[1:])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
