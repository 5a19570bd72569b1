"""Edits of weights that nothing counts: found when the next call begins, and brought home.

On a resident pipeline `weight.data[0] = row` takes effect, and so does writing to a tensor that was read from a weight
long ago, or to an entry of `state_dict()`. No version counter tells. So what code outside may have its hands on is
remembered, and compared with the bytes at home:

- *lent* units: something looked at their weights while no call ran;
- *kept* views: memory that a unit has left, because somebody still looks at it;
- *entries* of a `state_dict`, which are memory at home: by their version, and by their bytes;
- weights *held* since before streaming, as entries, views or arrays of the memory that they were found in. What torch
  made of a weight shares its version counter, so a version that moved while no call ran tells; of arrays, the bytes.

What was edited is copied home, or is home already; then what the device has of it is stale.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layerstream.budget import format_bytes
from layerstream.device.base import Device
from layerstream.engine.ties import Entry, Held, KeptView, differ, differ_in_value, fits, same_bytes
from layerstream.saying import warn
from layerstream.stats import Stats
from layerstream.torch_private import without_subclasses
from layerstream.transfer.unit import StreamedUnit
from layerstream.weights.binding import BoundTensor
from layerstream.weights.references import is_held

# Kept views and entries of more than this are compared once a use of the pipeline, not at each pass of a component.
_SMALL_BYTES = 2**28

_Edited = defaultdict[StreamedUnit, set[BoundTensor]]  # whose device bytes are stale for it


@dataclass
class Edits:
    """What code outside may have its hands on, of one streamer's weights.

    Args:
        units: by index; the streamer adds and removes them.
        unit_of: by the id of a weight, the unit that it is part of.
        wait: queues this thread's compute behind the load of a unit; gives its weights there.
    """

    device: Device
    units: Mapping[int, StreamedUnit]
    unit_of: Mapping[int, Any]
    stats: Stats
    wait: Callable[[StreamedUnit], list[torch.Tensor]]
    _kept: list[KeptView] = field(default_factory=list)
    _entries: list[Entry] = field(default_factory=list)
    _held: dict[int, Held] = field(default_factory=dict)  # by unit
    _given: set[int] = field(default_factory=set)  # ids of weights whose entries are to be tracked
    _homes: dict[int, torch.Tensor] = field(default_factory=dict)  # by the id of a weight: see `_remember_homes`
    _places: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)  # of tied weights when a pause begins
    _has_told: bool = False
    _has_lent: bool = False  # asked at each call, where going through all units would take longer

    def __bool__(self) -> bool:
        return bool(self._has_lent or self._kept or self._entries or self._held)

    def lend(self, units: Iterable[StreamedUnit]) -> None:
        """Code outside looks at these units while no call runs."""
        for unit in units:
            if not unit.is_lent and self._is_watched(unit):
                self._remember_home(unit)
            unit.is_lent = self._has_lent = True

    @property
    def lent(self) -> list[StreamedUnit]:
        """Units that code outside has looked at while no call ran."""
        found = [unit for unit in self.units.values() if unit.is_lent] if self._has_lent else []
        self._has_lent = bool(found)
        return found

    # ---- what is remembered

    def keep(self, unit: StreamedUnit, views: Sequence[torch.Tensor], but: Collection[BoundTensor] = ()) -> None:
        """Somebody still looks at memory that the unit has left; `views` are where its weights were.

        Args:
            but: weights that were pointed elsewhere: what is written to their old memory is nothing to them.
        """
        for bound, view in zip(unit.binding.tensors, views, strict=True):
            if view.numel() and bound not in but:
                # `.data`: a view would keep what it was made of, and look held by that.
                self._kept.append(KeptView(bound.tensor, view.data))

    def keep_held(self, bounds: Iterable[BoundTensor]) -> None:
        """These weights are about to leave memory that is each one's own, not a slot's; some of it may be held."""
        for bound in bounds:
            view = bound.tensor.data
            if view.numel() and is_held(view, num_own=2):
                self._kept.append(KeptView(bound.tensor, view))

    def pointed_elsewhere(self, bounds: Sequence[BoundTensor]) -> None:
        """`weight.data = other`: memory that these weights had before is no longer theirs."""
        self._untie({id(bound.tensor) for bound in bounds})

    def has_entries(self, bounds: Collection[BoundTensor]) -> bool:
        """Whether somebody has memory at home of one of these weights as an entry of a `state_dict`, is being given it,
        or has had it before."""
        weights = {id(bound.tensor) for bound in bounds}
        is_entry = any(id(each.tensor) in weights and each.is_held() for each in self._entries)
        is_held = any(id(bound.tensor) in weights for held in self._held.values() for bound in held.bounds)
        return is_entry or is_held or not weights.isdisjoint(self._given)

    def holds(self, unit: StreamedUnit) -> bool:
        """Whether somebody has memory in which weights of the unit were found."""
        return unit.index in self._held

    def give(self, entries: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Somebody gets these entries, in a pause. How many look at their memory is counted once it is over."""
        self._given = {id(weight) for weight, _ in entries}

    def track(self, entries: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Entries of a `state_dict` that somebody has now, each with its weight; after `give`."""
        self._given = set()
        for weight, entry in entries:
            self._entries.append(made := Entry(weight, entry, entry._version))
            made.num_holders = made.count()

    def held_before(self, found: Sequence[tuple[StreamedUnit, Sequence[BoundTensor]]]) -> None:
        """Units begin to stream, or do again after a pause, and somebody looks at the memory in which these weights of
        them were found."""
        before = {id(bound.tensor) for held in self._held.values() for bound in held.bounds}
        self._kept = [kept for kept in self._kept if not kept.is_found or id(kept.tensor) not in before]
        # By whoever has read them since, and is told of elsewhere.
        told = {id(kept.tensor) for kept in self._kept} | {id(each.tensor) for each in self._entries} | self._given
        places = {b.home.data_ptr() for _, bounds in found for b in bounds if id(b.tensor) in told}
        told |= {id(b.tensor) for _, bounds in found for b in bounds if b.home.data_ptr() in places}  # tied to those
        for unit, bounds in found:
            held = [bound for bound in bounds if id(bound.tensor) in before or id(bound.tensor) not in told]
            if held:
                self._held[unit.index] = Held(held)
            self._kept += [KeptView(b.tensor, b.home, is_found=True) for b in held if b.home is not b.master]

    def pass_begins(self) -> None:
        """What it writes is on the device alone, until it has ended: an interrupt may keep it from that."""
        for index, held in self._held.items():
            unit = self.units.get(index)
            if unit is not None and not (unit.is_present and unit.binding.is_guarded):
                held.versions = []

    def pass_ended(self) -> None:
        """What a call has written to weights that are held elsewhere is home at its end: what differs from it when the
        next begins was written elsewhere."""
        with without_subclasses():
            for index, held in self._held.items():
                unit = self.units.get(index)
                if unit is None or (unit.is_present and unit.binding.is_guarded):
                    continue  # of a component that did not run
                versions = held.versions_now()
                if unit.is_present and not unit.is_lent:
                    counted = unit.binding.written() if versions != held.versions else []
                    for bound in [*counted, *unit.binding.uncounted()]:
                        if bound in held.bounds and bound.has_form_of(bound.tensor):
                            unit.home.write(bound, bound.tensor.data)
                held.versions = versions
            self._remember_homes()

    # ---- what is found

    def written(self, unit: StreamedUnit) -> list[BoundTensor]:
        """Weights of a present unit whose bytes on the device are newer than those at home."""
        binding = unit.binding
        found = binding.written()
        suspects = binding.tensors if unit.is_lent else binding.uncounted()
        newer = [*found, *(b for b in suspects if b not in found and differ(b.tensor.data, b.master))]
        # What somebody has since before streaming shares its count with the weight: a write there looks like one here.
        return [bound for bound in newer if not (unit.is_lent and self._is_newer_at_home(bound))]

    def settle_of(self, units: Collection[StreamedUnit]) -> set[StreamedUnit]:
        """The same as `settle` of these units alone, which somebody is about to read between two calls."""
        weights = {id(bound.tensor) for unit in units for bound in unit.binding.tensors}
        edited: _Edited = defaultdict(set)
        self._of_kept(edited, [kept for kept in self._kept if id(kept.tensor) in weights])
        self._of_entries(edited, [each for each in self._entries if id(each.tensor) in weights])
        self._of_held(edited, {u.index: h for u in units if (h := self._held.get(u.index))}, compares=True)
        return self._with_others_home(edited)

    def settle(self, *, is_new_use: bool) -> set[StreamedUnit]:
        """Bring home what was edited elsewhere than in the present units; returns those whose device bytes are stale.

        Lent units are left to whoever writes units back.

        Args:
            is_new_use: large ones are compared, too.
        """
        edited: _Edited = defaultdict(set)
        self._by_version(edited)
        # Both are let go only once they were compared: what was written to one that nobody has any more was written
        # all the same.
        if is_new_use or sum(kept.view.nbytes for kept in self._kept) <= _SMALL_BYTES:
            self._of_kept(edited, self._kept)
            counts = Counter(kept.view.untyped_storage().data_ptr() for kept in self._kept)
            self._kept = [
                kept
                for kept in self._kept
                if is_held(kept.view, num_own=counts[kept.view.untyped_storage().data_ptr()])
            ]
        if is_new_use or sum(each.entry.nbytes for each in self._entries) <= _SMALL_BYTES:
            self._of_entries(edited, self._entries)
            self._entries = [each for each in self._entries if each.is_held()]
        # Of more, reading back what the device has takes longer than what a call streams.
        compares = is_new_use and sum(b.num_bytes for h in self._held.values() for b in h.bounds) <= _SMALL_BYTES
        self._of_held(edited, self._held, compares=compares)
        self._tell_of_large_ones()
        return self._with_others_home(edited)

    def came_home(self, bounds: Sequence[BoundTensor]) -> None:
        """What was written on the device is home now; views that are kept see it, as of a resident weight."""
        for bound in bounds:
            if id(bound.tensor) in self._homes:
                self._homes[id(bound.tensor)] = bound.master.clone()
            for kept in self._kept:
                if kept.tensor is bound.tensor and fits(kept.view, bound):
                    kept.view.copy_(bound.master)

    def pause_begins(self) -> None:
        """Before weights go home, and are taken hold of by other tensors of ours afterwards."""
        for each in self._entries:
            each.num_others = each.count() - each.num_holders

    def before_pause(self) -> None:
        """Weights are at home, and may be edited there or through what is kept."""
        tied = [kept.tensor for kept in self._kept] + [each.tensor for each in self._entries]
        tied += [bound.tensor for held in self._held.values() for bound in held.bounds]
        with without_subclasses():  # of components that go on streaming
            self._places = {id(tensor): (tensor, tensor.data_ptr()) for tensor in tied}
        if sum(kept.view.nbytes for kept in self._kept) <= _SMALL_BYTES:
            for kept in self._kept:
                kept.before = kept.view.to("cpu", copy=True)

    def pause_ends(self) -> None:
        """Before weights are taken hold of again: what was pointed at other memory inside (`model.double().float()`) is
        no longer what somebody has read of it."""
        places, self._places = self._places, {}
        with without_subclasses():
            self._untie({of for of, (tensor, address) in places.items() if tensor.data_ptr() != address})

    def after_pause(self) -> None:
        """Weights may have changed at home, and belong to other units now."""
        self._kept = [kept for kept in self._kept if self._bound_of(kept.tensor) is not None]
        for kept in self._kept:
            bound, before, kept.before = self._bound_of(kept.tensor), kept.before, None
            if bound is not None and before is not None and not same_bytes(kept.view.to("cpu"), before):
                self._take(kept.view, bound)
        self.came_home([bound for kept in self._kept if (bound := self._bound_of(kept.tensor)) is not None])
        for each in self._entries:
            each.version = each.entry._version
            # What is given in this pause is told of by an entry of its own.
            each.num_holders = max(0, each.count() - each.num_others - (id(each.tensor) in self._given))
        # What nobody holds any more was not told of when these units were attached anew.
        self._held = {
            index: held
            for index, held in self._held.items()
            if index in self.units and all(bound in self.units[index].binding.tensors for bound in held.bounds)
        }

    # ---- inside

    def _untie(self, gone: Collection[int]) -> None:
        """Nothing that somebody has of these weights, by their ids, is theirs any more."""
        if not gone:
            return
        self._homes = {weight: home for weight, home in self._homes.items() if weight not in gone}
        self._kept = [kept for kept in self._kept if id(kept.tensor) not in gone]
        self._entries = [each for each in self._entries if id(each.tensor) not in gone]
        for held in self._held.values():
            held.bounds = [bound for bound in held.bounds if id(bound.tensor) not in gone]
            held.versions = []

    def _remember_homes(self) -> None:
        """Copies of what is at home now of weights that somebody has there, where somebody else has kept views of what
        is on the device: what differs when the next call begins was written by either."""
        lent = {id(bound.tensor) for unit in self.lent for bound in unit.binding.tensors}
        self._homes = {weight: home for weight, home in self._homes.items() if weight in lent}
        units = {self.units.get(index) for index in self._held}
        units |= {self._unit_of_id(id(each.tensor)) for each in self._entries}
        aliased = [
            unit
            for unit in units
            if unit is not None and unit.is_present and not unit.is_lent and unit.slot is not None
            if unit.slot.is_aliased(num_bound=len(unit.binding.tensors))
        ]
        if not aliased:
            return
        watched = {id(bound.tensor) for held in self._held.values() for bound in held.bounds}
        watched |= {id(each.tensor) for each in self._entries}
        homes = {id(b.tensor): b.master for unit in aliased for b in unit.binding.tensors if id(b.tensor) in watched}
        if sum(home.nbytes for home in homes.values()) <= _SMALL_BYTES:
            self._homes |= {weight: home.clone() for weight, home in homes.items()}

    def _is_watched(self, unit: StreamedUnit) -> bool:
        """Whether somebody has memory of the unit at home."""
        return unit.index in self._held or any(self._unit_of_id(id(each.tensor)) is unit for each in self._entries)

    def _remember_home(self, unit: StreamedUnit) -> None:
        """The same of a unit that is lent: what differs later was written at home, and not on the device."""
        if sum(bound.num_bytes for bound in unit.binding.tensors) <= _SMALL_BYTES:
            self._homes |= {id(bound.tensor): bound.master.clone() for bound in unit.binding.tensors}

    def _is_newer_at_home(self, bound: BoundTensor) -> bool:
        """Whether a weight was written at home since its unit was lent, as far as that was remembered."""
        before = self._homes.get(id(bound.tensor))
        if before is None:
            return False
        return not same_bytes(before, bound.master) or (
            not bound.has_one_home and fits(bound.home, bound) and differ_in_value(bound.home, before)
        )

    def _tell_of_large_ones(self) -> None:
        num_bytes = sum(k.view.nbytes for k in self._kept) + sum(e.entry.nbytes for e in self._entries)
        if num_bytes > _SMALL_BYTES and not self._has_told:
            self._has_told = True
            warn(
                f"{format_bytes(num_bytes)} of tensors that were read from weights which are streamed now are still "
                "held (a state_dict, weight.data): they are compared with the weights before each call, in case "
                "somebody writes to them. Let them go to save that time.",
            )

    def _by_version(self, edited: _Edited) -> None:
        for each in self._entries:
            bound = self._bound_of(each.tensor)
            if bound is not None and each.entry._version != each.version:
                each.version = each.entry._version
                self._take(each.entry, bound)
                edited[self._unit_of(each.tensor)].add(bound)

    def _of_kept(self, edited: _Edited, kept_views: Iterable[KeptView]) -> None:
        for kept in kept_views:
            bound = self._bound_of(kept.tensor)
            if bound is None or not fits(kept.view, bound):
                continue
            unit = self._unit_of(kept.tensor)
            slot = unit.slot
            if slot is not None and slot.start <= kept.view.data_ptr() < slot.end:
                self.wait(unit)  # it was left to whoever looks at it, and is being loaded again
            if differ_in_value(kept.view, bound.master):
                self._take(kept.view, bound)
                edited[unit].add(bound)

    def _of_entries(self, edited: _Edited, entries: Iterable[Entry]) -> None:
        for each in entries:
            entry, bound = each.entry, self._bound_of(each.tensor)
            if bound is None or not fits(entry, bound):
                continue
            unit = self._unit_of(each.tensor)
            if entry.data_ptr() != bound.master.data_ptr():
                if not same_bytes(entry, bound.master):
                    self._take(entry, bound)
                    edited[unit].add(bound)
            elif not unit.is_lent and self._is_older(unit, bound):
                edited[unit].add(bound)

    def _of_held(self, edited: _Edited, held_of: Mapping[int, Held], *, compares: bool) -> None:
        for index, held in held_of.items():
            unit = self.units.get(index)
            if unit is None or unit.is_lent or unit.slot is None:
                continue
            has_ended = bool(held.versions)  # since when all that the call has counted is home
            with without_subclasses():
                has_moved = has_ended and held.versions_now() != held.versions
            if has_moved or compares:
                older = [b for b in held.bounds if self._is_older(unit, b, is_counted_at_home=has_ended)]
                edited[unit].update(older)
                if not edited[unit]:
                    del edited[unit]

    def _is_older(self, unit: StreamedUnit, bound: BoundTensor, *, is_counted_at_home: bool = False) -> bool:
        """Whether the device has bytes of a weight that differ from those at home, and were not written there. Where
        somebody has views of them, the unit is lent from now on."""
        there = self._on_device(unit, bound)
        if there is None or bound in unit.binding.uncounted():
            return False
        is_written = not is_counted_at_home and unit.is_present and bound in unit.binding.written()
        if is_written or not differ(there, bound.master):
            return False
        before = self._homes.get(id(bound.tensor))
        if before is None:
            return True
        self.lend([unit])
        return not same_bytes(before, bound.master)  # else it was written on the device

    def _with_others_home(self, edited: _Edited) -> set[StreamedUnit]:
        for unit, bounds in edited.items():
            self._bring_home_others(unit, bounds)
        return set(edited)

    def _bring_home_others(self, unit: StreamedUnit, edited: Collection[BoundTensor]) -> None:
        """What the device has of a unit is about to be dropped, since some of its weights were edited elsewhere: what
        was written to its others is brought home before."""
        if not unit.is_present:
            return
        if unit.binding.is_guarded:
            unit.binding.unguard()
        homes = {bound.master.data_ptr() for bound in edited}  # of those that are tied to them, too
        for bound in self.written(unit):
            if bound.master.data_ptr() not in homes and bound.has_form_of(bound.tensor):
                unit.home.write(bound, bound.tensor.data)
                self.came_home([bound])

    def _take(self, edited: torch.Tensor, bound: BoundTensor) -> None:
        """What somebody wrote is what the weight is from now on."""
        if not fits(edited, bound):
            return
        self._unit_of(bound.tensor).home.write(bound, edited)
        self.came_home([bound])
        self.stats.num_written_back += 1

    def _bound_of(self, tensor: torch.Tensor) -> BoundTensor | None:
        unit = self._unit_of_id(id(tensor))
        return next((b for b in unit.binding.tensors if b.tensor is tensor), None) if unit is not None else None

    def _unit_of_id(self, weight: int) -> StreamedUnit | None:
        record = self.unit_of.get(weight)
        return None if record is None else self.units.get(record.unit)

    def _unit_of(self, tensor: torch.Tensor) -> StreamedUnit:
        return self.units[self.unit_of[id(tensor)].unit]

    def _on_device(self, unit: StreamedUnit, bound: BoundTensor) -> torch.Tensor | None:
        """What the device has of a weight; None: nothing, or what nobody is about to use."""
        if unit.is_present:
            is_there = not unit.binding.is_guarded and bound.tensor.data_ptr() != bound.master.data_ptr()
            return bound.tensor.data if is_there else None
        if unit.slot is None:
            return None
        return self.wait(unit)[unit.binding.tensors.index(bound)]  # loaded ahead, perhaps before it was written
