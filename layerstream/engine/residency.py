"""Which units are on the device: brings them there when they are used, and takes them away to make room.

`use` is the way up (load, wait, bind), `evict` the way down (write back, unbind, vacate). The slot is the unit's own
where the plan makes it resident, and one of the ring's where it streams. A unit that is present stays so until its slot
is needed, so that hooks that users put on a block still see its weights after ours have run; it is *held*, and never
evicted, while its block runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from layerstream.device.base import Device, engine_tensors
from layerstream.engine.attachments import Attachments
from layerstream.engine.edits import Edits
from layerstream.engine.lane import Lanes
from layerstream.engine.ledger import Ledger
from layerstream.engine.session import Session
from layerstream.errors import BudgetError, StreamerStateError
from layerstream.planning.order import OrderLearner
from layerstream.planning.schedule import ScheduleRecorder
from layerstream.stats import Stats
from layerstream.torch_private import without_subclasses
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import Slot, StreamedUnit
from layerstream.weights.binding import BoundTensor

# Resident units whose loads may be queued ahead: they wait for no slot, only for the bus. At the end of a pass, when
# the bus may have nothing to do until another phase begins, more.
LOOK_AHEAD = 8
LOOK_AHEAD_AT_END = 96


class Residency:
    """The one owner of what state each unit is in, between two plans.

    Attributes:
        order: learns in which order units are used.
        makes_graphs: something that the running call computes with requires grad.
        with_autocast: components of whose weights autocast has kept casts.
        units: by index; the attachments add and remove them.
        recorder: writes down what the pass that runs does with units; None: nobody wants to know.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        transfer: TransferEngine,
        edits: Edits,
        ledger: Ledger,
        lanes: Lanes,
        session: Session,
        stats: Stats,
    ) -> None:
        self.order = OrderLearner([])
        self.makes_graphs = True
        self.with_autocast: set[str] = set()
        self.units: Mapping[int, StreamedUnit] = attached.units
        self.recorder: ScheduleRecorder | None = None
        self._is_guarding = True  # whoever looks at weights that are there is noticed
        self._device = device
        self._attached = attached
        self._transfer = transfer
        self._edits = edits
        self._ledger = ledger
        self._lanes = lanes
        self._session = session
        self._stats = stats

    def use(self, units: Sequence[StreamedUnit], *, is_touch: bool, is_grad: bool) -> None:
        """Load what is missing, start loading what is expected next, wait, and bind."""
        if self._device.stream_number() != self._session.stream_number:
            self._session.stream_number = None  # what is bound now is waited for on this thread's stream alone
        held = [*units, *self._held()]
        is_main = self._lanes.here is self._lanes.main
        if is_touch:
            self._not_the_pass()
        self.drop_extra_slots(held)
        for unit in units:
            # A pass beside the main one uses what that has just used.
            is_hit = unit.spec.is_block and is_main and self.order.observe(unit.index)
            if unit.slot is None:
                # A block's later pieces may have to wait, foreseen or not, until the block before gives up its slots.
                is_foreseen = is_hit and unit is not units[0]
                self._stats.num_demand_loads += unit.spec.is_block and not is_foreseen
                self._stats.num_touch_loads += is_touch
                self._load(unit, self.make_room(unit, held))
        # Before compute is told to wait: what is recorded on its stream after the wait, such as the last block's
        # release, happens after the wait, and the next load would start a round trip after this one ends.
        self.prefetch(held)
        for unit in units:
            views = self._transfer.wait(unit)
            if not unit.is_present:
                # Code outside a call may keep, save or pickle what it sees (`state_dict`), which wants weights in
                # storages of their own, as a resident model has them. Inside a call the slot is what is there for it.
                if is_touch and self._lanes.here.is_idle:
                    views = self._cloned_views(unit, views)
                unit.bind(views)
            elif not is_touch and unit.binding.is_guarded:
                unit.binding.unguard()
            if is_grad and not is_touch:
                unit.may_be_saved = True
                unit.may_be_in_graph |= self.makes_graphs

    def _cloned_views(self, unit: StreamedUnit, views: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of a unit's weights, one for those that are tied by their memory; where there is no room for them, the
        weights in the slot."""
        copies: dict[tuple[object, ...], torch.Tensor] = {}
        with self._ledger.forgiving():
            try:
                cloned = []
                for view in views:
                    place = view.data_ptr() if view.numel() else id(view), view.dtype, view.shape, view.stride()
                    if place not in copies:
                        copies[place] = view.clone()
                    cloned.append(copies[place])
            except torch.OutOfMemoryError:
                return views
        unit.is_cloned = True
        return cloned

    def _held(self) -> list[StreamedUnit]:
        """Units that some lane's compute is reading, or may read without asking again."""
        loaded = [s.unit for s in [*self._transfer.ring, *self._transfer.extra] if s.unit is not None]
        return [u for u in loaded if any(self._lanes.is_running(m) for m in u.called)]

    def ahead(self, count: int) -> list[StreamedUnit]:
        """The units that are expected next, in their order."""
        return [self.units[index] for index in self.order.predict(count)]

    def prefetch(self, held: Sequence[StreamedUnit], look_ahead: int = LOOK_AHEAD) -> None:
        """Start loading the units expected next, in their order, as far as there are slots that nobody holds. The ring
        may be another one in the phase that follows: what comes after that is loaded into slots of its own only."""
        if self.order.is_in_doubt:
            return
        transfer = self._transfer
        wanted = [unit for unit in dict.fromkeys(held) if unit.slot is not unit.own_slot]
        num_slots = len(transfer.ring)
        is_of_this_ring = True
        with engine_tensors():
            for unit in map(self.units.__getitem__, self.order.trace(2 * num_slots + look_ahead)):
                is_of_this_ring = is_of_this_ring and self._is_of_this_ring(unit)
                if unit.slot is not None:
                    if unit.own_slot is None and unit not in wanted:
                        wanted.append(unit)
                    continue
                if unit.own_slot is None:
                    if not is_of_this_ring:
                        continue
                    if unit not in wanted:
                        wanted.append(unit)
                    if len(wanted) > num_slots or unit.home.device_bytes > transfer.slot_bytes:
                        return  # no room; what comes after must not get ahead of it on the bus
                try:
                    slot = transfer.empty_slot(unit) or self._evict_one(keep=wanted)
                except BudgetError:
                    return  # somebody keeps the slot's memory; the unit that needs it will say so
                if slot is None:
                    return
                self._load(unit, slot)

    def _is_of_this_ring(self, unit: StreamedUnit) -> bool:
        """Whether the ring is the present one while a unit's phase runs."""
        applied = self._session.applied
        if applied is None or applied.phase.involves(unit.spec):
            return True
        return bool(self._transfer.ring) and self._ledger.plan.phase_of(unit.spec.component).ring == applied.ring

    def _load(self, unit: StreamedUnit, slot: Slot) -> None:
        self._transfer.load(unit, slot)
        if self.recorder is not None:
            self.recorder.loaded(unit.index)

    def _not_the_pass(self) -> None:
        """What follows is no part of what a pass does each time."""
        if self.recorder is not None:
            self.recorder.spoil()

    def make_room(self, unit: StreamedUnit, held: Sequence[StreamedUnit]) -> Slot:
        """A slot for a unit needed now. What is expected next is evicted only where nothing else can be, and what
        is held never: then there are more units in use at once than the plan has slots, and one is added."""
        slot = self._transfer.empty_slot(unit)
        if slot is None and unit.home.device_bytes <= self._transfer.slot_bytes:
            ahead = self.ahead(len(self._transfer.ring))
            slot = self._evict_one(keep=[*held, *ahead[:1]]) or self._evict_one(keep=held)
        return slot or self._add_extra(unit, held)

    def _add_extra(self, unit: StreamedUnit, held: Sequence[StreamedUnit]) -> Slot:
        """A slot beyond the plan. Residents pay for it, since activations were given what the plan leaves: first those
        of other phases, then what is needed last."""
        transfer, phase = self._transfer, self._session.applied
        self._not_the_pass()
        if phase is not None and self._stats.budget_bytes:
            resident = phase.resident
            taken = transfer.slots_bytes + self._device.rounded_bytes(unit.home.device_bytes)
            for payer in transfer.with_own_wire:  # first: what it takes to have them back is one copy
                if taken <= phase.weights_bytes:
                    break
                taken -= self._device.rounded_bytes(payer.home.wire_bytes)
                transfer.drop_own_wire(payer.home)
                self._session.forget_plan()  # the next call lays out anew
            soon = _positions(self.ahead(len(self.units)))
            payers = [u for u in transfer.with_own_slot if u not in held and u is not unit]
            payers.sort(key=lambda u: (u.index in resident, u.spec.is_block, -soon.get(u, len(soon))))
            for payer in payers:
                if taken <= phase.weights_bytes:
                    break
                if payer.index in resident and not payer.spec.is_block:
                    continue  # the base of what runs
                taken -= self._device.rounded_bytes(payer.home.device_bytes)
                self.give_up(payer)
                self._session.forget_plan()  # the next call lays out anew
        slot: Slot = self.allocating(functools.partial(transfer.add_extra, unit))
        return slot

    def _evict_one(self, keep: Sequence[StreamedUnit]) -> Slot | None:
        """Free the slot of the ring whose unit is needed last; None if all are to be kept."""
        candidates = [s.unit for s in self._transfer.ring if s.unit is not None and s.unit not in keep]
        if len(candidates) < 2:
            return self.evict(candidates[0]) if candidates else None
        soon = _positions(self.ahead(4 * len(self._transfer.ring) + LOOK_AHEAD))
        return self.evict(max(candidates, key=lambda unit: soon.get(unit, len(soon))))

    def evict(self, unit: StreamedUnit) -> Slot:
        """Take a unit out of its slot. Order matters: see the note in `device/base.py`."""
        slot = self._empty(unit, self._unbind(unit, writes_back=True))
        if self.recorder is not None:
            self.recorder.let_go(unit.index)
        return slot

    def _unbind(self, unit: StreamedUnit, *, writes_back: bool) -> list[BoundTensor]:
        """Make a unit absent; what was written goes home. Returns weights that had been pointed elsewhere."""
        self.wake([unit])
        if not unit.is_present:
            return []
        binding = unit.binding
        if binding.is_guarded:
            binding.unguard()
        has_changed = not writes_back or bool(self.write_back(unit, may_replace=False))
        replaced = binding.replaced() if has_changed else []
        self._edits.keep_held(
            b
            for b in (binding.tensors if unit.is_cloned else replaced)
            if b not in replaced or not self._transfer.is_in_slot(b.tensor)
        )
        # A unit whose hooks had nothing to do was seen by nobody: its graphs are refused as well.
        if unit.may_be_saved or unit.own_slot is not None:
            binding.forbid_backward()
        self.forget_autocast([unit])
        unit.unbind()
        return replaced

    def _empty(self, unit: StreamedUnit, replaced: Sequence[BoundTensor]) -> Slot:
        """Free the slot of a unit that is absent."""
        slot = unit.holding()
        is_own = slot is unit.own_slot
        was_grad = unit.may_be_in_graph or is_own
        if slot.readers and (unit.is_lent or not was_grad) and slot.is_aliased():
            # Somebody else looks at the slot (`weight.detach()` kept by user code) and keeps the bytes. (Graphs hold
            # the weights they saved, too; their backward is refused. What else a forward keeps of its weights under
            # grad cannot be told from that.)
            views = slot.views(unit)
            if not is_own or replaced:  # one's own may stay: it gets what is there, and is held, once more
                self.allocating(functools.partial(self._transfer.abandon, unit))
                slot = unit.holding()
            # Only now: where there is no memory to leave it to them, another unit comes to lie there.
            self._edits.keep(unit, views, but=replaced)
        elif was_grad:
            slot.accept_references()
        self._transfer.vacate(unit)
        return slot

    def discard(self, units: Collection[StreamedUnit]) -> None:
        """What the device has of these units is not what is at home: they are loaded anew when they are used."""
        # All are made absent first: a weight of one may have been pointed at the slot of another.
        replaced = {unit: self._unbind(unit, writes_back=False) for unit in units if unit.slot is not None}
        for unit, elsewhere in replaced.items():
            if unit.slot is not None:
                self._empty(unit, elsewhere)
                self._session.changed()

    def drop_extra_slots(self, held: Sequence[StreamedUnit]) -> None:
        """Extra slots go as soon as nobody holds their unit; they are memory beyond the plan."""
        for slot in [s for s in self._transfer.extra if s.unit not in held]:
            if slot.unit is None:
                self._transfer.drop_extra(slot)
            else:
                self.evict(slot.unit)

    def give_up(self, unit: StreamedUnit) -> None:
        """Take a resident unit's room from it."""
        self._not_the_pass()
        if unit.slot is not None:
            self.evict(unit)
            self._stats.num_evicted += 1
        self._transfer.drop_own_slot(unit)
        self._session.changed()

    def allocating(self, allocate: Callable[[], Any]) -> Any:
        """Run `allocate`; where the budget has no room, say so with numbers."""
        try:
            return allocate()
        except torch.OutOfMemoryError as exc:
            if self._drop_own_wires():
                self._ledger.forgive(1)
                return self.allocating(allocate)
            raise self._ledger.explain(exc, self._transfer.weights_bytes, is_for_weights=True) from exc

    def _drop_own_wires(self) -> bool:
        """Have nothing stay on the device packed, since memory is refused to what cannot do without; returns whether
        anything did."""
        units = self._transfer.with_own_wire
        for unit in units:
            self._transfer.drop_own_wire(unit.home)
        if units:
            self._device.empty_cache()
            self._session.forget_plan()
        return bool(units)

    def may_allocate(self, allocate: Callable[..., None], *args: Any) -> bool:
        """Run `allocate` for what is not needed yet; returns whether there was memory for it."""
        with self._ledger.forgiving():
            try:
                allocate(*args)
            except torch.OutOfMemoryError:
                return False
        return True

    def listen_to(self, units: Sequence[StreamedUnit]) -> None:
        """Put hooks back on the blocks of those that had none."""
        again = [unit for unit in units if unit.is_quiet]
        for unit in again:
            self._attached.listen_again(unit)
            unit.is_quiet = False
        self._session.quiet_for = None
        if again:
            self.order.take_in([unit.index for unit in again])

    def wake(self, units: Sequence[StreamedUnit]) -> None:
        """These are about to go. Streams that read those without hooks are not all known: one wait covers all."""
        quiet = [unit for unit in units if unit.is_quiet]
        if quiet:
            self.listen_to(quiet)
            self._device.synchronize()

    def quiet(self) -> list[StreamedUnit]:
        """Units whose blocks have no hooks now."""
        return [unit for unit in self.units.values() if unit.is_quiet]

    def wait_on_this_stream(self) -> None:
        """Units that are present were waited for on the streams that used them; this thread's may be another one."""
        number = self._device.stream_number()
        if number != self._session.stream_number:
            for unit in self._transfer.loaded:
                if unit.is_present:
                    self._transfer.wait(unit)
            self._session.stream_number = number

    def guard(self) -> None:
        """No call runs: who looks at weights that are present is noticed from now on."""
        self._is_guarding = True
        for unit in self._transfer.loaded:
            if unit.is_present and not unit.binding.is_guarded and not unit.is_lent:
                unit.binding.guard()

    def guard_again(self, units: Iterable[StreamedUnit]) -> None:
        """Whoever has looked at these is done: the next one is noticed as well."""
        for unit in units:
            if unit.index in self.units and unit.is_present and not unit.binding.is_guarded:
                unit.binding.guard()

    def unguard_for_call(self, units: Iterable[StreamedUnit]) -> None:
        """A call begins that uses these units; `guard` is to follow."""
        self._is_guarding = False
        self.unguard(units)

    def notice_interrupt(self) -> None:
        """No call runs. One that was interrupted has not told of its end, and has left its weights plain: who has
        looked at them since was not noticed."""
        if not self._is_guarding:
            self._is_guarding = True
            self._edits.lend(u for u in self._transfer.loaded if u.is_present and not u.binding.is_guarded)

    def unguard(self, units: Iterable[StreamedUnit]) -> None:
        for unit in units:
            if unit.binding.is_guarded:
                unit.binding.unguard()

    def lend_if_looked_at(self, unit: StreamedUnit) -> None:
        """Code may have kept, in the middle of a call, views of weights that are there still (`module.weight.data` in a
        hook): what is written to them is counted nowhere."""
        if unit.is_present and unit.holding().is_aliased(num_bound=len(unit.binding.tensors)):
            self._edits.lend([unit])

    def write_back(self, unit: StreamedUnit, *, may_replace: bool) -> list[BoundTensor]:
        """Keep what was written into the unit's tensors: the host bytes are what the next load reads."""
        written = self._edits.written(unit)
        replaced = unit.binding.replaced() if written else []
        for bound in written:
            now, is_replaced = bound.tensor.data, bound in replaced
            if not (may_replace and self._is_replaced_at_home(unit, bound, now, is_replaced=is_replaced)):
                if not bound.has_form_of(now):
                    raise StreamerStateError(_changed(bound, now))
                self._keep_at_home(unit, bound, now)
                if unit.is_cloned and not is_replaced:  # so that whoever looks at the slot sees it, too
                    unit.holding().views(unit)[unit.binding.tensors.index(bound)].copy_(now)
        self._edits.pointed_elsewhere(replaced)
        self._edits.came_home(written)
        return written

    def _keep_at_home(self, unit: StreamedUnit, bound: BoundTensor, now: torch.Tensor) -> None:
        """What was written to a weight is what the next load reads."""
        unit.home.write(bound, now)
        self._stats.num_written_back += 1

    def _is_replaced_at_home(
        self, unit: StreamedUnit, bound: BoundTensor, now: torch.Tensor, *, is_replaced: bool
    ) -> bool:
        """Hand back what the user made of a weight, where the memory at home is not for it: see `has_left_home`.
        Returns whether it is so."""
        has_left = not bound.has_form_of(now) or (is_replaced and self._is_anothers(unit, bound))
        if has_left:
            unit.home.replace(bound, now)
        return has_left

    def has_left_home(self, unit: StreamedUnit) -> bool:
        """Whether a weight of a present unit has another form now, or was pointed away from memory at home that is also
        somebody's entry of a `state_dict`, or another weight's."""
        binding = unit.binding
        with without_subclasses():
            has_form = all(bound.has_form_of(bound.tensor) for bound in binding.tensors)
            return not has_form or any(self._is_anothers(unit, bound) for bound in binding.replaced())

    def _is_anothers(self, unit: StreamedUnit, bound: BoundTensor) -> bool:
        """Whether the memory of a weight at home is not its alone."""
        at = bound.master.data_ptr()
        is_tied = any(b is not bound and b.master.data_ptr() == at for b in unit.binding.tensors)
        return is_tied or self._edits.has_entries([bound])

    def take_in(self, unit: StreamedUnit) -> bool:
        """Bring home what the weights of an absent unit were given meanwhile; returns whether it can go on so."""
        changed = unit.binding.changed_while_absent()
        if not changed:
            return True
        can_go_on = True
        with engine_tensors():
            for bound in changed:
                with without_subclasses():
                    now = bound.tensor.data
                if self._is_replaced_at_home(unit, bound, now, is_replaced=True):
                    can_go_on = False
                else:
                    self._keep_at_home(unit, bound, now)
            unit.binding.absent_again(changed)
            self._edits.pointed_elsewhere(changed)
            self.discard([unit])
        return can_go_on

    def forget_autocast(self, units: Iterable[StreamedUnit]) -> None:
        """Autocast keeps a cast copy of weights until the region ends: the model would pile up."""
        kept = self.kept_by_autocast(units)
        if kept:
            torch.clear_autocast_cache()
            self.with_autocast.update(unit.spec.component for unit in kept)

    def listen_under_autocast(self) -> None:
        """Put hooks back on blocks whose end is to let go of what autocast keeps of them."""
        kept = self.kept_by_autocast(unit for unit in self.units.values() if unit.is_quiet)
        if kept:
            components = {unit.spec.component for unit in kept}
            self.with_autocast |= components
            self.listen_to([unit for unit in self.quiet() if unit.spec.component in components])

    def kept_by_autocast(self, units: Iterable[StreamedUnit]) -> list[StreamedUnit]:
        """Of these, the units that have weights of which autocast keeps casts now: parameters of 32 bits that require
        grad, and nothing else."""
        if not torch.is_autocast_cache_enabled() or not torch.is_autocast_enabled(self._device.torch_device.type):
            return []
        return [unit for unit in units if any(bound.requires_grad for bound in unit.of_32_bits)]


def _positions(units: Sequence[StreamedUnit]) -> dict[StreamedUnit, int]:
    """Where each comes first."""
    return {unit: position for position, unit in reversed(list(enumerate(units)))}


def _changed(bound: BoundTensor, now: torch.Tensor) -> str:
    before, after = f"{bound.dtype} {list(bound.shape)}", f"{now.dtype} {list(now.shape)}"
    if before == after:
        before, after = (f"{kind} in strides {list(s)}" for kind, s in ((before, bound.strides), (after, now.stride())))
    return (
        f"`{bound.name}` was changed from {before} to {after} while it streams. Leave the offload context, change it, "
        "and enter again."
    )
