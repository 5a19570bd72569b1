"""Wire buffers: where copies of packed units arrive on the device, and are decoded from. They take turns.

A wire buffer is free again once it has been decoded, which nobody on the host waits for: the next copy into it waits
for that event. So copies run ahead of decoding by as many loads as there are buffers, however late slots become free.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from layerstream.device.base import Device, Event, Stream, engine_tensors
from layerstream.interrupts import twice_if_interrupted


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
        count_bytes: hears how many bytes more, or less, they take on the device.
    """

    def __init__(self, device: Device, count_bytes: Callable[[int], object]) -> None:
        self._device = device
        self._count_bytes = count_bytes
        self._wires: list[Wire] = []
        self._next = 0
        self._laid = (0, 0)  # number and size, as they were asked for

    def are(self, count: int, num_bytes: int) -> bool:
        """Whether there are so many buffers of `num_bytes`, and no others."""
        return self._laid == (count, num_bytes) and len(self._wires) == count

    def lay(self, count: int, num_bytes: int) -> None:
        """Have so many buffers of `num_bytes`; others are given up."""
        if self.are(count, num_bytes):
            return
        self.drop()
        for _ in range(count):
            self._wires.append(self._make(num_bytes))
        self._laid = count, num_bytes

    def next(self, num_bytes: int) -> Wire:
        """The buffer whose turn it is among those that are large enough. Where no plan has asked for any yet, one is
        made."""
        for _ in self._wires:
            wire = self._wires[self._next]
            self._next = (self._next + 1) % len(self._wires)
            if wire.buffer.numel() >= num_bytes:
                return wire
        self._wires.append(self._make(num_bytes))
        return self._wires[-1]

    def drop(self) -> None:
        """Give all up. What is on its way through them is waited for by the stream that their memory goes back to."""
        self._laid, self._next = (0, 0), 0
        while self._wires:
            wire = self._wires.pop()
            try:
                twice_if_interrupted(functools.partial(self._device.wait, wire.stream, wire.free))
            finally:
                self._count_bytes(-self._device.rounded_bytes(wire.buffer.numel()))
                self._device.free(wire.buffer)

    def close(self) -> list[torch.Tensor]:
        """Forget all, with the device idle; returns the buffers, to be freed."""
        wires, self._wires, self._laid, self._next = self._wires, [], (0, 0), 0
        return [wire.buffer for wire in wires]

    def _make(self, num_bytes: int) -> Wire:
        with engine_tensors():
            stream = self._device.compute_stream()
            # The allocator may hand out memory that queued compute still reads: the first copy waits for all of it.
            issued = self._device.record(stream)
            buffer = self._device.allocate(num_bytes)
        self._count_bytes(self._device.rounded_bytes(num_bytes))
        return Wire(buffer, stream, issued)
