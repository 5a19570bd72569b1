"""The order in which units are used, learned while they are used. Pure.

The order is a *position in the trace*: every use is appended to one history, and a cursor follows the
earlier stretch of it that the present repeats. What followed there is what will follow here, across
blocks, passes, components and calls, so the last block of a pass predicts the first of the next one.
A map "after A came B" cannot do this: where a block is used several times a pass, or a token loop runs
inside a call, it misses on the expensive block each time (54 of 107 predictions against 0).

On a deviation the cursor moves to the earlier use with the longest matching past. After a second miss in
a pass nothing is predicted until the present follows the past again: wrong loads cost the bus twice.

Units that stay may be *left out*: nobody tells of their uses. Where the past says that some came before what is told
now, they came again. So the trace stays whole, and a unit that is given up once a call is foreseen in the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

_MAX_HISTORY = 1 << 20  # uses kept; a call of 50 steps has about 3,000, a token loop 200,000
_MAX_CANDIDATES = 512  # earlier uses looked at when the cursor is lost: a call of 50 steps in two passes has 100
_MAX_COMMON_PAST = 8192  # uses compared per candidate: finding the place again must cost less than a load
_MISSES_TO_DOUBT = 2
# Looked at, of what comes untold before a unit that is told: a text encoder and what runs before it. Predictions look
# further than loads ahead do, so that passes for which equal units are expected load alike.
_MOST_UNTOLD, _UNTOLD_PER_TOLD = 256, 4
_COUNTED_USES = 1 << 16  # the most recent ones; a token of a large model has some 400


class OrderLearner:
    """Predicts the next units to be used from the uses seen so far.

    Attributes:
        seen: units that were ever used.

    Args:
        chains: units in definition order, one chain per component, and whether the component repeats. They are
            the guess until something was seen: a chain that repeats continues with itself, another with the next.
    """

    def __init__(self, chains: Sequence[tuple[Sequence[int], bool]]) -> None:
        self._history: list[int] = []
        self._positions: dict[int, list[int]] = {}  # of each unit's uses, up to the number that was indexed
        self._num_indexed = 0
        self._cursor: int | None = None  # history[cursor] is the earlier use that matches the last one
        self._misses = 0
        self.seen: set[int] = set()
        self._left_out: set[int] = set()
        self._num_untold = 0  # so many of those that come next have come untold, perhaps
        self._num_counted = 0
        self._chains = chains
        self._define()

    def _define(self) -> None:
        """What follows what by definition."""
        chains = [([u for u in chain if u not in self._left_out], repeats) for chain, repeats in self._chains]
        self._defined = _successors([(chain, repeats) for chain, repeats in chains if chain])
        self._first = next((chain[0] for chain, _ in chains if chain), None)

    def begin_pass(self) -> None:
        """A component's forward begins: doubt from the last pass is forgotten."""
        self._misses = 0

    def observe(self, unit: int) -> bool:
        """Record that `unit` is used now; returns whether it was the predicted one."""
        expected = self._trace(1)
        is_hit = bool(expected) and expected[-1] == unit
        is_first = not self._history
        if not is_hit:  # not all has come that may have
            came = [number for number, each in enumerate(expected[: self._num_untold]) if each == unit]
            expected = expected[: came[-1] + 1] if came else []
        self._num_untold = 0
        if self._cursor is not None and expected:
            self._follow(expected)
        else:
            self._cursor = self._resynchronise(unit)
            self._history.append(unit)
        if is_hit:
            self._misses = min(self._misses, _MISSES_TO_DOUBT - 1)  # found again: one more miss brings doubt back
        elif not is_first:
            self._misses += 1
        self._note([unit])
        return is_hit

    def observe_expected(self, units: Sequence[int]) -> None:
        """Record that these are used, which are the next ones that are expected."""
        expected = self._trace(len(units))
        told = [unit for unit in expected[self._num_untold :] if unit not in self._left_out]
        if self._cursor is None or told != list(units):
            for unit in units:
                self.observe(unit)
            return
        self._num_untold = 0
        self._follow(expected)
        self._misses = min(self._misses, _MISSES_TO_DOUBT - 1)
        self._note(units)

    def _follow(self, expected: Sequence[int]) -> None:
        """These came, as the trace says."""
        assert self._cursor is not None
        self._history += expected
        self._cursor += len(expected)

    def _note(self, units: Sequence[int]) -> None:
        """These were told."""
        self.seen.update(units)
        if not self._left_out:
            self._num_counted = min(self._num_counted + len(units), _COUNTED_USES)
        if len(self._history) > _MAX_HISTORY:
            self._forget()

    def leave_out(self, units: Collection[int]) -> None:
        """These are used untold from now on, since they stay where they are."""
        self._left_out |= set(units)
        self._num_counted = 0
        self._define()

    def take_in(self, units: Collection[int]) -> None:
        """These are told again. What the trace says came untold after the last use is taken as come, until the next use
        says otherwise: who gives up units has mostly used them."""
        came = self._trace(1) if self._left_out and self._cursor is not None else []
        if came and came[-1] not in self._left_out:
            self._num_untold = len(came) - 1
        self._left_out -= set(units)
        self._define()

    @property
    def num_uses(self) -> int:
        """How many uses `uses` counts."""
        return self._num_counted

    def uses(self) -> Mapping[int, int]:
        """How often each unit was used of late, since all of them are told."""
        return Counter(self._history[-self._num_counted :] if self._num_counted else ())

    @property
    def is_in_doubt(self) -> bool:
        """Whether nothing is predicted."""
        return self._misses >= _MISSES_TO_DOUBT

    def predict(self, count: int) -> list[int]:
        """Up to `count` told units expected next, nearest first; may repeat a unit. Empty while in doubt."""
        if self.is_in_doubt:
            return []
        ahead = self._trace(count, _MOST_UNTOLD + _UNTOLD_PER_TOLD * count)
        return [unit for unit in ahead[self._num_untold :] if unit not in self._left_out]

    def trace(self, count: int) -> list[int]:
        """What comes next as far as the `count`-th told unit, with what comes untold before that, unless that is much.
        In doubt, too."""
        return self._trace(count, _MOST_UNTOLD)[self._num_untold :]

    # ---- inside

    def _trace(self, count: int, most: int = _MAX_HISTORY) -> list[int]:
        """What the trace, or before there is one the definition, says comes after the last use that was recorded.

        Args:
            most: units beyond those that have come untold, perhaps; where a denoiser stays, a call has thousands.
        """
        if not self._history:
            return self._defined_from(self._first, count)
        if self._cursor is None:
            return self._defined_from(self._defined.get(self._history[-1]), count)
        history, start, end = self._history, self._cursor + 1, len(self._history)
        ahead = history[start : start + count]
        if len(ahead) == count and not self._left_out and not self._num_untold:
            return ahead
        num_told = num_ahead = 0
        is_turn_told, position = False, start
        for num_ahead in range(1, most + self._num_untold + 1) if start < end and count else ():
            if history[position] not in self._left_out and num_ahead > self._num_untold:
                num_told, is_turn_told = num_told + 1, True
                if num_told == count:
                    break
            position += 1
            if position == end:  # the past has caught up with the present: what repeats goes on with the same period
                if not is_turn_told:
                    break
                position, is_turn_told = start, False
        period = history[start : min(end, start + num_ahead)]
        return period if num_ahead <= end - start else (period * (num_ahead // len(period) + 1))[:num_ahead]

    def _defined_from(self, unit: int | None, count: int) -> list[int]:
        ahead: list[int] = []
        while unit is not None and len(ahead) < count:
            ahead.append(unit)
            unit = self._defined.get(unit)
        return ahead

    def _resynchronise(self, unit: int) -> int | None:
        """The earlier use of `unit` whose past matches ours longest; the earliest of equals.

        Passes of a loop are alike, and the first of them has the rest of the loop before it. The last would predict the
        loop's end after every pass.
        """
        best, best_length = None, -1
        self._index()
        for position in self._positions.get(unit, [])[-_MAX_CANDIDATES:]:
            length = self._common_past(position)
            if length > best_length:
                best, best_length = position, length
            if length >= _MAX_COMMON_PAST:
                break
        return best

    def _common_past(self, position: int) -> int:
        """How many uses before `position` equal the most recent ones: doubling, then bisection, over slices."""
        history, end = self._history, len(self._history)
        most = min(position, _MAX_COMMON_PAST)  # longer pasts count as equal

        def is_common(length: int) -> bool:
            return history[position - length : position] == history[end - length : end]

        low, high = 0, 1
        while high <= most and is_common(high):
            low, high = high, 2 * high
        high = min(high, most + 1)  # is_common(low) holds, is_common(high) does not or is out of range
        while high - low > 1:
            middle = (low + high) // 2
            if is_common(middle):
                low = middle
            else:
                high = middle
        return low

    def _forget(self) -> None:
        """Drop the older half of the history; the cursor is found again."""
        self._history = self._history[len(self._history) // 2 :]
        self._positions, self._num_indexed, self._cursor = {}, 0, None
        last = self._history.pop()
        self._cursor = self._resynchronise(last)
        self._history.append(last)

    def _index(self) -> None:
        """Note where each use is. Only who has lost the place asks for it."""
        history = self._history
        for position in range(self._num_indexed, len(history)):
            self._positions.setdefault(history[position], []).append(position)
        self._num_indexed = len(history)


def _successors(chains: list[tuple[list[int], bool]]) -> dict[int, int]:
    after: dict[int, int] = {}
    for number, (chain, repeats) in enumerate(chains):
        after.update(pairwise(chain))
        following = chain if repeats else chains[(number + 1) % len(chains)][0]
        after[chain[-1]] = following[0]
    return after
