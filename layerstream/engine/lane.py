"""Lanes: the passes that run now. A lane is one thread's; it knows which modules are running there, outermost first.

A use of a pipeline has its main lane, in whichever thread calls components. Another thread of the same use may be given
a lane beside it (`Lanes.beside`), which runs a pass of its own over the same units: the two take turns, block by block.
Without one, a second thread is refused.

Forward hooks say when a module starts and ends, except that an interrupt (`KeyboardInterrupt` is no
`Exception`) skips even `always_call` hooks. What is left behind then is found out when it matters, by looking
whether the module's `__call__` is still on the thread's Python stack.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from layerstream.engine.gate import Ticket
from layerstream.errors import ConcurrentUseError
from layerstream.torch_private import CALL_CODE


class GivenUpError(BaseException):
    """Ends a pass that nobody waits for. No `Exception`, so that no model's code keeps it."""


class Lane:
    """One running pass, or the place for the next.

    Attributes:
        method: the id of the component whose method runs, where that is what is outermost; its end is always told.
        ticket: of a bare component that runs here; of a pipeline's call its caller has it.
        handled: the exception that the caller was handling when the running call began.
        output: of a forward that ran beside the main lane.
        is_answered: the running call's result is there: nothing of it runs.
        caller: the frame that called the hook or wrapper by which what is outermost was entered: on the stack until
            that returns or is interrupted; None: nothing was entered so.
        running: the modules that run, outermost first, each with whether it is a root.
    """

    def __init__(self) -> None:
        self.method: int | None = None
        self.ticket: Ticket | None = None
        self.handled: BaseException | None = None
        self.is_answered = False
        self.output: Any = None
        self.caller: FrameType | None = None
        self._thread: int | None = None
        self.running: list[tuple[nn.Module, bool]] = []

    def enter(self, module: nn.Module, *, is_root: bool) -> None:
        """`module`, for which `is_outermost` was asked, starts in this thread.

        Raises:
            ConcurrentUseError: another thread is in the middle of a call.
        """
        self.run_here()
        self.running.append((module, is_root))

    def run_here(self) -> None:
        """What runs from now on runs in this thread.

        Raises:
            ConcurrentUseError: another thread is in the middle of a call.
        """
        self.check_thread()
        self._thread = threading.get_ident()

    def leave(self, module: nn.Module) -> bool:
        """`module` ended; returns whether it was running in this thread."""
        if self._thread != threading.get_ident():
            return False
        for position in range(len(self.running) - 1, -1, -1):
            if self.running[position][0] is module:
                del self.running[position:]
                return True
        return False

    def check_thread(self) -> None:
        """Raise if a call is running in another thread."""
        if self.running and self._thread != threading.get_ident():
            self._forget_interrupted(entering=None)
        if self.running and self._thread != threading.get_ident():
            names = {t.ident: t.name for t in threading.enumerate()}
            raise ConcurrentUseError(
                f"thread {threading.current_thread().name!r} uses a streamed pipeline while thread "
                f"{names.get(self._thread, self._thread)!r} is in the middle of a call. Both are part of one use, "
                "so neither waits for the other: let one thread of it call components."
            )

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs, so far as hooks have told."""
        return not self.running and self.method is None

    @property
    def is_running_here(self) -> bool:
        """Whether something runs in this thread, so far as hooks have told."""
        return self.method is not None or (bool(self.running) and self._thread == threading.get_ident())

    def are_over(self, thread: int) -> bool:
        """Whether nothing runs any more that began in `thread`, whatever hooks have told; asked by other threads."""
        if self.running:
            self._forget_interrupted(entering=None)
            return not self.running
        # Interrupted within a hook, perhaps: then no module is being called there.
        frame = sys._current_frames().get(thread)
        while frame is not None and frame.f_code is not CALL_CODE:
            frame = frame.f_back
        return frame is None

    def is_running(self, module: nn.Module) -> bool:
        return any(running is module for running, _ in self.running)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, as far as this thread can tell; what an interrupt left behind does not count."""
        return self.is_outermost(None)

    def is_outermost(self, entering: nn.Module | None) -> bool:
        """Whether nothing ran when `entering` was called, whose frame is on the stack already."""
        if self.method is not None:
            return False
        may_tell = entering is not None or self._thread == threading.get_ident()
        if self.running and may_tell and not self._is_innermost_on_stack(entering):
            self._forget_interrupted(entering)
        return not self.running

    def _is_innermost_on_stack(self, entering: nn.Module | None) -> bool:
        """Whether the module that started last runs in this thread, and with it all that it runs in: the usual case."""
        if self._thread != threading.get_ident():
            return False
        innermost, _ = self.running[-1]
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is CALL_CODE:
                found = frame.f_locals.get("self")
                if found is entering:
                    entering = None
                elif found is innermost:
                    return True
            frame = frame.f_back
        return False

    def _forget_interrupted(self, entering: nn.Module | None) -> None:
        """Keep only modules whose `__call__` is on the stack of the thread that ran them.

        The walk ends where all are found, which is near: 3 µs in a block below its root.
        """
        missing = Counter(id(module) for module, _ in self.running)
        # The frame of a module that is about to enter is there already.
        skipped = None if entering is None or self._thread != threading.get_ident() else id(entering)
        num_missing = len(self.running)
        is_own = self._thread == threading.get_ident()
        frame = sys._getframe() if is_own else sys._current_frames().get(self._thread or 0)
        while frame is not None and num_missing:
            if frame.f_code is CALL_CODE:
                found = id(frame.f_locals.get("self"))
                if found == skipped:
                    skipped = None
                elif missing[found] > 0:
                    missing[found] -= 1
                    num_missing -= 1
            frame = frame.f_back
        if not num_missing:
            return
        kept = []
        for module, is_root in self.running:  # the outermost of equal ones are the interrupted ones
            if missing[id(module)] > 0:
                missing[id(module)] -= 1
            else:
                kept.append((module, is_root))
        self.running = kept


class Lanes:
    """The lanes of one streamer."""

    def __init__(self) -> None:
        self.main = Lane()
        self._beside: dict[int, Lane] = {}  # by thread
        self._given_up: set[int] = set()  # threads

    @property
    def here(self) -> Lane:
        """That of the calling thread: its own, or the main one.

        Raises:
            GivenUpError: its pass beside the main one was given up.
        """
        if self._given_up and threading.get_ident() in self._given_up:
            raise GivenUpError
        return self._beside.get(threading.get_ident(), self.main) if self._beside else self.main

    @contextlib.contextmanager
    def beside(self) -> Iterator[Lane]:
        """Give the calling thread a lane beside the main one, until the `with` block is left. The thread must be part
        of the running use (a copy of its context), and must never run while another lane's does."""
        thread = threading.get_ident()
        lane = self._beside[thread] = Lane()
        try:
            yield lane
        finally:
            self._beside.pop(thread, None)
            self._given_up.discard(thread)

    def forget_beside(self) -> None:
        """Whoever has a lane beside the main one does not come back: if he does, he ends at his next hook."""
        self._given_up.update(self._beside)
        self._beside.clear()

    def is_running(self, module: nn.Module) -> bool:
        """Whether it runs in any lane."""
        return self.main.is_running(module) or any(lane.is_running(module) for lane in self._beside.values())

    def others_run(self, lane: Lane) -> bool:
        """Whether a pass is on its way in a lane other than this."""
        return bool(self._beside) and any(
            other is not lane and not other.is_empty for other in (self.main, *self._beside.values())
        )

    def are_idle(self) -> bool:
        """Whether nothing runs, as far as this thread can tell."""
        return self.here.is_idle and not self.others_run(self.here)
