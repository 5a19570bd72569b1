"""Gives units other homes while streaming goes on, such as one with the bytes packed, or elsewhere in memory.

There is one safe point, `HomeExchanges.at_rest`: no component is in the middle of a call, so that nothing is being
loaded that a hook has asked for, and host bytes have one reader, the copies that are on their way. One unit is taken at
a time. Its old home is released once the last load from it is over, for which nobody waits: it is asked the next time.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from layerstream.device.base import Device, Event, engine_tensors
from layerstream.engine.attachments import Attachments
from layerstream.engine.edits import Edits
from layerstream.errors import TransferError
from layerstream.host.home import Home, RawHome
from layerstream.host.memory import Pages
from layerstream.host.store import HostStore
from layerstream.interrupts import twice_if_interrupted
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import StreamedUnit
from layerstream.weights.references import is_held

_log = logging.getLogger("layerstream.exchange")

MakeHome = Callable[[HostStore, StreamedUnit], Home | None]


@dataclass(eq=False)
class _Retired:
    """A home that was given up, in whose memory the load may still be reading after which `last_load` was recorded."""

    store: HostStore
    home: Home
    last_load: Event


class HomeExchanges:
    """The exchanges of one streamer that are wanted, and the homes whose release is due.

    Attributes:
        make_raw: gives a unit a `RawHome`, at once.

    Args:
        has_exchanged: called when a unit has another home.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        transfer: TransferEngine,
        edits: Edits,
        has_exchanged: Callable[[], None],
    ) -> None:
        self._device = device
        self._attached = attached
        self._transfer = transfer
        self._edits = edits
        self._has_exchanged = has_exchanged
        self.make_raw: Callable[[StreamedUnit], object] = _refuse
        self._wanted: deque[tuple[int, MakeHome]] = deque()
        self._retired: list[_Retired] = []

    def ask(self, unit: int, make: MakeHome) -> None:
        """Exchange the home of a unit when that can be done.

        Args:
            unit: its index. If it is streamed no longer by then, nothing is done.
            make: makes the new home, page-locked, of the same bytes; None: the unit keeps the one it has, and so it
                does if that raises.
        """
        self._wanted.append((unit, make))

    @property
    def num_wanted(self) -> int:
        """How many units wait for their exchange."""
        return len(self._wanted)

    def at_rest(self) -> None:
        """No component is in the middle of a call: exchange one unit's home, and release what is due."""
        if not self._wanted and not self._retired:
            return
        self.release()
        for _ in range(len(self._wanted)):
            index, make = self._wanted.popleft()
            unit = self._attached.units.get(index)
            if unit is None:
                continue
            if self.is_looked_at(unit):
                self._wanted.append((index, make))  # at home, by somebody who may write there; the next one's turn
                continue
            with engine_tensors():
                self._exchange(unit, make)
            return

    def store_of(self, unit: StreamedUnit) -> HostStore:
        """What owns the host side of a unit."""
        return self._attached.of_component[unit.spec.component].store

    def exchange(self, unit: StreamedUnit, home: Home, unpacked: Pages | None = None) -> None:
        """A unit has this home from now on, of the same bytes. Nobody may be looking at the one before; the device may
        be reading it still.

        Args:
            unpacked: where a unit's bytes are now that were packed, or elsewhere.
        """
        store, old = self.store_of(unit), unit.home
        twice_if_interrupted(functools.partial(self._adopt, store, unit, home, unpacked))
        self._retired.append(_Retired(store, old, unit.last_load))
        self._has_exchanged()
        try:
            twice_if_interrupted(functools.partial(self._transfer.drop_own_wire, old))
        except Exception as error:  # of a device that has failed: weights come home all the same
            _log.warning("what `%s` had on the device packed could not be given up: %r", unit.spec.name, error)

    def is_looked_at(self, unit: StreamedUnit) -> bool:
        """Whether somebody has been given the unit's memory at home: an entry of a `state_dict`, or what a pickle was
        made of; or has what its weights were found in."""
        bounds = unit.binding.tensors
        return (
            unit.is_lent
            or any(bound.stand_in is not None and bound.stand_in() is not None for bound in bounds)
            or any(not bound.has_one_home and is_held(bound.home, num_own=1) for bound in bounds)
            or self._edits.has_entries(bounds)
        )

    def why_at_home(self, unit: StreamedUnit) -> str:
        """Why the memory at home of a unit cannot be let go of; "": it can."""
        binding = unit.binding
        if not isinstance(unit.home, RawHome):  # it has none
            return "somebody else has its memory" if self.is_looked_at(unit) else ""
        # What a weight was found in is needed beside what loads read, where handing it back keeps its strides.
        if any(not b.has_one_home and (not b.is_dense or b.home.is_shared()) for b in binding.tensors):
            return "its memory is not all ours"
        places = [at for bound, at in zip(binding.tensors, unit.home.offsets, strict=True) if bound.num_bytes]
        if len(set(places)) < len(places):
            return "weights of it are tied by their memory"
        if binding.statistics:
            return "its forward writes to it"
        if self._edits.holds(unit) or self.is_looked_at(unit):
            return "somebody else has its memory"
        if any(bound.home.is_shared() for bound in binding.tensors):
            return "its memory is shared"
        return ""

    def forget(self) -> None:
        """All is handed back, and the device is idle: nothing is wanted any more, and nothing is left to be released,
        since stores release what is theirs."""
        self._wanted.clear()
        self._retired.clear()

    # ---- inside

    def _exchange(self, unit: StreamedUnit, make: MakeHome) -> None:
        try:
            home = make(self.store_of(unit), unit)
        except Exception as error:  # the pipeline's call has nothing to do with it
            _log.warning("`%s` keeps its home: %r", unit.spec.name, error)
            return
        if home is not None:
            self.exchange(unit, home)

    def _adopt(self, store: HostStore, unit: StreamedUnit, home: Home, unpacked: Pages | None) -> None:
        if isinstance(home, RawHome) and unpacked is not None:
            store.adopt_unpacked(home, unit.binding, unpacked)
        else:
            store.adopt(home, unit.binding, functools.partial(self.make_raw, unit))
        unit.home = home
        self._transfer.forget_loads(unit)

    def release(self) -> None:
        """Give up homes whose last load is over."""
        for retired in [r for r in self._retired if r.last_load is None or self._device.is_done(r.last_load)]:
            self._retired.remove(retired)
            retired.store.release(retired.home)


def _refuse(unit: StreamedUnit) -> None:
    raise TransferError(f"unit `{unit.spec.name}` is not raw, and nobody can make it so")
