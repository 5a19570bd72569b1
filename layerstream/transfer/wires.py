"""Wire buffers: where copies of packed units arrive on the device, and are decoded from.

Those of the ring take turns. One is free again once it has been decoded, which nobody on the host waits for: the next
copy into it waits for that event. So copies run ahead of decoding by as many loads as there are buffers, however late
slots become free.

A unit may have one of its *own*, in which its packed bytes stay: it is filled by the first load, and what follows is
decoded from there, with nothing copied. It belongs to the unit's home, whose bytes never change; a unit that was
written to has another home, and never finds the bytes that it had before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from layerstream.device.base import Event, Stream
from layerstream.host.home import Home

Allocate = Callable[[int], tuple[torch.Tensor, Stream, Event]]
GiveBack = Callable[[torch.Tensor, Stream, Sequence[Event]], object]


class Wire:
    """One buffer.

    Attributes:
        stream: the compute stream it was allocated on, to which its memory returns.
        free: the event after which the next copy into it may begin.
    """

    def __init__(self, buffer: torch.Tensor, stream: Stream, free: Event) -> None:
        self.buffer, self.stream, self.free = buffer, stream, free


class OwnWire(Wire):
    """A buffer of one unit's own.

    Attributes:
        filled: the event after the copy into it, which each decoding waits for; None: no copy was begun.
    """

    def __init__(self, buffer: torch.Tensor, stream: Stream, free: Event) -> None:
        super().__init__(buffer, stream, free)
        self.filled: Event = None


class WireRing:
    """All wire buffers of one streamer.

    Args:
        allocate: gives a buffer of so many bytes, the stream that its memory returns to, and the event after which it
            may be written to.
        give_back: frees a buffer of that stream, which waits for these events.
    """

    def __init__(self, allocate: Allocate, give_back: GiveBack) -> None:
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


class OwnWires:
    """The wire buffers that units have of their own.

    Attributes:
        of: by home.

    Args:
        allocate, give_back: see `WireRing`.
    """

    def __init__(self, allocate: Allocate, give_back: GiveBack) -> None:
        self._allocate = allocate
        self._give_back = give_back
        self.of: dict[Home, OwnWire] = {}

    @property
    def num_bytes(self) -> int:
        """Of what is packed in them."""
        return sum(home.wire_bytes for home in self.of)

    def give(self, home: Home) -> None:
        """Allocate a buffer for what a load of this home brings."""
        self.of[home] = OwnWire(*self._allocate(home.wire_bytes))

    def drop(self, home: Home) -> None:
        """Give the buffer of this home up, if it has one. What is on its way into it, or decoded from it, is waited for
        by the stream that its memory goes back to."""
        wire = self.of.pop(home, None)
        if wire is not None:
            self._give_back(wire.buffer, wire.stream, [wire.free])

    def close(self) -> list[torch.Tensor]:
        """Forget all, with the device idle; returns the buffers, to be freed."""
        buffers = [wire.buffer for wire in self.of.values()]
        self.of.clear()
        return buffers
