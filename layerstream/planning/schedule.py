"""What a pass does with units, as data: which are used as each block begins, let go of, and loaded. Pure.

A pass that runs as one before it did, with the same units in the ring and the same ones expected, does the same with
them. So it is written down once, and need not be worked out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """A load, and the unit that is let go of to make room for it; None: a slot is empty by then."""

    let_go: int | None
    load: int


@dataclass(frozen=True)
class Step:
    """One block begins.

    Attributes:
        uses: its units; they are in the ring, or resident, or loaded in this step.
        exchanges: in their order.
    """

    uses: tuple[int, ...]
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """One pass.

    Attributes:
        expected: the units that were expected when it began: all that it uses, and what follows as far as its loads
            look ahead. In another pass other units may follow, and then other loads are right.
    """

    expected: tuple[int, ...]
    steps: tuple[Step, ...]


class ScheduleRecorder:
    """Writes down a pass while it is worked out.

    Args:
        expected: the units that are expected as it begins, for a while.
        num_ahead: so many units ahead of a use decide what is loaded.
    """

    def __init__(self, expected: Sequence[int], num_ahead: int) -> None:
        self._expected = expected
        self._num_ahead = num_ahead
        self._steps: list[Step] = []
        self._exchanges: list[Exchange] = []
        self._let_go: int | None = None  # and nothing is loaded in its place yet
        self._is_spoilt = False

    def spoil(self) -> None:
        """Something happens that is not the pass' own."""
        self._is_spoilt = True

    def let_go(self, unit: int) -> None:
        """A unit leaves its slot."""
        if self._let_go is not None:
            self.spoil()  # what makes room for two loads at once
        self._let_go = unit

    def loaded(self, unit: int) -> None:
        """A unit is loaded, into the slot that was left last, or an empty one."""
        self._exchanges.append(Exchange(self._let_go, unit))
        self._let_go = None

    def used(self, units: Sequence[int]) -> None:
        """A block has begun, and these are its units."""
        if self._let_go is not None:
            self.spoil()
        self._steps.append(Step(tuple(units), tuple(self._exchanges)))
        self._exchanges = []

    @property
    def num_uses(self) -> int:
        """How many units were used so far, each as often as it was."""
        return sum(len(step.uses) for step in self._steps)

    def schedule(self) -> Schedule | None:
        """What was written down, once the pass has ended; None: it cannot be repeated, or not all of it was expected
        when it began."""
        uses = [unit for step in self._steps for unit in step.uses]
        needed = len(uses) + self._num_ahead
        if self._is_spoilt or self._exchanges or not uses or len(self._expected) < needed:
            return None
        if list(self._expected[: len(uses)]) != uses:
            return None
        return Schedule(tuple(self._expected[:needed]), tuple(self._steps))
