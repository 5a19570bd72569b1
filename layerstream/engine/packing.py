"""Packing: units whose bytes at home are fewer than on the device, and are decoded there each time they are loaded.

Which units: those whose loads a pass waits for, by the plan ("auto"), or all blocks on entering ("ahead"). One unit is
packed at a time, while no component runs. Its bytes are packed on the device; what is then on the host is read back,
decoded and compared with what it was made of, bit by bit. Only then is the home exchanged (`exchange.py`), and the raw
bytes are let go. A unit that gains too little, or of which somebody else has the memory, stays raw.

Whoever asks for a weight at home (to write to it, to save it, to have it back) makes its unit raw again; it is packed
anew when nobody looks any more.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from layerstream.blocks import Sizes
from layerstream.device.base import Device, engine_tensors
from layerstream.engine.attachments import Attachments
from layerstream.engine.edits import Edits
from layerstream.engine.exchange import HomeExchanges
from layerstream.engine.ledger import Ledger
from layerstream.host.home import PackedHome, RawHome
from layerstream.host.memory import PageMapping, touch, trim_heap
from layerstream.host.store import HostStore
from layerstream.planning.phase_plan import PhasePlan
from layerstream.planning.plan import Plan
from layerstream.progress import Progress
from layerstream.saying import warn
from layerstream.stats import Stats
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import StreamedUnit

_log = logging.getLogger("layerstream.packing")

LEAST_BYTES = 2**20  # of a unit; less is not worth a launch
LEAST_GAIN = 0.1

_LEAST_TIMED_BYTES = 2**24  # of a unit whose decoding tells how fast it is
_TIMED_UNITS = 9  # the last ones count
_MOST_TIME_SHARE = 0.05  # of the time since the first unit was packed, that packing takes
_NO_ROOM = "the budget has no room for wire buffers"
_MOST_UNPACKED = 2  # times that a unit is touched, until it stays raw


class Packing:
    """Which units of one streamer are packed, and how they come to be and cease to be so.

    Attributes:
        why_off: why nothing is packed; "": it may be.

    Args:
        mode: "off"; "ahead": all blocks on entering; "auto": what a pass waits for, while calls run.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        transfer: TransferEngine,
        edits: Edits,
        ledger: Ledger,
        exchanges: HomeExchanges,
        stats: Stats,
        mode: str,
    ) -> None:
        self.why_off = 'packing="off"' if mode == "off" else ""
        self._device = device
        self._attached = attached
        self._transfer = transfer
        self._edits = edits
        self._ledger = ledger
        self._exchanges = exchanges
        self._stats = stats
        self._mode = mode
        self._refused: dict[int, str] = {}  # why a unit stays raw
        self._num_unpacked: dict[int, int] = {}  # times that it was made raw again
        self._wanted: deque[int] = deque()
        self._is_asked = False  # the exchange of a unit
        self._considered: Plan | None = None  # the plan that was looked at last
        self._has_changed = False  # what is packed is not what plans are made with
        self._is_checked = False  # kernels are there
        self._speeds: deque[float] = deque(maxlen=_TIMED_UNITS)  # of decoding, in GB/s
        self._spent_s = 0.0
        self._began_s = 0.0

    @property
    def is_ahead(self) -> bool:
        """Whether all that can be is packed on entering."""
        return self._mode == "ahead"

    def why_raw(self) -> str:
        """Why nothing is packed, or how many units stay raw that were to be packed, and why; "": none, or it is off."""
        if self._mode == "off" or self.why_off:
            return self.why_off if self._mode != "off" else ""
        counts = Counter(why for index, why in self._refused.items() if index in self._attached.units)
        return "; ".join(f"{count} of what was to be: {why}" for why, count in counts.most_common())

    # ---- when

    def prepare(self) -> None:
        """Before anything is page-locked: see that it can be done, and have kernels made."""
        if not self.why_off and not self._is_checked:
            self._is_checked = True
            self.why_off = self._device.why_not_packed()
            if self.why_off:
                warn(f"weights are not packed: {self.why_off}")

    def attached(self) -> None:
        """Components are there: pack their blocks now, if that is wanted."""
        if not self.is_ahead or self.why_off:
            return
        units = [unit for unit in self._attached.units.values() if self._may_pack(unit)]
        if not self._ledger.planner.has_room_to_pack(self._sizes(unit.index for unit in units)):
            self._refuse([unit.index for unit in units], _NO_ROOM)
            return
        progress = Progress(sum(unit.home.device_bytes for unit in units), "layerstream packs the weights")
        try:
            with engine_tensors():
                for unit in units:
                    home = self._make(self._exchanges.store_of(unit), unit)
                    if home is not None:
                        self._exchanges.exchange(unit, home)
                    self._exchanges.release()
                    progress.add(unit.home.device_bytes)
        finally:
            progress.close()
        trim_heap()
        self._tell_planner()

    def at_rest(self) -> None:
        """No component is in the middle of a call: have the next unit packed that is wanted."""
        if self._mode == "off" or self.why_off:
            return
        if self._is_asked and not self._exchanges.num_wanted:
            self._is_asked = False
            self._has_changed |= not self._wanted
            self._count()
        if self._has_changed:
            self._tell_planner()
        self._consider()
        is_early = self._spent_s > _MOST_TIME_SHARE * (time.perf_counter() - self._began_s)
        if not self._wanted or self._is_asked or is_early:
            return
        index = next((index for index in self._wanted if not self._is_looked_at(index)), None)
        if index is not None:
            self._began_s = self._began_s or time.perf_counter()
            self._is_asked = True
            self._wanted.remove(index)
            self._exchanges.ask(index, self._make)

    def _is_looked_at(self, index: int) -> bool:
        unit = self._attached.units.get(index)
        return unit is not None and self._exchanges.is_looked_at(unit)

    def _consider(self) -> None:
        """Look at a plan that is new: what it makes passes wait for is to be packed."""
        plan = self._ledger.planner.present
        if plan is None or plan is self._considered:
            return
        self._considered = plan
        known = set(self._wanted)
        found = [
            index
            for phase_plan in plan.phases
            for index in (self._waited_for(plan, phase_plan) if self._mode == "auto" else plan_units(plan, phase_plan))
            if index not in known and index in self._attached.units and self._may_pack(self._attached.units[index])
        ]
        if found:
            self.prepare()
        if not found or self.why_off:
            return
        if self._ledger.planner.has_room_to_pack(self._sizes([*self._wanted, *found])):
            self._wanted.extend(found)
            self._tell_planner()
        else:
            self._refuse(found, _NO_ROOM)

    def _waited_for(self, plan: Plan, phase_plan: PhasePlan) -> list[int]:
        """Units whose copies make passes of a phase longer than compute: those that stream; of what runs once a call,
        also those that are loaded for it."""
        prediction, phase = phase_plan.prediction, phase_plan.phase
        if prediction is None or prediction.bound == "compute":
            return []
        everywhere = frozenset.intersection(*(p.resident | p.kept for p in plan.phases))
        stays = phase_plan.resident if phase.is_repeated else everywhere
        return [index for index in plan_units(plan, phase_plan) if index not in stays]

    def _may_pack(self, unit: StreamedUnit) -> bool:
        return (
            unit.spec.is_block
            and isinstance(unit.home, RawHome)
            and unit.index not in self._refused
            and unit.home.device_bytes >= LEAST_BYTES
        )

    def _tell_planner(self) -> None:
        """Plans are made with what is packed, and with what is to be, from now on."""
        self._has_changed = False
        self._ledger.planner.pack(self._sizes(self._wanted))
        self._count()

    def _count(self) -> None:
        packed = [unit for unit in self._attached.units.values() if isinstance(unit.home, PackedHome)]
        self._stats.num_packed_units = len(packed)
        self._stats.packed_bytes = sum(unit.home.wire_bytes for unit in packed)
        self._stats.unpacked_bytes = sum(unit.home.device_bytes for unit in packed)

    def _sizes(self, wanted: Iterable[int]) -> dict[int, Sizes]:
        """Of units that are packed, and of those that are to be, by index."""
        units, sizes = self._attached.units, {}
        for index, unit in units.items():
            if isinstance(unit.home, PackedHome):
                sizes[index] = Sizes(unit.spec.num_bytes, unit.home.wire_bytes, unit.home.wire_bytes)
        for index in wanted:
            if index in units and index not in sizes:
                most = int((1 - LEAST_GAIN) * units[index].home.device_bytes)  # wire buffers are made for it
                sizes[index] = Sizes(units[index].spec.num_bytes, most, most)
        return sizes

    def _refuse(self, units: Iterable[int], why: str) -> None:
        """These stay raw."""
        self._refused.update(dict.fromkeys(units, why))

    def forget(self, units: Sequence[StreamedUnit]) -> None:
        """These units are let go of."""
        gone = {unit.index for unit in units}
        self._wanted = deque(index for index in self._wanted if index not in gone)
        self._is_asked = False
        self._considered = None
        self._has_changed = True

    # ---- one unit

    def _why_raw(self, unit: StreamedUnit) -> str:
        """Why a unit cannot be packed; "": it can."""
        binding = unit.binding
        if not all(bound.has_one_home and bound.home_device.type == "cpu" for bound in binding.tensors):
            return "its memory is not all ours"
        places = [at for bound, at in zip(binding.tensors, unit.home.offsets, strict=True) if bound.num_bytes]
        if len(set(places)) < len(places):
            return "weights of it are tied by their memory"
        if binding.statistics:
            return "its forward writes to it"
        if self._edits.holds(unit) or self._exchanges.is_looked_at(unit):
            return "somebody else has its memory"
        if any(bound.home.is_shared() for bound in binding.tensors):
            return "its memory is shared"
        return ""

    def _make(self, store: HostStore, unit: StreamedUnit) -> PackedHome | None:
        """A packed home of the same bytes; None: the unit stays raw."""
        started = time.perf_counter()
        try:
            why = self._why_raw(unit)
            home = None
            if not why:
                with self._ledger.forgiving():
                    try:
                        home = self._packed(store, unit)
                        why = "" if home is not None else f"packing gains less than {LEAST_GAIN:.0%}"
                    except torch.OutOfMemoryError:
                        why = "there is no room to pack it"
            if why:
                self._refuse([unit.index], why)
                self._has_changed = True
                _log.debug("`%s` stays raw: %s", unit.spec.name, why)
            return home
        finally:
            self._spent_s += time.perf_counter() - started

    def _packed(self, store: HostStore, unit: StreamedUnit) -> PackedHome | None:
        device, old = self._device, unit.home
        num_bytes = old.device_bytes
        is_32_bits = all(bound.dtype is torch.float32 for bound in unit.binding.tensors)
        with contextlib.ExitStack() as undo:
            with self._scratch(num_bytes) as raw:
                raw.zero_()
                pairs = [(target, source) for target, source, _ in old.pairs(raw)]
                copies = device.prepare(pairs, is_locked=old.is_pinned)
                stream = device.compute_stream()
                device.wait(stream, device.copy(copies, [device.record(stream)]))
                most_bytes = int((1 - LEAST_GAIN) * num_bytes)
                found = None
                for word_bytes in (4, 2) if is_32_bits else (2,):
                    found = found or device.pack(raw, word_bytes, most_bytes)
                if found is None:
                    return None
                packed, layout = found
                pages = PageMapping(packed.numel())
                touch([pages.range])
                home = PackedHome(device, old.offsets, num_bytes, layout=layout)
                home.make_raw = functools.partial(self._make_raw, unit)
                undo.callback(store.release, home)
                device.copy_back(store.hold(home, pages, packed.numel()), packed)
                del packed, found
                if not self._is_same(home, raw):
                    self._stats.num_packing_mismatches += 1
                    warn(f"`{unit.spec.name}` does not come back as it was when it is packed; it stays as it is.")
                    return None
            undo.pop_all()
            return home

    def _is_same(self, home: PackedHome, raw: torch.Tensor) -> bool:
        """Whether what is on the host decodes to these bytes, which are on the device."""
        with self._scratch(home.device_bytes) as again:
            again.fill_(0xA5)
            marks = self._decode(home, again)
            with engine_tensors():
                is_same = torch.equal(again, raw)  # the host has waited for the decoding by now
            ms = self._device.elapsed_ms(*marks)
            if is_same and ms and home.device_bytes >= _LEAST_TIMED_BYTES:
                self._speeds.append(home.device_bytes / ms / 1e6)
                self._ledger.planner.decode_gb_per_s = median(self._speeds)
            return is_same

    def _make_raw(self, unit: StreamedUnit) -> RawHome:
        """Give a unit its bytes back as they are, in memory of their own."""
        home = unit.home
        if isinstance(home, RawHome):
            return home
        assert isinstance(home, PackedHome)
        store = self._exchanges.store_of(unit)
        with engine_tensors():
            pages = PageMapping(home.device_bytes)
            touch([pages.range])
            raw = RawHome(self._device, home.offsets, home.device_bytes)
            self._decode_to_host(home, store.hold(raw, pages, home.device_bytes))
            self._exchanges.exchange(unit, raw, pages)
        count = self._num_unpacked[unit.index] = self._num_unpacked.get(unit.index, 0) + 1
        if count >= _MOST_UNPACKED:
            self._refuse([unit.index], "it is looked at again and again")
        self._has_changed, self._considered = True, None
        return raw

    def _decode_to_host(self, home: PackedHome, buffer: torch.Tensor) -> None:
        """On the device, which is ten times faster; on the host where the device has no room, or has failed."""
        with self._ledger.forgiving():
            try:
                with self._scratch(home.device_bytes) as raw:
                    self._decode(home, raw)
                    self._device.copy_back(buffer, raw)
                return
            except Exception as error:
                _log.debug("decoding on the host: %r", error)
        self._device.unpack_on_host(home.wire, home.layout, buffer)

    def _decode(self, home: PackedHome, raw: torch.Tensor) -> tuple[Any, Any]:
        """Decode what is on the host into a device buffer; compute that follows comes after it.

        Returns: marks before and after the decoding.
        """
        device = self._device
        stream = device.compute_stream()
        with self._scratch(home.wire_bytes) as wire:
            pairs = [(target, source) for target, source, _ in home.pairs(wire)]
            copies = device.prepare(pairs, is_locked=home.is_pinned)
            unpacking = device.prepare_unpack(wire[: home.wire_bytes], home.layout, raw)
            device.wait(stream, device.copy(copies, [device.record(stream)]))
            start = device.mark(stream)
            device.wait(stream, device.unpack(unpacking, [device.record(stream)]))
            return start, device.mark(stream)

    @contextlib.contextmanager
    def _scratch(self, num_bytes: int) -> Iterator[torch.Tensor]:
        """A device buffer for the moment (uint8 [num_bytes]). What is on its way to it by then is waited for."""
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


def plan_units(plan: Plan, phase_plan: PhasePlan) -> list[int]:
    """The blocks of a phase, in order."""
    return [u.index for u in plan.units if u.is_block and phase_plan.phase.involves(u)]
