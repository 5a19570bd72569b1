"""A unit while it streams: the one place for where its bytes are and who may look at them, and the slots it may be in.

    state      bytes at home  bytes on the device                      its tensors
    ---------  -------------  ---------------------------------------  ---------------------------------------
    ABSENT     yes            none                                     absent: one NaN, load if touched
    LOADED     yes            in a slot, undefined until `ready`       absent
    PRESENT    yes            in a slot                                bound to the slot, or to copies of it

`load` and `vacate` (`transfer.py`) lead from ABSENT to LOADED and back, `bind` and `unbind` from LOADED to PRESENT and
back. Each refuses any other state.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from layerstream.blocks import UnitSpec
from layerstream.device.base import Event, Stream
from layerstream.errors import TransferError
from layerstream.hooks.outputs import without_aliases
from layerstream.host.home import Home
from layerstream.torch_private import use_count_of
from layerstream.transfer.route import Issue, Routes
from layerstream.weights.binding import BoundTensor, UnitBinding


def kept_out_of_slots(output: Any, units: Iterable[StreamedUnit]) -> Any:
    """What a block with these units returns, with tensors that lie in their slots replaced by copies; itself if there
    are none."""
    for unit in units:
        slot = unit.slot
        if slot is not None:
            output = without_aliases(output, slot.start, slot.end)
    return output


class UnitState(enum.Enum):
    """What memory a unit takes, beside its bytes at home."""

    ABSENT = "none"
    LOADED = "a slot; nothing is bound to it"
    PRESENT = "a slot; the unit's tensors are bound to it, or to copies of their own"


class Prepared(NamedTuple):
    """What is made once for a unit in a slot.

    Attributes:
        views: its tensors there.
        load: what loads it; None: its home is another since.
        num_references: that `load` has to the slot's memory.
    """

    views: list[torch.Tensor]
    load: Issue | None
    num_references: int = 0


class Slot:
    """One device buffer, which holds one unit at a time.

    Attributes:
        stream: the compute stream it was allocated on, to which its memory returns.
        unit: what it holds, or is being filled with.
        ready: the event after the copy that filled it; a new one for each load.
        after: events the next copy into it must wait for.
        readers: compute streams that wait, or waited, for `ready`.
        is_extra: made for one use; freed when it is vacated.
        start, end: addresses of its memory.
        prepared: by unit, what is made once for it in this slot.
    """

    def __init__(self, buffer: torch.Tensor, stream: Stream, after: Event, *, is_extra: bool = False) -> None:
        self.buffer = buffer
        self.stream = stream
        self.is_extra = is_extra
        self.unit: StreamedUnit | None = None
        self.ready: Event = None
        self.after: list[Event] = [after]
        self.readers: list[Stream] = []
        self.prepared: dict[StreamedUnit, Prepared] = {}
        self.start = buffer.data_ptr()
        self.end = self.start + buffer.numel()
        self._storage = buffer.untyped_storage()
        self._cdata = self._storage._cdata
        self._own_references = self._references = self._count_references()

    def prepare(self, unit: StreamedUnit, routes: Routes) -> Issue:
        """What loads `unit` into this slot, and its views there, made once for each home: fixed addresses, and 15 µs
        instead of 150 to bind."""
        known = self.prepared.get(unit)
        if known is not None and known.load is not None:
            return known.load
        before = self._count_references()
        load = routes.prepare(unit.home, self.buffer, unit.spec.name)
        num_references = self._count_references() - before
        self.prepared[unit] = Prepared(unit.home.views(unit.binding, self.buffer), load, num_references)
        del known
        self._noticed_own(before)
        return load

    def views(self, unit: StreamedUnit) -> list[torch.Tensor]:
        """The tensors of a unit that was loaded into this slot, where they are in it."""
        return self.prepared[unit].views

    def forget_load(self, unit: StreamedUnit) -> None:
        """The unit has another home: its next load is prepared anew. What is in the slot is where it was."""
        known = self.prepared.get(unit)
        if known is not None:
            self.prepared[unit] = Prepared(known.views, None)
            # What the load has of the memory is let go of, now or, by a copy that is on its way, soon: what would be
            # counted as ours from then on would be somebody else's.
            self._own_references -= known.num_references
            self._references -= known.num_references

    def forget(self, unit: StreamedUnit) -> None:
        """Drop the views of a unit that exists no more."""
        before = self._count_references()
        self.prepared.pop(unit, None)
        self._noticed_own(before)

    def is_aliased(self, num_bound: int = 0) -> bool:
        """Whether anything but this slot, and so many weights that are bound to it, looks at its memory:
        `weight.detach()` kept by user code, say. Where torch does not tell, it is taken to be so; and where some of
        the graphs that were accepted are gone, since the rest may be anything."""
        count = use_count_of(self._cdata)
        if count < 0:
            return True
        count -= num_bound
        if count <= self._own_references:
            self._references = count  # all that was accepted is gone
            return False
        return count != self._references

    def accept_references(self) -> None:
        """What looks at the slot now may stay, and see its bytes change: graphs, whose backward is refused."""
        self._references = self._count_references()

    def _noticed_own(self, before: int) -> None:
        """What looks at the memory since then is the slot's own."""
        added = self._count_references() - before
        self._own_references += added
        self._references += added

    def _count_references(self) -> int:
        return use_count_of(self._cdata)


