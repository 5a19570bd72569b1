"""Storing: units whose bytes are in another GPU's memory, and are loaded from there.

On entering, and after a pause, all units go there for which there is room, blocks of denoisers before the rest; what
they had on the host is let go of. A unit of which somebody else has the memory then stays on the host. Whoever asks for
a weight at home has its unit brought back to the host; it goes again when nobody looks any more.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from layerstream.blocks import UnitSpec
from layerstream.budget import format_bytes
from layerstream.device.base import Device, engine_tensors
from layerstream.engine.attachments import Attachments
from layerstream.engine.exchange import HomeExchanges
from layerstream.engine.ledger import Ledger
from layerstream.engine.raw_again import RawAgain
from layerstream.errors import HostMemoryError, StoreError
from layerstream.host.home import Home, PackedHome, StoredHome
from layerstream.host.keeper import Keeper
from layerstream.host.memory import available_bytes, trim_heap
from layerstream.host.store import HostStore
from layerstream.progress import Progress
from layerstream.saying import warn
from layerstream.stats import Stats
from layerstream.transfer.unit import StreamedUnit

_log = logging.getLogger("layerstream.storing")

# Of a unit's bytes, that it takes packed: a word of 32 bits keeps at least one byte, one of 16 bits, too.
_LEAST_PACKED_SHARE = 0.25
_MOST_BROUGHT_BACK = 2  # times that a unit is, until it stays on the host


class Storing:
    """Which units of one streamer are in other GPUs' memory.

    Args:
        keepers: those GPUs, in the order in which they are filled; none: it is off.
        is_all: everything must fit there; else the rest stays on the host.
        is_to_be_packed: whether a unit, by its index, is to be packed, and goes after that.
        may_be_packed: which units, by index, may be packed by the time that they go.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        ledger: Ledger,
        exchanges: HomeExchanges,
        raw_again: RawAgain,
        stats: Stats,
        keepers: Sequence[Keeper],
        *,
        is_all: bool,
        is_to_be_packed: Callable[[int], bool],
        may_be_packed: Callable[[Sequence[UnitSpec]], frozenset[int]],
    ) -> None:
        self._device = device
        self._attached = attached
        self._ledger = ledger
        self._exchanges = exchanges
        self._stats = stats
        self._keepers = keepers
        self._is_all = is_all
        self._is_to_be_packed = is_to_be_packed
        self._may_be_packed = may_be_packed
        self._told: set[Keeper] = set()  # those of which it was said that they are out of reach
        self._refused: dict[int, str] = {}  # why a unit stays on the host
        self._num_brought: Counter[int] = Counter()
        self._is_due = False  # some unit may go that is not there
        self._has_changed = False
        self._has_entered = False
        self._raw_again = raw_again
        raw_again.has_made.append(self._was_brought_back)

    @property
    def is_on(self) -> bool:
        """Whether anything is to be stored."""
        return bool(self._keepers)

    def why_on_host(self) -> str:
        """How many units stay on the host that were to be stored, and why; "": none, or it is off."""
        counts = Counter(why for index, why in self._refused.items() if index in self._attached.units)
        return "; ".join(f"{count} of what was to be: {why}" for why, count in counts.most_common())

    def check(self, specs: Sequence[UnitSpec]) -> None:
        """Before anything changes: see that there is room. What will be packed is known only then: `attached` asks
        again.

        Raises:
            StoreError: with numbers.
        """
        if not self.is_on:
            return
        packed = self._may_be_packed(specs)
        sizes = [int(s.num_bytes * _LEAST_PACKED_SHARE) if s.index in packed else s.num_bytes for s in specs]
        self._refuse_too_much(sizes, "at least " if packed else "")

    def _refuse_too_much(self, sizes: Iterable[int], at_least: str = "") -> None:
        """Raise if everything must fit there, and memory of these sizes does not."""
        if not self._is_all:
            return
        needed = sum(self._keepers[0].device.rounded_bytes(num_bytes) for num_bytes in sizes if num_bytes)
        room = sum(keeper.room_bytes() for keeper in self._keepers)
        if needed > room:
            names = " and ".join(keeper.name for keeper in self._keepers)
            raise StoreError(
                f"the weights do not fit in the memory of {names}: they take {at_least}{format_bytes(needed)}, "
                f"and {format_bytes(room)} may be taken there. Raise store_budget, free memory there, or add the host "
                f'for the rest: store=["{self._keepers[0].name}", "cpu"].',
                needed_bytes=needed,
                available_bytes=room,
            )

    def check_way_back(self) -> None:
        """Before anything is handed back: see that host memory has room for what is elsewhere.

        Raises:
            HostMemoryError: with numbers.
        """
        needed = sum(u.home.device_bytes for u in self._attached.units.values() if u.home.keeper is not None)
        room = available_bytes() if needed else None
        if room is not None and needed > room[0]:
            names = " and ".join(keeper.name for keeper in self._keepers)
            raise HostMemoryError(
                f"{format_bytes(needed)} of weights are in the memory of {names}, and come back to host memory, of "
                f"which {format_bytes(room[0])} are left ({room[1]}). Free some, and leave (or close) again: until "
                "then the pipeline streams on.",
                needed_bytes=needed,
                available_bytes=room[0],
            )

    def attached(self) -> None:
        """Components are there, and packed if they are to be: store what can be.

        Raises:
            StoreError: on entering, where they do not fit; nothing is stored.
        """
        if not self.is_on:
            return
        is_entering, self._has_entered = not self._has_entered, True
        if is_entering:
            self._refuse_too_much(u.home.wire_bytes for u in self._attached.units.values() if u.home.keeper is None)
        self._refused.clear()
        for keeper in self._keepers:
            keeper.hold()
        units = self._in_order([unit for unit in self._attached.units.values() if self._may_store(unit)])
        progress = Progress(sum(unit.home.device_bytes for unit in units), "layerstream stores the weights")
        try:
            with engine_tensors():
                for unit in units:
                    self._store(unit)
                    progress.add(unit.home.device_bytes)
        finally:
            progress.close()
        trim_heap()
        self._tell()
        if is_entering:  # in a pause it is what somebody looks at meanwhile, as a rule
            self._tell_what_stays(units)

    def at_rest(self) -> None:
        """No component is in the middle of a call: store what was brought back, and is looked at no longer."""
        for keeper in self._keepers:
            if not keeper.is_reached and keeper not in self._told:
                self._tell_of_reach(keeper)
        if not self._is_due:
            return
        self._is_due = False
        with engine_tensors():
            for unit in self._attached.units.values():
                if self._may_store(unit):
                    if self._exchanges.is_looked_at(unit) or self._is_to_be_packed(unit.index):
                        self._is_due = True
                    else:
                        self._store(unit)
        if self._has_changed:
            self._tell()

    def close(self) -> None:
        """Everything is handed back: give up what was asked of the other GPUs."""
        self._has_entered = False
        with contextlib.ExitStack() as each:  # all of them, also when one fails
            for keeper in self._keepers:
                each.callback(keeper.close)

    # ---- inside

    def _may_store(self, unit: StreamedUnit) -> bool:
        return unit.home.keeper is None and unit.home.device_bytes > 0 and unit.index not in self._refused

    def _in_order(self, units: Sequence[StreamedUnit]) -> list[StreamedUnit]:
        """Blocks that run many times a call come first: of these as many as have room, evenly spread; then the rest."""
        often = [unit for unit in units if unit.spec.is_repeated and unit.spec.is_block]
        total = sum(unit.home.wire_bytes for unit in often)
        room = sum(keeper.room_bytes() for keeper in self._keepers)
        chosen, seen, taken = [], 0, 0
        for unit in often:
            seen += unit.home.wire_bytes
            if taken + unit.home.wire_bytes <= seen * min(1.0, room / max(total, 1)):
                taken += unit.home.wire_bytes
                chosen.append(unit)
        first = set(chosen)
        return [*chosen, *(unit for unit in units if unit not in first)]

    def _store(self, unit: StreamedUnit) -> None:
        why = self._exchanges.why_at_home(unit)
        if not why:
            home = self._made(self._exchanges.store_of(unit), unit)
            if home is not None:
                self._exchanges.exchange(unit, home)
                self._exchanges.release()
                self._has_changed = True
                return
            why = "there is no room for it"
        self._refused[unit.index] = why
        _log.debug("`%s` stays on the host: %s", unit.spec.name, why)

    def _made(self, store: HostStore, unit: StreamedUnit) -> Home | None:
        """A home of the same bytes in the memory of the first GPU that has room; None: none has."""
        old = unit.home
        for keeper in self._keepers:
            if keeper.device.rounded_bytes(old.wire_bytes) > keeper.room_bytes():
                continue
            with contextlib.ExitStack() as undo:
                num_bytes = old.device_bytes
                home: Home = StoredHome(self._device, old.offsets, num_bytes, keeper=keeper)
                if isinstance(old, PackedHome):
                    home = PackedHome(self._device, old.offsets, num_bytes, keeper=keeper, layout=old.layout)
                    num_bytes = old.wire_bytes
                undo.callback(store.release, home)
                try:
                    buffer = store.keep(home, num_bytes)
                except torch.OutOfMemoryError:
                    continue
                keeper.fill([pair[:2] for pair in old.pairs(buffer)], is_locked=old.is_pinned)
                undo.pop_all()
                return home
        return None

    def _was_brought_back(self, unit: StreamedUnit, before: Home) -> None:
        if before.keeper is None:
            return
        self._has_changed = self._is_due = True
        if not self._raw_again.is_leaving:
            self._num_brought[unit.index] += 1
            if self._num_brought[unit.index] >= _MOST_BROUGHT_BACK:
                self._refused[unit.index] = "it is looked at again and again"

    def _tell_of_reach(self, keeper: Keeper) -> None:
        """Say once that a GPU is out of reach, and what that costs, as soon as it is measured."""
        speed = self._ledger.planner.links.get(keeper.name)
        if speed is not None:
            self._told.add(keeper)
            warn(
                f"{keeper.name} cannot be reached from {self._device.label} directly: loads from there go through host "
                f"memory, over both GPUs' links to it, at {speed:.1f} GB/s."
            )

    def _tell_what_stays(self, units: Sequence[StreamedUnit]) -> None:
        """Say of which units there is something to be stored, and is not; `store` may have promised all."""
        left = [unit for unit in units if unit.home.keeper is None]
        if left and self._is_all:
            names = " and ".join(keeper.name for keeper in self._keepers)
            num_bytes = sum(unit.home.device_bytes for unit in left)
            warn(
                f"{len(left)} of {len(units)} blocks, pieces or bases, {format_bytes(num_bytes)}, are not in the "
                f"memory of {names} and stay on the host ({self.why_on_host()}). They are loaded from there."
            )

    def _tell(self) -> None:
        """Plans are made with where units are from now on."""
        self._has_changed = False
        units = self._attached.units
        stored = {index: unit.home.keeper.name for index, unit in units.items() if unit.home.keeper is not None}
        self._ledger.planner.keep(stored)
        self._stats.pinned_bytes = self._attached.locked_bytes
        self._stats.num_stored_units = len(stored)
        self._stats.stored_bytes = sum(units[index].home.wire_bytes for index in stored)
