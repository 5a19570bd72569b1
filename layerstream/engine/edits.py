"""Edits of weights that nothing counts: found when the next call begins, and brought home.

On a resident pipeline `weight.data[0] = row` takes effect, and so does writing to a tensor that was read from a weight
long ago, or to an entry of `state_dict()`. No version counter tells. So what code outside may have its hands on is
remembered, and compared with the bytes at home:

- *lent* units: something looked at their weights while no call ran;
- *kept* views: memory that a unit has left, because somebody still looks at it;
- *entries* of a `state_dict`, which are memory at home: by their version, and by their bytes.

What was edited is copied home, or is home already; then what the device has of it is stale.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layerstream.budget import format_bytes
from layerstream.device.base import Device
from layerstream.host.memory import bytes_of
from layerstream.saying import warn
from layerstream.stats import Stats
from layerstream.transfer.unit import StreamedUnit
from layerstream.weights.binding import BoundTensor
from layerstream.weights.references import is_held, use_count

_COMPARED_BYTES = 2**23  # at once: so much of home is on the device meanwhile
# Kept views and entries of more than this are compared once a use of the pipeline, not at each pass of a component.
_SMALL_BYTES = 2**28


@dataclass(eq=False)
class _KeptView:
    """Memory that a unit has left. `tensor` is the weight that it was; `view` looks at the memory."""

    tensor: torch.Tensor
    view: torch.Tensor


@dataclass(eq=False)
class _Entry:
    """An entry of a `state_dict`: memory at home, with a version counter of its own.

    Attributes:
        num_holders: tensors that looked at the memory when nobody but us had taken anything from the entry.
    """

    tensor: torch.Tensor
    entry: torch.Tensor
    version: int
    num_holders: int

    def is_held(self) -> bool:
        """Whether somebody else has the entry, or what was made of it: a view, an array."""
        return sys.getrefcount(self.entry) > 2 or is_held(self.entry, self.num_holders)


@dataclass
class Edits:
    """What code outside may have its hands on, of one streamer's weights.

    Args:
        units: by index; the streamer adds and removes them.
        unit_of: by the id of a weight, the unit that it is part of.
        wait: queues this thread's compute behind the load of a unit.
    """

    device: Device
    units: Mapping[int, StreamedUnit]
    unit_of: Mapping[int, Any]
    stats: Stats
    wait: Callable[[StreamedUnit], object]
    _kept: list[_KeptView] = field(default_factory=list)
    _entries: list[_Entry] = field(default_factory=list)
    _has_told: bool = False
    _has_lent: bool = False  # asked at each call, where going through all units would take longer

    def __bool__(self) -> bool:
        return bool(self._has_lent or self._kept or self._entries)

    def lend(self, units: Iterable[StreamedUnit]) -> None:
        """Code outside looks at these units while no call runs."""
        for unit in units:
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
                self._kept.append(_KeptView(bound.tensor, view))

    def keep_held(self, bounds: Iterable[BoundTensor]) -> None:
        """These weights are about to leave memory that is each one's own, not a slot's; some of it may be held."""
        for bound in bounds:
            view = bound.tensor.data
            if view.numel() and is_held(view, num_own=2):
                self._kept.append(_KeptView(bound.tensor, view))

    def pointed_elsewhere(self, bounds: Sequence[BoundTensor]) -> None:
        """`weight.data = other`: memory that these weights had before is no longer theirs."""
        if bounds:
            gone = {id(bound.tensor) for bound in bounds}
            self._kept = [kept for kept in self._kept if id(kept.tensor) not in gone]
            self._entries = [each for each in self._entries if id(each.tensor) not in gone]

    def has_entry(self, bound: BoundTensor) -> bool:
        """Whether somebody has the weight's memory at home as an entry of a `state_dict`."""
        return any(each.tensor is bound.tensor and each.is_held() for each in self._entries)

    def track(self, entries: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Entries of a `state_dict` that somebody has now, each with its weight."""
        for weight, entry in entries:
            count = use_count(storage := entry.untyped_storage())
            num_holders = 0 if count is None else count - 1
            del storage
            self._entries.append(_Entry(weight, entry, entry._version, num_holders))

    # ---- what is found

    def written(self, unit: StreamedUnit) -> list[BoundTensor]:
        """Weights of a present unit whose bytes on the device are newer than those at home."""
        binding = unit.binding
        found = binding.written()
        suspects = binding.tensors if unit.is_lent else binding.uncounted()
        return [*found, *(b for b in suspects if b not in found and self._differ(b.tensor.data, b.master))]

    def settle(self, *, is_new_use: bool) -> set[StreamedUnit]:
        """Bring home what was edited elsewhere than in the present units; returns those whose device bytes are stale.

        Lent units are left to whoever writes units back.

        Args:
            is_new_use: large ones are compared, too.
        """
        stale = self._by_version()
        # Both are let go only once they were compared: what was written to one that nobody has any more was written
        # all the same.
        if is_new_use or sum(kept.view.nbytes for kept in self._kept) <= _SMALL_BYTES:
            stale |= self._of_kept()
            counts = Counter(kept.view.untyped_storage().data_ptr() for kept in self._kept)
            self._kept = [
                kept
                for kept in self._kept
                if is_held(kept.view, num_own=counts[kept.view.untyped_storage().data_ptr()])
            ]
        if is_new_use or sum(each.entry.nbytes for each in self._entries) <= _SMALL_BYTES:
            stale |= self._of_entries(but=stale)
            self._entries = [each for each in self._entries if each.is_held()]
        self._tell_of_large_ones()
        return stale

    def came_home(self, bounds: Sequence[BoundTensor]) -> None:
        """What was written on the device is home now; views that are kept see it, as of a resident weight."""
        for bound in bounds:
            for kept in self._kept:
                if kept.tensor is bound.tensor and _fits(kept.view, bound):
                    kept.view.copy_(bound.master)

    def after_pause(self) -> None:
        """Weights may have changed at home, and belong to other units now."""
        self._kept = [kept for kept in self._kept if self._bound_of(kept.tensor) is not None]
        self.came_home([bound for kept in self._kept if (bound := self._bound_of(kept.tensor)) is not None])
        for each in self._entries:
            each.version = each.entry._version

    # ---- inside

    def _tell_of_large_ones(self) -> None:
        num_bytes = sum(k.view.nbytes for k in self._kept) + sum(e.entry.nbytes for e in self._entries)
        if num_bytes > _SMALL_BYTES and not self._has_told:
            self._has_told = True
            warn(
                f"{format_bytes(num_bytes)} of tensors that were read from weights while they are streamed are still "
                "held (a state_dict, weight.data): they are compared with the weights before each call, in case "
                "somebody writes to them. Let them go to save that time.",
            )

    def _by_version(self) -> set[StreamedUnit]:
        found = set()
        for each in self._entries:
            bound = self._bound_of(each.tensor)
            if bound is not None and each.entry._version != each.version:
                each.version = each.entry._version
                self._take(each.entry, bound)
                found.add(self._unit_of(each.tensor))
        return found

    def _of_kept(self) -> set[StreamedUnit]:
        found = set()
        for kept in self._kept:
            bound = self._bound_of(kept.tensor)
            if bound is None or not _fits(kept.view, bound):
                continue
            unit = self._unit_of(kept.tensor)
            slot = unit.slot
            if slot is not None and slot.start <= kept.view.data_ptr() < slot.end:
                self.wait(unit)  # it was left to whoever looks at it, and is being loaded again
            if self._differ(kept.view, bound.master):
                self._take(kept.view, bound)
                found.add(self._unit_of(kept.tensor))
        return found

    def _of_entries(self, but: set[StreamedUnit]) -> set[StreamedUnit]:
        found = set()
        for each in self._entries:
            entry, bound = each.entry, self._bound_of(each.tensor)
            if bound is None or not _fits(entry, bound):
                continue
            unit = self._unit_of(each.tensor)
            if entry.data_ptr() != bound.master.data_ptr():
                if not _same_bytes(entry, bound.master):
                    self._take(entry, bound)
                    found.add(unit)
            elif (
                unit not in but | found
                and not unit.is_lent
                and self._is_on_device(unit, bound)
                and self._differ(bound.tensor.data, bound.master)
            ):
                found.add(unit)
        return found

    def _take(self, edited: torch.Tensor, bound: BoundTensor) -> None:
        """What somebody wrote is what the weight is from now on."""
        if not _fits(edited, bound):
            return
        self._unit_of(bound.tensor).home.write(bound, edited)
        self.came_home([bound])
        self.stats.num_written_back += 1

    def _bound_of(self, tensor: torch.Tensor) -> BoundTensor | None:
        record = self.unit_of.get(id(tensor))
        unit = self.units.get(record.unit) if record is not None else None
        return next((b for b in unit.binding.tensors if b.tensor is tensor), None) if unit is not None else None

    def _unit_of(self, tensor: torch.Tensor) -> StreamedUnit:
        return self.units[self.unit_of[id(tensor)].unit]

    def _is_on_device(self, unit: StreamedUnit, bound: BoundTensor) -> bool:
        return unit.is_present and not unit.binding.is_guarded and bound.tensor.data_ptr() != bound.master.data_ptr()

    def _differ(self, there: torch.Tensor, home: torch.Tensor) -> bool:
        """Whether a tensor on the device differs from the bytes at home; waits for the device."""
        if there.shape != home.shape or there.dtype != home.dtype or there.stride() != home.stride():
            return True
        if not home.numel():
            return False
        return not all(map(self._are_equal, _chunks(there), _chunks(home)))

    def _are_equal(self, there: torch.Tensor, home: torch.Tensor) -> bool:
        try:
            return torch.equal(there, home.to(there.device))
        except torch.OutOfMemoryError:  # the budget is full
            return torch.equal(there.to(home.device), home)


def _fits(tensor: torch.Tensor, bound: BoundTensor) -> bool:
    return tensor.dtype == bound.dtype and tuple(tensor.shape) == bound.shape


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def _chunks(dense: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = bytes_of(dense)
    for start in range(0, flat.numel(), _COMPARED_BYTES):
        yield flat[start : start + _COMPARED_BYTES]
