"""Calls of decorated functions that overlap: they share one streaming, and the last to leave ends it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from traceback import clear_frames
from types import TracebackType
from typing import Any, Protocol

from layerstream.errors import BudgetError, StreamerStateError
from layerstream.pipeline.owners import ENTERING, owner_of


class Shared(Protocol):
    """What such calls need of who streams."""

    num_guests: int | None  # decorated calls that share it; None: nobody but its user ends it

    @property
    def is_active(self) -> bool:
        """Whether it streams."""

    def start(self) -> Shared:
        """Begin to stream. Returns itself."""

    def close(self) -> None:
        """Stop streaming."""

    def using(self, what: str) -> contextlib.AbstractContextManager[object]:
        """One use, for which others wait."""

    def explained(self, exc: BaseException | None) -> BudgetError | None:
        """The error for memory that the budget refused, if `exc` is of that kind."""


def decorated_call(
    own: Any, make: Callable[[Any], Shared], args: tuple[Any, ...], name: str, is_use: bool
) -> contextlib.AbstractContextManager[object]:
    """What a decorated call runs in.

    Args:
        own: the pipeline that the decorator was made with; None: the call's first argument is the pipeline.
        make: a streamer of a pipeline, with the decorator's options.
        is_use: others wait until it ends.
    """
    if own is None and not args:
        raise StreamerStateError(
            "a function decorated with layerstream.offload() takes the pipeline as its first argument."
        )
    pipe = args[0] if own is None else own
    return _DecoratedCall(make, pipe, f"`{name}`", is_use)


class _DecoratedCall:
    """Calls that overlap share one streaming; the last to leave ends it."""

    def __init__(self, make: Callable[[Any], Shared], pipe: Any, what: str, is_use: bool) -> None:
        self._make, self._pipe, self._what, self._is_use = make, pipe, what, is_use
        self._inner: Shared | None = None
        self._use = contextlib.ExitStack()

    def __enter__(self) -> None:
        while True:
            self._inner = self._join()
            try:
                if self._is_use:
                    self._use.enter_context(self._inner.using(self._what))
                if self._inner.is_active:
                    return
            except BaseException:
                self._leave()
                raise
            self._leave()  # it ended while this call waited for its turn

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        refused = None if self._inner is None else self._inner.explained(exc)
        self._leave()
        raise_instead(refused, exc, traceback)

    def _join(self) -> Shared:
        with ENTERING:
            running: Shared | None = owner_of(self._pipe)
            if running is None:
                running = self._make(self._pipe).start()
                running.num_guests = 0
            if running.num_guests is not None:
                running.num_guests += 1
            return running

    def _leave(self) -> None:
        inner, self._inner = self._inner, None
        self._use.close()
        if inner is None or inner.num_guests is None:
            return
        with ENTERING:
            inner.num_guests -= 1
            if not inner.num_guests:
                inner.close()


def raise_instead(refused: BudgetError | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
    """Raise `refused`, if there is such, in the place of what leaves a context."""
    if refused is not None:
        try:
            # What the call had made goes now: whoever catches the error may want the room for a smaller image.
            clear_frames(traceback)
            raise refused from exc
        finally:
            del refused, exc, traceback  # this frame is in the error's traceback, and would keep it alive
