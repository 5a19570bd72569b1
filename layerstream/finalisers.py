"""State of the process that finalisers change, too: what a dropped pipeline leaves behind is taken back by those.

A collector runs finalisers between any two steps of any thread. A finaliser that waits for a lock may wait for ever:
the thread that it interrupts may hold that lock, or be what the holder waits for.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator


class Birthplace:
    """The process that something was made in. A child that is forked has copies of all objects, and of none of what
    they stand for: locks of pages, limits of GPUs, a place among ranks are its parent's."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this process is the one, and no child of it."""
        return os.getpid() == self._pid


def only_here(step: Callable[..., object]) -> Callable[..., object]:
    """A finaliser that does nothing in a process that is forked after this call."""
    birthplace = Birthplace()

    def run(*args: object) -> None:
        if birthplace.is_here:
            step(*args)

    return run


class FinaliserLock:
    """A lock that nobody takes twice, and that finalisers never wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._put_off: deque[Callable[[], object]] = deque()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Alone inside, after whoever holds the lock. Not for finalisers."""
        try:
            with self._lock:
                yield
        finally:
            self._catch_up()

    def when_free(self, step: Callable[[], object]) -> None:
        """Run a step alone: now, or, where somebody holds the lock, in that thread when the lock is let go.

        Args:
            step: may be run again from wherever an interrupt left it.
        """
        self._put_off.append(step)
        self._catch_up()

    def _catch_up(self) -> None:
        # Whoever has the lock looks afterwards at what was put off meanwhile, so nothing is left lying.
        while self._put_off and self._lock.acquire(blocking=False):
            try:
                self._run_put_off()
            finally:
                self._lock.release()

    def _run_put_off(self) -> None:
        while self._put_off:
            try:
                self._put_off[0]()
            except Exception:
                self._put_off.popleft()
                raise
            self._put_off.popleft()  # only now: an interrupt may come before
