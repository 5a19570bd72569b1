"""Device buffers for weights, and the copies into them. Who moves bytes is this file; who waits for whom is the note
in `device/base.py`.

A slot is a device buffer that holds one unit at a time (`unit.py`). Its life, as seen from the host:

    free -> `load`: a copy is queued, behind the last readers -> `wait`: compute is queued behind the copy
         -> read by any number of operators -> `vacate`: readers' events are recorded -> free

Some slots form the *ring*, through which streamed blocks take turns; others are a resident unit's *own*, made when a
plan gives the unit room and dropped when it takes it back; a few are *extra*, for one use that nothing else has room
for. What is packed may have a wire buffer of its own (`wires.py`), in which it stays packed while slots come and go.

`load` and `vacate` issue work and return; nothing here blocks the host, except copies from memory that could
not be page-locked, which go through a small staging ring.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from layerstream.device.base import Device, Event, Stream, engine_tensors
from layerstream.errors import TransferError
from layerstream.host.home import Home, PackedHome
from layerstream.interrupts import twice_if_interrupted
from layerstream.stats import PhaseStats, Stats
from layerstream.transfer.helper import Helper
from layerstream.transfer.profiling import Ranges
from layerstream.transfer.route import Routes
from layerstream.transfer.unit import Slot, StreamedUnit, UnitState
from layerstream.transfer.wires import OwnWires, WireRing

_PROBE_BYTES = 2**26  # enough for the link's full speed, 1.2 ms of it
_STAGED_PROBES = 8  # one behind the other, as loads are: the first part of each meets the last of the one before
_TIMED_PROBES = 4  # of these, the last: by then both copies of each part run beside those of others


class TransferEngine:
    """Owns every slot; the only caller of `Device.copy`.

    Args:
        units: by index; the streamer adds and removes them.
        helpers: other GPUs whose links to the host carry a share of loads.
    """

    def __init__(
        self,
        device: Device,
        units: Mapping[int, StreamedUnit],
        stats: Stats,
        ranges: Ranges,
        helpers: Sequence[Helper] = (),
    ) -> None:
        self.ranges = ranges
        self._device = device
        self._units = units
        self._stats = stats
        self._stalls: deque[tuple[Any, PhaseStats, int]] = deque()  # marker, phase, unit waited for
        self.wires = WireRing(self._allocate, self._give_back)
        self._own_wires = OwnWires(self._allocate, self._give_back)
        self._routes = Routes(device, self.wires, self._own_wires, ranges, helpers)
        self.ring: list[Slot] = []
        self.slot_bytes = 0  # of each slot of the ring
        self.extra: list[Slot] = []
        self._slots: dict[Slot, None] = {}  # all that there are, also of units that could not be let go of in order
        self.slots_bytes = 0  # what all slots and wire buffers take on the device, own ones included
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

    def give_own_slot(self, unit: StreamedUnit) -> None:
        """Allocate a slot for `unit` alone, in which it stays."""
        unit.own_slot = self._make_slot(unit.home.device_bytes)

    def drop_own_slot(self, unit: StreamedUnit) -> None:
        """Free the slot of `unit`, which is empty."""
        slot, unit.own_slot = unit.own_slot, None
        if slot is not None:
            self._free(slot)

    def give_own_wire(self, unit: StreamedUnit) -> None:
        """Allocate a wire buffer for `unit` alone, which is packed: its bytes stay there from its next load on, and it
        is decoded from there into a slot at each use."""
        own = self._own_wires
        own.give(unit.home)
        if len(own.of) > self._stats.num_own_wires:
            self._stats.num_own_wires = len(own.of)
            self._stats.own_wires_bytes = own.num_bytes

    def drop_own_wire(self, home: Home) -> None:
        """Free the wire buffer that a unit with this home has of its own, if it has one."""
        self._own_wires.drop(home)

    def has_own_wire(self, unit: StreamedUnit) -> bool:
        """Whether its packed bytes stay on the device, filled or not."""
        return unit.home in self._own_wires.of

    @property
    def with_own_wire(self) -> list[StreamedUnit]:
        """The units that have a wire buffer of their own."""
        return [unit for unit in self._units.values() if unit.home in self._own_wires.of]

    @property
    def ring_units(self) -> tuple[int, ...]:
        """What is in the ring, slot by slot; -1: nothing."""
        return tuple([-1 if slot.unit is None else slot.unit.index for slot in self.ring])

    @property
    def with_own_slot(self) -> list[StreamedUnit]:
        """The units that have a slot of their own, loaded or not."""
        return [unit for unit in self._units.values() if unit.own_slot is not None]

    def add_extra(self, unit: StreamedUnit) -> Slot:
        """A slot for one use of `unit`, when more units are in use at once than there is room for."""
        slot = self._make_slot(unit.home.device_bytes, is_extra=True)
        self.extra.append(slot)
        self._stats.num_extra_slots += 1
        return slot

    def drop_extra(self, slot: Slot) -> None:
        """Free an extra slot, which is empty."""
        self.extra.remove(slot)
        self._free(slot)

    def forget(self, unit: StreamedUnit) -> None:
        """The unit, which is in no slot, exists no more."""
        for slot in self.ring:
            slot.forget(unit)

    def forget_loads(self, unit: StreamedUnit) -> None:
        """The unit has another home: loads of it are prepared anew."""
        for slot in self._slots:
            slot.forget_load(unit)

    def close(self) -> None:
        """Drop all device memory. The device must be idle (`Device.synchronize`)."""
        buffers = [slot.buffer for slot in self._slots] + self.wires.close() + self._own_wires.close()
        self._slots, self.ring, self.extra = {}, [], []
        for unit in self._units.values():
            unit.slot = unit.own_slot = None
        self.slots_bytes = self.slot_bytes = 0
        with contextlib.ExitStack() as each:  # all of them, also when one fails
            for buffer in buffers:
                each.callback(self._device.free, buffer)
            each.callback(self._routes.close)

    def measure_links(self, known: Collection[str]) -> dict[str, float]:
        """GB/s to the device from host memory (""), and from each other GPU that has units, by its name, but for those
        that are known: by copying some unit, or a part of it, into an empty slot; blocks the host for 6 ms each."""
        slot = max((s for s in self._slots if s.unit is None), key=lambda s: s.buffer.numel(), default=None)
        found: dict[str, float] = {}
        if slot is None:
            return found
        for unit in sorted(self._units.values(), key=lambda unit: -unit.home.wire_bytes):
            keeper = unit.home.keeper
            name = "" if keeper is None else keeper.name
            if name in known or name in found:
                continue
            is_staged = self._routes.is_staged(unit.home)
            speed = self._speed_of_route(unit, slot) if is_staged else self._speed_from(unit.home, slot)
            if speed is not None:
                found[name] = speed
        return found

    def _speed_from(self, home: Home, slot: Slot) -> float | None:
        source = max((s.source for s in home.segments if s.is_pinned), key=torch.Tensor.numel, default=None)
        if source is None or not source.numel():
            return None
        source = source[: min(_PROBE_BYTES, slot.buffer.numel())]
        self._wait_for_all(self._device.compute_stream(), slot.after)
        return self._device.measure_link(slot.buffer[: source.numel()], source)

    def _speed_of_route(self, unit: StreamedUnit, slot: Slot) -> float | None:
        """Of a route with more than one copy, which is timed as a whole."""
        home = unit.home
        if not 0 < home.wire_bytes <= slot.buffer.numel():
            return None
        issue = self._routes.prepare_copy(home, slot.buffer, unit.spec.name)
        device = self._device
        device.synchronize_event(issue([*slot.after, device.record(device.compute_stream())]))  # to warm up
        start = device.mark_copies([issue([]) for _ in range(_STAGED_PROBES - _TIMED_PROBES)])
        end = device.mark_copies([issue([]) for _ in range(_TIMED_PROBES)])
        device.synchronize_event(device.record_copies())
        elapsed_ms = device.elapsed_ms(start, end)
        return _TIMED_PROBES * home.wire_bytes / elapsed_ms / 1e6 if elapsed_ms else None

    # ---- one unit's way into a slot and out of it

    @property
    def loaded(self) -> list[StreamedUnit]:
        """The units that are in a slot, or on their way into one."""
        return [unit for unit in self._units.values() if unit.slot is not None]

    def is_in_slot(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of some slot."""
        address = tensor.untyped_storage().data_ptr()
        return any(slot.buffer.untyped_storage().data_ptr() == address for slot in self._slots)

    def empty_slot(self, unit: StreamedUnit) -> Slot | None:
        """Where `unit` can go without making room: its own slot, or one of the ring that is empty and large enough."""
        if unit.own_slot is not None:
            return unit.own_slot
        if unit.home.device_bytes > self.slot_bytes:
            return None
        return next((s for s in self.ring if s.unit is None), None)

    def load(self, unit: StreamedUnit, slot: Slot) -> None:
        """Start copying `unit` into `slot` on the copy stream; does not block the host. Call under `engine_tensors`.

        Raises:
            TransferError: the slot holds another unit, or the unit is in another slot.
        """
        if unit.slot is not None:
            unit.refuse(UnitState.ABSENT)
        if slot.unit is not None:
            raise TransferError(f"unit `{unit.spec.name}` loaded into a slot that holds `{slot.unit.spec.name}`")
        issue = slot.prepare(unit, self._routes)
        own_wire = self._own_wires.of.get(unit.home)
        is_here = own_wire is not None and own_wire.filled is not None  # packed, and only decoded
        # Behind the last readers; from now on nothing but this copy may touch the slot until `wait`. The slot is
        # the unit's only once the copy is queued: if that fails, it stays free, and its readers' events stay.
        try:
            if self.ranges.is_on and not is_here:
                # What is packed is copied to a wire buffer, whatever reads the slot still.
                after = () if isinstance(unit.home, PackedHome) else slot.after
                with self.ranges.loading(unit.spec.name, unit.home.wire_bytes, after):
                    slot.ready = unit.last_load = issue(slot.after)
            else:
                slot.ready = unit.last_load = issue(slot.after)
        except BaseException:
            # Some of its segments may be on their way: what comes to lie in this memory next waits for them.
            unit.last_load = self._device.record_copies()
            slot.after = [*slot.after, unit.last_load]
            raise
        slot.after, slot.readers = [], []
        unit.filled(slot)
        num_bytes = 0 if is_here else unit.home.wire_bytes
        self._stats.num_loads += 1
        self._stats.num_loads_without_copy += is_here
        self._stats.loaded_bytes += num_bytes
        self.phase.num_loads += 1
        self.phase.loaded_bytes += num_bytes

    def wait(self, unit: StreamedUnit, stream: Stream | None = None) -> list[torch.Tensor]:
        """Queue this thread's compute, on `stream`, behind the load of `unit`; returns the unit's views."""
        slot = unit.slot or unit.holding()
        if stream is None:
            stream = self._device.compute_stream()
        if stream not in slot.readers:
            marker = self._device.start_stall(stream, slot.ready)
            if self.ranges.is_on:
                with self.ranges.waiting(unit.spec.name):
                    self._device.wait(stream, slot.ready)
            else:
                self._device.wait(stream, slot.ready)
            slot.readers.append(stream)
            if marker is not None:
                self._stats.num_stalls += 1
                self.phase.num_stalls += 1
                self._stalls.append((self._device.end_stall(stream, marker), self.phase, unit.index))
        return slot.prepared[unit].views

    def vacate(self, unit: StreamedUnit, stream: Stream | None = None) -> None:
        """Take `unit`, whose tensors are absent already, out of its slot, so that no reader can follow.

        Records on each reading stream an event that covers whatever was issued up to now; and on `stream`, this
        thread's own, where weights may have been read that another stream has waited for.
        """
        slot = unit.slot
        if slot is None or unit.is_present:
            unit.refuse(UnitState.LOADED)
        self._note_readers(slot, stream or self._device.compute_stream())
        unit.left()
        if slot.is_extra:
            self.drop_extra(slot)

    def abandon(self, unit: StreamedUnit) -> None:
        """Leave a slot's memory to whoever still looks at it, and give the slot new memory."""
        slot = unit.holding()
        if slot.is_extra:
            return  # it goes when it is vacated, and whoever looks at its memory keeps that
        is_own = unit.own_slot is slot
        fresh = self._make_slot(unit.home.device_bytes if is_own else self.slot_bytes)
        if is_own:
            unit.own_slot = fresh
        else:
            self.ring[self.ring.index(slot)] = fresh
        fresh.ready, unit.slot, fresh.unit = fresh.after[0], fresh, unit
        self._note_readers(slot, self._device.compute_stream())  # its tensors are absent: none follows
        self._free(slot)

    # ---- inside

    def _note_readers(self, slot: Slot, stream: Stream) -> None:
        """What comes to lie in a slot's memory next waits for what was issued up to now on the streams that read it,
        and on `stream`."""
        if not slot.readers:  # what nobody waited for may still be on its way
            slot.after = [*slot.after, slot.ready]
        elif stream not in slot.readers:
            slot.readers.append(stream)
        for reader in slot.readers:
            slot.after = [*slot.after, self._device.record(reader)]

    def _make_slot(self, num_bytes: int, *, is_extra: bool = False) -> Slot:
        slot = Slot(*self._allocate(num_bytes), is_extra=is_extra)
        self._slots[slot] = None
        return slot

    def _free(self, slot: Slot) -> None:
        self._slots.pop(slot, None)
        self._give_back(slot.buffer, slot.stream, slot.after)

    def _allocate(self, num_bytes: int) -> tuple[torch.Tensor, Stream, Event]:
        """A buffer, the stream that its memory goes back to, and what the first copy into it is to wait for."""
        with engine_tensors():
            stream = self._device.compute_stream()
            # The allocator may hand out memory that queued compute still reads: the first copy waits for all of it.
            issued = self._device.record(stream)
            buffer = self._device.allocate(num_bytes)
        self.slots_bytes += self._device.rounded_bytes(num_bytes)
        self._stats.peak_device_bytes = max(self._stats.peak_device_bytes, self.weights_bytes)
        return buffer, stream, issued

    def _give_back(self, buffer: torch.Tensor, stream: Stream, after: Sequence[Event]) -> None:
        # The memory goes back to the stream it was allocated on: what follows there must not meet a copy or a reader.
        try:
            twice_if_interrupted(functools.partial(self._wait_for_all, stream, after))
        finally:
            self.slots_bytes -= self._device.rounded_bytes(buffer.numel())
            self._device.free(buffer)

    def _wait_for_all(self, stream: Stream, events: Sequence[Event]) -> None:
        for event in events:
            self._device.wait(stream, event)

    def count_stalls(self) -> None:
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
