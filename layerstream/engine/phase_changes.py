"""Phases change: units give up their room, slots are laid out as the plan says, and what stays is left alone.

The order is: evict, free, and only then allocate, so that the budget holds at each moment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from itertools import pairwise

from torch import nn

from layerstream.device.base import Device
from layerstream.engine.attachments import Attachments
from layerstream.engine.planner import Planner
from layerstream.engine.residency import Residency
from layerstream.engine.session import Session
from layerstream.hooks import compiled
from layerstream.host.home import PackedHome
from layerstream.planning.phase_plan import PhasePlan
from layerstream.transfer.profiling import Ranges
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import StreamedUnit


class PhaseChanges:
    """Makes slots and hooks what the plan of a phase says.

    Args:
        count_placements: called when other slots were laid out.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        transfer: TransferEngine,
        residency: Residency,
        planner: Planner,
        session: Session,
        ranges: Ranges,
        count_placements: Callable[[], None],
    ) -> None:
        self._device = device
        self._attached = attached
        self._units = attached.units
        self._transfer = transfer
        self._residency = residency
        self._planner = planner
        self._session = session
        self._ranges = ranges
        self._count_placements = count_placements

    def apply(self, phase_plan: PhasePlan) -> None:
        """Make the slots what the plan of this phase says: evict, free, and only then allocate."""
        if phase_plan is self._session.applied:
            return
        with self._ranges.changing(phase_plan.phase.name):
            self._lay_out(phase_plan)

    def _lay_out(self, phase_plan: PhasePlan) -> None:
        self._session.forget_plan()
        transfer = self._transfer
        wanted = phase_plan.ring
        is_new_ring = wanted != (len(transfer.ring), transfer.slot_bytes)
        has_freed = self._make_way(phase_plan, is_new_ring)
        missing = self._without_slot(phase_plan.resident)
        # What is kept for a phase that follows is loaded while this one runs, where it is not there yet.
        wanted_later = self._without_slot(phase_plan.kept)
        wanted_packed = self._without_wire(phase_plan)
        has_other_wires = not transfer.wires.are(*phase_plan.wires)
        if has_other_wires:
            transfer.wires.drop()
        if has_freed or is_new_ring or missing or wanted_later or wanted_packed or has_other_wires:
            # Laid out in memory of its own: a slot in a piece of what activations left would keep that apart.
            self._device.empty_cache()
        if has_other_wires and any(phase_plan.wires):
            self._residency.allocating(functools.partial(transfer.wires.lay, *phase_plan.wires))
        if is_new_ring and phase_plan.num_slots:
            self._residency.allocating(functools.partial(transfer.lay_ring, *wanted))
        for unit in missing:
            self._residency.allocating(functools.partial(transfer.give_own_slot, unit))
        # What gets no buffer to stay in packed streams packed.
        for unit in wanted_packed:
            if not self._residency.may_allocate(transfer.give_own_wire, unit):
                break
        # What only a later phase needs is laid out then, if there is no memory now.
        if is_new_ring and not phase_plan.num_slots and not self._residency.may_allocate(transfer.lay_ring, *wanted):
            transfer.drop_ring()
        for unit in wanted_later:
            if not self._residency.may_allocate(transfer.give_own_slot, unit):
                break
        self._planner.links.update(transfer.measure_links(self._planner.links))
        self._session.applied = phase_plan
        self._count_placements()

    def _without_slot(self, indices: Collection[int]) -> list[StreamedUnit]:
        """Of these units, in order, those that have no slot of their own."""
        return [unit for i in sorted(indices) if (unit := self._units[i]).own_slot is None]

    def _without_wire(self, phase_plan: PhasePlan) -> list[StreamedUnit]:
        """Units of this phase that are to stay packed, and have no wire buffer of their own. What was made raw since
        the plan was made streams raw."""
        units = [self._units[index] for index in sorted(phase_plan.packed)]
        return [
            unit
            for unit in units
            if phase_plan.phase.involves(unit.spec)
            and isinstance(unit.home, PackedHome)
            and not self._transfer.has_own_wire(unit)
        ]

    def _make_way(self, phase_plan: PhasePlan, is_new_ring: bool) -> bool:
        """Free what the plan has no room for; returns whether there was any. No slot is held here afterwards: memory
        goes back with the last reference to it."""
        transfer = self._transfer
        stay = phase_plan.resident | phase_plan.kept
        given_up = [unit for unit in transfer.with_own_slot if unit.index not in stay]
        self._residency.wake(given_up)
        for unit in given_up:
            self._residency.give_up(unit)
        for slot in transfer.ring:
            # What is to stay goes to a slot of its own.
            if slot.unit is not None and (is_new_ring or slot.unit.index in phase_plan.resident):
                self._residency.evict(slot.unit)
        if is_new_ring:
            transfer.drop_ring()
        unpacked = [unit for unit in transfer.with_own_wire if unit.index not in phase_plan.packed]
        for unit in unpacked:
            transfer.drop_own_wire(unit.home)
        return bool(given_up or unpacked)

    def mark_staying(self, phase_plan: PhasePlan) -> None:
        """Where all blocks are planned to stay, and have arrived, their hooks have nothing more to do."""
        if phase_plan.num_slots:
            return
        for component in phase_plan.phase.components:
            attachment = self._attached.of_component[component]
            if attachment not in self._session.staying and all(unit.is_settled for unit in attachment.units):
                self._session.staying.add(attachment)

    def quieten(self, phase_plan: PhasePlan) -> None:
        """Blocks that stay, and have arrived, need no hooks until they are to go; and what runs 300 times for a token
        has no time for any. Reads of them on streams that nobody has told us of are covered when they go."""
        if self._ranges.timeline is not None:
            return  # each block is told of
        if self._session.quiet_for is phase_plan or compiled.is_in_use() or not self._planner.knows_uses(phase_plan):
            return
        if self._residency.with_autocast.intersection(phase_plan.phase.components):
            return  # each block's end lets go of what autocast keeps of it
        is_all = True
        found: list[StreamedUnit] = []
        behind = self._behind_streamed(phase_plan)
        self._residency.listen_to(
            [unit for unit in self._residency.quiet() if unit.is_called_alone or unit.index in behind]
        )
        for unit in [self._units[index] for index in phase_plan.resident - behind]:
            if unit.is_quiet or unit.is_called_alone:
                continue
            blocks = unit.called
            units = {u for block in blocks for u in self._attached.units_of[id(block)]}
            stay = all(u.index in phase_plan.resident for u in units)
            if not blocks or not stay or any(_is_encoder_layer(block) for block in blocks):
                continue
            if all(u.is_settled and self._device.is_done(u.holding().ready) for u in units):
                found += [u for u in units if not u.is_quiet]
                for each in units:
                    each.is_quiet = True  # first: who takes the unit away puts hooks back
                for block in blocks:
                    self._attached.stop_listening(block)
            else:
                is_all = False
        if found:
            self._residency.order.leave_out([u.index for u in found])
        if is_all:
            self._session.quiet_for = phase_plan

    def _behind_streamed(self, phase_plan: PhasePlan) -> set[int]:
        """Units behind one that streams: when their block begins its slot is free, and the next load can."""
        blocks: dict[str, list[int]] = {}  # with their pieces
        for spec in self._attached.specs():
            if spec.is_block and spec.component in phase_plan.phase.components:
                blocks.setdefault(spec.block_name, []).append(spec.index)
        streams = {name: not phase_plan.resident.issuperset(units) for name, units in blocks.items()}
        return {unit for before, name in pairwise(blocks) if streams[before] for unit in blocks[name]}


def _is_encoder_layer(block: nn.Module) -> bool:
    """Of these the forward asks whether its weights are ordinary before it looks at them."""
    return isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
