"""Device buffers for weights, and the copies into them. Who moves bytes is this file; who waits for whom is the note
in `device.py`.

A slot is a device buffer that holds one unit at a time. Its life, as seen from the host:

    free -> `load`: a copy is queued, behind the last readers -> `wait`: compute is queued behind the copy
         -> read by any number of operators -> `vacate`: readers' events are recorded -> free

Some slots form the *ring*, through which streamed blocks take turns; others are a resident unit's *own*, made when a
plan gives the unit room and dropped when it takes it back; a few are *extra*, for one use that nothing else has room
for.

`load` and `vacate` issue work and return; nothing here blocks the host, except copies from memory that could
not be page-locked, which go through a small staging ring.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from layerstream.binding import UnitBinding
from layerstream.device import Copies, Device, Event, Stream, engine_tensors
from layerstream.errors import TransferError
from layerstream.host_store import StoredUnit
from layerstream.profiling import Ranges
from layerstream.references import use_count
from layerstream.stats import PhaseStats, Stats
from layerstream.units import Unit

_STAGING_BUFFERS = 3
_STAGING_BYTES = 2**25  # copies of 32 MiB run at full speed
_PROBE_BYTES = 2**26  # enough for the link's full speed, 1.2 ms of it


class Slot:
    """One device buffer.

    Attributes:
        stream: the compute stream it was allocated on, to which its memory returns.
        ready: the event after the copy that filled it; a new one for each load.
        after: events the next copy into it must wait for.
        readers: compute streams that wait, or waited, for `ready`.
        is_extra: made for one use; freed when it is vacated.
    """

    def __init__(self, buffer: torch.Tensor, stream: Stream, after: Event, *, is_extra: bool = False) -> None:
        self.buffer = buffer
        self.stream = stream
        self.is_extra = is_extra
        self.unit: int | None = None
        self.ready: Event = None
        self.after: list[Event] = [after]
        self.readers: list[Stream] = []
        self.views: dict[int, list[torch.Tensor]] = {}
        self.copies: dict[int, Copies] = {}
        self._storage = buffer.untyped_storage()
        self._references = self._count_references()

    def prepare(self, unit: int, stored: StoredUnit, binding: UnitBinding, device: Device) -> None:
        """Make the views of `unit` in this slot, once: fixed addresses, and 15 µs instead of 150 to bind."""
        if unit in self.views:
            return
        before = self._count_references()
        self.views[unit] = stored.views(binding, self.buffer)
        self.copies[unit] = device.prepare(stored.pieces(self.buffer))
        self._references += self._count_references() - before

    def forget(self, unit: int) -> None:
        """Drop the views of a unit that exists no more."""
        before = self._count_references()
        self.views.pop(unit, None)
        self.copies.pop(unit, None)
        self._references += self._count_references() - before

    def is_aliased(self, num_bound: int = 0) -> bool:
        """Whether anything but this slot, and so many weights that are bound to it, looks at its memory:
        `weight.detach()` kept by user code, say. Where torch does not tell, it is taken to be so."""
        if use_count(self._storage) is None:
            return True
        count = self._count_references() - num_bound
        if count < self._references:
            self._references = count  # a graph that was accepted is gone
        return count > self._references

    def accept_references(self) -> None:
        """What looks at the slot now may stay, and see its bytes change: graphs, whose backward is refused."""
        self._references = self._count_references()

    def _count_references(self) -> int:
        return use_count(self._storage) or 0


class TransferEngine:
    """Owns every slot; the only caller of `Device.copy`.

    Args:
        stored, units: by unit index; the streamer adds and removes units.
    """

    def __init__(
        self, device: Device, stored: Mapping[int, StoredUnit], units: Mapping[int, Unit], stats: Stats, ranges: Ranges
    ) -> None:
        self.ranges = ranges
        self._device = device
        self._stored = stored
        self._units = units
        self._stats = stats
        self._stalls: deque[tuple[Any, PhaseStats, int]] = deque()  # marker, phase, unit waited for
        self._staging: _StagingRing | None = None
        self._loaded: dict[int, Slot] = {}  # by the unit they hold
        self.ring: list[Slot] = []
        self.slot_bytes = 0  # of each slot of the ring
        self.own: dict[int, Slot] = {}  # by the unit they are for, loaded or not
        self.extra: list[Slot] = []
        self.slots_bytes = 0  # what all slots take on the device
        self.whole_bytes = 0  # of weights that are there as they are
        self.phase = PhaseStats()  # whose loads and stalls these are

    # ---- memory

    @property
    def weights_bytes(self) -> int:
        """What our weights take on the device."""
        return self.slots_bytes + self.whole_bytes

    def lay_ring(self, count: int, num_bytes: int) -> None:
        """Allocate the ring's slots anew, each of `num_bytes`; the old ones are empty."""
        self.drop_ring()
        self.slot_bytes = num_bytes
        for _ in range(count):
            self.ring.append(self._make_slot(num_bytes))
        self._stats.num_slots, self._stats.slot_bytes = count, num_bytes

    def drop_ring(self) -> None:
        """Free the ring's slots, which are empty."""
        while self.ring:
            self._free(self.ring.pop())
        self.slot_bytes = 0

    def give_own(self, unit: int) -> None:
        """Allocate a slot for `unit` alone, in which it stays."""
        self.own[unit] = self._make_slot(self._stored[unit].num_bytes)

    def drop_own(self, unit: int) -> None:
        """Free the slot of `unit`, which is empty."""
        self._free(self.own.pop(unit))

    def add_extra(self, unit: int) -> Slot:
        """A slot for one use of `unit`, when more units are in use at once than there is room for."""
        slot = self._make_slot(self._stored[unit].num_bytes, is_extra=True)
        self.extra.append(slot)
        self._stats.num_extra_slots += 1
        return slot

    def drop_extra(self, slot: Slot) -> None:
        """Free an extra slot, which is empty."""
        self.extra.remove(slot)
        self._free(slot)

    def forget(self, units: Iterable[int]) -> None:
        """These units, which are in no slot, exist no more."""
        for unit in units:
            for slot in self.ring:
                slot.forget(unit)

    def close(self) -> None:
        """Drop all device memory. The device must be idle (`Device.synchronize`)."""
        slots = [*self.ring, *self.own.values(), *self.extra]
        self.ring, self.own, self.extra, self._loaded, self._staging = [], {}, [], {}, None
        self.slots_bytes = self.slot_bytes = 0
        with contextlib.ExitStack() as each:  # all of them, also when one fails
            for slot in slots:
                each.callback(self._device.free, slot.buffer)

    def measure_link(self) -> float | None:
        """GB/s from host to device, by copying a part of some unit into an empty slot; blocks the host for 6 ms."""
        for slot in [*self.ring, *self.own.values()]:
            if slot.unit is not None:
                continue
            for stored in self._stored.values():
                source = max((s.source for s in stored.segments if s.is_pinned), key=torch.Tensor.numel, default=None)
                if source is not None:
                    source = source[: min(_PROBE_BYTES, slot.buffer.numel())]
                    return self._device.measure_link(slot.buffer[: source.numel()], source)
        return None

    # ---- one unit's way into a slot and out of it

    @property
    def loaded(self) -> Collection[int]:
        """The units that are in a slot, or on their way into one."""
        return self._loaded.keys()

    def slot_of(self, unit: int) -> Slot | None:
        """The slot that holds `unit`, or into which it is being loaded."""
        return self._loaded.get(unit)

    def is_in_slot(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of some slot."""
        address = tensor.untyped_storage().data_ptr()
        slots = [*self.ring, *self.own.values(), *self.extra]
        return any(slot.buffer.untyped_storage().data_ptr() == address for slot in slots)

    def empty_slot(self, unit: int) -> Slot | None:
        """Where `unit` can go without making room: its own slot, or one of the ring that is empty and large enough."""
        own = self.own.get(unit)
        if own is not None:
            return own
        if self._stored[unit].num_bytes > self.slot_bytes:
            return None
        return next((s for s in self.ring if s.unit is None), None)

    def load(self, unit: int, slot: Slot) -> None:
        """Start copying `unit` into `slot` on the copy stream; does not block the host. Call under `engine_tensors`.

        Raises:
            TransferError: the slot holds another unit, or the unit is in another slot.
        """
        if slot.unit is not None or unit in self._loaded:
            raise TransferError(f"unit {unit} loaded into a slot that holds unit {slot.unit}, or loaded twice")
        slot.prepare(unit, self._stored[unit], self._units[unit].binding, self._device)
        # Behind the last readers; from now on nothing but this copy may touch the slot until `wait`. The slot is
        # the unit's only once the copy is queued: if that fails, it stays free, and its readers' events stay.
        try:
            with self.ranges("load", self._units[unit].spec.name):
                slot.ready = self._copy(unit, slot)
        except BaseException:
            # Some of its segments may be on their way: what comes to lie in this memory next waits for them.
            slot.after = [*slot.after, self._device.record_copies()]
            raise
        slot.after, slot.readers = [], []
        slot.unit = unit
        self._loaded[unit] = slot
        self._stats.num_loads += 1
        self._stats.loaded_bytes += self._stored[unit].copied_bytes
        self.phase.num_loads += 1
        self.phase.loaded_bytes += self._stored[unit].copied_bytes

    def wait(self, unit: int) -> list[torch.Tensor]:
        """Queue this thread's compute behind the load of `unit`; returns the unit's views."""
        slot = self._holding(unit)
        stream = self._device.compute_stream()
        if stream not in slot.readers:
            marker = self._device.start_stall(stream, slot.ready)
            with self.ranges("wait", self._units[unit].spec.name):
                self._device.wait(stream, slot.ready)
            slot.readers.append(stream)
            if marker is not None:
                self._stats.num_stalls += 1
                self.phase.num_stalls += 1
                self._stalls.append((self._device.end_stall(stream, marker), self.phase, unit))
            self._count_stalls()
        return slot.views[unit]

    def vacate(self, unit: int) -> None:
        """Take `unit` out of its slot; its tensors are absent already, so no reader can follow.

        Records on each reading stream an event that covers whatever was issued up to now.
        """
        slot = self._holding(unit)
        records = [self._device.record(stream) for stream in slot.readers]
        # What nobody waited for may still be on its way.
        slot.after = [*slot.after, *(records or [slot.ready])]
        slot.unit = None
        del self._loaded[unit]
        if slot.is_extra:
            self.drop_extra(slot)

    def abandon(self, unit: int) -> None:
        """Leave a slot's memory to whoever still looks at it, and give the slot new memory."""
        slot = self._holding(unit)
        if slot.is_extra:
            return  # it goes when it is vacated, and whoever looks at its memory keeps that
        is_own = self.own.get(unit) is slot
        fresh = self._make_slot(self._stored[unit].num_bytes if is_own else self.slot_bytes)
        if is_own:
            self.own[unit] = fresh
        else:
            self.ring[self.ring.index(slot)] = fresh
        fresh.unit, fresh.ready = unit, fresh.after[0]
        self._loaded[unit] = fresh
        self._free(slot)

    # ---- inside

    def _holding(self, unit: int) -> Slot:
        slot = self._loaded.get(unit)
        if slot is None:
            raise TransferError(f"unit {unit} is in no slot")
        return slot

    def _copy(self, unit: int, slot: Slot) -> Event:
        stored = self._stored[unit]
        if stored.is_pinned:
            return self._device.copy(slot.copies[unit], slot.after)
        if self._staging is None:
            self._staging = _StagingRing(self._device)
        pinned = [s.is_pinned for s in stored.segments for _ in s.parts()]
        return self._staging.copy(list(zip(stored.pieces(slot.buffer), pinned, strict=True)), slot.after)

    def _make_slot(self, num_bytes: int, *, is_extra: bool = False) -> Slot:
        with engine_tensors():
            stream = self._device.compute_stream()
            # The allocator may hand out memory that queued compute still reads: the first copy waits for all of it.
            issued = self._device.record(stream)
            buffer = self._device.allocate(num_bytes)
        self.slots_bytes += self._device.rounded_bytes(num_bytes)
        self._stats.peak_device_bytes = max(self._stats.peak_device_bytes, self.weights_bytes)
        return Slot(buffer, stream, issued, is_extra=is_extra)

    def _free(self, slot: Slot) -> None:
        # The memory goes back to the stream it was allocated on: what follows there must not meet a copy or a reader.
        try:
            for event in slot.after:
                self._device.wait(slot.stream, event)
        finally:
            self.slots_bytes -= self._device.rounded_bytes(slot.buffer.numel())
            self._device.free(slot.buffer)

    def _count_stalls(self) -> None:
        """Add up the stalls the device has passed; the host never waits for the others."""
        while self._stalls:
            marker, phase, unit = self._stalls[0]
            stall_ms = self._device.stall_ms(marker)
            if stall_ms is None:
                return
            self._stats.stall_ms += stall_ms
            phase.stall_ms += stall_ms
            phase.stall_ms_by_unit[unit] = phase.stall_ms_by_unit.get(unit, 0.0) + stall_ms
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
        event = self._copy([], after)
        for (target, source), is_pinned in pieces:
            if is_pinned or not self._buffers:
                event = self._copy([(target, source)], [], is_locked=is_pinned)
                continue
            for start in range(0, source.numel(), _STAGING_BYTES):
                part = source[start : start + _STAGING_BYTES]
                number, self._next = self._next, (self._next + 1) % len(self._buffers)
                if self._events[number] is not None:
                    self._device.synchronize_event(self._events[number])
                staged = self._buffers[number][: part.numel()]
                staged.copy_(part)
                event = self._copy([(target[start : start + part.numel()], staged)], [])
                self._events[number] = event
        return event

    def _copy(
        self, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event], *, is_locked: bool = True
    ) -> Event:
        return self._device.copy(self._device.prepare(pieces, is_locked=is_locked), after)
