"""What the second call of a step will be given: learned from the calls of a component that ran alone.

Each argument of a second call is that of the first call of its step (latents, time), or that of the second call of the
step before (the text). Once two steps agree on which is which, the next second call is known when the first one comes.

A step has two calls or three; of three, the third runs alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from layerstream.engine.snapshots import Given, Path, same
from layerstream.engine.thread_state import ThreadState

_FITS = 2  # second calls that came as the step before says, until the next one is foreseen
_NUMS_OF_CALLS = (2, 3)  # that a step may have
_MOST_STRAYS = 6  # calls in a row that are no second ones, until nobody looks at them any more

# Where an argument of the second call comes from.
_FIRST = "the first call of the step"
_LAST = "the second call of the step before"


class Mark(NamedTuple):
    """Equal at two moments only if neither weights nor modes have changed between."""

    num_written_back: int
    num_relaid: int
    thread: ThreadState


@dataclass
class Call:
    """A call that ran alone.

    Attributes:
        mark: another one means that weights or modes have changed since.
        output: a copy of its leaves, once it has ended.
    """

    given: Given
    mark: Mark
    output: Mapping[Path, Any] | None = None


class Foresight:
    """One component's calls.

    Attributes:
        has_been_right: a second call came as foreseen.
    """

    def __init__(self) -> None:
        self.has_been_right = False
        self._calls: list[Call] = []  # the last ones, of the present call of the pipeline
        self._num_calls = _NUMS_OF_CALLS[0]  # of a step
        self._roles: dict[Path, str] = {}
        self._second: Given | None = None  # the second call of the last step
        self._since_second: int | None = None  # calls since the last second one; None: more than a step has
        self._num_fits = self._num_strays = 0

    @property
    def is_second_known(self) -> bool:
        """Whether the call that comes now is the first of a step, and the one after it can be foreseen."""
        is_first = self._since_second == self._num_calls - 2
        return is_first and self._num_fits >= _FITS and self._second is not None

    @property
    def holds_calls(self) -> bool:
        """Whether copies are kept."""
        return bool(self._calls) or self._second is not None

    @property
    def is_in_vain(self) -> bool:
        """Whether calls do not repeat what others were given."""
        return self._num_strays > _MOST_STRAYS

    def forget(self) -> None:
        """Something else has come: the calls so far say nothing of the next."""
        self._calls, self._second = [], None
        self._since_second, self._num_fits = None, 0

    def begin(self) -> None:
        """The pipeline is called anew."""
        self.forget()
        self._num_strays = 0

    def came_true(self) -> None:
        """The second call has come as foreseen."""
        self._since_second, self.has_been_right = 0, True

    def note(self, given: Given, mark: Mark) -> Call:
        """A call runs alone: what it is to those before."""
        roles = self._roles_of(given)
        call = Call(given.copied(), mark)
        if roles is not None:
            is_known = roles == self._roles
            # What was right in another call of the pipeline needs no second step.
            self._num_fits = _FITS if is_known and self.has_been_right else self._num_fits * is_known + 1
            self._roles, self._since_second, self._num_strays = roles, 0, 0
            self._second = call.given
        elif self._since_second is not None and self._since_second < self._num_calls - 1:
            self._since_second += 1
        else:
            self._since_second, self._num_fits = None, 0
            self._num_strays += 1
        self._calls = [*self._calls, call][-_NUMS_OF_CALLS[-1] :]
        return call

    def second_after(self, first: Given) -> Given | None:
        """What the call after this one will be given, in copies; None: not all of it is there."""
        if self._second is None:
            return None
        leaves = {}
        for path, role in self._roles.items():
            source = first if role == _FIRST else self._second
            if path not in source.leaves:
                return None
            leaves[path] = source.leaves[path]
        return self._second.with_leaves(leaves)

    def last_step(self, kind: tuple[object, ...], mark: Mark) -> tuple[Call, Call] | None:
        """The two calls of the last step that ran alone, with their outputs; None if it is of another kind, or weights
        have changed since."""
        calls = self._calls[-self._num_calls :][:2]
        if len(self._calls) < self._num_calls or kind != tuple(call.given.form for call in calls):
            return None
        if any(call.output is None or call.mark != mark for call in calls):
            return None
        return calls[0], calls[1]

    def drop_calls(self) -> None:
        """Nobody asks for the last step again."""
        self._calls = []

    # ---- inside

    def _roles_of(self, given: Given) -> dict[Path, str] | None:
        """Where each argument comes from, if this is a second call; None: it is not. Finds out how many calls a step
        has, too."""
        if not self._calls or (self._since_second is not None and self._since_second < self._num_calls - 1):
            return None
        first = self._calls[-1].given.leaves
        for count in _NUMS_OF_CALLS:
            if len(self._calls) >= count and (roles := _roles(given.leaves, first, self._calls[-count].given.leaves)):
                self._num_calls = count
                return roles
        if len(self._calls) > 1:
            return None
        # The first step: what comes from the step before is new, and the rest must be as it was.
        paths = list(given.leaves)
        if not self.has_been_right or set(self._roles) != set(paths):
            return None
        fixed = [path for path in paths if self._roles[path] == _FIRST]
        if not all(path in first for path in fixed):
            return None
        return self._roles if all(same([(given.leaves[path], first[path]) for path in fixed])) else None


def _roles(now: Mapping[Path, Any], first: Mapping[Path, Any], last: Mapping[Path, Any]) -> dict[Path, str] | None:
    paths = list(now)
    if list(last) != paths:
        return None
    of_first = [path for path in paths if path in first]
    answers = same([(now[path], first[path]) for path in of_first] + [(now[path], last[path]) for path in paths])
    is_first = dict(zip(of_first, answers, strict=False))
    is_last = dict(zip(paths, answers[len(of_first) :], strict=True))
    if not all(is_first.get(path) or is_last[path] for path in paths):
        return None
    return {path: _FIRST if is_first.get(path) else _LAST for path in paths}
