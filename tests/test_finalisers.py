"""A dropped pipeline is collected between any two steps: nobody waits for ever, and no state is changed midway."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device import simulated
from layerstream.device.allocator import GrowingSegments
from layerstream.device.base import Caps
from layerstream.device.simulated import SimulatedDevice
from layerstream.finalisers import FinaliserLock
from layerstream.host import memory
from layerstream.host.memory import MemoryMaps, PageMapping
from layerstream.host.page_locks import PageLocks
from layerstream.model.adapters import registry
from layerstream.model.adapters.registry import adapter_for
from layerstream.pipeline import owners, watch
from layerstream.weights.absent import AbsentClasses, at_home
from tests.fakes import OneModel, adversary, assert_equal, run, toy, twin

_PACKAGE = layerstream.__path__[0]
_SIMULATED = simulated.__path__[0]
_PLENTY_S = 60


def within(seconds: float, work: Callable[[], object]) -> None:
    """Run in a thread of its own, and fail if it does not end; an exception there is raised here."""
    found: list[BaseException | None] = []

    def run_it() -> None:
        try:
            work()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run_it, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    if found[0] is not None:
        raise found[0]


# ---- the lock


def test_who_waits_for_nobody_is_served_when_the_lock_is_let_go() -> None:
    lock, done = FinaliserLock(), []
    lock.when_free(lambda: done.append("free"))
    assert done == ["free"]
    with lock.held():
        lock.when_free(lambda: done.append("later"))
        assert done == ["free"]
    assert done == ["free", "later"]


def test_what_is_put_off_is_done_when_the_holder_fails_and_by_whoever_has_the_lock() -> None:
    lock, done = FinaliserLock(), []
    with pytest.raises(KeyError), lock.held():
        lock.when_free(lambda: done.append(1))
        raise KeyError
    assert done == [1]
    lock.when_free(lambda: lock.when_free(lambda: done.append(2)))  # collected in the middle of a finaliser
    assert done == [1, 2]


def test_a_step_that_fails_is_not_tried_again_and_an_interrupted_one_is() -> None:
    lock, done = FinaliserLock(), []

    def step(error: type[BaseException]) -> None:
        done.append(error)
        if done.count(error) == 1:
            raise error

    with pytest.raises(KeyError):
        lock.when_free(lambda: step(KeyError))
    with pytest.raises(KeyboardInterrupt):
        lock.when_free(lambda: step(KeyboardInterrupt))
    with lock.held():
        pass
    assert done == [KeyError, KeyboardInterrupt, KeyboardInterrupt]


# ---- who uses it: a finaliser asks while the same thread is inside


class Collecting(SimulatedDevice):
    """Something is collected while pages are locked."""

    collect: Callable[[], object] = staticmethod(lambda: None)

    def register(self, address: int, num_bytes: int) -> bool:
        self.collect()
        return super().register(address, num_bytes)


def test_page_locks_of_a_dropped_store_go_once_others_are_taken() -> None:
    device, locks = Collecting(), PageLocks()
    first, second = PageMapping(4096), PageMapping(4096)
    dropped = locks.acquire(device, [first.range])
    kept: list[Any] = [first]
    device.collect = lambda: locks.release_all_when_free(device, dropped, kept)

    def take() -> None:
        # The dropped one is asked for as well: it is locked by then, and must stay so for whoever asked.
        assert locks.acquire(device, [first.range, second.range]) == [first.range, second.range]

    within(_PLENTY_S, take)
    assert kept == []
    assert set(device.registered) == {first.range[0], second.range[0]}
    device.collect = lambda: None
    locks.release(device, [first.range, second.range])
    assert not device.registered
    assert not len(locks)


def test_caps_of_a_dropped_streamer_are_forgotten_after_another_was_set() -> None:
    caps, applied = Caps(), []

    def apply(least: int | None) -> None:
        if least == 10 and len(applied) == 1:
            caps.set(None, "dropped", apply)
        applied.append(least)

    caps.set(5, "dropped", apply)
    caps.set(None, "dropped", apply)
    caps.set(20, "dropped", apply)
    applied[:] = [None]
    within(_PLENTY_S, lambda: caps.set(10, "mine", apply))
    assert applied == [None, 10, 10]
    caps.set(None, "mine", apply)
    assert applied[-1] is None


def test_growing_segments_are_turned_off_after_a_request_without_them() -> None:
    settings = ["max_split_size_mb:100"]
    growing = GrowingSegments(lambda: settings[-1], settings.append)
    growing.add("dropped")

    def request() -> None:
        with growing.off():
            growing.remove("dropped")

    within(_PLENTY_S, request)
    assert not growing.is_on
    assert settings[-1].endswith("expandable_segments:False")


def test_patches_of_a_dropped_pipeline_go_while_another_is_watched() -> None:
    class Patched:
        def method(self) -> int:
            return 1

    original = Patched.method
    dropped = watch.PipelineWatch()
    dropped._patch(Patched, "method", lambda original: lambda self: 2)
    held = [dropped]
    del dropped

    class Other:
        def method(self) -> int:
            return 3

    def wrap(original: Any) -> Any:
        held.clear()  # here it is collected, in the middle of what the other needs
        return lambda self: 4

    other = watch.PipelineWatch()
    within(_PLENTY_S, lambda: other._patch(Other, "method", wrap))
    assert Patched.method is original
    assert Other().method() == 4
    other.remove()
    assert Other().method() == 3


# ---- lists of the process, read while they change


def with_collections(thresholds: range, make: Callable[[], object], work: Callable[[], object]) -> None:
    """Do the work with a collection after each number of allocations, and something to collect each time."""
    before = gc.get_threshold()
    for threshold in thresholds:
        gc.disable()
        try:
            circle: list[Any] = [make()]
            circle.append(circle)
            del circle
            gc.set_threshold(threshold)
            gc.enable()
            work()
        finally:
            gc.set_threshold(*before)
            gc.enable()


def test_page_mappings_are_collected_while_maps_are_read() -> None:
    kept = [PageMapping(4096) for _ in range(50)]
    gc.collect()
    maps: list[MemoryMaps] = []
    with_collections(range(1, 120), lambda: PageMapping(4096), lambda: maps.append(MemoryMaps([])))
    assert all({mapping.range for mapping in kept} <= set(each._own) for each in maps)


def test_a_mapping_in_the_place_of_one_that_goes_is_known() -> None:
    mappings = [PageMapping(4096)]
    start, end = mappings[0].range
    successor = memory.End(end)
    memory._OWN[start] = successor  # another thread has mapped the place before the finaliser ran
    mappings.clear()
    gc.collect()
    assert memory._OWN.pop(start) is successor


@pytest.mark.parametrize("what", ["streamed", "absent", "adapters"])
def test_lists_are_read_while_other_threads_change_them(what: str) -> None:
    interval = sys.getswitchinterval()
    is_over = threading.Event()
    tensor = torch.zeros(1)
    owner = nn.Identity()
    kept: list[Any] = []  # makes the lists long enough to be changed midway
    for _ in range(500):
        if what == "streamed":
            kept.append(nn.Identity())
            owners.ACTIVE[kept[-1]] = weakref.ref(owner)
        elif what == "absent":
            kept.append(AbsentClasses(lambda *args: None, lambda *args: None))  # type: ignore

    def change() -> None:
        while not is_over.is_set():
            if what == "streamed":
                modules = [nn.Identity() for _ in range(20)]
                for module in modules:
                    owners.ACTIVE[module] = weakref.ref(owner)
                del modules, module
            elif what == "absent":
                classes = [AbsentClasses(lambda *args: None, lambda *args: None) for _ in range(20)]  # type: ignore
                del classes
            else:
                for number in range(20):
                    registry._REGISTERED[f"Nothing{number}"] = layerstream.Adapter()
                for number in range(20):
                    registry._REGISTERED.pop(f"Nothing{number}", None)

    thread = threading.Thread(target=change, daemon=True)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        read = {
            "streamed": owners.streamed_now,
            "absent": lambda: at_home(tensor),
            "adapters": lambda: adapter_for(nn.Identity()),
        }[what]
        for _ in range(1000):
            read()
    finally:
        is_over.set()
        thread.join(_PLENTY_S)
        sys.setswitchinterval(interval)


# ---- any line of ours


class Pipe(OneModel):
    def __call__(self) -> list[torch.Tensor]:
        return run(self.model, passes=2)


def dropped_streaming(device: SimulatedDevice) -> list[Any]:
    """A pipeline that streams, whose user has forgotten it: only a collector finds it."""
    pipe = Pipe(toy())
    streamer = layerstream.offload(pipe, vram_budget="min", device=device)
    streamer.__enter__()
    pipe()
    circle: list[Any] = [pipe, streamer]
    circle.append(circle)
    return circle


class CollectingAtLines:
    """Before every `step`-th line of the package that runs inside for the first time, lets go of one thing and collects
    it."""

    def __init__(self, dropped: list[Any], step: int, offset: int = 0) -> None:
        self.dropped, self.step, self.offset = dropped, step, offset
        self.seen: set[tuple[str, int]] = set()

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(_PACKAGE) or name.startswith(_SIMULATED):  # a real device has no such lines
            return None
        line = name, frame.f_lineno
        if event == "line" and line not in self.seen:
            self.seen.add(line)
            if self.dropped and len(self.seen) % self.step == self.offset:
                self.dropped.pop()
                gc.collect()
        return self._trace

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)


def use_with_collections(num_dropped: int, step: int, offset: int, *, shares_device: bool) -> int:
    """Stream while dropped pipelines are collected; returns how many different lines there were."""
    device = adversary()
    dropped = [dropped_streaming(device if shares_device else adversary()) for _ in range(num_dropped)]
    model = toy()
    expected = run(twin(model), passes=2)
    pipe = Pipe(model)
    collecting = CollectingAtLines(dropped, step, offset)

    def use() -> None:
        with collecting.on():
            for _ in range(2):
                with layerstream.offload(pipe, vram_budget="min", device=device):
                    assert_equal(pipe(), expected)
                    with torch.no_grad():  # the last of these are replayed
                        run(pipe.model, passes=8)

    within(4 * _PLENTY_S, use)  # 38 s of tracing and collecting where nothing else runs
    dropped.clear()
    gc.collect()
    assert_equal(pipe(), expected)
    assert not device.registered
    return len(collecting.seen)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("shares_device", [True, False])
def test_dropped_pipelines_are_collected_at_many_lines(shares_device: bool) -> None:
    num_lines = use_with_collections(0, 1, 0, shares_device=shares_device)
    use_with_collections(20, num_lines // 20, 3, shares_device=shares_device)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("offset", range(4))
def test_dropped_pipelines_are_collected_at_more_lines(offset: int) -> None:
    use_with_collections(130, 20, 5 * offset, shares_device=offset % 2 == 0)
