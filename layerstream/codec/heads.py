"""What is settled of each group before its bits are written: is it raw, where do its words begin, what says its head.

Both encoders count what is in each tile, and both ask here, so that there is one raw rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerstream.codec.format import (
    CODE_WORDS,
    GROUP_TILES,
    LEVEL_1,
    LEVEL_2,
    NUM_RANKS,
    RAW_OFFSET,
    RAW_WORDS,
)

# By how many bits each rank's exponent is moved in its word of the head.
_SHIFTS = [
    *(8 * i for i in range(3)),
    *(8 * i for i in range(3)),
    *(8 * i for i in range(4)),
    *(8 * i for i in range(4)),
]


@dataclass(frozen=True)
class Heads:
    """The groups of a run, or of a part of it that is looked at alone.

    Attributes:
        head: int32 [groups, HEAD_WORDS].
        is_raw: bool [groups].
        first_word: int64 [groups], in the section of codes.
        first_exception: int32 [groups, tiles], of each tile, in the section of exceptions.
        totals: int64 [2]: code words, exceptions.
    """

    head: torch.Tensor
    is_raw: torch.Tensor
    first_word: torch.Tensor
    first_exception: torch.Tensor
    totals: torch.Tensor


def heads(exponents: torch.Tensor, counts: torch.Tensor) -> Heads:
    """Does not wait for the device.

    Args:
        exponents: uint8 [groups, >= NUM_RANKS], by rank, rotated as they lie in the bytes of a word.
        counts: int32 [groups, tiles, 3]: words of level 1 or 2, words of level 2, exceptions.
    """
    of_level_1, of_level_2, exceptions = counts.long().unbind(-1)
    bits = 2 * of_level_1 + 3 * of_level_2
    end = bits.cumsum(1)
    num_words = CODE_WORDS + (end[:, -1] + 31) // 32
    is_raw = num_words + exceptions.sum(1) >= RAW_WORDS
    num_words = torch.where(is_raw, RAW_WORDS, (num_words + 1) // 2 * 2)
    exceptions = torch.where(is_raw[:, None], 0, exceptions)
    first_word = num_words.cumsum(0) - num_words
    first_exception = exceptions.flatten().cumsum(0).view_as(exceptions) - exceptions

    offsets = torch.cat([end - bits, end[:, -1:]], 1)
    offsets = torch.where(is_raw[:, None], RAW_OFFSET, offsets)
    numbers = torch.cat([offsets, exceptions.sum(1, keepdim=True)], 1)
    shifted = exponents[:, :NUM_RANKS].long() << torch.tensor(_SHIFTS, device=exponents.device)
    middle = LEVEL_2 + 4
    columns = [
        (first_word | is_raw.long() << 31)[:, None],
        *(
            shifted[:, begin:stop].sum(1, keepdim=True)
            for begin, stop in ((0, LEVEL_1), (LEVEL_1, LEVEL_2), (LEVEL_2, middle), (middle, NUM_RANKS))
        ),
        numbers[:, 0::2] | numbers[:, 1::2] << 16,
        first_exception[:, :1],
    ]
    return Heads(
        head=torch.cat(columns, 1).to(torch.int32),  # wraps: of 32 bits all are used
        is_raw=is_raw,
        first_word=first_word,
        first_exception=first_exception.to(torch.int32).view(-1, GROUP_TILES),
        totals=torch.stack([num_words.sum(), exceptions.sum()]),
    )
