"""The simulated device finds what it is there to find: each check is broken by hand once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch

from layerstream.device import Device
from layerstream.errors import TransferError
from layerstream.simulated import PAGE_BYTES, RaceError, SimulatedDevice, SimulatedOutOfMemoryError

KIB = 1024
Copies = Literal["at_once", "late", "random"]


def floats(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.view(torch.float32)


def source(value: float, num_bytes: int = KIB) -> torch.Tensor:
    return torch.full((num_bytes // 4,), float(value)).view(torch.uint8)


def harsh(**options: Any) -> SimulatedDevice:
    return SimulatedDevice(**{"copies": "late", "is_poisoned": True} | options)


def load(device: SimulatedDevice, slot: torch.Tensor, value: float, after: Sequence[Any] = ()) -> Any:
    return device.copy([(slot, source(value, slot.numel()))], after)


def wait(device: SimulatedDevice, event: Any) -> None:
    device.wait(device.compute_stream(), event)


def reader_done(device: SimulatedDevice) -> Any:
    return device.record(device.compute_stream())


# ---- what is right passes


@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
def test_an_engine_that_waits_sees_its_bytes(copies: Copies) -> None:
    device = harsh(copies=copies)
    slots = [device.allocate(KIB) for _ in range(2)]
    free: list[Any] = [reader_done(device), reader_done(device)]
    with device.checking():
        ready = [load(device, slots[n], n, [free[n]]) for n in range(2)]
        for number in range(2, 12):
            turn = number % 2
            wait(device, ready[turn])
            assert torch.equal(floats(slots[turn]).sum(), torch.tensor(256.0 * (number - 2)))
            free[turn] = reader_done(device)
            ready[turn] = load(device, slots[turn], number, [free[turn]])


def test_it_is_a_device() -> None:
    names = [n for n in vars(Device) if not n.startswith("_")]
    assert len(names) > 15
    device = SimulatedDevice()
    assert [n for n in names if not hasattr(device, n)] == []
    assert device.torch_device == torch.device("cpu")
    assert device.is_simulated


# ---- reads that do not wait


def test_reading_before_waiting_gives_nan() -> None:
    device = harsh()
    slot = device.allocate(KIB)
    load(device, slot, 1.0)
    assert floats(slot).isnan().all()
    wait(device, load(device, slot, 2.0))
    assert torch.equal(floats(slot), torch.full((256,), 2.0))
    load(device, slot, 3.0)
    assert floats(slot).isnan().all(), "poisoned again from the moment the next copy is issued"


def test_memory_is_poisoned_from_the_start() -> None:
    assert floats(harsh().allocate(KIB)).isnan().all()


@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
def test_reading_before_waiting_is_a_race_even_where_the_values_are_right(copies: Copies) -> None:
    device = SimulatedDevice(copies=copies)
    slot = device.allocate(KIB)
    event = load(device, slot, 1.0)
    with device.checking():
        with pytest.raises(RaceError, match="slot read without waiting for its load"):
            floats(slot).sum()
        wait(device, event)
        floats(slot).sum()


@pytest.mark.parametrize(
    "read",
    [
        lambda slot: slot + 1,
        lambda slot: slot[3:5] * 2,
        lambda slot: slot.view(16, 16) @ torch.ones(16, 1),
        lambda slot: torch.cat([torch.ones(1), slot]),
        lambda slot: torch.empty(256).copy_(slot),
        lambda slot: slot.mul_(2),
        lambda slot: slot.fill_(0),
        lambda slot: torch.add(slot, 1, out=torch.empty(256)),
        lambda slot: torch.add(torch.ones(256), 1, out=slot),
        lambda slot: torch.nn.functional.linear(torch.ones(2, 256), slot.view(1, 256)),
        lambda slot: slot[0].item(),
    ],
)
def test_every_kind_of_access_is_checked(read: Any) -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    load(device, slot, 1.0)
    with device.checking(), pytest.raises(RaceError):
        read(floats(slot))


def test_views_and_metadata_are_no_accesses() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    load(device, slot, 1.0)
    with device.checking():
        view = floats(slot).view(16, 16).t()[1:]
        assert view.shape == (15, 16)
        assert view.stride() == (1, 16)


def test_memory_that_is_not_the_devices_is_not_checked() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    load(device, slot, 1.0)
    with device.checking():
        assert (torch.ones(3) + 1).sum() == 6


def test_outside_of_checking_nothing_is_checked() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    load(device, slot, 1.0)
    floats(slot).sum()


def test_waiting_on_another_stream_does_not_help() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    event = load(device, slot, 1.0)
    other = device.new_stream()
    device.wait(other, event)
    with device.checking():
        with pytest.raises(RaceError):
            floats(slot).sum()
        with device.use_stream(other):
            floats(slot).sum()
        floats(slot).sum()  # leaving the stream joined it


def test_waiting_on_one_that_waited_helps() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    other = device.new_stream()
    device.wait(other, load(device, slot, 1.0))
    wait(device, device.record(other))
    with device.checking():
        floats(slot).sum()


def test_waiting_for_a_later_copy_covers_the_earlier_ones() -> None:
    device = harsh()
    slots = [device.allocate(KIB) for _ in range(2)]
    load(device, slots[0], 1.0)
    wait(device, load(device, slots[1], 2.0))
    with device.checking():
        assert floats(slots[0]).sum() == 256


# ---- copies that do not wait


def test_copy_into_a_slot_that_is_being_read_is_a_race() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    wait(device, load(device, slot, 1.0))
    with device.checking():
        floats(slot).sum()
    with pytest.raises(RaceError, match="copy into a slot does not wait for its reader"):
        load(device, slot, 2.0)
    load(device, slot, 2.0, after=[reader_done(device)])


def test_an_event_recorded_before_the_last_reader_does_not_cover_it() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    wait(device, load(device, slot, 1.0))
    with device.checking():
        floats(slot).sum()
        too_early = reader_done(device)
        floats(slot).sum()
    with pytest.raises(RaceError):
        load(device, slot, 2.0, after=[too_early])


def test_every_reading_stream_must_be_waited_for() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    ready = load(device, slot, 1.0)
    wait(device, ready)
    other = device.new_stream()
    device.wait(other, ready)
    with device.checking():
        floats(slot).sum()
        mine = reader_done(device)
        device._used_stream[threading.get_ident()] = other  # as `use_stream`, without joining the two
        floats(slot).sum()
        device._used_stream.clear()
    with pytest.raises(RaceError):
        load(device, slot, 2.0, after=[mine])
    load(device, slot, 2.0, after=[mine, device.record(other)])


def test_a_reader_in_another_thread_counts() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    ready = load(device, slot, 1.0)
    events: list[Any] = []

    def read() -> None:
        wait(device, ready)
        with device.checking():
            floats(slot).sum()
        events.append(reader_done(device))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    with pytest.raises(RaceError):
        load(device, slot, 2.0, after=[reader_done(device)])
    load(device, slot, 2.0, after=events)


def test_host_waits_order_everything() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    device.synchronize_event(load(device, slot, 1.0))
    with device.checking():
        floats(slot).sum()
    device.synchronize()
    event = load(device, slot, 2.0)
    device.synchronize_event(event)
    with device.checking():
        floats(slot).sum()


def test_copy_to_freed_memory_is_refused() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    device.free(slot)
    with pytest.raises(TransferError, match="not allocated on the simulated device"):
        load(device, slot, 1.0)


# ---- when copies run


def test_late_copies_run_only_when_waited_for() -> None:
    device = harsh()
    slots = [device.allocate(KIB) for _ in range(3)]
    events = [load(device, slot, 1.0) for slot in slots]
    assert [device.is_done(e) for e in events] == [False] * 3
    wait(device, events[1])
    assert [device.is_done(e) for e in events] == [True, True, False], "in order, and no further"
    device.synchronize_event(events[2])
    assert device.is_done(events[2])


def test_copies_at_once_run_at_once() -> None:
    device = SimulatedDevice(copies="at_once", is_poisoned=True)
    slot = device.allocate(KIB)
    assert device.is_done(load(device, slot, 1.0))
    assert floats(slot).sum() == 256


def test_random_copies_run_in_order_and_by_their_seed() -> None:
    def history(seed: int) -> list[int]:
        device = harsh(copies="random", seed=seed)
        slots = [device.allocate(KIB) for _ in range(8)]
        events = [load(device, slot, 1.0) for slot in slots]
        counts = []
        for _ in range(6):
            done = [device.is_done(e) for e in events]
            assert done == sorted(done, reverse=True), "a prefix of the queue"
            counts.append(sum(done))
            reader_done(device)
        return counts

    histories = [history(seed) for seed in range(20)]
    assert histories == [history(seed) for seed in range(20)]
    assert len({tuple(h) for h in histories}) >= 3, "different seeds differ"
    assert any(0 < h[0] < 8 for h in histories)


def test_the_host_bytes_are_read_when_the_copy_runs() -> None:
    """As on a GPU: host memory that changes before the copy ran changes what arrives."""
    device = harsh()
    slot, host = device.allocate(KIB), source(1.0)
    event = device.copy([(slot, host)], [])
    floats(host).fill_(5)
    wait(device, event)
    assert floats(slot)[0] == 5


# ---- host memory


def pages(count: int) -> tuple[torch.Tensor, int]:
    """Host memory of so many pages and the address of the first."""
    raw = torch.zeros((count + 1) * PAGE_BYTES, dtype=torch.uint8)
    skip = -raw.data_ptr() % PAGE_BYTES
    return raw[skip : skip + count * PAGE_BYTES], raw.data_ptr() + skip


def test_a_copy_must_not_straddle_registrations() -> None:
    device = SimulatedDevice()
    host, start = pages(4)
    slot = device.allocate(4 * PAGE_BYTES)
    assert device.register(start, PAGE_BYTES)
    assert device.register(start + PAGE_BYTES, PAGE_BYTES)

    def copy(first: int, last: int) -> None:
        device.copy([(slot[first:last], host[first:last])], [])

    copy(0, PAGE_BYTES)
    copy(PAGE_BYTES, 2 * PAGE_BYTES)
    copy(2 * PAGE_BYTES, 4 * PAGE_BYTES)
    assert (device.num_copied_pieces, device.num_pageable_pieces) == (3, 1)
    for first, last in ((0, 2 * PAGE_BYTES), (PAGE_BYTES - 1, PAGE_BYTES + 1), (PAGE_BYTES, 2 * PAGE_BYTES + 1)):
        with pytest.raises(TransferError, match="straddles"):
            copy(first, last)


def test_registrations_are_whole_pages_and_disjoint() -> None:
    device = SimulatedDevice()
    _, start = pages(4)
    for address, num_bytes in ((start + 1, PAGE_BYTES), (start, PAGE_BYTES - 1)):
        with pytest.raises(TransferError, match="not page-aligned"):
            device.register(address, num_bytes)
    device.register(start + PAGE_BYTES, 2 * PAGE_BYTES)
    for address, num_bytes in ((start, 2), (start + PAGE_BYTES, 1), (start + 2 * PAGE_BYTES, 2)):
        with pytest.raises(TransferError, match="overlaps another"):
            device.register(address, num_bytes * PAGE_BYTES)
    device.register(start, PAGE_BYTES)
    assert device.registered == {start: PAGE_BYTES, start + PAGE_BYTES: 2 * PAGE_BYTES}


def test_unregistering_while_a_copy_is_in_flight_is_refused() -> None:
    device = harsh()
    host, start = pages(1)
    slot = device.allocate(PAGE_BYTES)
    device.register(start, PAGE_BYTES)
    device.copy([(slot, host)], [])
    with pytest.raises(TransferError, match="while a copy is in flight"):
        device.unregister(start)
    device.synchronize()
    device.unregister(start)
    assert device.registered == {}


def test_refused_pinning() -> None:
    device = SimulatedDevice(refuses_pinning=True)
    _, start = pages(1)
    assert not device.register(start, PAGE_BYTES)
    assert device.registered == {}


# ---- device memory


def test_memory_has_a_limit() -> None:
    device = SimulatedDevice(memory_bytes=3 * KIB)
    first, second = device.allocate(KIB), device.allocate(2 * KIB)
    assert (device.free_bytes(), device.total_bytes()) == (0, 3 * KIB)
    with pytest.raises(SimulatedOutOfMemoryError, match="1 bytes asked for, 0 of 3072 free") as error:
        device.allocate(1)
    assert isinstance(error.value, torch.OutOfMemoryError)
    device.free(first)
    device.allocate(KIB)
    device.free(second)
    assert (device.allocated_bytes, device.peak_allocated_bytes) == (KIB, 3 * KIB)


def test_freeing_twice_counts_once() -> None:
    device = SimulatedDevice()
    buffer = device.allocate(KIB)
    device.free(buffer)
    device.free(buffer)
    assert device.allocated_bytes == 0


def test_buffers_start_on_a_boundary() -> None:
    device = SimulatedDevice()
    assert [device.allocate(n).data_ptr() % 256 for n in (1, 255, 256, 257, 10_000)] == [0] * 5
    assert device.allocate(0).numel() == 0


# ---- faults


@pytest.mark.parametrize("position", range(5))
def test_a_fault_strikes_at_its_operation_once(position: int) -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    error = KeyboardInterrupt()
    device.fail_at(position, error)
    operations = [
        lambda: device.allocate(KIB),
        lambda: device.record(device.compute_stream()),
        lambda: load(device, slot, 1.0),
        lambda: device.copy_back(torch.empty(KIB, dtype=torch.uint8), slot),
        lambda: device.register(pages(1)[1], PAGE_BYTES),
    ]
    for number, operation in enumerate(operations):
        if number == position:
            with pytest.raises(KeyboardInterrupt) as raised:
                operation()
            assert raised.value is error
        else:
            operation()
    assert device.operations == ["allocate", "allocate", "record", "copy", "copy_back", "register"]


def test_a_failed_copy_has_not_begun() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    floats(slot).fill_(7)
    device.fail_at(0, RuntimeError("of the device"))
    with pytest.raises(RuntimeError, match="of the device"):
        load(device, slot, 1.0)
    assert (floats(slot) == 7).all()


# ---- the clock


def test_copies_take_their_bytes_over_the_link() -> None:
    device = SimulatedDevice(link_gb_per_s=2.0)
    slots = [device.allocate(2_000_000) for _ in range(2)]
    first = device.copy([(slots[0], torch.zeros(2_000_000, dtype=torch.uint8))], [])
    assert first.time_ms == pytest.approx(1.0)
    assert device.time_ms == 0
    second = device.copy([(slots[1], torch.zeros(2_000_000, dtype=torch.uint8))], [])
    assert second.time_ms == pytest.approx(2.0), "one bus"
    wait(device, second)
    assert device.time_ms == pytest.approx(2.0)


def test_a_copy_starts_after_what_it_waits_for() -> None:
    device = SimulatedDevice(link_gb_per_s=1.0)
    slot = device.allocate(1_000_000)
    device.compute(5.0)
    event = load(device, slot, 1.0, after=[reader_done(device)])
    assert event.time_ms == pytest.approx(6.0)


def test_compute_hides_copies_and_stalls_are_what_is_left() -> None:
    device = SimulatedDevice(link_gb_per_s=1.0)
    slot = device.allocate(3_000_000)
    event = load(device, slot, 1.0)
    device.compute(2.0)
    stream = device.compute_stream()
    marker = device.start_stall(stream, event)
    device.wait(stream, event)
    assert device.stall_ms(device.end_stall(stream, marker)) == pytest.approx(1.0)
    assert device.time_ms == pytest.approx(3.0)
    assert device.start_stall(stream, event) is None, "nothing to wait for any more"


def test_time_belongs_to_the_stream() -> None:
    device = SimulatedDevice()
    other = device.new_stream()
    with device.use_stream(other):
        device.compute(4.0)
        assert device.time_ms == pytest.approx(4.0)
    assert device.time_ms == pytest.approx(4.0), "joined"
    thread_ms: list[float] = []
    thread = threading.Thread(target=lambda: thread_ms.append(device.time_ms))
    thread.start()
    thread.join()
    assert thread_ms == [0.0]
    device.synchronize()
    assert device.time_ms == pytest.approx(4.0)


# ---- modes of the caller


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_copies_work_in_any_mode_of_the_caller(mode: Any) -> None:
    device = harsh()
    slot = device.allocate(KIB)
    with mode():
        event = load(device, slot, 1.0)
        wait(device, event)
    load(device, slot, 2.0, after=[reader_done(device)])
    device.synchronize()
    assert (floats(slot) == 2).all()
