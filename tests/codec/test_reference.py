"""Packing and unpacking in plain torch: nothing is lost, the bytes are what `format.py` says, and little is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerstream import codec
from layerstream.codec import reference
from layerstream.codec.format import GROUP_WORDS, HEAD_WORDS, PackedRun
from tests.codec import by_the_book
from tests.codec.data import NAMES, make, widened

POISON = 0x5A
ANY_SIZE = 2**40


def there_and_back(words: torch.Tensor, word_bytes: int = 2) -> tuple[torch.Tensor, PackedRun]:
    """Pack what may gain nothing; what comes back is the same, and nothing else is written."""
    packed = reference.encode(words, word_bytes, ANY_SIZE)
    assert packed is not None
    wire, layout = packed
    assert wire.numel() == layout.num_bytes
    buffer = torch.full((layout.raw_bytes + 4096,), POISON, dtype=torch.uint8)
    before = wire.clone()
    reference.decode(wire, layout, buffer[: layout.raw_bytes])
    assert torch.equal(buffer[: layout.raw_bytes].view(torch.int16), words)
    assert (buffer[layout.raw_bytes :] == POISON).all()
    assert torch.equal(wire, before)
    return packed


def raw_groups(wire: torch.Tensor, layout: PackedRun) -> int:
    head = reference.section(wire, layout.head, torch.int32).view(-1, HEAD_WORDS)
    return int((head[:, 0] < 0).sum())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost(name: str) -> None:
    there_and_back(make(name, 3 * GROUP_WORDS + 1032))


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_what_the_format_says(name: str) -> None:
    words = make(name, GROUP_WORDS + 2056)
    wire, _ = there_and_back(words)
    assert by_the_book.decode(wire.numpy().tobytes(), words.numel()) == (words.int() & 0xFFFF).tolist()


def test_more_than_a_chunk_at_once() -> None:
    groups = reference._CHUNK_GROUPS
    words = torch.cat([make("normal", groups * GROUP_WORDS), make("junk in weights", 9 * GROUP_WORDS + 8)])
    wire, layout = there_and_back(words)
    assert layout.num_exceptions > 0
    assert 0 < raw_groups(wire, layout) < layout.num_groups
    assert by_the_book.decode(wire.numpy().tobytes(), words.numel())[-8:] == (words.int() & 0xFFFF)[-8:].tolist()


@pytest.mark.parametrize("n", [8, 16, 128, 512, 1016, 1024, 1032, 8184, 8192, 8200, 16384])
def test_any_length_that_is_divisible_by_eight(n: int) -> None:
    for name in ("normal", "random bits", "bunched"):
        there_and_back(make(name, n))


@pytest.mark.parametrize("name", ["normal", "random bits", "bunched", "junk in weights", "infinities"])
def test_high_halves_of_32_bits(name: str) -> None:
    words = make(name, 2 * GROUP_WORDS + 1032)
    wide, layout = there_and_back(widened(words).view(torch.int16), 4)
    narrow, _ = there_and_back(words)
    assert torch.equal(wide, narrow), "the same bytes, but for what the words are"
    assert layout.raw_bytes == 4 * words.numel()


def test_a_ninth_word_of_level_2_is_an_exception() -> None:
    words = make("bunched", GROUP_WORDS)
    _, layout = there_and_back(words)
    exponents = words.int() >> 7 & 255
    order = torch.bincount(exponents, minlength=256).sort(descending=True, stable=True).indices
    is_level_2 = torch.isin(exponents, order[6:14]).view(8, 2, 2, 32, 8)
    late = (is_level_2.sum((2, 4)) - 8).clamp(min=0).sum()
    assert late > 100
    assert layout.num_exceptions == late + torch.isin(exponents, order[14:]).sum()


def test_random_bits_stay_raw_and_take_little_more() -> None:
    words = make("random bits", 64 * GROUP_WORDS)
    wire, layout = there_and_back(words)
    assert raw_groups(wire, layout) == 64
    assert layout.num_exceptions == 0
    assert layout.num_bytes * 8 / words.numel() < 16.05


# What the study of the format measured, and a little for sections that are filled up.
@pytest.mark.parametrize(
    ("name", "most_bits"),
    [
        ("normal", 10.74),
        ("student-t(4)", 10.94),
        ("2 % zeros", 10.84),
        ("fp16 origin", 10.74),
        ("near 1 (LN)", 10.06),
        ("uniform", 10.43),
        ("constant", 10.06),
    ],
)
def test_weights_become_two_thirds(name: str, most_bits: float) -> None:
    _, layout = there_and_back(make(name, 200 * GROUP_WORDS))
    assert layout.num_bytes * 8 / layout.num_words < most_bits


@st.composite
def runs(draw: st.DrawFn) -> torch.Tensor:
    """Words of few exponents and of many, in stretches."""
    octets = draw(st.integers(1, 2600))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    words = torch.randint(-32768, 32768, (8 * octets,), generator=generator, dtype=torch.int16)
    for _ in range(draw(st.integers(0, 5))):
        begin, stop = sorted(draw(st.tuples(st.integers(0, 8 * octets), st.integers(0, 8 * octets))))
        lowest, number = draw(st.integers(0, 255)), draw(st.integers(1, 20))
        exponents = (lowest + torch.randint(0, number, (stop - begin,), generator=generator)) % 256
        words[begin:stop] = ((words[begin:stop].int() & 0x807F) | exponents << 7).to(torch.int16)
    return words


@given(runs())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_words(words: torch.Tensor) -> None:
    there_and_back(words)


def test_what_gains_too_little_is_not_packed() -> None:
    assert codec.encode(make("random bits", 8 * GROUP_WORDS)) is None
    words = make("normal", 8 * GROUP_WORDS)
    packed = codec.encode(words)
    assert packed is not None
    assert packed[1].num_bytes <= 0.9 * 2 * words.numel()
    assert reference.encode(words, 2, packed[1].num_bytes) is not None
    assert reference.encode(words, 2, packed[1].num_bytes - 1) is None


def test_the_front_takes_bf16_and_fp32() -> None:
    weights = make("normal", 4 * GROUP_WORDS).view(torch.bfloat16)
    for run in (weights, weights.float(), torch.nn.Parameter(weights)):
        packed = codec.encode(run)
        assert packed is not None
        target = torch.full((run.numel() * run.element_size(),), POISON, dtype=torch.uint8)
        codec.decode(*packed, target)
        assert torch.equal(target.view(run.dtype), run)


def test_fp32_with_a_low_half_is_not_packed() -> None:
    weights = make("normal", 4 * GROUP_WORDS).view(torch.bfloat16).float()
    weights.view(torch.int32)[-1] |= 1
    assert codec.encode(weights) is None


def test_nothing_is_not_packed() -> None:
    assert codec.encode(torch.empty(0, dtype=torch.bfloat16)) is None


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="12 elements"):
        codec.encode(torch.zeros(12, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="elements of 8 bytes"):
        codec.encode(torch.zeros(16, dtype=torch.float64))


def test_a_target_of_another_size_is_refused() -> None:
    packed = codec.encode(make("normal", GROUP_WORDS))
    assert packed is not None
    with pytest.raises(ValueError, match="into 16385"):
        codec.decode(*packed, torch.zeros(16385, dtype=torch.uint8))
