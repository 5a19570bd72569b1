"""How long a pass takes when some of its blocks stream, and which choice of them is fastest. Pure numbers.

A pass is a list of units in the order of their use, named by position: blocks, or pieces of blocks, which are computed
together. Three *servers* work through it, each one thing after another: the bus copies, the decoder unpacks what has
another form on the way (where there is any), and compute runs blocks. What they hand on lies in *rings* of buffers: a
copy may start once the block that had its slot before has been computed; one that is unpacked goes to a wire buffer,
which is free again when it has been, and the unpacking waits for the slot. The decoder runs on the same cores as
compute: a block that runs meanwhile takes that much longer.

Compute waits for loads, loads wait for buffers, and neither shows in a sum of bytes: two placements that stream as much
may differ by a fifth. So placements are compared by playing the passes.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor, inf, log
from typing import Literal

LEAST_WIRES = 2  # one that is unpacked, one that is filled meanwhile
_TOLERANCE = 1.02  # within it a pass takes as long as its compute, or as its copies
_MOST_CELLS = 40
_MOST_SLOT_SIZES = 5
_MOST_STEPS = 3000  # of play in a cell: about 150 passes of 20 streamed blocks, a few ms
_STRETCH = 1.01  # from one target of a pass's time to the next
_MOST_TARGETS = 10
_MOST_BLOCKS_IN_ALL_PAIRS = 16


@dataclass(frozen=True)
class Prediction:
    """How long a pass takes.

    Attributes:
        bound: what it takes as long as; "waits": longer than both, because copies and compute wait for each other.
    """

    ms_per_pass: float
    compute_ms: float
    bus_ms: float
    bound: Literal["compute", "bus", "waits"]


def predict_pass(
    blocks: Sequence[tuple[int, float, bool]], num_slots: int, link_gb_per_s: float, is_cyclic: bool
) -> Prediction:
    """Play the engine's rules.

    Args:
        blocks: (bytes, compute in ms, is streamed) in the order of their use.
        is_cyclic: passes follow each other, and copies for the next begin during this one; else one pass, from cold.
    """
    pace = Pace([(num_bytes, compute_ms) for num_bytes, compute_ms, _ in blocks], link_gb_per_s)
    return pace.prediction([i for i, (_, _, is_streamed) in enumerate(blocks) if is_streamed], num_slots, is_cyclic)


class Pace:
    """The times of a list of blocks, and of passes in which some of them stream.

    Args:
        blocks: (bytes over the bus, compute in ms) in the order of their use.
        wholes: of each, what it is a piece of; pieces of one block follow each other. None: each is a block.
        decode_ms: of each, what it takes to unpack; 0: it is copied to its slot as it is. None: so are all.
        num_wires: buffers for what is to be unpacked.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[int, float]],
        link_gb_per_s: float,
        wholes: Sequence[Hashable] | None = None,
        decode_ms: Sequence[float] | None = None,
        num_wires: int = LEAST_WIRES,
    ) -> None:
        self.decode_ms = decode_ms if decode_ms is not None and any(decode_ms) else None
        self.num_wires = num_wires
        self.ms_per_byte = 1 / (link_gb_per_s * 1e6)
        self.copy_ms = [num_bytes * self.ms_per_byte for num_bytes, _ in blocks]
        self.compute_ms = [ms for _, ms in blocks]
        self.starts = [0.0]  # of each unit in a pass without a wait; at the end, the time of such a pass
        for ms in self.compute_ms:
            self.starts.append(self.starts[-1] + ms)
        # Of each unit, the first of its block and the one after its last: a block is computed at once.
        self.firsts, self.ends = list(range(len(blocks))), list(range(1, len(blocks) + 1))
        for i in range(1, len(blocks)):
            if wholes is not None and wholes[i] == wholes[i - 1]:
                self.firsts[i] = self.firsts[i - 1]
        for i in range(len(blocks) - 2, -1, -1):
            if self.firsts[i + 1] == self.firsts[i]:
                self.ends[i] = self.ends[i + 1]
        self.most_pieces = max((end - first for first, end in zip(self.firsts, self.ends, strict=True)), default=1)

    @property
    def total_ms(self) -> float:
        return self.starts[-1]

    def prediction(self, streamed: Sequence[int], num_slots: int, is_cyclic: bool) -> Prediction:
        """Of passes in which the blocks at these positions, in order, stream."""
        ms, bus_ms = self.pass_ms(streamed, num_slots, is_cyclic), sum(self.copy_ms[i] for i in streamed)
        compute_ms = self.total_ms + sum(self.decode_ms[i] for i in streamed if self.decode_ms is not None)
        bound: Literal["compute", "bus"] = "compute" if compute_ms >= bus_ms else "bus"
        return Prediction(ms, compute_ms, bus_ms, bound if ms <= _TOLERANCE * max(compute_ms, bus_ms) else "waits")

    def pass_ms(self, streamed: Sequence[int], num_slots: int, is_cyclic: bool = True) -> float:
        """Time of one pass, from cold; of the third, if they follow each other. Infinite if a block's pieces need more
        slots than there are."""
        if not streamed:
            return self.total_ms
        if self.decode_ms is not None and any(self.decode_ms[i] for i in streamed):
            return self._pass_ms_unpacked(streamed, num_slots, is_cyclic, self.decode_ms)
        steps, rest = self._steps(streamed)
        if max([len(copies) for _, copies, _ in steps]) > num_slots:
            return inf
        free = [0.0] * num_slots  # when each slot's last block has been computed
        slot = 0
        arrived = end = before = 0.0
        for _ in range(3 if is_cyclic else 1):
            before = end
            for resident_ms, copies, ms in steps:
                first = slot
                for copy_ms in copies:
                    arrived = (arrived if arrived > free[slot] else free[slot]) + copy_ms
                    slot = slot + 1 if slot + 1 < num_slots else 0
                end += resident_ms
                end = (end if end > arrived else arrived) + ms
                for _ in copies:
                    free[first] = end
                    first = first + 1 if first + 1 < num_slots else 0
            end += rest
        if not is_cyclic:
            return end
        # Where copies and compute are nearly even, it takes more passes until the slower of them shows.
        return max(end - before, self.total_ms, sum([sum(copies) for _, copies, _ in steps]))

    def _steps(self, streamed: Sequence[int]) -> tuple[list[tuple[float, list[float], float]], float]:
        """Of each block that streams, in ms: the residents before it, the copy of each of its units, its compute; and
        the residents behind the last. Residents only delay the streamed blocks behind them."""
        starts, firsts, ends, copy_ms = self.starts, self.firsts, self.ends, self.copy_ms
        steps: list[tuple[float, list[float], float]] = []
        done, last, copies = 0.0, -1, [0.0]
        for i in streamed:
            if firsts[i] == last:
                copies.append(copy_ms[i])
                continue
            last, copies = firsts[i], [copy_ms[i]]
            start, end = starts[last], starts[ends[i]]
            steps.append((start - done, copies, end - start))
            done = end
        return steps, self.total_ms - done

    def _pass_ms_unpacked(
        self, streamed: Sequence[int], num_slots: int, is_cyclic: bool, decode_ms: Sequence[float]
    ) -> float:
        """`pass_ms`, where some of what streams is unpacked on the way."""
        steps, rest = self._steps(streamed)
        if max([len(copies) for _, copies, _ in steps]) > num_slots:
            return inf
        num_passes = 3 if is_cyclic else 1
        loads = _Loads(
            [(self.copy_ms[i], decode_ms[i]) for i in streamed], num_passes, num_slots, max(1, self.num_wires)
        )
        end = before = 0.0
        for _ in range(num_passes):
            before = end
            for resident_ms, copies, ms in steps:
                end = loads.computed(end, resident_ms)
                end = max(end, loads.there(len(copies)))
                end = loads.computed(end, ms)
                loads.leave(len(copies), end)
            end = loads.computed(end, rest)
        if not is_cyclic:
            return end
        bus_ms = sum(self.copy_ms[i] for i in streamed)
        return max(end - before, self.total_ms + sum(decode_ms[i] for i in streamed), bus_ms)


