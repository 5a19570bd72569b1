"""What the engine's budget asks of CUDA's allocator. Run with `pytest -m gpu`."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

import layerstream
from layerstream.device.cuda import CudaDevice
from tests.fakes import toy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

MIB = 2**20

# Expandable segments grow by 20 MiB and are shared: what a buffer adds cannot be told beforehand.
settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
to_the_byte = pytest.mark.skipif("expandable_segments:True" in settings, reason="expandable segments")


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    found = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    yield found
    found.set_cap(None)
    gc.collect()
    torch.cuda.empty_cache()


def take(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cuda")


def take_until_refused(device: CudaDevice, num_bytes: int) -> None:
    """Tensors and engine buffers in turn."""
    kept: list[torch.Tensor] = []
    with pytest.raises(torch.OutOfMemoryError):
        while len(kept) < 1000:
            kept.append(device.allocate(num_bytes) if len(kept) % 2 else take(num_bytes))


def fraction() -> float | None:
    read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return None if read is None else read()


@pytest.mark.parametrize("num_bytes", [MIB // 2, 3 * MIB, 17 * MIB + 1])
def test_the_cap_holds_whatever_the_sizes(device: CudaDevice, num_bytes: int) -> None:
    cap, num_ooms = device.reserved_bytes() + 256 * MIB + 12345, device.num_ooms()
    device.set_cap(cap)
    device.reset_peaks()
    take_until_refused(device, num_bytes)
    assert cap - 64 * MIB < device.peak_reserved_bytes() <= cap
    assert device.num_ooms() == num_ooms + 1


@to_the_byte
def test_the_cap_holds(device: CudaDevice) -> None:
    before, num_ooms = fraction(), device.num_ooms()
    cap = device.reserved_bytes() + 256 * MIB
    device.set_cap(cap)
    device.reset_peaks()
    kept = [take(64 * MIB) for _ in range(4)]
    with pytest.raises(torch.OutOfMemoryError):
        take(20 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        device.allocate(20 * MIB)
    assert device.num_ooms() == num_ooms + 2
    assert device.reserved_bytes() == device.peak_reserved_bytes() == cap
    kept.pop()
    assert device.reserved_bytes() == cap, "cached"
    kept.append(device.allocate(64 * MIB))
    with pytest.raises(torch.OutOfMemoryError):
        take(20 * MIB)
    assert device.peak_reserved_bytes() == cap
    device.set_cap(None)
    assert fraction() == before
    kept.append(take(512 * MIB))
    assert device.reserved_bytes() >= cap + 512 * MIB


@to_the_byte
def test_cached_blocks_are_given_back_before_a_request_is_refused(device: CudaDevice) -> None:
    cap = device.reserved_bytes() + 256 * MIB
    device.set_cap(cap)
    device.reset_peaks()
    num_ooms = device.num_ooms()
    parts = [take(32 * MIB) for _ in range(8)]
    assert device.reserved_bytes() == cap
    del parts
    assert device.reserved_bytes() == cap
    whole = device.allocate(250 * MIB)  # fits in none of the cached blocks
    assert whole.numel() == 250 * MIB
    assert device.reserved_bytes() <= cap
    assert device.peak_reserved_bytes() <= cap
    assert device.num_ooms() == num_ooms, "giving back is no out-of-memory error"


@pytest.fixture
def growing(device: CudaDevice) -> Iterator[CudaDevice]:
    """The device while something streams."""
    device.grow_segments("test", is_on=True)
    if not device.page_bytes():
        pytest.skip("this allocator's segments do not grow, or the user has decided")
    yield device
    device.grow_segments("test", is_on=False)


def reserved_by_a_pass(device: CudaDevice) -> int:
    """What tensors of unlike sizes that come and go, as activations do, reserve beyond what is reserved already."""
    gc.collect()
    torch.cuda.empty_cache()
    before = device.reserved_bytes()
    device.reset_peaks()
    for size in (30, 90, 170, 40, 260, 110, 350, 60):
        first, second = take(size * MIB), take((size // 3) * MIB)
        del first
        third = take((size + 50) * MIB)
        del second, third
    reserved = device.peak_reserved_bytes() - before
    torch.cuda.empty_cache()
    return reserved


def test_growing_segments_leave_fewer_gaps(device: CudaDevice) -> None:
    cut = reserved_by_a_pass(device)
    device.grow_segments("test", is_on=True)
    is_possible = device.page_bytes() > 0
    grown = reserved_by_a_pass(device)
    device.grow_segments("test", is_on=False)
    if not is_possible:
        pytest.skip("this allocator's segments do not grow, or the user has decided")
    assert grown < cut


def test_the_engines_buffers_keep_segments_of_their_own(growing: CudaDevice) -> None:
    kept = take(50 * MIB)
    reserved = growing.reserved_bytes()
    buffers = [growing.allocate(33 * MIB + 5), growing.allocate(12 * MIB)]
    assert growing.reserved_bytes() - reserved == sum(growing.rounded_bytes(b.numel()) for b in buffers)
    del buffers
    torch.cuda.empty_cache()
    assert growing.reserved_bytes() == reserved
    kept.fill_(1)


@pytest.mark.parametrize("num_bytes", [3 * MIB, 17 * MIB + 1, 64 * MIB])
def test_the_cap_holds_with_growing_segments(growing: CudaDevice, num_bytes: int) -> None:
    cap = growing.reserved_bytes() + 300 * MIB
    growing.set_cap(cap)
    growing.reset_peaks()
    take_until_refused(growing, num_bytes)
    assert cap - 2 * num_bytes - 64 * MIB < growing.peak_reserved_bytes() <= cap


def test_the_allocators_settings_come_back(device: CudaDevice) -> None:
    def is_on() -> bool:
        return bool(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])

    before = is_on()
    with layerstream.offload(toy(), vram_budget="min"):
        assert is_on() or "expandable_segments" in settings
    assert is_on() == before


def test_what_is_reserved_already_stays(device: CudaDevice) -> None:
    kept = take(64 * MIB)
    held = device.reserved_bytes()
    device.set_cap(held - 32 * MIB)
    assert device.reserved_bytes() == held
    with pytest.raises(torch.OutOfMemoryError):
        take(64 * MIB)
    kept.fill_(3)
    device.set_cap(None)
    assert bool((kept == 3).all())


def test_another_cap_comes_back(device: CudaDevice) -> None:
    if fraction() is None:
        pytest.skip("this torch cannot say what was set")
    torch.cuda.set_per_process_memory_fraction(0.5)
    try:
        before = fraction()
        for _ in range(3):
            device.set_cap(128 * MIB)
            device.set_cap(256 * MIB)
            device.set_cap(None)
            assert fraction() == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_cap_is_a_share_of_what_torch_divides_by() -> None:
    assert torch.cuda.get_device_properties(0).total_memory == torch.cuda.mem_get_info(0)[1]


@to_the_byte
@pytest.mark.parametrize("num_bytes", [10 * MIB, 10 * MIB + 1, 25 * MIB + 12345, 301 * MIB + 1])
def test_a_buffer_adds_its_rounded_size(device: CudaDevice, num_bytes: int) -> None:
    reserved, allocated = device.reserved_bytes(), device.allocated_bytes()
    device.reset_peaks()
    buffer = device.allocate(num_bytes)
    assert buffer.numel() == num_bytes
    assert buffer.data_ptr() % 256 == 0
    assert device.reserved_bytes() - reserved == device.rounded_bytes(num_bytes)
    assert device.allocated_bytes() - allocated == device.rounded_bytes(num_bytes)
    del buffer
    torch.cuda.empty_cache()
    assert (device.reserved_bytes(), device.allocated_bytes()) == (reserved, allocated)
    assert device.peak_reserved_bytes() == reserved + device.rounded_bytes(num_bytes)
    assert device.peak_allocated_bytes() == allocated + device.rounded_bytes(num_bytes)
    device.reset_peaks()
    assert (device.peak_reserved_bytes(), device.peak_allocated_bytes()) == (reserved, allocated)


def test_the_context_is_outside_the_allocator(device: CudaDevice) -> None:
    before = device.context_bytes()
    assert 16 * MIB < before < device.total_bytes()
    kept = take(512 * MIB)
    assert abs(device.context_bytes() - before) < 64 * MIB, "what the allocator holds does not count"
    del kept


def test_the_link_is_measured(device: CudaDevice) -> None:
    source, target = device.pinned_staging(64 * MIB), device.allocate(64 * MIB)
    assert source is not None
    source.random_(0, 255)
    target.fill_(255)
    torch.cuda._sleep(100_000_000)
    read = target.clone()  # queued behind the sleep: the measurement must not overtake it
    speeds = [device.measure_link(target, source) for _ in range(3)]
    assert all(1 < gb_per_s < 1000 for gb_per_s in speeds), speeds
    assert max(speeds) < 1.5 * min(speeds), speeds
    assert bool((read == 255).all())
    assert torch.equal(target.cpu(), source)


def test_marks_never_wait(device: CudaDevice) -> None:
    stream = device.compute_stream()
    start = device.mark(stream)
    torch.cuda._sleep(400_000_000)  # some 200 ms
    end = device.mark(stream)
    assert device.elapsed_ms(start, end) is None
    torch.cuda.synchronize()
    elapsed_ms = device.elapsed_ms(start, end)
    assert elapsed_ms is not None
    assert 50 < elapsed_ms < 5000
