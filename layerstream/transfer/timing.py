"""How long the device takes for each block, in the passes that are timed.

The host is often passes ahead of the device. What a pass took is read once the device is through with it, whenever that
is, and is never waited for; meanwhile passes begin and end as any others do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerstream.device.base import Device
from layerstream.planning.phases import CallKind

Units = tuple[int, ...]  # of a block


@dataclass(eq=False)
class _Pass:
    """One pass: the marks before the blocks that run, and (units, before, after) of those that have run."""

    kind: CallKind
    running: dict[Units, Any] = field(default_factory=dict)
    blocks: list[tuple[Units, Any, Any]] = field(default_factory=list)


class PassTimer:
    """Marks the compute stream around blocks, and reads the marks once the device has passed them."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._current: _Pass | None = None
        self._unread: deque[_Pass] = deque()  # the oldest first

    def begin(self, kind: CallKind) -> None:
        """A pass of that key begins, and is timed."""
        self.end()
        self._current = _Pass(kind)

    def end(self) -> None:
        """Whatever runs next belongs to another pass."""
        if self._current is not None:
            self._unread.append(self._current)
            self._current = None

    @property
    def is_timing(self) -> bool:
        """Whether the pass that runs is timed."""
        return self._current is not None

    def enter_block(self, units: Units) -> None:
        if self._current is not None:
            self._current.running[units] = self._mark()

    def leave_block(self, units: Units) -> None:
        if self._current is not None and units in self._current.running:
            self._current.blocks.append((units, self._current.running.pop(units), self._mark()))

    @property
    def is_ready(self) -> bool:
        """Whether there is a pass that `take` would give."""
        return bool(self._unread) and self._is_through(self._unread[0])

    def take(self) -> Iterator[tuple[CallKind, Mapping[Units, float]]]:
        """The ended passes that the device is through with, once: the key, and milliseconds by block.

        Of a block that ran several times in a pass, the longest.
        """
        while self.is_ready:
            done = self._unread.popleft()
            times: dict[Units, float] = {}
            for units, start, end in done.blocks:
                elapsed = self._device.elapsed_ms(start, end)
                if elapsed is not None:
                    times[units] = max(elapsed, times.get(units, 0.0))
            yield done.kind, times

    def drop(self) -> list[CallKind]:
        """Forget all that was not taken; returns the keys, one for each pass."""
        self.end()
        dropped = [each.kind for each in self._unread]
        self._unread.clear()
        return dropped

    def _mark(self) -> Any:
        return self._device.mark(self._device.compute_stream())

    def _is_through(self, done: _Pass) -> bool:
        return not done.blocks or self._device.elapsed_ms(*done.blocks[-1][1:]) is not None
