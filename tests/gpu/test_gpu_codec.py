"""The codec on a real GPU: every bit comes back, and both encoders write the same bytes. Run with `pytest -m gpu`."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from layerstream import codec
from layerstream.codec import launch, reference
from layerstream.codec.format import PackedRun
from tests.codec.data import NAMES, make, widened

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

POISON = 0x5A
PAST_END = 4096
ANY_SIZE = 2**40
SPIN_CYCLES = 20_000_000  # about 10 ms
KIB, MB = 1024, 1_000_000


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    pytest.importorskip("triton")
    found = torch.device("cuda", 0)
    codec.warm_up(found)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    yield found
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def pack(words: torch.Tensor, word_bytes: int = 2) -> tuple[torch.Tensor, PackedRun]:
    """A run packed by the kernels, even where that gains nothing."""
    packed = launch.encode(words, word_bytes, ANY_SIZE)
    assert packed is not None
    return packed


def poisoned(layout: PackedRun) -> torch.Tensor:
    return torch.full((layout.raw_bytes + PAST_END,), POISON, dtype=torch.uint8, device="cuda")


def unpack(wire: torch.Tensor, layout: PackedRun) -> torch.Tensor:
    """The 16-bit words that the kernel writes, into memory that held something else, and nothing past its end."""
    buffer = poisoned(layout)
    codec.decode(wire, layout, buffer[: layout.raw_bytes])
    assert (buffer[layout.raw_bytes :] == POISON).all()
    return buffer[: layout.raw_bytes].view(torch.int16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [8192 * 300 + 1032, 8192 * 7 + 4096 + 8])
def test_nothing_is_lost(name: str, n: int, device: torch.device) -> None:
    words = make(name, n, device)
    assert torch.equal(unpack(*pack(words)), words)


@pytest.mark.parametrize("name", NAMES)
def test_the_encoders_write_the_same_bytes(name: str, device: torch.device) -> None:
    words = make(name, 8192 * 40 + 2056, device)
    wire, layout = pack(words)
    on_host = reference.encode(words.cpu(), 2, ANY_SIZE)
    assert on_host is not None
    assert layout == on_host[1]
    assert torch.equal(wire.cpu(), on_host[0])
    on_device = reference.encode(words, 2, ANY_SIZE)
    assert on_device is not None
    assert torch.equal(wire, on_device[0])


@pytest.mark.parametrize("name", NAMES)
def test_high_halves_of_32_bits(name: str, device: torch.device) -> None:
    wide = widened(make(name, 8192 * 30 + 1032, device)).view(torch.int16)
    packed = pack(wide, 4)
    assert torch.equal(unpack(*packed), wide)
    on_host = reference.encode(wide.cpu(), 4, ANY_SIZE)
    assert on_host is not None
    assert torch.equal(packed[0].cpu(), on_host[0])


@pytest.mark.parametrize("n", [8, 128, 512, 1016, 1024, 1032, 4096, 4104, 8184, 8192, 8200, 8192 * 129 + 8])
@pytest.mark.parametrize("name", ["normal", "random bits", "bunched"])
def test_any_length_that_is_divisible_by_eight(name: str, n: int, device: torch.device) -> None:
    words = make(name, n, device)
    assert torch.equal(unpack(*pack(words)), words)


@pytest.mark.parametrize("num_bytes", [KIB, 16 * KIB, 256 * KIB, 4 * MB, 100 * MB, 342 * MB])
@pytest.mark.parametrize("name", ["normal", "junk in weights"])
def test_any_size(name: str, num_bytes: int, device: torch.device) -> None:
    words = make(name, num_bytes // 256 * 128, device)
    assert torch.equal(unpack(*pack(words)), words)


@pytest.mark.parametrize("name", ["normal", "student-t(4)", "junk in weights"])
def test_again_and_again(name: str, device: torch.device) -> None:
    words = make(name, 8192 * 500 + 128, device)
    wire, layout = pack(words)
    target = poisoned(layout)[: layout.raw_bytes]
    start = codec.prepare(wire, layout, target)
    for _ in range(20):
        target.fill_(POISON)
        start(torch.cuda.current_stream().cuda_stream)
        assert torch.equal(target.view(torch.int16), words)


def test_on_the_stream_that_it_is_told(device: torch.device) -> None:
    words = make("normal", 8192 * 100, device)
    wire, layout = pack(words)
    target = poisoned(layout)[: layout.raw_bytes]
    start = codec.prepare(wire, layout, target)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN_CYCLES)
    start(side.cuda_stream)
    before = target.clone()  # in the current stream, while the other spins
    torch.cuda.synchronize()
    assert (before == POISON).all()
    assert torch.equal(target.view(torch.int16), words)


def test_it_does_not_block_the_host(device: torch.device) -> None:
    wire, layout = pack(make("normal", 8192 * 100, device))
    start = codec.prepare(wire, layout, poisoned(layout)[: layout.raw_bytes])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN_CYCLES)
    start(side.cuda_stream)
    assert not side.query()
    torch.cuda.synchronize()


def test_what_is_compiled_is_launched_itself(device: torch.device) -> None:
    wire, layout = pack(make("normal", 8192, device))
    start = codec.prepare(wire, layout, poisoned(layout)[: layout.raw_bytes])
    assert getattr(start, "func", None) is launch._launch


def test_the_ordinary_launch_does_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    words = make("junk in weights", 8192 * 9 + 128, device)
    wire, layout = pack(words)
    monkeypatch.setattr(launch, "_compiled", lambda *args: (object(), False))
    target = poisoned(layout)[: layout.raw_bytes]
    start = codec.prepare(wire, layout, target)
    assert getattr(start, "func", None) is launch._launch_ordinarily
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    start(side.cuda_stream)
    side.synchronize()
    assert torch.equal(target.view(torch.int16), words)


def test_the_kernels_without_assembly(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_takes_ptx", lambda device: False)
    for name in ("normal", "junk in weights", "bunched"):
        words = make(name, 8192 * 9 + 128, device)
        assert torch.equal(unpack(*pack(words)), words)


def requested_bytes(which: str) -> int:
    """Of the allocator, without what it rounds up."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


def test_packing_takes_little_memory(device: torch.device) -> None:
    words = make("normal", 100 * MB // 256 * 128, device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested_bytes("current")
    _, layout = pack(words)
    assert requested_bytes("peak") - before <= layout.num_bytes + 0.03 * layout.raw_bytes
    torch.cuda.reset_peak_memory_stats()
    before = requested_bytes("current")
    assert launch.encode(words, 2, layout.num_bytes - 1) is None
    assert requested_bytes("peak") - before <= 0.1 * layout.raw_bytes


def test_random_bits_and_low_halves_stay_as_they_are(device: torch.device) -> None:
    assert codec.encode(make("random bits", 8192 * 20, device)) is None
    weights = make("normal", 8192 * 20, device).view(torch.bfloat16).float()
    assert codec.encode(weights) is not None
    weights.view(torch.int32)[-1] |= 1
    assert codec.encode(weights) is None
