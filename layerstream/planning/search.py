"""Which blocks stream in the fastest passes that a room allows. Pure numbers.

Placements are compared by playing the passes (`pace.py`), and there are too many to play all.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor, inf, log

from layerstream.planning.pace import Pace

_MOST_CELLS = 40
_MOST_SLOT_SIZES = 5
_MOST_STEPS = 3000  # of play in a cell: about 150 passes of 20 streamed blocks, a few ms
_STRETCH = 1.01  # from one target of a pass's time to the next
_MOST_TARGETS = 10
_MOST_BLOCKS_IN_ALL_PAIRS = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """Which blocks stream, and through how many slots.

    Attributes:
        streamed: positions, as bits of a number.
        room_bytes: what all blocks take: the residents and the slots.
        rank: ms per pass, then bytes that stream, then bytes of slots; less is better.
    """

    streamed: int
    num_slots: int
    slot_bytes: int
    room_bytes: int
    rank: tuple[float, int, int]

    @property
    def ms_per_pass(self) -> float:
        return self.rank[0]

    @property
    def streamed_bytes(self) -> int:
        return self.rank[1]

    def is_streamed(self, position: int) -> bool:
        return bool(self.streamed >> position & 1)


class Search:
    """Looks for the fastest passes that follow each other in a given room.

    The rooms between the least and all there is are divided into cells. What is looked at in a cell does not depend on
    the room there is, which only decides what of it fits; and the cells below are looked at wherever they could hold
    something faster. So more room is never slower.

    In a cell, it starts from evenly spread residents and from blocks that stream wherever they are there in time, and
    goes on to what differs by a block or two, as long as that is better for the room it takes. Of random instances of
    3 to 8 blocks that found the best of all in 99.7 %, and was at most 1.3 times slower in the rest
    (`tests/test_pace.py`).

    Args:
        sizes: bytes that each block takes on the device, in a buffer of its own or as a slot; 0 if it does not stream.
        counts: the numbers of slots to choose from, ascending.
    """

    def __init__(self, pace: Pace, sizes: Sequence[int], counts: Sequence[int]) -> None:
        self._pace, self._sizes, self._counts = pace, sizes, counts
        self._blocks = [i for i, size in enumerate(sizes) if size]
        self._total = sum(sizes)
        self._least_ms_per_byte = min((pace.copy_ms[i] / sizes[i] for i in self._blocks), default=0.0)
        self._slot_sizes = [_SlotSize.of(sizes, slot_bytes) for slot_bytes in sorted(set(sizes))]
        self._slot_sizes = [s for s in self._slot_sizes if len(s.others) > counts[0]]
        self._least = min((s.bytes_with(counts[0]) for s in self._slot_sizes), default=self._total)
        num_cells = max(2, min(_MOST_CELLS, len(self._blocks) ** 2 // 32))  # the more blocks, the more there is in each
        self._width = max(1, -(-(self._total - self._least) // num_cells))
        self._walked: dict[tuple[int, int, int], int] = {}
        self._cells: dict[int, _Frontier] = {}

    def fastest(self, room: int) -> Choice | None:
        """None if nothing fits with these numbers of slots."""
        if room >= self._total:
            return Choice(0, 0, 0, self._total, (round(self._pace.total_ms, 6), 0, 0))
        best: Choice | None = None
        for cell in range((room - self._least) // self._width, -1, -1):
            if best is not None and best.rank <= self._bound(self._range(cell)[1]):
                break
            found = self._cell(cell).within(room)
            if found is not None and (best is None or found.rank < best.rank):
                best = found
        return best

    def smallest(self, room: int) -> Choice | None:
        """What takes the least room of all that are as fast as the fastest in `room`."""
        best = self.fastest(room)
        if best is None:
            return None
        low, high = self._least, min(best.room_bytes, room)
        while low < high:  # more room is never slower
            middle = (low + high) // 2
            found = self.fastest(middle)
            if found is not None and found.ms_per_pass <= best.ms_per_pass:
                best, high = found, min(middle, found.room_bytes)
            else:
                low = middle + 1
        return best

    # ---- one cell

    def _range(self, cell: int) -> tuple[int, int]:
        """The least and the most room of a cell."""
        low = self._least + cell * self._width
        return low, min(low + self._width, self._total) - 1

    def _cell(self, cell: int) -> _Frontier:
        """The best found in a cell."""
        if cell not in self._cells:
            self._cells[cell] = self._filled(*self._range(cell))
        return self._cells[cell]

    def _filled(self, low: int, high: int) -> _Frontier:
        frontier = _Frontier()
        seen: set[tuple[int, int]] = set()
        for streamed, slots in self._starts(low, high):
            if (streamed, slots) not in seen:
                seen.add((streamed, slots))
                blocks = self._positions(streamed)
                num_bytes = sum([self._sizes[i] for i in blocks])
                slot_bytes = max([self._sizes[i] for i in blocks], default=0)
                if low <= self._total - num_bytes + slots * slot_bytes <= high:
                    self._look(frontier, streamed, slots, num_bytes, slot_bytes)
        steps = _MOST_STEPS
        expanded: set[tuple[int, int]] = set()
        while steps > 0:
            choice = next((c for c in reversed(frontier.choices) if (c.streamed, c.num_slots) not in expanded), None)
            if choice is None:
                break
            expanded.add((choice.streamed, choice.num_slots))
            for streamed, slots, num_bytes, slot_bytes in self._neighbours(choice):
                room = self._total - num_bytes + slots * slot_bytes
                if low <= room <= high and (streamed, slots) not in seen:
                    seen.add((streamed, slots))
                    steps -= self._look(frontier, streamed, slots, num_bytes, slot_bytes)
        return frontier

    def _look(self, frontier: _Frontier, streamed: int, slots: int, num_bytes: int, slot_bytes: int) -> int:
        """Play a choice, unless it cannot be better than what is known; returns how many blocks were played."""
        if streamed.bit_count() <= slots:
            return 0  # no less room than all of them resident
        room = self._total - num_bytes + slots * slot_bytes
        known = frontier.within(room)
        if known is not None and known.rank <= (
            round(max(self._pace.total_ms, num_bytes * self._least_ms_per_byte), 6),
            num_bytes,
        ):
            return 0
        blocks = self._positions(streamed)
        ms = self._pace.pass_ms(blocks, slots)
        if ms == inf:
            return 1
        ms = round(ms, 6)
        frontier.add(Choice(streamed, slots, slot_bytes, room, (ms, num_bytes, slots * slot_bytes)))
        return len(blocks)

    def _neighbours(self, choice: Choice) -> Iterator[tuple[int, int, int, int]]:
        """What differs by a slot, a block, or two that change places: streamed, slots, bytes, bytes of a slot."""
        sizes, streamed, slots = self._sizes, choice.streamed, choice.num_slots
        at = self._counts.index(slots)
        for other in (*self._counts[max(at - 1, 0) : at], *self._counts[at + 1 : at + 2]):
            yield streamed, other, choice.streamed_bytes, choice.slot_bytes
        n = len(self._blocks)
        pairs = [(i, -1) for i in self._blocks]
        for distance in range(1, (n if n <= _MOST_BLOCKS_IN_ALL_PAIRS else 4)):
            for k in range(n - distance if n <= _MOST_BLOCKS_IN_ALL_PAIRS else n):
                pairs.append((self._blocks[k], self._blocks[(k + distance) % n]))
        for i, j in pairs:
            if j >= 0 and not (streamed >> i ^ streamed >> j) & 1:
                continue
            into = i if not streamed >> i & 1 else j
            out = j if into == i else i
            changed = streamed ^ (1 << i | (1 << j if j >= 0 else 0))
            added, removed = sizes[into] if into >= 0 else 0, sizes[out] if out >= 0 else 0
            slot_bytes = max(choice.slot_bytes, added)
            if removed == slot_bytes:
                slot_bytes = max([sizes[b] for b in self._positions(changed)], default=0)
            yield changed, slots, choice.streamed_bytes + added - removed, slot_bytes

    def _starts(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        slot_sizes = [s for s in self._slot_sizes if s.bytes_with(self._counts[0]) <= high]
        if len(slot_sizes) > _MOST_SLOT_SIZES:
            slot_sizes = [
                slot_sizes[i * (len(slot_sizes) - 1) // (_MOST_SLOT_SIZES - 1)] for i in range(_MOST_SLOT_SIZES)
            ]
        bound_ms = self._bound(high)[0]  # rounded: 0 of what takes less than a nanosecond
        target = floor(log(bound_ms / self._pace.total_ms, _STRETCH)) if bound_ms and self._pace.total_ms else 0
        for slot_size in slot_sizes:
            for slots in self._counts:
                # What the residents among the others may take.
                least, most = low - slot_size.bytes_with(slots), high - slot_size.bytes_with(slots)
                if slots >= len(slot_size.others) or most < 0:
                    break
                yield from ((streamed, slots) for streamed in slot_size.even(least, most))
                for k in range(target, target + _MOST_TARGETS) if self._pace.total_ms else ():
                    streamed, resident_bytes = self._walk(slot_size, slots, k)
                    if resident_bytes < least:
                        break
                    yield streamed, slots

    def _walk(self, slot_size: _SlotSize, slots: int, target: int) -> tuple[int, int]:
        """Stream every block that is there in time when a pass takes so long; the rest is resident, so many bytes."""
        pace, copy_ms = self._pace, self._pace.copy_ms
        key = slot_size.slot_bytes, slots, target
        streamed = self._walked.get(key)
        if streamed is None:
            stretch = _STRETCH**target
            free = [0.0] * slots
            slot, arrived, begin = 0, 0.0, 0.0
            for _ in range(2):  # the second as it is when passes follow each other
                streamed = 0
                block, num_taken = -1, 0
                for i in slot_size.others:
                    if pace.firsts[i] != block:
                        block, num_taken = pace.firsts[i], 0
                    start = begin + pace.starts[block] * stretch
                    arrives = (free[slot] if free[slot] > arrived else arrived) + copy_ms[i]
                    if arrives <= start and num_taken < slots:
                        arrived = arrives
                        streamed |= 1 << i
                        free[slot] = start + pace.starts[pace.ends[i]] - pace.starts[block]
                        slot = slot + 1 if slot + 1 < slots else 0
                        num_taken += 1
                begin += pace.total_ms * stretch
            self._walked[key] = streamed = streamed or 0
        return streamed, sum([self._sizes[i] for i in slot_size.others if not streamed >> i & 1])

    # ---- inside

    def _positions(self, streamed: int) -> list[int]:
        return [i for i in self._blocks if streamed >> i & 1]

    def _bound(self, room: int) -> tuple[float, int]:
        """No choice in this room ranks before it."""
        slots = self._counts[0]
        spare = [slots * s.slot_bytes for s in self._slot_sizes if s.bytes_with(slots) <= room]
        num_bytes = self._total - room + min(spare, default=0)
        return round(max(self._pace.total_ms, num_bytes * self._least_ms_per_byte), 6), num_bytes


@dataclass(frozen=True)
class _SlotSize:
    """One size of slot: larger blocks are resident, the others may stream."""

    slot_bytes: int
    larger_bytes: int
    others: tuple[int, ...]
    sizes: Sequence[int]

    @classmethod
    def of(cls, sizes: Sequence[int], slot_bytes: int) -> _SlotSize:
        others = tuple(i for i, size in enumerate(sizes) if 0 < size <= slot_bytes)
        return cls(slot_bytes, sum(s for s in sizes if s > slot_bytes), others, sizes)

    def bytes_with(self, slots: int) -> int:
        return self.larger_bytes + slots * self.slot_bytes

    def even(self, least: int, most: int) -> Iterator[int]:
        """What streams when the residents are evenly spaced and take between so many bytes.

        Blocks of the largest size are spaced by themselves, in any number: where sizes differ, that fills the room.
        """
        small, large = self._spaced
        every = sum([1 << i for i in self.others])
        for large_bytes, large_mask in large:
            for small_bytes, small_mask in small:
                if least <= large_bytes + small_bytes <= most:
                    yield every - large_mask - small_mask

    @cached_property
    def _spaced(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(bytes, positions as bits) of evenly spaced blocks by their number: of smaller ones, of the largest ones."""
        is_large = [self.sizes[i] == self.slot_bytes for i in self.others]
        classes = [
            [i for i, large in zip(self.others, is_large, strict=True) if large is wanted] for wanted in (False, True)
        ]
        found = []
        for members in classes:
            n = len(members)
            # The middle of each of `count` equal stretches.
            chosen = [[members[(2 * i + 1) * n // (2 * count)] for i in range(count)] for count in range(n + 1)]
            found.append([(sum([self.sizes[i] for i in some]), sum([1 << i for i in some])) for some in chosen])
        return found[0], found[1]


class _Frontier:
    """Choices none of which takes more room than a better one."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []  # by room

    def within(self, room: int) -> Choice | None:
        """The best that fits."""
        at = bisect_right(self.choices, room, key=lambda c: c.room_bytes)
        return self.choices[at - 1] if at else None

    def add(self, choice: Choice) -> None:
        known = self.within(choice.room_bytes)
        if known is None or choice.rank < known.rank:
            room = choice.room_bytes
            self.choices = [c for c in self.choices if c.room_bytes < room or c.rank < choice.rank]
            insort(self.choices, choice, key=lambda c: c.room_bytes)
