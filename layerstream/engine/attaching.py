"""Components come to be streamed, and go: what is taken hold of, what it takes on the device at once, and who is told.

`attachments.py` takes hold of weights and modules; here the rest of the engine follows: slots, order, ledger, counters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from layerstream.blocks import Placement
from layerstream.device.base import Device, engine_tensors
from layerstream.engine.attachments import Attachment, Attachments, is_hookable
from layerstream.engine.edits import Edits
from layerstream.engine.ledger import Ledger
from layerstream.engine.residency import Residency
from layerstream.engine.session import Session
from layerstream.hooks.intercept import Listener
from layerstream.model.units import ComponentLayout, Division, whole_bytes
from layerstream.planning.order import OrderLearner
from layerstream.progress import Progress
from layerstream.stats import Stats
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import StreamedUnit


class Attaching:
    """Attaches components and detaches them, for entering, leaving and pauses.

    Attributes:
        has_shown_progress: a bar was shown.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        transfer: TransferEngine,
        residency: Residency,
        edits: Edits,
        ledger: Ledger,
        session: Session,
        stats: Stats,
    ) -> None:
        self.has_shown_progress = False
        self._device = device
        self._attached = attached
        self._transfer = transfer
        self._residency = residency
        self._edits = edits
        self._ledger = ledger
        self._session = session
        self._stats = stats
        self._stacks: list[tuple[list[int], bool]] = []

    def attach(
        self,
        layouts: Sequence[ComponentLayout],
        division: Division,
        listener: Listener,
        all_names: Sequence[str],
        *,
        changed: Collection[str],
    ) -> None:
        """Take hold of components. Failing half-way leaves it to `close`.

        Args:
            all_names: the pipeline's components, these among them, in its order.
        """
        # Everything is looked at, and then page-locked.
        progress = Progress(2 * sum(unit.spec.num_bytes for unit in division.units))
        try:
            with engine_tensors():
                held = self._attached.attach(layouts, division, listener, progress)
            self._edits.held_before(held)
        finally:
            self.has_shown_progress |= progress.close()
        self._device.empty_cache()  # what the components had on the device is given up
        self._note_components(all_names, changed)

    def _note_components(self, all_names: Sequence[str], changed: Collection[str]) -> None:
        """Units came or went: order, ledger and stats go by what there is now."""
        by_name = {layout.name: layout for a in self._attached.all for layout in a.layouts}
        # In the order of the pipeline, in which its components usually run; what it has dropped is yet to be let go of.
        layouts = [by_name[name] for name in dict.fromkeys([*all_names, *by_name]) if name in by_name]
        names = tuple(by_name)
        specs = [
            # What no hook can bring to the device when it is needed is there always.
            replace(spec, also=names) if not is_hookable(by_name[spec.component]) else spec
            for spec in self._attached.specs()
        ]
        blocks = {
            layout.name: [s.index for s in specs if s.component == layout.name and s.is_block] for layout in layouts
        }
        stacks = [(blocks[c.name], c.is_repeated) for c in layouts if blocks[c.name]]
        if stacks != self._stacks:  # what was only cast is used in the same order
            self._stacks, self._residency.order = stacks, OrderLearner(stacks)
        whole = [spec for a in self._attached.all for spec in a.division.whole()]
        self._ledger.components(
            [(c.name, c.is_repeated) for c in layouts], specs, whole, changed, self._residency.order
        )
        self._stats.pinned_bytes = self._attached.locked_bytes
        self._stats.pin_s = sum(a.store.pin_s for a in self._attached.all)
        self.count_placements()

    def move_others(self) -> None:
        """Bring to the device what cannot stream."""
        with engine_tensors():
            self._attached.move_others(self._residency.allocating)
        self._transfer.whole_bytes = self._stats.whole_bytes = self._attached.whole_bytes
        self._stats.peak_device_bytes = max(self._stats.peak_device_bytes, self._transfer.weights_bytes)

    def load_fixed(self) -> None:
        """Bring to the device what no hook can bring there when it is needed."""
        with engine_tensors():
            for attachment in self._attached.all:
                for layout in attachment.layouts:
                    if not is_hookable(layout):
                        for unit in attachment.units:
                            self._residency.allocating(functools.partial(self._transfer.give_own_slot, unit))
                        self._residency.use(attachment.units, is_touch=False, is_grad=False)

    def detach(self, attachments: Sequence[Attachment], attempt: Callable[..., None], *, goes_on: bool) -> None:
        """Let go of components: written tensors home, everything as it was found, hooks off.

        Args:
            goes_on: they are attached again, and what somebody has read of them stays tied to them.
        """
        taken = list(attachments)
        units = [unit for attachment in taken for unit in attachment.units]
        self._session.forget_plan()
        try:
            attempt(functools.partial(self._bring_home, units), "copy back weights that were written")
            if goes_on:
                attempt(functools.partial(self._residency.discard, units), "leave memory to those who look at it")
            attempt(self._device.synchronize, "wait for the device")
            self._attached.detach(taken, self._forget_slots, attempt)
            if not self._attached.all:
                attempt(self._transfer.wires.drop, "free device memory")
        finally:
            for attachment in taken:  # also of those that could not be handed back
                attachment.interception.remove()

    def _forget_slots(self, unit: StreamedUnit) -> None:
        """A unit that is let go of leaves its slot; its tensors are at home already."""
        if unit.slot is not None:
            self._transfer.vacate(unit)
        self._transfer.drop_own_slot(unit)
        self._transfer.drop_own_wire(unit.home)
        self._transfer.forget(unit)
        if unit.is_quiet:
            unit.is_quiet = False
            self._residency.order.take_in([unit.index])

    def _bring_home(self, units: Sequence[StreamedUnit]) -> None:
        """What was written on the device, or edited elsewhere, goes where it is handed back from."""
        self._residency.notice_interrupt()
        # Those of others stay guarded: nobody looks at them unseen in a pause of these.
        self._residency.unguard(units)
        if self._edits:
            self._residency.discard(self._edits.settle(is_new_use=True))
        for unit in units:
            if not unit.is_present:
                self._residency.take_in(unit)
            else:
                self._residency.lend_if_looked_at(unit)
                self._residency.write_back(unit, may_replace=True)
                # Graphs may hold what they saved of weights that stayed resident, too.
                unit.binding.forbid_backward()

    def check_budget(self, layouts: Sequence[ComponentLayout], division: Division) -> None:
        """Refuse a budget that cannot do before anything has moved."""
        target = self._device.torch_device
        tensors = [b for unit in division.units for b in unit.binding.tensors]
        places = [p for places in division.others.values() for p in places]
        own = 0
        if not self._device.is_simulated:
            own = sum(b.num_bytes for b in tensors if b.home_device == target)
            own += sum({id(p.tensor): whole_bytes(p.tensor) for p in places if p.tensor.device == target}.values())
        outside = max(0, self._device.allocated_bytes() - own)
        components = [(layout.name, layout.is_repeated) for layout in layouts]
        self._ledger.check(components, [unit.spec for unit in division.units], division.whole(), outside)

    def count_placements(self) -> None:
        blocks = {s.block_name for s in self._attached.specs() if s.is_block}
        plan = self._ledger.plan
        placed = {placement: set[str]() for placement in Placement}
        for spec in self._attached.specs():
            placed[plan.placement(spec.index)].add(spec.block_name)
        streamed = placed[Placement.STREAMED]
        packed = placed[Placement.PACKED] - streamed
        self._stats.num_streamed_blocks = len(streamed)
        self._stats.num_resident_packed_blocks = len(packed)
        self._stats.num_resident_blocks = len(blocks) - len(streamed) - len(packed)
