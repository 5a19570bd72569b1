"""Page locks, counted per process: a page can be registered with the driver once, and several units may need it.

A lock is a range that is registered as a whole and given up as a whole; whoever asks for a part of one holds all of it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from layerstream.device.base import Device, synchronize_all
from layerstream.finalisers import FinaliserLock
from layerstream.host.memory import NUM_THREADS, Range
from layerstream.saying import warn


class PageLocks:
    """The ranges that are registered, and how many hold each."""

    def __init__(self) -> None:
        self._holders: dict[Range, int] = {}
        self._sorted: list[Range] = []  # disjoint
        self._lock = FinaliserLock()

    def __len__(self) -> int:
        return len(self._holders)

    def forget(self) -> None:
        """All of them are the parent's of this process, which registers what it needs itself. The mutex goes as well:
        another thread of the parent may have held it."""
        self._holders, self._sorted, self._lock = {}, [], FinaliserLock()

    def overlapping(self, span: Range) -> Range | None:
        """A lock that shares pages with the span."""
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
            known = [self._overlapping(span) for span in spans]
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
            return locks

    def release(self, device: Device, locks: list[Range]) -> None:
        """Give up a hold on each lock, and empty the list; pages are unlocked with the last hold on them. No copy may
        be in flight then.

        Raises:
            What the device does at a lock: after all the others were given up.
        """
        with self._lock.held():
            self._release(device, locks)

    def release_all(self, device: Device, locks: list[Range], kept: list[Any], others: Sequence[Device] = ()) -> None:
        """The same where copies may be in flight.

        Args:
            kept: what holds the memory; emptied once it is locked no longer.
            others: devices that may read it as well.
        """
        with self._lock.held():
            self._release_all(device, locks, kept, others)

    def release_all_when_free(
        self, device: Device, locks: list[Range], kept: list[Any], others: Sequence[Device] = ()
    ) -> None:
        """The same for finalisers."""
        self._lock.when_free(functools.partial(self._release_all, device, locks, kept, others))

    def _release_all(self, device: Device, locks: list[Range], kept: list[Any], others: Sequence[Device]) -> None:
        try:
            if locks or kept:  # what is not locked may be another GPU's memory
                synchronize_all([device, *others])
        finally:
            self._release(device, locks)
            kept.clear()

    def _release(self, device: Device, locks: list[Range]) -> None:
        with contextlib.ExitStack() as unlocking:  # all of them, also when one fails
            while locks:
                lock = locks.pop()
                self._holders[lock] -= 1
                if not self._holders[lock]:
                    # First: whatever becomes of it, nobody must count on it.
                    del self._holders[lock], self._sorted[bisect_left(self._sorted, lock)]
                    unlocking.callback(device.unregister, lock[0])

    def _overlapping(self, span: Range) -> Range | None:
        position = bisect_right(self._sorted, (span[0], 2**64))  # the first that begins behind the span's start
        for lock in self._sorted[max(position - 1, 0) : position + 1]:
            if lock[0] < span[1] and span[0] < lock[1]:
                return lock
        return None

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
_REAL = PageLocks()


def page_locks_of(device: Device) -> PageLocks:
    """The locks that a device's copies go by."""
    return _BY_SIMULATED_DEVICE.setdefault(device, PageLocks()) if device.is_simulated else _REAL


def _warn_at_fork() -> None:
    if len(_REAL):
        warn(
            "the process forks while layerstream has host memory page-locked: the kernel copies those pages for the "
            "child at once. Start worker processes before streaming, or with the 'spawn' method.",
        )


def _forget_in_child() -> None:
    _REAL.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_warn_at_fork, after_in_child=_forget_in_child)
