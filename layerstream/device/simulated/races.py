"""Buffers of the simulated device, and whether accesses to them are ordered by events."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import torch

from layerstream.device.simulated.streams import Copy, SimulatedStream
from layerstream.errors import TransferError


class RaceError(TransferError):
    """Two accesses to a slot that no event orders: on a GPU they may happen in either order."""


@dataclass(eq=False)
class Buffer:
    """One allocation and who touched it last.

    Attributes:
        stream: that it was allocated on, and goes back to.
        writes: by copies, or by decoding: where each begins and ends, the number of its stream, and its own on that;
            those that no later one has overwritten.
        accesses: the last of each compute stream, by the stream's number.
        decoded_by: the last decoding that reads it.
    """

    start: int
    num_bytes: int
    stream: SimulatedStream
    writes: list[tuple[int, int, int, int]] = field(default_factory=list)
    accesses: dict[int, int] = field(default_factory=dict)
    decoded_by: Copy | None = None


class Buffers:
    """The allocations that live, found by address."""

    def __init__(self) -> None:
        self._buffers: dict[int, Buffer] = {}
        self._starts: list[int] = []

    def __len__(self) -> int:
        return len(self._buffers)

    def add(self, buffer: Buffer) -> None:
        self._buffers[buffer.start] = buffer
        self._starts = sorted(self._buffers)

    def take(self, address: int) -> Buffer | None:
        """The buffer that begins there, which is one no longer; None: none does."""
        buffer = self._buffers.pop(address, None)
        self._starts = sorted(self._buffers)
        return buffer

    def at(self, address: int) -> Buffer | None:
        """The buffer that an address lies in."""
        position = bisect_right(self._starts, address) - 1
        if position < 0:
            return None
        buffer = self._buffers[self._starts[position]]
        return buffer if address < buffer.start + buffer.num_bytes else None

    def overwrite(self, target: torch.Tensor, writer: SimulatedStream) -> None:
        """What was issued last on the stream of copies, or of decoding, writes there.

        Raises:
            RaceError: it does not wait for what reads the buffer, or was written to it.
        """
        buffer = self.at(target.data_ptr())
        if buffer is None:
            if target.numel():
                raise TransferError("copy to memory that is not allocated on the simulated device")
            return
        for stream, tick in buffer.accesses.items():
            if stream != writer.number and writer.num_seen(stream) < tick:
                raise RaceError(
                    f"copy into a slot does not wait for its reader: compute stream {stream} read it at {tick}, "
                    f"the copy waited for {writer.num_seen(stream)}"
                )
        start, end = target.data_ptr(), target.data_ptr() + target.numel() * target.element_size()
        others = []
        for write in buffer.writes:
            its_start, its_end, before, tick = write
            if its_end <= start or end <= its_start:
                others.append(write)
            elif writer.num_seen(before) < tick:
                raise RaceError(f"two writes to a buffer on streams {before} and {writer.number} that no event orders")
        buffer.writes = [*others, (start, end, writer.number, writer.num_seen(writer.number))]

    def access(self, tensor: torch.Tensor, stream: SimulatedStream) -> None:
        """An operator on a compute stream reads, or writes, a tensor.

        Raises:
            RaceError: it lies in a buffer, and the stream has not waited for the last copy into it.
        """
        buffer = self.at(tensor.data_ptr()) if tensor.numel() else None
        if buffer is None:
            return
        for _, _, writer, tick in buffer.writes:
            if stream.num_seen(writer) < tick:
                raise RaceError(
                    f"slot read without waiting for its load: copy {tick} was issued, compute stream "
                    f"{stream.number} has waited for {stream.num_seen(writer)}"
                )
        buffer.accesses[stream.number] = stream.tick()


def check_given_back(buffer: Buffer) -> None:
    """What is given back goes to the stream it came from, which may hand it out at once.

    Raises:
        RaceError: that stream has not waited for everything that touches the buffer.
    """
    stream = buffer.stream
    for _, _, writer, tick in buffer.writes:
        if stream.num_seen(writer) < tick:
            raise RaceError(
                f"memory given back with copy {tick} on its way to it: its stream has waited for "
                f"{stream.num_seen(writer)}"
            )
    for reader, tick in buffer.accesses.items():
        if stream.num_seen(reader) < tick:
            raise RaceError(f"memory given back while compute stream {reader} may still read it")
