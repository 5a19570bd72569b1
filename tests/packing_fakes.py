"""A codec for tests of everything around one: it packs any bytes into a quarter, and the tiniest weights, too.

What is packed has nothing but the number of a run, again and again; the bytes are kept here. Where a wire buffer holds
anything else by the time it is decoded, garbage comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from layerstream.device.simulated import device as simulated
from layerstream.engine import packing

_RUNS: list[torch.Tensor] = []


@dataclass(frozen=True)
class Numbered:
    """Of a run, how many bytes it has."""

    raw_bytes: int


def encode(words: torch.Tensor, word_bytes: int, most_bytes: int) -> tuple[torch.Tensor, Numbered] | None:
    raw = words.view(torch.uint8)
    if word_bytes != 2 or raw.numel() // 4 > most_bytes:
        return None
    _RUNS.append(raw.clone())
    wire = torch.full((raw.numel() // 32,), len(_RUNS) - 1, dtype=torch.int64, device="cpu")
    return wire.view(torch.uint8), Numbered(raw.numel())


def decode(wire: torch.Tensor, layout: Numbered, target: torch.Tensor) -> None:
    numbers = wire.view(torch.int64)
    number = int(numbers[0])
    is_whole = 0 <= number < len(_RUNS) and bool((numbers == number).all())
    if is_whole and _RUNS[number].numel() == target.numel() == layout.raw_bytes:
        target.copy_(_RUNS[number])
    else:
        target.fill_(0x5A)


@pytest.fixture
def packs_anything(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The simulated device packs with this codec, units of any size, as fast as it can, again and again."""
    monkeypatch.setattr(simulated, "encode", encode)
    monkeypatch.setattr(simulated, "decode", decode)
    monkeypatch.setattr(packing, "LEAST_BYTES", 1)
    monkeypatch.setattr(packing, "_MOST_TIME_SHARE", 1e9)
    monkeypatch.setattr(packing, "_MOST_UNPACKED", 10**9)
    yield
    _RUNS.clear()
