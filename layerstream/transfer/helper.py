"""Another GPU whose link to the host carries a share of each load: `offload(pipe, links=["cuda:1"])`.

What it brings lands in buffers of its own, a few of them in turn, and goes on from there to the GPU that computes. It
holds nothing else, and computes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from layerstream.budget import format_bytes
from layerstream.device.base import Device, Event, engine_tensors, synchronize_all
from layerstream.errors import StoreError

LINK_PART_BYTES = 2**24  # that a link carries at once: its full speed, and so little that the links keep in step
_NUM_BUFFERS = 6


class Helper:
    """One other GPU.

    Attributes:
        device: that GPU.
        name: for people, such as "cuda:1".
        is_reached: copies from there to the GPU that computes go straight. Else it is of no use.
        carried_bytes: what it has brought from the host so far.

    Args:
        target: the GPU that computes.
    """

    def __init__(self, device: Device, target: Device) -> None:
        self.device = device
        self.name = device.label
        target.stop_growing()  # before the first copy between the two
        self.is_reached = target.reaches(device)
        self.carried_bytes = 0
        self._target = target
        self._buffers: list[torch.Tensor] = []
        self._free: list[Event] = []
        self._next = 0

    def open(self) -> None:
        """Take the buffers; idempotent.

        Raises:
            StoreError: that GPU has no room for them; it has given up those that it had.
        """
        try:
            with engine_tensors(), self._target.homes():
                while len(self._buffers) < _NUM_BUFFERS:
                    # Memory that the allocator hands out may still be read by what was issued there.
                    self._free.append(self.device.record(self.device.compute_stream()))
                    self._buffers.append(self.device.allocate(LINK_PART_BYTES))
        except torch.OutOfMemoryError as error:
            self.close()
            needed, room = _NUM_BUFFERS * LINK_PART_BYTES, self.device.free_bytes()
            raise StoreError(
                f"{self.name} has no room for what comes over its link: {format_bytes(needed)}, of which "
                f"{format_bytes(room)} are free. Free memory there, or leave it out of `links`.",
                needed_bytes=needed,
                available_bytes=room,
            ) from error

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event]) -> Event:
        """Bring a part of at most `LINK_PART_BYTES` here, and from here to the GPU that computes; does not block.

        Args:
            after: what the second copy waits for.
        Returns: the event after that.
        """
        number = self._next
        self._next = (number + 1) % len(self._buffers)
        buffer = self._buffers[number][: source.numel()]
        with self._target.homes():
            here = self.device.copy(self.device.prepare([(buffer, source)]), [self._free[number]])
        arrived = self._target.copy_beside(self._target.prepare([(target, buffer)]), [here, *after])
        self._free[number] = arrived
        self.carried_bytes += source.numel()
        return arrived

    def close(self) -> None:
        """Free the buffers, once both GPUs are through with what was copied."""
        with contextlib.ExitStack() as each:  # all of them, also when one fails, or waiting does
            while self._buffers:
                each.callback(self.device.free, self._buffers.pop())
            self._free.clear()
            self._next = 0
            synchronize_all([self.device, self._target])
