"""Page locks that are given up behind, as on a GPU, where that takes long."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.host import memory as host_memory
from layerstream.host import page_locks, store
from layerstream.host.memory import PAGE_BYTES, PageMapping
from layerstream.host.page_locks import Hold, PageLocks, page_locks_of
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy

_PLENTY_S = 20.0


class Counting(SimulatedDevice):
    """Counts what is locked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(unlocks_behind=True, **options)
        self.num_registered = 0

    def register(self, address: int, num_bytes: int) -> bool:
        self.num_registered += 1
        return super().register(address, num_bytes)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    monkeypatch.setattr(page_locks, "_IDLE_S", 1.0)  # on a busy machine what follows at once may take longer than 0.25
    made = Counting(copies="late", is_poisoned=True)
    yield made
    until(lambda: not made.registered)
    assert not page_locks_of(made).num_idle


def until(is_so: Any) -> None:
    end = time.monotonic() + _PLENTY_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_leaving_does_not_wait_for_page_locks(device: Counting) -> None:
    model, resident = toy(), toy()
    before = describe(model)
    with layerstream.offload(model, vram_budget="min", device=device):
        assert_equal(run(model), run(resident))
    assert page_locks_of(device).num_idle == len(device.registered) > 0
    assert not len(page_locks_of(device))
    assert_restored(model, before, changed=[])
    assert_equal(run(model), run(resident))


def test_entering_again_takes_idle_locks_back(device: Counting) -> None:
    """All but those of small weights, which are put together anew."""
    model, resident = toy(), toy()
    big = torch.nn.Parameter(torch.zeros(2**21))  # stays where it lies
    model.blocks[0].register_parameter("big", big)
    with layerstream.offload(model, vram_budget="min", device=device):
        first = set(device.registered)
    for _ in range(3):
        counted = device.num_registered
        with layerstream.offload(model, vram_budget="min", device=device) as streamer:
            assert_equal(run(model), run(resident))
            assert device.num_registered - counted < len(first)
            assert streamer.stats().pinned_bytes >= big.nbytes


def test_a_pause_gives_up_only_what_has_changed(device: Counting) -> None:
    model = toy()
    model.head.register_parameter("one", torch.nn.Parameter(torch.zeros(2**21)))
    model.head.register_parameter("two", torch.nn.Parameter(torch.zeros(2**21)))
    with layerstream.offload(model, vram_budget="min", device=device) as streamer:
        run(model)
        home = device.registered.copy()
        with streamer.paused():
            model.head.two.data = torch.ones(2**21)
        run(model)
        large = {start for start, num_bytes in device.registered.items() if num_bytes >= 2**23}
        assert len(large & set(home)) >= 1
    assert torch.equal(model.head.two.data, torch.ones(2**21))


def test_an_idle_lock_gives_way_to_another_range(device: Counting) -> None:
    locks = page_locks_of(device)
    pages = PageMapping(8 * PAGE_BYTES)
    start = pages.range[0]

    def span(first: int, last: int) -> tuple[int, int]:
        return start + first * PAGE_BYTES, start + last * PAGE_BYTES

    for first, last, others in ((0, 4, []), (2, 6, []), (6, 8, [(2, 6)]), (0, 8, [])):
        assert locks.acquire(device, [span(first, last)]) == [span(first, last)]
        assert locks.overlapping(span(0, 8)) == span(first, last)
        locks.release_all(device, [Hold(span(first, last))], [])
        assert locks.overlapping(span(0, 8)) is None
        assert set(device.registered) == {span(*each)[0] for each in ((first, last), *others)}


def test_memory_stays_for_as_long_as_it_is_locked(device: Counting) -> None:
    locks, pages = page_locks_of(device), PageMapping(PAGE_BYTES)
    span, source = pages.range, pages.cut(0, PAGE_BYTES)
    del pages
    for _ in range(2):
        assert locks.acquire(device, [span]) == [span]
    holds = [Hold(span, (source,)), Hold(span)]
    del source
    locks.release_all(device, [holds.pop(0)], [])  # the other one has not said what memory it is
    gc.collect()
    assert span[0] in host_memory._OWN
    locks.release_all(device, holds, [])
    gc.collect()
    assert span[0] in host_memory._OWN
    until(lambda: not device.registered)
    gc.collect()
    assert span[0] not in host_memory._OWN


def test_what_is_idle_is_given_up_before_memory_is_refused(device: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    with layerstream.offload(model, vram_budget="min", device=device):
        pass

    def available() -> tuple[int, str]:
        return (1 if page_locks_of(device).num_idle else 2**40), "a test"

    monkeypatch.setattr(store, "available_bytes", available)
    store._refuse_too_much(2**20, [], page_locks_of(device))


def test_entering_and_leaving_while_locks_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_locks, "_IDLE_S", 0.002)
    device, rng = adversary(unlocks_behind=True), random.Random(0)
    model, resident = toy(), toy()
    model.blocks[1].register_parameter("big", torch.nn.Parameter(torch.zeros(2**20)))
    expected = run(resident)
    for _ in range(60):
        with layerstream.offload(model, vram_budget="min", device=device) as streamer, device.checking():
            assert_equal(run(model), expected)
            if rng.random() < 0.5:
                with streamer.paused():
                    time.sleep(rng.random() * 0.004)
                assert_equal(run(model), expected)
        time.sleep(rng.random() * 0.004)
    until(lambda: not device.registered)


def test_a_lock_that_cannot_be_given_up_is_told_and_the_next_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("threading.excepthook", lambda args: told.append(args.exc_value))
    device = Counting()
    locks, pages = PageLocks(is_behind=True), [PageMapping(PAGE_BYTES) for _ in range(2)]
    spans = [each.range for each in pages]
    assert locks.acquire(device, spans) == spans
    monkeypatch.setattr(device, "unregister", failing_once(device.unregister))
    locks.release_all(device, [Hold(span) for span in spans[:1]], [])
    until(lambda: told)
    locks.release_all(device, [Hold(span) for span in spans[1:]], [])
    until(lambda: not locks.num_idle)


def failing_once(unregister: Any) -> Any:
    left = [RuntimeError("lost")]

    def fail(address: int) -> None:
        if left:
            raise left.pop()
        unregister(address)

    return fail


def test_a_process_ends_right_after_it_has_left() -> None:
    script = """
        import layerstream
        from layerstream.device.simulated import SimulatedDevice
        from tests.fakes import run, toy
        model = toy()
        with layerstream.offload(model, vram_budget="min", device=SimulatedDevice(unlocks_behind=True)):
            run(model)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
