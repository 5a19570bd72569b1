"""Slots, and the copies into them. Who moves bytes is this file; who waits for whom is the note in `device.py`.

A slot is a device buffer that holds one unit at a time. Its life, as seen from the host:

    free -> `load`: a copy is queued, behind the last readers -> `wait`: compute is queued behind the copy
         -> read by any number of operators -> `vacate`: readers' events are recorded -> free

`load` and `vacate` issue work and return; nothing here blocks the host, except copies from memory that could
not be page-locked, which go through a small staging ring.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from layerstream.binding import UnitBinding
from layerstream.device import Device, Event, Stream, engine_tensors
from layerstream.errors import TransferError
from layerstream.host_store import StoredUnit
from layerstream.stats import Stats

_STAGING_BUFFERS = 3
_STAGING_BYTES = 2**25  # copies of 32 MiB run at full speed


class Slot:
    """One device buffer.

    Attributes:
        ready: the event after the copy that filled it; a new one for each load.
        after: events the next copy into it must wait for.
        readers: compute streams that wait, or waited, for `ready`.
        is_extra: made beyond the plan; freed when it is vacated.
    """

    def __init__(self, buffer: torch.Tensor, after: Event, *, is_extra: bool) -> None:
        self.buffer = buffer
        self.is_extra = is_extra
        self.unit: int | None = None
        self.ready: Event = None
        self.after: list[Event] = [after]
        self.readers: list[Stream] = []
        self.views: dict[int, list[torch.Tensor]] = {}
        self.pieces: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._storage = buffer.untyped_storage()
        self._references = self._count_references()

    def prepare(self, unit: int, stored: StoredUnit, binding: UnitBinding) -> None:
        """Make the views of `unit` in this slot, once: fixed addresses, and 15 µs instead of 150 to bind."""
        if unit in self.views:
            return
        before = self._count_references()
        self.views[unit] = stored.views(binding, self.buffer)
        self.pieces[unit] = stored.pieces(self.buffer)
        self._references += self._count_references() - before

    def is_aliased(self) -> bool:
        """Whether anything but this slot looks at its memory: `weight.detach()` kept by user code, say."""
        count = self._count_references()
        if count < self._references:
            self._references = count  # a graph that was accepted is gone
        return count > self._references

    def accept_references(self) -> None:
        """What looks at the slot now may stay, and see its bytes change: graphs, whose backward is refused."""
        self._references = self._count_references()

    def _count_references(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage._cdata))


class TransferEngine:
    """Owns the slots and the resident units' buffers; the only caller of `Device.copy`.

    Args:
        stored, bindings: by unit index.
    """

    def __init__(
        self, device: Device, stored: Sequence[StoredUnit], bindings: Sequence[UnitBinding], stats: Stats
    ) -> None:
        self._device = device
        self._stored = stored
        self._bindings = bindings
        self._stats = stats
        self._residents: list[torch.Tensor] = []
        self._slot_bytes = 0
        self._device_bytes = 0
        self._stalls: deque[Any] = deque()
        self._staging: _StagingRing | None = None
        self.slots: list[Slot] = []

    # ---- memory

    def make_slots(self, count: int, num_bytes: int) -> None:
        """Allocate the planned slots, each of `num_bytes`."""
        self._slot_bytes = num_bytes
        for _ in range(count):
            self._add_slot(is_extra=False)
        self._stats.num_slots, self._stats.slot_bytes = count, num_bytes

    def place(self, unit: int) -> list[torch.Tensor]:
        """Copy a unit to device memory of its own, where it stays; returns its views. `finish_placing` waits."""
        stored = self._stored[unit]
        with engine_tensors():
            buffer = self._allocate(stored.num_bytes)
            self._residents.append(buffer)
            # The allocator may hand out memory that queued compute still reads: the copy waits for all of it.
            self._copy(unit, stored.pieces(buffer), [self._device.record(self._device.compute_stream())])
            self._stats.placed_bytes += stored.copied_bytes
            return stored.views(self._bindings[unit], buffer)

    def finish_placing(self) -> None:
        """Block the host until every resident unit is on the device."""
        self._device.synchronize()

    def close(self) -> None:
        """Drop all device memory. The device must be idle (`Device.synchronize`)."""
        buffers = [*self._residents, *(slot.buffer for slot in self.slots)]
        self._residents, self.slots, self._staging = [], [], None
        with contextlib.ExitStack() as each:  # all of them, also when one fails
            for buffer in buffers:
                each.callback(self._device.free, buffer)

    # ---- one unit's way into a slot and out of it

    def slot_of(self, unit: int) -> Slot | None:
        """The slot that holds `unit`, or into which it is being loaded."""
        return next((s for s in self.slots if s.unit == unit), None)

    def free_slot(self) -> Slot | None:
        """A planned slot without a unit. Extra slots are for the use that made them and no other."""
        return next((s for s in self.slots if s.unit is None), None)

    def add_extra_slot(self) -> Slot:
        """A slot beyond the plan, for when more units are in use at once than there are slots."""
        self._stats.num_extra_slots += 1
        return self._add_slot(is_extra=True)

    def load(self, unit: int, slot: Slot) -> None:
        """Start copying `unit` into `slot` on the copy stream; does not block the host. Call under `engine_tensors`.

        Raises:
            TransferError: the slot holds another unit, or the unit is in another slot.
        """
        if slot.unit is not None or self.slot_of(unit) is not None:
            raise TransferError(f"unit {unit} loaded into a slot that holds unit {slot.unit}, or loaded twice")
        slot.prepare(unit, self._stored[unit], self._bindings[unit])
        # Behind the last readers; from now on nothing but this copy may touch the slot until `wait`. The slot is
        # the unit's only once the copy is queued: if that fails, it stays free, and its readers' events stay.
        slot.ready = self._copy(unit, slot.pieces[unit], slot.after)
        slot.after, slot.readers = [], []
        slot.unit = unit
        self._stats.num_loads += 1
        self._stats.loaded_bytes += self._stored[unit].copied_bytes

    def wait(self, unit: int) -> list[torch.Tensor]:
        """Queue this thread's compute behind the load of `unit`; returns the unit's views."""
        slot = self._holding(unit)
        stream = self._device.compute_stream()
        if stream not in slot.readers:
            marker = self._device.start_stall(stream, slot.ready)
            self._device.wait(stream, slot.ready)
            slot.readers.append(stream)
            if marker is not None:
                self._stats.num_stalls += 1
                self._stalls.append(self._device.end_stall(stream, marker))
            self._count_stalls()
        return slot.views[unit]

    def vacate(self, unit: int) -> None:
        """Take `unit` out of its slot; its tensors are absent already, so no reader can follow.

        Records on each reading stream an event that covers whatever was issued up to now.
        """
        slot = self._holding(unit)
        slot.after = [*slot.after, *(self._device.record(stream) for stream in slot.readers)]
        slot.unit = None
        if slot.is_extra:
            self.slots.remove(slot)
            self._free(slot.buffer)

    def abandon(self, unit: int) -> None:
        """Leave the slot's memory to whoever still looks at it, and give the slot new memory."""
        slot = self._holding(unit)
        fresh = self._add_slot(is_extra=slot.is_extra)
        self.slots.remove(slot)
        fresh.unit = unit
        self._free(slot.buffer)

    # ---- inside

    def _holding(self, unit: int) -> Slot:
        slot = self.slot_of(unit)
        if slot is None:
            raise TransferError(f"unit {unit} is in no slot")
        return slot

    def _copy(self, unit: int, pieces: list[tuple[torch.Tensor, torch.Tensor]], after: list[Event]) -> Event:
        stored = self._stored[unit]
        if stored.is_pinned:
            return self._device.copy(pieces, after)
        if self._staging is None:
            self._staging = _StagingRing(self._device)
        pinned = [s.is_pinned for s in stored.segments]
        return self._staging.copy(list(zip(pieces, pinned, strict=True)), after)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        buffer = self._device.allocate(num_bytes)
        self._device_bytes += num_bytes
        self._stats.peak_device_bytes = max(self._stats.peak_device_bytes, self._device_bytes)
        return buffer

    def _free(self, buffer: torch.Tensor) -> None:
        self._device_bytes -= buffer.numel()
        self._device.free(buffer)

    def _add_slot(self, *, is_extra: bool) -> Slot:
        with engine_tensors():
            # As in `place`: recycled memory may still be read by compute that was issued before.
            issued = self._device.record(self._device.compute_stream())
            slot = Slot(self._allocate(self._slot_bytes), issued, is_extra=is_extra)
        self.slots.append(slot)
        return slot

    def _count_stalls(self) -> None:
        """Add up the stalls the device has passed; the host never waits for the others."""
        while self._stalls:
            stall_ms = self._device.stall_ms(self._stalls[0])
            if stall_ms is None:
                return
            self._stats.stall_ms += stall_ms
            self._stalls.popleft()


