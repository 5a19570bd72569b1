"""How long the device takes for each block, and the host to issue it, in the passes that are timed.

The host is often passes ahead of the device. What a pass took is read once the device is through with it, whenever that
is, and is never waited for; meanwhile passes begin and end as any others do.

In a token loop the host is behind: a layer of 0.3 ms on the device takes 2 ms to issue. A device that waits for loads
hides that from its own marks, so the host is timed by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from layerstream.device import Device
from layerstream.phases import Reserve

Units = tuple[int, ...]  # of a block


class BlockTime(NamedTuple):
    """Milliseconds.

    Attributes:
        device: from the block's first operator to its last.
        host: from the end of the block before, or its own beginning, to its end.
    """

    device: float
    host: float


@dataclass(eq=False)
class _Pass:
    """One pass: the marks before the blocks that run, and (units, before, after, host ms) of those that have run."""

    reserve: Reserve
    running: dict[Units, Any] = field(default_factory=dict)
    blocks: list[tuple[Units, Any, Any, float]] = field(default_factory=list)
    host_ms: float | None = None  # when the last block ended, or the first began


class PassTimer:
    """Marks the compute stream around blocks, and reads the marks once the device has passed them."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._current: _Pass | None = None
        self._unread: deque[_Pass] = deque()  # the oldest first

    def begin(self, reserve: Reserve) -> None:
        """A pass of that key begins, and is timed."""
        self.end()
        self._current = _Pass(reserve)

    def end(self) -> None:
        """Whatever runs next belongs to another pass."""
        if self._current is not None:
            self._unread.append(self._current)
            self._current = None

    def enter_block(self, units: Units) -> None:
        if self._current is not None:
            self._current.running[units] = self._mark()
            if self._current.host_ms is None:
                self._current.host_ms = self._device.host_ms()

    def leave_block(self, units: Units) -> None:
        current = self._current
        if current is not None and units in current.running:
            before, current.host_ms = current.host_ms or 0.0, self._device.host_ms()
            current.blocks.append((units, current.running.pop(units), self._mark(), current.host_ms - before))

    @property
    def is_ready(self) -> bool:
        """Whether there is a pass that `take` would give."""
        return bool(self._unread) and self._is_through(self._unread[0])

    def take(self) -> Iterator[tuple[Reserve, Mapping[Units, BlockTime]]]:
        """The ended passes that the device is through with, once: the key, and times by block.

        Of a block that ran several times in a pass, the longest on the device, and the shortest on the host.
        """
        while self.is_ready:
            done = self._unread.popleft()
            times: dict[Units, BlockTime] = {}
            for units, start, end, host_ms in done.blocks:
                elapsed = self._device.elapsed_ms(start, end)
                if elapsed is not None:
                    known = times.get(units, BlockTime(0.0, host_ms))
                    times[units] = BlockTime(max(elapsed, known.device), min(host_ms, known.host))
            yield done.reserve, times

    def drop(self) -> list[Reserve]:
        """Forget all that was not taken; returns the keys, one for each pass."""
        self.end()
        dropped = [each.reserve for each in self._unread]
        self._unread.clear()
        return dropped

    def _mark(self) -> Any:
        return self._device.mark(self._device.compute_stream())

    def _is_through(self, done: _Pass) -> bool:
        return not done.blocks or self._device.elapsed_ms(*done.blocks[-1][1:3]) is not None
