"""How long a pass takes when some of its blocks stream. Pure numbers.

A pass is a list of units in the order of their use, named by position: blocks, or pieces of blocks, which are computed
together. Three *servers* work through it, each one thing after another: the bus copies, the decoder unpacks what has
another form on the way (where there is any), and compute runs blocks. What they hand on lies in *rings* of buffers: a
copy may start once the block that had its slot before has been computed; one that is unpacked goes to a wire buffer,
which is free again when it has been, and the unpacking waits for the slot. What stays packed on the device is not
copied, and only unpacked. The decoder runs on the same cores as
compute: a block that runs meanwhile takes that much longer.

Compute waits for loads, loads wait for buffers, and neither shows in a sum of bytes: two placements that stream as much
may differ by a fifth. So placements are compared by playing the passes (`search.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

LEAST_WIRES = 2  # one that is unpacked, one that is filled meanwhile
_TOLERANCE = 1.02  # within it a pass takes as long as its compute, or as its copies


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
        blocks: (bytes over a link of this speed, compute in ms) in the order of their use.
        wholes: of each, what it is a piece of; pieces of one block follow each other. None: each is a block.
        decode_ms: of each, what it takes to unpack; 0: it is copied to its slot as it is. None: so are all.
        num_wires: buffers for what is to be unpacked.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[float, float]],
        link_gb_per_s: float,
        wholes: Sequence[Hashable] | None = None,
        decode_ms: Sequence[float] | None = None,
        num_wires: int = LEAST_WIRES,
    ) -> None:
        self._made_of = blocks, link_gb_per_s, wholes
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

    def without_decoder(self, link_share: float = 1.0) -> Pace:
        """The same with unpacking taken as compute of its block, whether that streams or not: to play it as a server of
        its own takes ten times as long.

        Args:
            link_share: of the link's speed.
        """
        blocks, link_gb_per_s, wholes = self._made_of
        unpacking = self.decode_ms or [0.0] * len(blocks)
        summed = [(num_bytes, ms + more) for (num_bytes, ms), more in zip(blocks, unpacking, strict=True)]
        return Pace(summed, link_share * link_gb_per_s, wholes)

    def keeping_packed(self, positions: Collection[int]) -> Pace:
        """The same with the packed bytes of these on the device throughout: nothing of them is copied, and they are
        unpacked from where they lie, in no wire buffer's turn."""
        if not positions:
            return self
        blocks, link_gb_per_s, wholes = self._made_of
        kept = [(0.0, ms) if i in positions else (num_bytes, ms) for i, (num_bytes, ms) in enumerate(blocks)]
        return Pace(kept, link_gb_per_s, wholes, self.decode_ms, self.num_wires)

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
        units: (copy in ms, unpacking in ms) of what streams, in the order of its use. What is unpacked and has no copy
            is on the device already.
    """

    def __init__(self, units: Sequence[tuple[float, float]], num_passes: int, num_slots: int, num_wires: int) -> None:
        self._units = units
        self._num_loads = len(units) * num_passes
        self._slots_free = [0.0] * num_slots  # when each slot's last block has been computed; those known so far
        self._wires_free = [0.0] * num_wires
        self._num_turns = 0  # of wire buffers
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
            if copy_ms:
                wire_free = self._wires_free[self._num_turns % len(self._wires_free)]
                self._copied = max(self._copied, wire_free) + copy_ms
            self._arrived.append(self._copied if copy_ms else 0.0)
        before = self._there[-1] if self._there else 0.0
        return max(self._arrived[load], self._slots_free[load], before)

    def _has_slot(self) -> bool:
        """Whether there is a next load, and it is known when its slot is free."""
        return len(self._there) < min(self._num_loads, len(self._slots_free))

    def _decode(self, ready: float) -> None:
        copy_ms, decode_ms = self._units[len(self._there) % len(self._units)]
        if copy_ms:
            self._wires_free[self._num_turns % len(self._wires_free)] = ready + decode_ms
            self._num_turns += 1
        self._there.append(ready + decode_ms)

    def _copy_raw(self) -> None:
        """The next load goes to its slot as it is, once that is free."""
        load = len(self._there)
        copy_ms, _ = self._units[load % len(self._units)]
        self._copied = max(self._copied, self._slots_free[load]) + copy_ms
        self._arrived.append(self._copied)
        self._there.append(self._copied)
