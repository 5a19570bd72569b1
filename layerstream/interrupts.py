"""What must be done although the user has pressed Ctrl-C, which may come between any two lines."""

from __future__ import annotations

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
