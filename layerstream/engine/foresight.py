"""What the second call of a step will be given: learned from the calls of a component that ran alone.

Each argument of a second call is that of the first call of its step (latents, time), or that of the second call of the
step before (the text). Once two steps agree on which is which, the next second call is known when the first one comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerstream.engine.snapshots import Given, Path, same

_FITS = 2  # second calls that came as the step before says, until the next one is foreseen
_MOST_STRAYS = 6  # calls in a row that are no second ones, until nobody looks at them any more

# Where an argument of the second call comes from.
_FIRST = "the first call of the step"
_LAST = "the second call of the step before"


@dataclass
class Call:
    """A call that ran alone.

    Attributes:
        mark: another one means that weights have changed since.
        output: a copy of its leaves, once it has ended.
    """

    given: Given
    mark: tuple[int, int]
    output: Mapping[Path, Any] | None = None


class Foresight:
    """One component's calls.

    Attributes:
        has_been_right: a second call came as foreseen.
    """

    def __init__(self) -> None:
        self.has_been_right = False
        self._calls: list[Call] = []  # the last two, of the present call of the pipeline
        self._roles: dict[Path, str] = {}
        self._second: Given | None = None  # the second call of the last step
        self._was_second = False  # the last call was one
        self._num_fits = self._num_strays = 0

    @property
    def is_second_known(self) -> bool:
        """Whether the call that comes now is the first of a step, and the one after it can be foreseen."""
        return self._was_second and self._num_fits >= _FITS and self._second is not None

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
        self._was_second, self._num_fits = False, 0

    def begin(self) -> None:
        """The pipeline is called anew."""
        self.forget()
        self._num_strays = 0

    def came_true(self) -> None:
        """The second call has come as foreseen."""
        self._was_second = self.has_been_right = True

    def note(self, given: Given, mark: tuple[int, int]) -> Call:
        """A call runs alone: what it is to those before."""
        roles = self._roles_of(given)
        call = Call(given.copied(), mark)
        if roles is None:
            if not self._was_second:
                self._num_strays += 1
                self._num_fits = 0
            self._was_second = False
        else:
            is_known = roles == self._roles
            # What was right in another call of the pipeline needs no second step.
            self._num_fits = _FITS if is_known and self.has_been_right else self._num_fits * is_known + 1
            self._roles, self._was_second, self._num_strays = roles, True, 0
            self._second = call.given
        self._calls = [*self._calls[-1:], call]
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

    def last_step(self, kind: tuple[object, ...], mark: tuple[int, int]) -> tuple[Call, Call] | None:
        """The two calls of the last step that ran alone, with their outputs; None if it is of another kind, or weights
        have changed since."""
        if len(self._calls) != 2 or kind != tuple(call.given.form for call in self._calls):
            return None
        if any(call.output is None or call.mark != mark for call in self._calls):
            return None
        return self._calls[0], self._calls[1]

    def drop_calls(self) -> None:
        """Nobody asks for the last step again."""
        self._calls = []

    # ---- inside

    def _roles_of(self, given: Given) -> dict[Path, str] | None:
        """Where each argument comes from, if this is a second call; None: it is not."""
        if self._was_second or not self._calls:
            return None
        first = self._calls[-1].given.leaves
        if len(self._calls) > 1:
            return _roles(given.leaves, first, self._calls[-2].given.leaves)
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
