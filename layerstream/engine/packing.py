"""Packing: units whose bytes at home are fewer than on the device, and are decoded there each time they are loaded.

Which units: those whose loads a pass waits for, by the plan ("auto"), or all blocks on entering ("ahead"). One unit is
packed at a time, while no component runs. Its bytes are packed on the device; what is then on the host is read back,
decoded and compared with what it was made of, bit by bit. Only then is the home exchanged (`exchange.py`), and the raw
bytes are let go. A unit that gains too little, or of which somebody else has the memory, stays raw.

Whoever asks for a weight at home (to write to it, to save it, to have it back) makes its unit raw again; it is packed
anew when nobody looks any more.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence

import torch

from layerstream import codec
from layerstream.blocks import Sizes, UnitSpec
from layerstream.device.base import Device, engine_tensors
from layerstream.engine.attachments import Attachments
from layerstream.engine.exchange import HomeExchanges
from layerstream.engine.ledger import Ledger
from layerstream.engine.packer import Packer
from layerstream.engine.raw_again import RawAgain
from layerstream.engine.scratch import Scratch
from layerstream.host.home import Home, PackedHome, RawHome
from layerstream.host.memory import trim_heap
from layerstream.host.store import HostStore
from layerstream.planning.packed_choice import may_pack, worth_packing
from layerstream.planning.plan import Plan
from layerstream.progress import Progress
from layerstream.saying import warn
from layerstream.stats import Stats
from layerstream.transfer.unit import StreamedUnit

_log = logging.getLogger("layerstream.packing")

LEAST_BYTES = 2**20  # of a unit; less is not worth a launch
_MOST_TIME_SHARE = 0.05  # of the time since the first unit was packed, that packing takes
_NO_ROOM = "the budget has no room for wire buffers"
_MOST_UNPACKED = 2  # times that a unit is touched, until it stays raw


class Packing:
    """Which units of one streamer are packed, and how they come to be and cease to be so.

    Attributes:
        why_off: why nothing can be packed; "": it can, as far as known.

    Args:
        mode: "off"; "ahead": all blocks on entering; "auto": what a pass waits for, while calls run.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        ledger: Ledger,
        scratch: Scratch,
        exchanges: HomeExchanges,
        raw_again: RawAgain,
        stats: Stats,
        mode: str,
    ) -> None:
        self.why_off = ""
        self._device = device
        self._attached = attached
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
        self._num_told = 0  # how many were wanted still when plans were made with what was packed
        self._is_checked = False  # kernels are there
        self._raw_again = raw_again
        raw_again.has_made.append(self._was_made_raw)
        self._packer = Packer(device, ledger, scratch, raw_again.pages, stats, lambda unit: self._follows)
        ledger.planner.make_all_raw = self._make_all_raw
        self._follows: StreamedUnit | None = None  # the unit to be packed after the one that is now
        self._spent_s = 0.0
        self._began_s = 0.0

    @property
    def is_on(self) -> bool:
        """Whether anything is to be packed, ever."""
        return self._mode != "off"

    @property
    def is_ahead(self) -> bool:
        """Whether all that can be is packed on entering."""
        return self._mode == "ahead"

    def is_to_be_packed(self, unit: int) -> bool:
        """Whether the unit of this index waits for that."""
        return unit in self._wanted

    def may_be_packed_ahead(self, specs: Sequence[UnitSpec]) -> frozenset[int]:
        """Which of these units, by index, are perhaps packed on entering: that depends on their bytes."""
        return may_pack(specs, LEAST_BYTES) if self.is_ahead and not self.why_off else frozenset()

    def why_raw(self) -> str:
        """Why nothing is packed, or how many units stay raw that were to be packed, and why; "": none, or it is off."""
        if not self.is_on or self.why_off:
            return self.why_off if self.is_on else ""
        counts = Counter(why for index, why in self._refused.items() if index in self._attached.units)
        num_looked_at = sum(map(self._is_looked_at, self._wanted))
        if num_looked_at:
            counts["somebody else has its memory"] += num_looked_at
        return "; ".join(f"{count} of what was to be: {why}" for why, count in counts.most_common())

    # ---- when

    def prepare(self) -> None:
        """Before anything is page-locked: see that it can be done, and have kernels made."""
        if self.is_on and not self._is_checked:
            self._is_checked = True
            self.why_off = self._device.why_not_packed()
            if self.why_off:
                warn(f"weights are not packed: {self.why_off}")

    def attached(self) -> None:
        """Components are there: pack their blocks now, if that is wanted."""
        if not self.is_ahead or self.why_off:
            return
        every = self._packable()
        if not self._ledger.planner.has_room_to_pack(self._sizes(unit.index for unit in every)):
            self._refuse([unit.index for unit in every], _NO_ROOM)
            return
        looked_at = {unit.index for unit in every if self._exchanges.is_looked_at(unit)}
        self._wanted.extend(looked_at)  # packed at rest, when nobody looks any more
        units = [unit for unit in every if unit.index not in looked_at]
        progress = Progress(sum(unit.home.device_bytes for unit in units), "layerstream packs the weights")
        try:
            with engine_tensors():
                for unit, self._follows in zip(units, [*units, None][1:], strict=True):
                    home = self._make(self._exchanges.store_of(unit), unit)
                    if home is not None:
                        self._exchanges.exchange(unit, home)
                    self._exchanges.release()
                    progress.add(unit.home.device_bytes)
        finally:
            self._follows = None
            self._device.empty_cache()  # activations in pieces of what packing took would keep these apart
            self._raw_again.pages.close()
            progress.close()
        trim_heap()
        self._tell_planner()

    def at_rest(self) -> None:
        """No component is in the middle of a call: have the next unit packed that is wanted."""
        if not self.is_on or self.why_off:
            return
        if self._is_asked and not self._exchanges.num_wanted:
            self._is_asked = False
            # Plans are made with what is packed by now; each costs loads, so there are few.
            self._has_changed |= 2 * len(self._wanted) <= self._num_told
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
            # Pages for the next one are touched by another thread while calls run, which is most of what packing takes.
            self._follows = next((self._attached.units.get(each) for each in self._wanted), None)
            self._exchanges.ask(index, self._make_at_rest)

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
        can_be = {unit.index for unit in self._packable()} - known
        if self.is_ahead:
            found = sorted(can_be)
        else:
            each = [worth_packing(plan, phase_plan, can_be) for phase_plan in plan.phases]
            found = list(dict.fromkeys(index for indices in each for index in indices))
        if not found:
            return
        if self._ledger.planner.has_room_to_pack(self._sizes([*self._wanted, *found])):
            self._wanted.extend(found)
            self._tell_planner()
        else:
            self._refuse(found, _NO_ROOM)

    def _packable(self) -> list[StreamedUnit]:
        """Units that are raw, and may be packed."""
        found = may_pack(self._attached.specs(), LEAST_BYTES)
        units = self._attached.units.values()
        return [u for u in units if u.index in found and u.index not in self._refused and isinstance(u.home, RawHome)]

    def _tell_planner(self) -> None:
        """Plans are made with what is packed, and with wire buffers for what is to be, from now on."""
        self._has_changed, self._num_told = False, len(self._wanted)
        self._ledger.planner.pack(self._sizes(index for index in self._wanted if not self._is_looked_at(index)))
        self._count()

    def _count(self) -> None:
        self._stats.pinned_bytes = self._attached.locked_bytes
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
                most = int((1 - codec.LEAST_GAIN) * units[index].home.device_bytes)  # wire buffers are made for it
                sizes[index] = Sizes(units[index].spec.num_bytes, most, most, is_there=False)
        return sizes

    def _make_all_raw(self) -> None:
        """What runs takes more than was known, and leaves no room for wire buffers: pack nothing any more."""
        self._wanted.clear()
        for unit in self._attached.units.values():
            if unit.spec.is_block:
                self._refuse([unit.index], _NO_ROOM)
                if isinstance(unit.home, PackedHome):
                    self._raw_again.make_raw(unit)

    def _refuse(self, units: Iterable[int], why: str) -> None:
        """These stay raw."""
        self._refused.update(dict.fromkeys(units, why))

    def _was_made_raw(self, unit: StreamedUnit, before: Home) -> None:
        if not isinstance(before, PackedHome):
            return
        self._has_changed, self._considered = True, None
        if self._raw_again.is_leaving:
            return
        count = self._num_unpacked[unit.index] = self._num_unpacked.get(unit.index, 0) + 1
        if count >= _MOST_UNPACKED:
            self._refuse([unit.index], "it is looked at again and again")

    def forget(self, units: Sequence[StreamedUnit]) -> None:
        """These units are let go of. Why they stayed raw may be over when they come back."""
        gone = {unit.index for unit in units}
        self._wanted = deque(index for index in self._wanted if index not in gone)
        for index in gone:
            self._refused.pop(index, None)
            self._num_unpacked.pop(index, None)
        self._follows = None
        self._is_asked = False
        self._considered = None
        self._has_changed = True

    def _make_at_rest(self, store: HostStore, unit: StreamedUnit) -> PackedHome | None:
        try:
            return self._make(store, unit)
        finally:
            self._device.empty_cache()  # activations in pieces of what this took would keep these apart

    def _make(self, store: HostStore, unit: StreamedUnit) -> PackedHome | None:
        """A packed home of the same bytes; None: the unit stays raw."""
        started = time.perf_counter()
        try:
            why = self._exchanges.why_at_home(unit)
            home = None
            if not why:
                with self._ledger.forgiving():
                    try:
                        made = self._packer.packed(store, unit)
                        home, why = (None, made) if isinstance(made, str) else (made, "")
                    except torch.OutOfMemoryError:
                        why = "there is no room to pack it"
            if why:
                self._refuse([unit.index], why)
                self._has_changed = True
                _log.debug("`%s` stays raw: %s", unit.spec.name, why)
            return home
        finally:
            self._spent_s += time.perf_counter() - started
