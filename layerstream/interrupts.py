"""What must be done although the user has pressed Ctrl-C, which may come between any two lines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable


def twice_if_interrupted(step: Callable[[], object]) -> None:
    """Run a step that may be run again from wherever it was left; an interrupt is raised once it is done.

    One interrupt comes once: what it has kept from being done the second run does.
    """
    try:
        step()
    except Exception:
        raise
    except BaseException:
        step()
        raise


def undo_all(undo: list[Callable[[], object]]) -> None:
    """Run steps that take something back, the latest first; each may be run again.

    A step is forgotten only once it is done, since an interrupt may come between the two; one that fails is, too.
    """
    while undo:
        try:
            undo[-1]()
        except Exception:
            undo.pop()
            raise
        undo.pop()


def surely(undo: contextlib.ExitStack, step: Callable[[], object]) -> None:
    """Run a step when `undo` is left, although an interrupt may come before its first line: it may be run again."""
    undo.callback(step)
    undo.callback(step)