class _StagingRing:
    """Copies from pageable memory through a few small page-locked buffers.

    The host copies into a buffer (and waits for the copy that read it last), the device copies out of it. Where
    even these are refused, the pageable memory is given to the device as it is, and the driver does the same.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        with engine_tensors():
            buffers = [device.pinned_staging(_STAGING_BYTES) for _ in range(_STAGING_BUFFERS)]
        self._buffers = [b for b in buffers if b is not None]
        self._events: list[Event] = [None] * len(self._buffers)
        self._next = 0

    def copy(self, pieces: Sequence[tuple[tuple[torch.Tensor, torch.Tensor], bool]], after: Sequence[Event]) -> Event:
        """Like `Device.copy`, for pieces of which some are page-locked; blocks the host for the others."""
        event = self._device.copy([], after)
        for (target, source), is_pinned in pieces:
            if is_pinned or not self._buffers:
                event = self._device.copy([(target, source)], [])
                continue
            for start in range(0, source.numel(), _STAGING_BYTES):
                part = source[start : start + _STAGING_BYTES]
                number, self._next = self._next, (self._next + 1) % len(self._buffers)
                if self._events[number] is not None:
                    self._device.synchronize_event(self._events[number])
                staged = self._buffers[number][: part.numel()]
                staged.copy_(part)
                event = self._device.copy([(target[start : start + part.numel()], staged)], [])
                self._events[number] = event
        return event