class _Loads:
    """The loads of some passes, as bus and decoder get on with them; compute asks for them in their order.

    Args:
        units: (copy in ms, unpacking in ms) of what streams, in the order of its use.
    """

    def __init__(self, units: Sequence[tuple[float, float]], num_passes: int, num_slots: int, num_wires: int) -> None:
        self._units = units
        self._num_loads = len(units) * num_passes
        self._slots_free = [0.0] * num_slots  # when each slot's last block has been computed; those known so far
        self._wires_free = [0.0] * num_wires
        self._num_decodes = 0
        self._copied = 0.0  # when the last copy ends
        self._arrived: list[float] = []  # of each load, when its copy ends
        self._there: list[float] = []  # when it is in its slot
        self._num_used = 0

    def computed(self, start: float, ms: float) -> float:
        """When compute that begins at `start` ends: what is unpacked meanwhile takes its time from it."""
        end = start + ms
        while ms and (ready := self._next_decode()) is not None and ready < end:
            end += self._units[len(self._there) % len(self._units)][1]
            self._decode(ready)
        return end

    def there(self, count: int) -> float:
        """When the next `count` units are in their slots."""
        while len(self._there) < self._num_used + count:
            ready = self._next_decode()
            if ready is not None and len(self._there) < self._num_used + count:
                self._decode(ready)
        return self._there[self._num_used + count - 1]

    def leave(self, count: int, end: float) -> None:
        """The block with the next `count` units has been computed at `end`; their slots are free."""
        self._slots_free += [end] * count
        self._num_used += count

    # ---- inside

    def _next_decode(self) -> float | None:
        """When the next load could be unpacked, once what goes before it is copied; None: no slot is known to be free
        for it by now, or there is none."""
        while self._has_slot() and not self._units[len(self._there) % len(self._units)][1]:
            self._copy_raw()
        if not self._has_slot():
            return None
        load = len(self._there)
        if len(self._arrived) == load:
            copy_ms, _ = self._units[load % len(self._units)]
            wire_free = self._wires_free[self._num_decodes % len(self._wires_free)]
            self._copied = max(self._copied, wire_free) + copy_ms
            self._arrived.append(self._copied)
        before = self._there[-1] if self._there else 0.0
        return max(self._arrived[load], self._slots_free[load], before)

    def _has_slot(self) -> bool:
        """Whether there is a next load, and it is known when its slot is free."""
        return len(self._there) < min(self._num_loads, len(self._slots_free))

    def _decode(self, ready: float) -> None:
        _, decode_ms = self._units[len(self._there) % len(self._units)]
        self._wires_free[self._num_decodes % len(self._wires_free)] = ready + decode_ms
        self._num_decodes += 1
        self._there.append(ready + decode_ms)

    def _copy_raw(self) -> None:
        """The next load goes to its slot as it is, once that is free."""
        load = len(self._there)
        copy_ms, _ = self._units[load % len(self._units)]
        self._copied = max(self._copied, self._slots_free[load]) + copy_ms
        self._arrived.append(self._copied)
        self._there.append(self._copied)


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
