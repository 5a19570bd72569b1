"""Brings what a unit has at home into a device buffer for the moment, decoded where it is packed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from layerstream.device.base import Device, engine_tensors
from layerstream.engine.ledger import Ledger
from layerstream.host.home import Home, PackedHome


class Scratch:
    """Device buffers that are needed for the moment, while no pass runs."""

    def __init__(self, device: Device, ledger: Ledger) -> None:
        self._device = device
        self._ledger = ledger

    @contextlib.contextmanager
    def buffer(self, num_bytes: int) -> Iterator[torch.Tensor]:
        """A device buffer (uint8 [num_bytes]). What is on its way to it by the end is waited for.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        self._ledger.spoil_interval()
        with engine_tensors():
            buffer = self._device.allocate(num_bytes)
            try:
                yield buffer
            except BaseException:
                with contextlib.suppress(Exception):
                    self._device.wait(self._device.compute_stream(), self._device.record_copies())
                raise
            finally:
                self._device.free(buffer)

    def decode(self, home: PackedHome, raw: torch.Tensor) -> tuple[Any, Any]:
        """Decode what is at home into a device buffer; compute that follows comes after it.

        Returns: marks before and after the decoding.
        """
        device = self._device
        stream = device.compute_stream()
        with self.buffer(home.wire_bytes) as wire:
            unpacking = device.prepare_unpack(wire[: home.wire_bytes], home.layout, raw)
            self.copy(home, wire)
            start = device.mark(stream)
            device.wait(stream, device.unpack(unpacking, [device.record(stream)]))
            return start, device.mark(stream)

    def copy(self, home: Home, buffer: torch.Tensor) -> None:
        """Copy what is at home into a device buffer as it is; compute that follows comes after it."""
        device, stream = self._device, self._device.compute_stream()
        pairs, is_locked = [pair[:2] for pair in home.pairs(buffer)], home.is_pinned
        if home.keeper is not None and not home.keeper.is_reached:
            pairs, is_locked = [(target, home.keeper.fetch(source)) for target, source in pairs], False
        copies = device.prepare(pairs, is_locked=is_locked)
        device.wait(stream, device.copy(copies, [device.record(stream)]))
