"""Two passes in lockstep: the second runs in a thread of its own, and exactly one of the two runs at any time.

The first hands over at the end of each of its blocks, before it lets go of it; the second at the end of each of its
own, after it has. So whatever the second needs next is what the first has just used, and a unit is let go of when both
are past it. They are handed over outside of any lock.

An abandoned second pass ends where it would be handed over to next. Its thread lives as long as the streamer.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from layerstream.engine.lane import GivenUpError

_LIMIT_S = 30.0  # of the host, for a block of the second pass; what computes is only queued
_LOST_S = 1.0  # for a thread that has not come back before
_LOOK_S = 0.02  # while one waits for a pass that was interrupted


class Lockstep:
    """The second thread, and whose turn it is.

    Each thread waits for a lock of its own, which the other releases: nothing else is safe from interrupts, which may
    come within any line of Python. What was in the way is found by looking, in `_end_second`.

    Attributes:
        is_lost: the second pass has not come back in time, and perhaps never will.
    """

    def __init__(self, limit_s: float = _LIMIT_S) -> None:
        self.is_lost = False
        self._limit_s = limit_s
        self._to_second, self._to_first = _closed(), _closed()
        self._is_parked = False  # the second waits for its turn
        self._thread: threading.Thread | None = None
        self._run: Callable[[], Any] | None = None
        self._begin: Callable[[], bool] | None = None
        self._first: int | None = None  # the thread of the first pass, while there are two
        self._has_begun = self._is_over = self._is_abandoned = self._is_closing = False
        self._output: Any = None
        self._error: BaseException | None = None

    @property
    def is_on(self) -> bool:
        """Whether there are two passes now."""
        return self._first is not None

    @property
    def has_begun(self) -> bool:
        """Whether something of the second pass has run, of those that were prepared last."""
        return self._has_begun

    def prepare(self, run: Callable[[], Any], may_begin: Callable[[], bool]) -> None:
        """The calling thread's pass is the first from now on.

        Args:
            run: the second pass, called in the second thread once the first hands over.
            may_begin: asked then, in the first thread; where it says no there is no second pass.
        """
        for turn in (self._to_second, self._to_first):  # what an interrupt has left open
            turn.acquire(blocking=False)
        self._run, self._begin = run, may_begin
        self._has_begun = self._is_over = self._is_abandoned = False
        self._output = self._error = None
        self._first = threading.get_ident()

    def first_hands_over(self) -> None:
        """A block of the first pass is about to end: let the second go on until one of its own has ended."""
        if self._first != threading.get_ident() or self._is_over:
            return
        if not self._has_begun:
            if self._begin is None or not self._begin():
                self._is_over = True
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="layerstream second lane", daemon=True)
                self._thread.start()
            self._has_begun = True
        try:
            self._to_second.release()
            if not self._to_first.acquire(timeout=self._limit_s):
                self.is_lost = self._is_over = self._is_abandoned = True
        except BaseException:  # an interrupt: the second goes on meanwhile, as far as its next hand-over
            self._end_second()
            raise

    def second_hands_over(self) -> None:
        """A block of the second pass has ended."""
        if threading.current_thread() is not self._thread:
            return
        self._park()
        if self._is_abandoned:
            raise GivenUpError

    def finish(self) -> tuple[Any, BaseException | None]:
        """The first pass has ended: run the second to its end.

        Returns: its output and its error; both None where there was no second pass.
        """
        while not self._is_over:
            self.first_hands_over()
        return self._done()

    def abandon(self) -> None:
        """The first pass has failed: end the second where it is. It runs no more when this returns."""
        if self._has_begun and not self._is_over:
            self._end_second()
        self._is_over = True
        self._done()

    def close(self) -> None:
        """No second pass follows: end the thread."""
        thread = self._thread
        if thread is not None:
            self._is_closing = self._is_abandoned = True
            _open(self._to_second)
            thread.join(_LOST_S if self.is_lost else None)
            self._thread = None

    # ---- inside

    def _done(self) -> tuple[Any, BaseException | None]:
        output, error = self._output, self._error
        self._first = self._run = self._begin = self._output = self._error = None
        return output, error

    def _end_second(self) -> None:
        """End it at its next hand-over, whatever comes in between: it runs no more when this returns, or is lost."""
        self._is_abandoned, self._run = True, None  # what has not begun does not
        end = time.monotonic() + self._limit_s
        while not (self._is_over and self._is_parked):
            try:
                if time.monotonic() > end:
                    self.is_lost = self._is_over = True
                    return
                if self._is_parked and self._to_second.locked():
                    self._to_second.release()  # it was not told, or has come to its next hand-over since
                self._to_first.acquire(timeout=_LOOK_S)
            except BaseException:  # another interrupt; one is raised when this is done
                continue

    def _park(self) -> None:
        """Let the first go on, and wait for a turn."""
        _open(self._to_first)
        self._is_parked = True  # last: who looks for it finds the first's turn given
        self._to_second.acquire()
        self._is_parked = False

    def _work(self) -> None:
        self._is_parked = True
        self._to_second.acquire()
        self._is_parked = False
        while not self._is_closing:
            run, self._run = self._run, None  # once
            output, error = None, None
            try:
                output = None if run is None else run()
            except BaseException as exc:
                error = exc
            if not self.is_lost:  # else nobody waits for it
                self._output, self._error = output, error
            run = output = error = None
            self._is_over = True
            if not self._is_closing:
                self._park()


def _open(lock: Any) -> None:
    """Let whoever waits for it go on, or come through when he does; it may be open."""
    with contextlib.suppress(RuntimeError):
        lock.release()


def _closed() -> Any:
    """A lock that whoever waits for it finds taken."""
    lock = threading.Lock()
    lock.acquire()
    return lock
