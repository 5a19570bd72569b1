"""The simulated device finds what it is there to find: each check is broken by hand once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch

from layerstream.device.base import Device
from layerstream.device.simulated import PAGE_BYTES, RaceError, SimulatedDevice, SimulatedOutOfMemoryError
from layerstream.errors import TransferError

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
    names = [n for n in [*dir(Device), *Device.__annotations__] if not n.startswith("_")]
    assert len(names) > 25
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
        with device.use_stream(other, is_ordered=False):
            floats(slot).sum()
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
        with pytest.raises(TransferError, match="invalid argument: a copy of .* behind the registration it begins in"):
            copy(first, last)
    assert device.unregister(start) is None
    copy(PAGE_BYTES - 1, PAGE_BYTES + 1)  # begins outside: an ordinary copy, whatever it crosses
    assert device.num_pageable_pieces == 2


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
    with pytest.raises(TransferError, match="while a copy from it is in flight"):
        device.unregister(start)
    _other, other_start = pages(1)
    device.register(other_start, PAGE_BYTES)
    device.unregister(other_start)  # no copy is from there
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
    with pytest.raises(SimulatedOutOfMemoryError, match="256 bytes asked for, 0 of 3072 free") as error:
        device.allocate(1)
    assert isinstance(error.value, torch.OutOfMemoryError)
    device.free(first)
    del first
    device.allocate(KIB)
    device.free(second)
    assert (device.buffer_bytes, device.peak_buffer_bytes) == (KIB, 3 * KIB)


def test_freeing_twice_counts_once() -> None:
    device = SimulatedDevice()
    buffer = device.allocate(KIB)
    device.free(buffer)
    device.free(buffer)
    assert device.buffer_bytes == 0


def test_a_buffer_adds_its_rounded_size() -> None:
    device = SimulatedDevice()
    assert [device.rounded_bytes(n) for n in (0, 1, 256, 257)] == [0, 256, 256, 512]
    for num_bytes in (0, 1, 256, 257, 10_000):
        before = device.reserved_bytes()
        buffer = device.allocate(num_bytes)
        assert buffer.numel() == num_bytes
        assert device.reserved_bytes() - before == device.rounded_bytes(num_bytes)
        device.free(buffer)
        del buffer
        assert device.reserved_bytes() == before


def test_a_freed_buffer_takes_memory_while_somebody_looks_at_it() -> None:
    device = SimulatedDevice(memory_bytes=2 * KIB)
    buffer = device.allocate(2 * KIB)
    view = floats(buffer)[3:]
    device.free(buffer)
    del buffer
    assert (device.buffer_bytes, device.reserved_bytes()) == (0, 2 * KIB)
    told = r"0 of 2048 free \(buffers 0, activations 2048, whole 0, foreign 0\)"
    with pytest.raises(SimulatedOutOfMemoryError, match=told):
        device.allocate(1)
    del view
    assert (device.reserved_bytes(), device.peak_reserved_bytes()) == (0, 2 * KIB)
    device.allocate(2 * KIB)


def test_buffers_start_on_a_boundary() -> None:
    device = SimulatedDevice()
    assert [device.allocate(n).data_ptr() % 256 for n in (1, 255, 256, 257, 10_000)] == [0] * 5
    assert device.allocate(0).numel() == 0


# ---- activations


def activation(num_bytes: int = KIB) -> torch.Tensor:
    return torch.ones(num_bytes // 4)


def test_temporaries_come_and_go() -> None:
    device = SimulatedDevice()
    with device.accounting():
        kept = activation()
        assert device.reserved_bytes() == KIB
        kept = ((kept + 1) * 2) + 3  # never more than two beside the one before
        assert device.reserved_bytes() == device.allocated_bytes() == KIB
        assert device.peak_reserved_bytes() == device.peak_allocated_bytes() == 3 * KIB
        device.reset_peaks()
        assert device.peak_reserved_bytes() == KIB
        more = kept.double()
        assert (device.reserved_bytes(), device.peak_reserved_bytes()) == (3 * KIB, 3 * KIB)
    assert device.free_bytes() == device.memory_bytes - 3 * KIB, "what lives takes memory outside as well"
    del more
    assert (device.reserved_bytes(), device.peak_reserved_bytes()) == (KIB, 3 * KIB)
    del kept
    assert device.reserved_bytes() == 0
    unseen = activation() + 1
    assert device.reserved_bytes() == 0
    with device.accounting():
        unseen.mul_(2)
        assert device.reserved_bytes() == 0, "made while nobody looked: host memory"


def nothing_new(x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "view": lambda: x.view(16, 16).t()[1:],
        "in place": lambda: x.add_(1).relu_(),
        "out": lambda: torch.add(x, 1, out=x),
        "detach": lambda: x.detach(),
        "split": lambda: x.chunk(4),
        "no copy": lambda: x.to(x.dtype).contiguous(),
        "meta": lambda: torch.empty(100, device="meta") * 2,
        "tuple of views": lambda: x.view(4, 64).unbind(0),
    }


@pytest.mark.parametrize("name", nothing_new(torch.ones(0)))
@pytest.mark.parametrize("is_counted", [False, True])
def test_what_makes_no_storage_takes_no_memory(name: str, is_counted: bool) -> None:
    device = SimulatedDevice()
    host = activation()
    with device.accounting():
        x = activation() if is_counted else host
        before = device.reserved_bytes()
        assert before == KIB * is_counted
        kept = nothing_new(x)[name]()
        assert device.reserved_bytes() == device.peak_reserved_bytes() == before
        if is_counted and isinstance(kept, torch.Tensor) and kept.device.type == "cpu":
            del x
            assert device.reserved_bytes() == before, "a view keeps the storage"
            del kept
            assert device.reserved_bytes() == 0


def test_host_memory_is_not_the_devices() -> None:
    device = SimulatedDevice(memory_bytes=KIB)
    host = activation(64 * KIB)
    with device.accounting():
        host.mul_(2)
        rows = host.view(64, -1)[3:5]
        assert device.reserved_bytes() == 0
        assert torch.tensor([1.0, 2.0]).numel() == 2, "made by no operator"
        assert device.peak_reserved_bytes() == 0
        with pytest.raises(SimulatedOutOfMemoryError, match="2048 bytes asked for"):
            rows + 1


def test_one_operator_that_makes_several_takes_them_together() -> None:
    device = SimulatedDevice()
    x = activation()
    with device.accounting():
        outputs = torch.sort(x)
        assert device.reserved_bytes() == KIB + 256 * 8
        del outputs
        x = [torch.ones(4), torch.ones(4)]
        y = torch._foreach_add(x, 1)
        assert device.reserved_bytes() == 64
        del x, y
    assert device.reserved_bytes() == 0


def test_a_storage_that_grows() -> None:
    device = SimulatedDevice()
    with device.accounting():
        out = torch.empty(0)
        torch.add(torch.ones(256), 1, out=out)
        assert device.reserved_bytes() == KIB
        out.resize_(512)
        assert device.reserved_bytes() == 2 * KIB
    del out
    assert device.reserved_bytes() == 0


def test_what_a_graph_keeps_takes_memory() -> None:
    device = SimulatedDevice()
    weight = torch.ones(256, requires_grad=True)
    with device.accounting():
        loss = (weight * 2).exp().sum()
        assert device.reserved_bytes() == KIB + 4, "exp keeps its result"
        del loss
        assert device.reserved_bytes() == 0


def test_garbage_in_cycles_takes_memory_until_it_is_collected() -> None:
    device = SimulatedDevice()
    with device.accounting():
        cycle: list[Any] = [activation()]
        cycle.append(cycle)
        del cycle
        assert device.reserved_bytes() == KIB
        gc.collect()
        assert device.reserved_bytes() == 0


def test_addresses_that_are_used_again() -> None:
    device = SimulatedDevice()
    with device.accounting():
        kept = []
        for number in range(200):
            x = activation(4 * number + 4)
            if number % 2:
                kept.append(x)
            del x
        assert device.reserved_bytes() == sum(x.untyped_storage().nbytes() for x in kept)


def test_the_engines_own_operations_are_not_activations() -> None:
    device = harsh()
    host = source(1.0)
    with device.checking():
        slot = device.allocate(KIB)
        wait(device, device.copy([(slot, host)], []))
        staging = device.pinned_staging(KIB)
        assert staging is not None
        staging.copy_(host)
        rows = floats(slot).view(16, 16)[2:]
        floats(slot).mul_(2)
        assert device.reserved_bytes() == device.peak_reserved_bytes() == device.buffer_bytes == KIB
        more = rows + 1
        assert device.reserved_bytes() == KIB + more.untyped_storage().nbytes()


def test_nested_modes_count_once() -> None:
    device = SimulatedDevice(memory_bytes=2 * KIB)
    with device.checking(), device.accounting(), device.checking():
        x = activation()
        y = x + 1
        assert (device.reserved_bytes(), device.peak_reserved_bytes()) == (2 * KIB, 2 * KIB)
        with pytest.raises(SimulatedOutOfMemoryError):
            x + y
        assert device.num_ooms() == 1
    with device.accounting():
        y += x
        assert device.reserved_bytes() == 2 * KIB
    del x, y
    assert device.reserved_bytes() == 0


def test_accounting_checks_no_races() -> None:
    device = SimulatedDevice()
    slot = device.allocate(KIB)
    load(device, slot, 1.0)
    with device.accounting():
        floats(slot).sum()
    with device.accounting(), device.checking(), pytest.raises(RaceError):
        floats(slot).sum()


def test_threads_share_the_device() -> None:
    device = SimulatedDevice()
    kept: list[torch.Tensor] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        with device.accounting():
            barrier.wait()
            for _ in range(50):
                kept.append(activation() + 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert device.reserved_bytes() == 200 * KIB
    kept.clear()
    assert device.reserved_bytes() == 0


@pytest.mark.parametrize("is_kept", [False, True])
def test_each_storage_is_looked_at_once(is_kept: bool) -> None:
    """Accounting costs the same for the last of many operators as for the first, also where all results stay."""
    device = SimulatedDevice()
    kept = []
    with device.accounting():
        x = activation()
        for _ in range(2000):
            x = x + 1
            if is_kept:
                kept.append(x)
        num_live, num_at_peak = (2000, 2000) if is_kept else (1, 2)
        assert (device.reserved_bytes(), device.peak_reserved_bytes()) == (num_live * KIB, num_at_peak * KIB)
        assert device._memory.activations.num_forgotten == 2001 - num_live
        assert len(device._memory.activations) == num_live


def test_parts_of_a_wrapper_subclass_take_memory() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    device = SimulatedDevice()
    wrapped = TwoTensor(torch.ones(256), torch.ones(256))
    with device.accounting():
        result = wrapped + 1
        assert device.reserved_bytes() == 2 * KIB
        del result
    assert device.reserved_bytes() == 0


# ---- the cap


def test_the_cap_holds_for_buffers_activations_and_foreign_tensors() -> None:
    device = SimulatedDevice(memory_bytes=64 * KIB)
    device.set_cap(4 * KIB)
    slot = device.allocate(KIB)
    with device.accounting():
        x = activation(2 * KIB)
        assert device.num_ooms() == 0
        with pytest.raises(
            SimulatedOutOfMemoryError,
            match=r"2048 bytes asked for, 1024 of 4096 that the cap allows of 65536 free "
            r"\(buffers 1024, activations 2048, whole 0, foreign 0\)",
        ):
            x + 1
        with pytest.raises(SimulatedOutOfMemoryError, match="1280 bytes asked for, 1024 of 4096"):
            device.allocate(KIB + 1)
        with device.foreign(KIB):
            assert device.reserved_bytes() == device.allocated_bytes() == 4 * KIB
            with pytest.raises(SimulatedOutOfMemoryError, match="foreign 1024"):
                device.allocate(1)
        with pytest.raises(SimulatedOutOfMemoryError), device.foreign(KIB + 1):
            pytest.fail("refused")
        assert device.num_ooms() == 4
        assert (device.reserved_bytes(), device.peak_reserved_bytes()) == (3 * KIB, 4 * KIB)
        assert device.buffer_bytes == slot.numel()
        del x
        x = activation(3 * KIB)
    assert device.free_bytes() == 0
    device.set_cap(KIB)  # what is there stays
    assert device.reserved_bytes() == KIB + x.untyped_storage().nbytes() == 4 * KIB
    with pytest.raises(SimulatedOutOfMemoryError, match="0 of 1024"):
        device.allocate(1)
    device.set_cap(None)
    device.allocate(60 * KIB)
    device.set_cap(1000 * KIB)
    with pytest.raises(SimulatedOutOfMemoryError, match="0 of 65536 free"):
        device.allocate(1)


def test_refused_activations_are_not_counted() -> None:
    device = SimulatedDevice(memory_bytes=4 * KIB)
    with device.accounting():
        x = activation()
        for _ in range(3):
            with pytest.raises(SimulatedOutOfMemoryError):
                x.repeat(8)
        assert device.num_ooms() == 3
        assert (device.reserved_bytes(), device.peak_reserved_bytes()) == (KIB, KIB)
        x.repeat(3)


def test_views_and_empty_tensors_are_never_refused() -> None:
    device = SimulatedDevice(memory_bytes=KIB)
    with device.accounting():
        x = activation()
        device.set_cap(0)
        assert x[3:].add_(1).numel() == 253
        assert torch.empty(0).numel() == 0
        assert device.allocate(0).numel() == 0


def test_foreign_memory_comes_back_by_exception() -> None:
    device = SimulatedDevice()
    with pytest.raises(KeyError), device.foreign(KIB):
        raise KeyError
    assert (device.reserved_bytes(), device.peak_reserved_bytes()) == (0, KIB)
    assert device.context_bytes() == 0


def test_an_injected_out_of_memory_error_counts_as_one() -> None:
    device = SimulatedDevice()
    for error, expected in ((SimulatedOutOfMemoryError("full"), 1), (RuntimeError("lost"), 1)):
        device.fail_at(0, error)
        with pytest.raises(type(error)):
            device.allocate(KIB)
        assert device.num_ooms() == expected
    assert device.reserved_bytes() == device.peak_reserved_bytes() == 0


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
    assert list(device.operations) == ["allocate", "allocate", "record", "copy", "copy_back", "register"]


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


def test_marks() -> None:
    device = SimulatedDevice()
    stream = device.compute_stream()
    start = device.mark(stream)
    device.compute(2.5)
    end = device.mark(stream)
    device.compute(1.0)
    assert device.elapsed_ms(start, end) == pytest.approx(2.5)


def test_the_link_is_measured_by_a_copy() -> None:
    device = harsh(link_gb_per_s=2.0)
    slot = device.allocate(2_000_000)
    host, start = pages(2_000_000 // PAGE_BYTES)
    host.fill_(7)
    assert device.register(start, host.numel())
    with device.checking():
        floats(slot).sum()  # compute that still reads
        assert device.measure_link(slot[: host.numel()], host) == 2.0
        assert (slot[: host.numel()] == 7).all(), "waited for"
    assert device.num_pageable_pieces == 0
    assert device.time_ms == pytest.approx(1.0, rel=0.01)


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
