"""Page locks, counted per process: a page can be registered with the driver once, and several units may need it.

A lock is a range that is registered as a whole and given up as a whole; whoever asks for a part of one holds all of it.

A lock that nobody holds any more is *idle*. On a GPU, where that takes long (60 GB/s), a thread gives idle locks up
behind the back of whoever has let go of them. Until then they are there for whoever asks for the same range again: a
pause that ends, or the next call of a decorated function. The memory is kept for as long as it is locked.

[Note: behind] The driver lets nobody queue work while it locks or unlocks pages: beside a thread that does so without a
break, the next kernel of another was queued when all was over (measured on an H200, 6.4 GB: 0.39 s to lock, 0.13 to
unlock). So there are breaks. It waits for copies from the pages that were queued before. Pages are not locked behind:
the first call needs them all, and would wait for them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import weakref
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from layerstream.device.base import Device
from layerstream.finalisers import FinaliserLock
from layerstream.host.memory import NUM_THREADS, Range
from layerstream.saying import warn

_IDLE_S = 0.25  # how long an idle lock waits for somebody who asks for it again
_BREAK_S = 0.001  # between two that are given up: others queue work meanwhile


class Hold(NamedTuple):
    """What somebody has of a lock that is about to be given up: the memory in it, which must not go before the lock."""

    lock: Range
    memory: tuple[torch.Tensor, ...] = ()


class _Idle(NamedTuple):
    device: Device
    since: float  # in seconds, by the monotonic clock


class PageLocks:
    """The ranges that are registered, and how many hold each.

    Args:
        is_behind: idle locks are given up by a thread; else at once.
    """

    def __init__(self, *, is_behind: bool = False) -> None:
        self._is_behind = is_behind
        self._holders: dict[Range, int] = {}  # 0: idle
        self._sorted: list[Range] = []  # disjoint
        # By its address, of those who have let go of a lock that is there still.
        self._memory: dict[Range, dict[int, torch.Tensor]] = {}
        self._idle: dict[Range, _Idle] = {}  # the oldest first
        self._thread: threading.Thread | None = None  # gives them up
        self._lock = FinaliserLock()

    def __len__(self) -> int:
        """How many are held."""
        return len(self._holders) - len(self._idle)

    @property
    def num_idle(self) -> int:
        """How many are locked still, and nobody's."""
        return len(self._idle)

    def overlapping(self, span: Range) -> Range | None:
        """A lock that somebody holds and that shares pages with the span."""
        with self._lock.held():
            return self._overlapping(span)

    def acquire(
        self, device: Device, spans: Sequence[Range], tell: Callable[[int], object] = lambda num_bytes: None
    ) -> list[Range | None]:
        """Hold a lock on each span, page-aligned and disjoint; `tell` hears of bytes that are done.

        Returns: for each the lock that has it, perhaps a larger one; None where the system refused, or where a lock
            has only a part of it: two registrations must not share a page, nor one tensor lie in two.
        """
        with self._lock.held():
            for span in spans:
                for other in [lock for lock in self._touching(span) if lock in self._idle and lock != span]:
                    self._unlock_idle(other)
            known = [span if span in self._idle else self._overlapping(span) for span in spans]
            missing = [span for span, lock in zip(spans, known, strict=True) if lock is None]
            made: list[Range] = []
            try:
                self._register(device, missing, made, tell)
            except BaseException:
                for start, _ in made:
                    device.unregister(start)
                raise
            registered = set(made)
            locks = [
                lock if lock is not None and lock[0] <= span[0] and span[1] <= lock[1] else None
                for span, lock in zip(spans, known, strict=True)
            ]
            locks = [span if span in registered else lock for span, lock in zip(spans, locks, strict=True)]
            for lock in locks:
                if lock is not None:
                    if lock not in self._holders:
                        insort(self._sorted, lock)
                    self._holders[lock] = self._holders.get(lock, 0) + 1
                    if self._idle.pop(lock, None) is not None:
                        tell(lock[1] - lock[0])
            return locks

    def release(self, device: Device, holds: list[Hold]) -> None:
        """Give up a hold on each lock, and empty the list; pages are unlocked with the last hold on them. No copy may
        be in flight then.

        Raises:
            What the device does at a lock: after all the others were given up.
        """
        with self._lock.held():
            self._release(device, holds, is_behind=False)

    def release_all(self, device: Device, holds: list[Hold], kept: list[Any]) -> None:
        """The same where copies may be in flight, and perhaps behind (see the note above).

        Args:
            kept: what holds the memory; emptied once the rest is known to be done.
        """
        with self._lock.held():
            try:
                self._release_all(device, holds, kept, is_behind=self._is_behind)
            finally:
                if self._idle and self._thread is None:
                    self._start_unlocking()

    def release_all_when_free(self, device: Device, holds: list[Hold], kept: list[Any]) -> None:
        """The same for finalisers, which start no threads."""
        self._lock.when_free(functools.partial(self._release_all, device, holds, kept, is_behind=False))

    def unlock_idle(self) -> None:
        """Give up now what nobody holds."""
        with self._lock.held():
            self._unlock_all_idle()

    # ---- inside

    def _release_all(self, device: Device, holds: list[Hold], kept: list[Any], *, is_behind: bool) -> None:
        try:
            if holds:
                device.synchronize()
        finally:
            self._release(device, holds, is_behind=is_behind)
            kept.clear()

    def _release(self, device: Device, holds: list[Hold], *, is_behind: bool) -> None:
        with contextlib.ExitStack() as unlocking:  # all of them, also when one fails
            while holds:
                lock, memory = holds.pop()
                self._holders[lock] -= 1
                if self._holders[lock] or is_behind:
                    self._memory.setdefault(lock, {}).update((tensor.data_ptr(), tensor) for tensor in memory)
                if not self._holders[lock]:
                    if is_behind:
                        self._idle[lock] = _Idle(device, time.monotonic())
                    else:
                        # First: whatever becomes of it, nobody must count on it.
                        unlocking.callback(self._forget(lock).clear)  # after the next, since the last goes first
                        unlocking.callback(device.unregister, lock[0])

    def _forget(self, lock: Range) -> dict[int, torch.Tensor]:
        """It is nobody's any more, and about to be given up; returns what keeps its memory until then."""
        del self._holders[lock], self._sorted[bisect_left(self._sorted, lock)]
        return self._memory.pop(lock, {})

    def _unlock_idle(self, lock: Range) -> None:
        device, memory = self._idle.pop(lock).device, self._forget(lock)
        device.unregister(lock[0])
        memory.clear()

    def _start_unlocking(self) -> None:
        # No daemon: a process that ends waits until the driver has done what it is at.
        thread = threading.Thread(target=self._unlock_behind, name="layerstream page locks")
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends
            self._unlock_all_idle()
        else:
            self._thread = thread

    def _unlock_all_idle(self) -> None:
        for lock in list(self._idle):
            self._unlock_idle(lock)

    def _unlock_behind(self) -> None:
        """What the thread does, until there is nothing idle."""
        while (wait := self._unlock_next()) is not None:
            time.sleep(max(wait, _BREAK_S))

    def _unlock_next(self) -> float | None:
        """Give up the lock that has been idle for longest, if it is time to; returns seconds until it is for that one,
        or the next; None: there is none, and the thread ends."""
        with self._lock.held():
            try:
                for lock, idle in self._idle.items():
                    wait = idle.since + _IDLE_S - time.monotonic()
                    if wait <= 0:
                        self._unlock_idle(lock)
                    return wait
            except BaseException:
                self._thread = None
                raise
            self._thread = None
            return None

    def _overlapping(self, span: Range) -> Range | None:
        return next((lock for lock in self._touching(span) if lock not in self._idle), None)

    def _touching(self, span: Range) -> Iterator[Range]:
        """The locks, idle ones too, that share pages with the span."""
        position = bisect_right(self._sorted, (span[0], 2**64))  # the first that begins behind the span's start
        for at in range(max(position - 1, 0), len(self._sorted)):
            lock = self._sorted[at]
            if lock[0] >= span[1]:
                return
            if span[0] < lock[1]:
                yield lock

    def _register(
        self, device: Device, spans: Sequence[Range], made: list[Range], tell: Callable[[int], object]
    ) -> None:
        is_refused = threading.Event()

        def register(span: Range) -> None:
            # After the first refusal the rest would be refused too, one slow call at a time.
            if not is_refused.is_set():
                if device.register(span[0], span[1] - span[0]):
                    made.append(span)
                    tell(span[1] - span[0])
                else:
                    is_refused.set()

        if device.is_simulated or len(spans) < 2:
            for span in spans:
                register(span)
            return
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(register, spans))


# Real page locks belong to the process, whichever GPU asked for them; those of a simulated device belong to it.
_BY_SIMULATED_DEVICE: weakref.WeakKeyDictionary[Device, PageLocks] = weakref.WeakKeyDictionary()
_REAL = PageLocks(is_behind=True)


def page_locks_of(device: Device) -> PageLocks:
    """The locks that a device's copies go by."""
    if not device.is_simulated:
        return _REAL
    return _BY_SIMULATED_DEVICE.setdefault(device, PageLocks(is_behind=device.unlocks_behind))


def _warn_at_fork() -> None:
    _REAL.unlock_idle()
    if len(_REAL):
        warn(
            "the process forks while layerstream has host memory page-locked: the kernel copies those pages for the "
            "child at once. Start worker processes before streaming, or with the 'spawn' method.",
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_warn_at_fork)
