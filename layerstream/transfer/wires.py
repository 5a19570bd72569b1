"""Wire buffers: where copies of packed units arrive on the device, and are decoded from. They take turns.

A wire buffer is free again once it has been decoded, which nobody on the host waits for: the next copy into it waits
for that event. So copies run ahead of decoding by as many loads as there are buffers, however late slots become free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from layerstream.device.base import Event, Stream


class Wire:
    """One buffer.

    Attributes:
        stream: the compute stream it was allocated on, to which its memory returns.
        free: the event after which the next copy into it may begin.
    """

    def __init__(self, buffer: torch.Tensor, stream: Stream, free: Event) -> None:
        self.buffer, self.stream, self.free = buffer, stream, free


class WireRing:
    """All wire buffers of one streamer.

    Args:
        allocate: gives a buffer of so many bytes, the stream that its memory returns to, and the event after which it
            may be written to.
        give_back: frees a buffer of that stream, which waits for these events.
    """

    def __init__(
        self,
        allocate: Callable[[int], tuple[torch.Tensor, Stream, Event]],
        give_back: Callable[[torch.Tensor, Stream, Sequence[Event]], object],
    ) -> None:
        self._allocate = allocate
        self._give_back = give_back
        self._wires: list[Wire] = []
        self._next = 0
        self._laid = (0, 0)  # number and size, as they were asked for

    def are(self, count: int, num_bytes: int) -> bool:
        """Whether there are so many buffers of `num_bytes`, and no others."""
        return self._laid == (count, num_bytes) and len(self._wires) == count

    def lay(self, count: int, num_bytes: int) -> None:
        """Have so many buffers of `num_bytes`; others are given up."""
        self.drop()
        for _ in range(count):
            self._wires.append(Wire(*self._allocate(num_bytes)))
        self._laid = count, num_bytes

    def next(self, num_bytes: int) -> Wire:
        """The buffer whose turn it is among those that are large enough. Where no plan has asked for any yet, one is
        made."""
        for _ in self._wires:
            wire = self._wires[self._next]
            self._next = (self._next + 1) % len(self._wires)
            if wire.buffer.numel() >= num_bytes:
                return wire
        self._wires.append(Wire(*self._allocate(num_bytes)))
        return self._wires[-1]

    def drop(self) -> None:
        """Give all up. What is on its way through them is waited for by the stream that their memory goes back to."""
        for wire in self._forget():
            self._give_back(wire.buffer, wire.stream, [wire.free])

    def close(self) -> list[torch.Tensor]:
        """Forget all, with the device idle; returns the buffers, to be freed."""
        return [wire.buffer for wire in self._forget()]

    def _forget(self) -> Iterator[Wire]:
        """Each, which is one no longer."""
        self._laid, self._next = (0, 0), 0
        while self._wires:
            yield self._wires.pop()
