"""Who may use a streamed pipeline now: one caller at a time, the others wait in line.

A *use* is a call of a pipeline, of a decorated function, or of a bare component outside of those. The thread that
began it may come in again as often as it likes (a pipeline's call enters components), and so may whatever runs in a
copy of its context (`asyncio.to_thread`, `contextvars.copy_context`). Nobody's use is ever interrupted by another's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from layerstream.errors import ConcurrentUseError
from layerstream.interrupts import surely, twice_if_interrupted

_log = logging.getLogger("layerstream.gate")

# A use whose end nobody was told of, because an interrupt skips even hooks that are always called, is found out about
# this often by those that wait for it.
_LOOK_S = 0.2
_LONG_WAIT_S = 60.0


@dataclass(eq=False, slots=True)
class Ticket:
    """One use that goes on.

    Attributes:
        what: for messages.
        is_over: whether it has ended without anybody being told; asked by those that wait.
        is_guarded: its end is certain to be told, whatever happens.
        is_pause: nothing runs while it goes on, so that others may read weights.
    """

    what: str
    is_over: Callable[[], bool] = lambda: False
    is_guarded: bool = True
    is_pause: bool = False
    thread: threading.Thread = field(default_factory=threading.current_thread)
    is_ended: bool = False


_NUMBERS = itertools.count()
_WAITING: dict[threading.Thread, Gate] = {}  # who waits at which gate
_WAITING_MUTEX = threading.Lock()
_INSIDE: ContextVar[tuple[Ticket, ...]] = ContextVar("layerstream_inside", default=())


class Gate:
    """The line of callers of one streamer.

    Args:
        timeout_s: how long a caller waits; None: as long as it takes, 0: not at all.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s
        self.number = next(_NUMBERS)  # who waits at more than one gate waits in this order
        self._ticket: Ticket | None = None
        self._line: deque[Ticket] = deque()
        self._at_end: Callable[[], None] | None = None
        self._closing: tuple[Ticket, Callable[[], None]] | None = None  # what is done between two uses, now
        self._changed = threading.Condition(threading.Lock())
        # Of whoever reads weights in a use that others may share (a pause, a copy of the context), until it has read.
        # Taken after a turn in line and before the streamer's own lock.
        self.reading_lock = threading.RLock()

    @property
    def is_inside(self) -> bool:
        """Whether the running use is this thread's, or the one that its context was copied from."""
        ticket = self._ticket
        return ticket is not None and (ticket.thread is threading.current_thread() or ticket in _INSIDE.get())

    @property
    def is_inside_call(self) -> bool:
        """Whether this thread is inside a call of a pipeline or of a decorated function."""
        ticket = self._ticket
        return ticket is not None and ticket.is_guarded and not ticket.is_pause and self.is_inside

    @property
    def running(self) -> Ticket | None:
        """The use that goes on."""
        return self._ticket

    def enter(self, what: str, *, is_over: Callable[[], bool] | None = None) -> Ticket | None:
        """Begin a use, when it is this thread's turn; None if it is inside one already.

        Args:
            is_over: for a use whose end may not be told.
        Raises:
            ConcurrentUseError: the timeout is over; the use that goes on is not touched.
        """
        if self.is_inside and not self._is_left_behind():
            return None
        ticket = Ticket(what) if is_over is None else Ticket(what, is_over, is_guarded=False)
        try:
            self._admit(ticket)
        except BaseException:
            self.leave(ticket)
            raise
        return ticket

    def _admit(self, ticket: Ticket) -> None:
        """Wait for one's turn. Interrupted, it may have been one's turn already: `leave` then."""
        with self._changed:
            self._line.append(ticket)
            try:
                self._wait_for_turn(ticket)
                self._ticket = ticket
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()
        _INSIDE.set((*(t for t in _INSIDE.get() if not t.is_ended), ticket))

    def leave(self, ticket: Ticket | None) -> None:
        """End the use that `enter` began, if it began one; does what was put off until then."""
        if ticket is not None and ticket is self._ticket:
            twice_if_interrupted(functools.partial(self._leave, ticket))

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            ticket.is_ended = True
            if self._ticket is ticket:  # else an interrupt came when that was done
                work, self._at_end = self._at_end, None
                self._closing = None if work is None else (Ticket("closing"), work)
                self._ticket = None if self._closing is None else self._closing[0]
            self._changed.notify_all()
        _INSIDE.set(tuple(t for t in _INSIDE.get() if not t.is_ended))
        self._close()

    @contextlib.contextmanager
    def entered(self, what: str, *, is_pause: bool = False) -> Iterator[None]:
        """A use as long as the `with` block runs."""
        is_inside = self.is_inside and not self._is_left_behind()
        with contextlib.ExitStack() as undo:
            if not is_inside:
                ticket = Ticket(what, is_pause=is_pause)
                surely(undo, functools.partial(self._end_pause if is_pause else self.leave, ticket))
                self._admit(ticket)
            yield

    def _end_pause(self, ticket: Ticket) -> None:
        with self.reading_lock:  # weights that are being read are read first
            self.leave(ticket)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """The use that reading a weight is, until it has been read.

        It waits for no pause, since whoever pauses may wait for it; the pause does not end meanwhile.
        """
        while True:
            running = self._ticket
            is_pause = running is not None and running.is_pause
            turn = contextlib.nullcontext() if is_pause else self.entered("reading weights")
            with turn, self.reading_lock:
                if not is_pause or self._ticket is running:
                    yield
                    return

    def when_free(self, work: Callable[[], None]) -> bool:
        """Do something while nobody else is inside: now, or when the running call ends, in the thread that ends it.

        The forward of a bare component is waited for; a call of a pipeline, which may be long, is not.

        Returns: whether it was done now.
        """
        running = self._ticket
        if running is not None and running.is_pause and self.is_inside:
            work()
            return True
        with self._changed:
            while self._is_taken() and self._ticket is not None and not self._ticket.is_guarded:
                self._changed.wait(_LOOK_S)
            if self._ticket is not None:
                self._at_end = work
                return False
            self._closing = Ticket("closing"), work
            self._ticket = self._closing[0]
        twice_if_interrupted(self._close)
        return True

    @property
    def is_closing(self) -> bool:
        """Whether something was put off until the running call ends."""
        return self._at_end is not None

    # ---- inside

    def _close(self) -> None:
        """Do what was put off, while nobody is inside."""
        if self._closing is None:
            return
        ticket, work = self._closing
        try:
            twice_if_interrupted(work)
        finally:
            with self._changed:
                self._closing = None
                if self._ticket is ticket:
                    self._ticket = None
                self._changed.notify_all()

    def _is_left_behind(self) -> bool:
        """Whether what makes this thread seem to be inside was interrupted in it."""
        running = self._ticket
        return running is not None and running.thread is threading.current_thread() and running.is_over()

    def _is_taken(self) -> bool:
        if self._ticket is not None and self._ticket.is_over():
            self._ticket.is_ended, self._ticket = True, None
        return self._ticket is not None

    def _wait_for_turn(self, ticket: Ticket) -> None:
        started = time.monotonic()
        next_word = 0.0
        try:
            while self._line[0] is not ticket or self._is_taken():
                self._refuse_circle(ticket)
                next_word = self._wait_on(ticket, started, next_word)
        finally:
            with _WAITING_MUTEX:
                _WAITING.pop(ticket.thread, None)

    def _refuse_circle(self, ticket: Ticket) -> None:
        """Raise if who is waited for waits, perhaps by way of others, for this thread."""
        with _WAITING_MUTEX:
            _WAITING[ticket.thread] = self
            seen: set[threading.Thread] = set()
            gate: Gate | None = self
            # Other gates' turns may end meanwhile: each is looked at once.
            while gate is not None and (turn := gate._ticket) is not None and turn.thread not in seen:
                thread = turn.thread
                if thread is ticket.thread and gate is not self:
                    del _WAITING[ticket.thread]  # whoever else is in the circle goes on
                    raise ConcurrentUseError(
                        f"thread {ticket.thread.name!r} cannot begin {ticket.what}: {self._who()}, which waits for a "
                        "call that this thread is in the middle of. Each would wait for the other for ever. Where "
                        "threads call one pipeline inside another's call, let them take turns by a lock around both."
                    )
                seen.add(thread)
                gate = _WAITING.get(thread)

    def _wait_on(self, ticket: Ticket, started: float, next_word: float) -> float:
        """Wait a little; returns after how many seconds of waiting the next word is due."""
        waited = time.monotonic() - started
        if self.timeout_s is not None and waited >= self.timeout_s:
            raise ConcurrentUseError(self._refusal(ticket, waited))
        if waited >= next_word:
            level = logging.WARNING if next_word else logging.INFO
            _log.log(level, "thread %r waits%s: %s", ticket.thread.name, _since(waited), self._who())
            next_word = _LONG_WAIT_S if next_word == 0.0 else 2 * next_word
        left = _LOOK_S if self.timeout_s is None else min(_LOOK_S, self.timeout_s - waited)
        self._changed.wait(max(left, 0.001))
        return next_word

    def _who(self) -> str:
        running = self._ticket
        if running is None:
            return f"{len(self._line) - 1} other callers are in line before it"
        return f"thread {running.thread.name!r} is in the middle of {running.what}"

    def _refusal(self, ticket: Ticket, waited: float) -> str:
        after = f" after waiting {waited:.1f} s (call_timeout={self.timeout_s})" if self.timeout_s else ""
        return (
            f"thread {ticket.thread.name!r} cannot begin {ticket.what}{after}: {self._who()}. One call at a time: "
            "raise call_timeout (None waits as long as it takes), or use one pipeline per thread."
        )


def is_own_variable(variable: ContextVar[Any]) -> bool:
    """Whether it is the context variable in which uses are noted."""
    return variable is _INSIDE


def _since(seconds: float) -> str:
    return f" since {seconds:.0f} s" if seconds >= 1 else ""
