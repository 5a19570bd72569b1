"""Watches an engine while it streams, for what an adapter could have spared it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerstream.engine.streamer import Streamer
from layerstream.hooks.entrances import Entrance
from layerstream.testing.findings import Findings
from layerstream.transfer.unit import StreamedUnit


class EngineWatch:
    """Notes what a streamer does that an adapter could have spared it. `remove` lets go of it."""

    def __init__(self, engine: Streamer, findings: Findings, *, streams_all: bool) -> None:
        self.is_settled = False
        self.streams_all = streams_all  # else blocks that come back when their phase begins may be waited for
        self._engine, self._findings = engine, findings
        self._make_room, self._make_present = engine._residency.make_room, engine.listener.make_present
        self._look = engine.listener.look_for_entrance
        self._watch_entrance = engine._attached.watch_entrance
        self._counts = (0, 0)
        engine._residency.make_room = self._noting_room  # type: ignore[method-assign]
        engine.listener.make_present = self._noting_reading  # type: ignore[method-assign]
        engine.listener.look_for_entrance = self._noting_search  # type: ignore[method-assign]
        engine._attached.watch_entrance = self._noting_entrance  # type: ignore[method-assign]

    def remove(self) -> None:
        """The engine is as it was."""
        engine = self._engine
        self._findings.used |= {
            engine._units[unit].spec.block_name for unit in engine._residency.order.seen if unit in engine._units
        }
        for owner, name in (
            (engine._residency, "make_room"),
            (engine.listener, "make_present"),
            (engine.listener, "look_for_entrance"),
            (engine._attached, "watch_entrance"),
        ):
            vars(owner).pop(name, None)

    def _noting_room(self, unit: StreamedUnit, held: Any) -> Any:
        """A unit that is not there is needed now; the counters say why."""
        stats = self._engine.stats
        counts = stats.num_demand_loads, stats.num_touch_loads
        is_read = counts[1] > self._counts[1]
        if self.is_settled and self.streams_all and not is_read and counts[0] > self._counts[0]:
            self._findings.not_foreseen(unit)
        self._counts = counts
        return self._make_room(unit, held)

    def _noting_reading(self, indices: Sequence[int], is_grad: bool) -> Sequence[StreamedUnit]:
        """Something looks at weights that are not bound to the device, be they on their way or not."""
        if self.is_settled:
            for unit in indices:
                if not self._engine._units[unit].is_present:
                    self._findings.read_outside(self._engine, unit)
        return self._make_present(indices, is_grad)

    def _noting_search(self, component: str, *, is_between_calls: bool = False) -> Entrance | None:
        if self.is_settled and not is_between_calls:
            self._findings.entered_from_outside(self._engine, component)
        return self._look(component, is_between_calls=is_between_calls)

    def _noting_entrance(self, entrance: Any, component: str, listener: Any) -> None:
        self._findings.found_entrance(component, str(entrance))
        self._watch_entrance(entrance, component, listener)
