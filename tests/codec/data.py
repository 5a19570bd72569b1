"""Words to pack: weights as they are found, and what an encoder stumbles over."""

from __future__ import annotations

import torch

from benchmarks.codec import DATA, words_of

_CPU = torch.device("cpu")
SPECIALS = {
    "infinities": [0x7F80, 0xFF80],
    "NaNs": [0x7F81, 0x7FC0, 0x7FFF, 0xFF81, 0xFFC1, 0xFFFF],
    "denormals": [0x0001, 0x007F, 0x8001, 0x807F],
    "zeros": [0x0000, 0x8000],
}


def all_patterns(n: int, device: torch.device) -> torch.Tensor:
    """All 65,536, again and again."""
    return torch.arange(n, device=device).to(torch.int16)


def constant(n: int, device: torch.device) -> torch.Tensor:
    return torch.full((n,), 0x3F80, dtype=torch.int16, device=device)


def bunched(n: int, device: torch.device) -> torch.Tensor:
    """Stretches in which all words are of level 2, so that of each lane's sixteen most become exceptions."""
    number = torch.arange(n, device=device)
    common = 120 + number % 6
    rare = 110 + number * 7 // 3 % 8
    exponent = torch.where(number // 512 % 5 == 2, rare, common)
    return (exponent << 7 | number * 37 % 128 | (number % 3 == 0) << 15).to(torch.int16)


def junk_in_weights(n: int, device: torch.device) -> torch.Tensor:
    """Weights, with some random bits among them, and every third group of random bits alone."""
    number = torch.arange(n, device=device)
    is_junk = (number // 700 % 11 == 3) | (number // 8192 % 3 == 1)
    return torch.where(is_junk, words_of("random bits", n, device), words_of("normal", n, device))


def falling(n: int, device: torch.device) -> torch.Tensor:
    """Weights every other one of which is up to 2 ** 11 times smaller."""
    words = words_of("normal", n, device)
    return torch.where(
        torch.arange(n, device=device) % 2 == 0, words - (words_of("random bits", n, device) % 12 << 7), words
    )


_MADE = {
    "all patterns": all_patterns,
    "constant": constant,
    "bunched": bunched,
    "junk in weights": junk_in_weights,
    "falling": falling,
}
NAMES = [*DATA, *_MADE, *SPECIALS]


def make(name: str, n: int, device: torch.device = _CPU) -> torch.Tensor:
    """int16 [n]."""
    if name in _MADE:
        return _MADE[name](n, device).contiguous()
    if name in SPECIALS:  # one word in nineteen, among weights
        words = words_of("normal", n, device)
        special = torch.tensor(SPECIALS[name], device=device).to(torch.int16)
        at = torch.arange(0, n, 19, device=device)
        words[at] = special[at // 19 % len(special)]
        return words
    return words_of(name, n, device)


def widened(words: torch.Tensor) -> torch.Tensor:
    """The words as the high halves of 32 bits: int32."""
    return torch.stack([torch.zeros_like(words), words], 1).flatten().view(torch.int32)