class StreamedUnit:
    """A unit of a pipeline that streams.

    Attributes:
        spec: its name, size and place, as the plan knows it.
        binding: its tensors.
        home: its bytes outside of the device, and their only writer.
        last_load: the event after the last load that was issued; None: there was none.
        called: modules whose forward needs it; none of a base.
        of_32_bits: of its tensors, those of which autocast may keep casts.
        index: its number in plans.
        slot: the one that it is in, or is being loaded into.
        own_slot: one for it alone, loaded or not, where the plan makes it resident.
        is_present: its tensors are bound to bytes on the device.
        is_lent: code outside looked at its weights while no call ran, and may have written to them.
        is_cloned: its weights were read between calls, and are in memory of their own.
        may_be_saved: autograd may have saved its weights, and must find out that they are gone.
        may_be_in_graph: what looks at its slot may be what autograd has saved; where nothing requires grad, it is not.
        is_quiet: its blocks have no hooks, since it stays where it is.
        is_called_alone: its block was called from outside of all that is watched.
    """

    def __init__(self, spec: UnitSpec, binding: UnitBinding, called: tuple[nn.Module, ...], home: Home) -> None:
        self.spec, self.binding, self.called, self.home = spec, binding, called, home
        self.last_load: Event = None
        self.of_32_bits = tuple(bound for bound in binding.tensors if bound.dtype is torch.float32)
        self.index = spec.index
        self.slot: Slot | None = None
        self.own_slot: Slot | None = None
        self.is_lent = self.is_cloned = self.is_quiet = self.is_called_alone = False
        self.may_be_saved = self.may_be_in_graph = False
        self.is_present = False

    def __repr__(self) -> str:
        return f"StreamedUnit({self.spec.name!r}, {self.state.name})"

    @property
    def state(self) -> UnitState:
        """Where its bytes are."""
        if self.slot is None:
            return UnitState.ABSENT
        return UnitState.PRESENT if self.is_present else UnitState.LOADED

    @property
    def is_settled(self) -> bool:
        """Whether it is where the plan wants it to stay, with its tensors bound."""
        return self.own_slot is not None and self.slot is self.own_slot and self.is_present

    def holding(self) -> Slot:
        """The slot that it is in.

        Raises:
            TransferError: it is in none.
        """
        if self.slot is None:
            raise TransferError(f"unit `{self.spec.name}` is in no slot")
        return self.slot

    def filled(self, slot: Slot) -> None:
        """A copy into `slot` is queued: ABSENT to LOADED."""
        if self.slot is not None:
            self.refuse(UnitState.ABSENT)
        self.slot, slot.unit = slot, self

    def bind(self, views: Sequence[torch.Tensor]) -> None:
        """Point its tensors at `views`, which compute is queued behind: LOADED to PRESENT."""
        if self.slot is None or self.is_present:
            self.refuse(UnitState.LOADED)
        try:
            self.binding.present(views)
        except BaseException:  # an interrupt: none may stay bound to a slot that holds another unit next
            self.binding.absent_again(self.binding.tensors)
            raise
        self.is_present = True

    def unbind(self) -> None:
        """Make its tensors absent: PRESENT to LOADED."""
        if not self.is_present:
            self.refuse(UnitState.PRESENT)
        self.is_present = self.is_cloned = False
        try:
            self.binding.absent()
        except BaseException:
            self.binding.absent_again(self.binding.tensors)
            raise

    def hand_back(self) -> None:
        """Give its tensors the bytes at home for good: from any state, to ABSENT or LOADED."""
        self.binding.restore(self.home.value)
        self.is_present = False

    def hand_back_lost(self) -> None:
        """The same of a unit whose bytes are lost: its tensors are NaN."""
        self.binding.restore(_nothing_of)
        self.is_present = False

    def left(self) -> Slot:
        """Nothing follows that reads its slot: LOADED to ABSENT. Returns the slot."""
        slot = self.slot
        if slot is None or self.is_present:
            self.refuse(UnitState.LOADED)
        self.slot = slot.unit = None
        self.may_be_saved = self.may_be_in_graph = self.is_lent = self.is_cloned = False
        return slot

    def refuse(self, wanted: UnitState) -> NoReturn:
        """Raise, since it is in another state than this.

        Raises:
            TransferError: names the unit and both states.
        """
        raise TransferError(f"unit `{self.spec.name}` is {self.state.name}, where it should be {wanted.name}")


def _nothing_of(bound: BoundTensor) -> torch.Tensor:
    value = torch.empty(bound.shape, dtype=bound.dtype, device=bound.home_device)
    return value.fill_(float("nan") if bound.dtype.is_floating_point else 0)
