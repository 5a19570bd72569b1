"""One copy of the weights in host memory for all ranks of a host: `offload(pipe, shared_as="sd3")`.

The first rank to come copies its units into shared memory, and leads; the others compare theirs with it, bit by bit,
and take it in place of their own, which is let go of. All read it, each page-locked for its own GPU, and nobody writes
to it. A unit that differs, because the rank has edited it, stays the rank's own; so does one that is written to later.
Weights are handed back in that memory, too: a page becomes the process's own when it is written to.

Nothing is agreed on but where that memory is. A rank that ends takes nothing along; one that comes when the first has
ended makes another copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from layerstream.blocks import align
from layerstream.budget import format_bytes
from layerstream.device.base import Device
from layerstream.errors import HostMemoryError, RankError
from layerstream.host.home import SharedHome
from layerstream.host.memory import available_bytes, bytes_of, fill, touch
from layerstream.host.ranks import Entering, HostRanks
from layerstream.host.shared_pages import Address, SharedPages
from layerstream.model.units import ComponentLayout, Unit
from layerstream.saying import warn
from layerstream.stats import Stats
from layerstream.weights.binding import UnitBinding

_TIMEOUT_S = 600.0  # until the leader has copied what it leads with: it reads a checkpoint from disk meanwhile
_WHERE = "where"  # the key under which a leader says where its memory is


@dataclass(frozen=True)
class _Contents:
    """What some components are made of, which leader and followers must agree on.

    Attributes:
        forms: of their tensors, by the name of the unit.
    """

    forms: Mapping[str, str]
    num_bytes: int

    @classmethod
    def of(cls, units: Sequence[Unit]) -> _Contents:
        forms = {
            unit.spec.name: repr([(b.name, b.dtype, b.shape, b.strides) for b in unit.binding.tensors])
            for unit in units
        }
        return cls(forms, sum(_ends(unit.binding)[-1] for unit in units))

    def __str__(self) -> str:
        digest = hashlib.sha256(json.dumps(dict(self.forms), sort_keys=True).encode()).hexdigest()[:12]
        return f"{len(self.forms)} units of {format_bytes(self.num_bytes)} (names, shapes and dtypes {digest})"


@dataclass
class _Part:
    """Shared memory of some components, as this rank has it.

    Attributes:
        forms: of all units, as they were when it was entered.
        offsets: of the units that are in it, by name.
    """

    forms: Mapping[str, str]
    pages: SharedPages
    offsets: Mapping[str, int]
    entering: Entering = field(repr=False)


class HostCopy:
    """What one streamer shares with those of other ranks.

    Args:
        ranks: those of the process group; None: nothing is shared.
        name: what ranks that share call it.
    """

    def __init__(self, device: Device, stats: Stats, ranks: HostRanks | None, name: str) -> None:
        self._device = device
        self._stats = stats
        self._ranks = ranks
        self._name = name
        self._parts: dict[str, _Part | None] = {}  # by components; None: nothing of them is shared
        self._forget_counts()

    def _forget_counts(self) -> None:
        self._num_compared = self._num_equal = 0  # units of what others lead with, while it is entered
        self._num_all = self._num_shared = 0  # units that have bytes, and those of them that are shared, likewise
        self._all_bytes = self._shared_bytes = 0
        self._has_entered = False

    @property
    def is_on(self) -> bool:
        """Whether anything is to be shared."""
        return self._ranks is not None

    def line(self) -> str:
        """With whom, in words; "": nothing is shared."""
        if not self._stats.num_shared_units:
            return ""
        told = (
            f"{self._stats.num_shared_units} blocks, pieces or bases, {format_bytes(self._stats.shared_bytes)}, are in "
            f"host memory that is shared as {self._name!r}"
        )
        try:
            with_whom = set().union(*(part.entering.ranks() for part in self._parts.values() if part is not None))
        except RankError:  # of a store that answers no more, without which all goes on
            return told
        return f"{told}; by rank {', '.join(map(str, sorted(with_whom)))} so far"

    def share(
        self, layouts: Sequence[ComponentLayout], units: Sequence[Unit], looked_at: Container[Unit]
    ) -> Mapping[Unit, SharedHome]:
        """Homes in shared memory for those of these units that have the same bytes there; before they are attached.

        Args:
            layouts: the components.
            units: all of theirs.
            looked_at: of which somebody else has memory.
        Raises:
            RankError: the leader has other weights, or does not answer.
            HostMemoryError: there is no memory for a copy.
        """
        if self._ranks is None or not units:
            return {}
        place = "+".join(layout.name for layout in layouts)
        contents = _Contents.of(units)
        may_be = [unit for unit in units if unit not in looked_at and _may_be_shared(unit.binding)]
        if place not in self._parts:
            self._parts[place] = self._entered(place, contents, may_be) if contents.num_bytes else None
        part = self._parts[place]
        self._num_all += sum(_ends(unit.binding)[-1] > 0 for unit in units)
        self._all_bytes += contents.num_bytes
        if part is None:
            return {}
        compared = [  # what was cast since, or taken apart, has other forms
            unit
            for unit in may_be
            if unit.spec.name in part.offsets and part.forms[unit.spec.name] == contents.forms[unit.spec.name]
        ]
        with self._device.homes():
            found = [unit for unit in compared if _is_equal(unit, part)]
        if not part.entering.is_leader:
            self._num_compared += len(compared)
            self._num_equal += len(found)
        self._num_shared += len(found)
        self._shared_bytes += sum(_ends(unit.binding)[-1] for unit in found)
        return {unit: _home(self._device, unit, part) for unit in found}

    def entered(self) -> None:
        """All components are there, as streaming begins.

        Raises:
            RankError: others lead with weights of which this rank has none.
        """
        is_first, self._has_entered = not self._has_entered, True
        if self._ranks is None or not is_first:
            return
        if self._num_compared and not self._num_equal:
            raise RankError(
                f"rank {self._ranks.rank} shares {self._name!r} with others, and none of its {self._num_compared} "
                "units has the same weights. Load the same checkpoint in all ranks, or give pipelines that differ "
                "other names."
            )
        if self._num_shared < self._num_all:
            num_other = self._num_compared - self._num_equal
            warn(
                f"rank {self._ranks.rank} shares {self._num_shared} of {self._num_all} blocks, pieces or bases, "
                f"{format_bytes(self._shared_bytes)} of {format_bytes(self._all_bytes)}, as {self._name!r}. The rest "
                f"is in its own memory: {num_other} have other weights than those of the rank that leads, and "
                f"{self._num_all - self._num_shared - num_other} are tied, held by other code, or not found there."
            )

    def count(self, homes: Sequence[object]) -> None:
        """Components have come or gone: these are the homes of all units."""
        shared = [home for home in homes if isinstance(home, SharedHome)]
        self._stats.num_shared_units = len(shared)
        self._stats.shared_bytes = sum(home.device_bytes for home in shared)

    def close(self) -> None:
        """This rank shares nothing more; what others have of it stays theirs."""
        while self._parts:
            part = self._parts.popitem()[1]
            if part is not None:
                part.entering.close()
        self._forget_counts()

    # ---- inside

    def _entered(self, place: str, contents: _Contents, may_be: Sequence[Unit]) -> _Part | None:
        """What there is of these components; of those that come when it streams already, as far as others agree."""
        try:
            return self._enter(place, contents, may_be)
        except RankError as error:
            if not self._has_entered:
                raise
            warn(f"`{place}` is in memory of its own: {error}")
            return None

    def _enter(self, place: str, contents: _Contents, may_be: Sequence[Unit]) -> _Part | None:
        assert self._ranks is not None
        entering = self._ranks.enter(f"{self._name}/{place}", str(contents))
        with contextlib.ExitStack() as undo:
            undo.callback(entering.close)
            if entering.refused is not None:
                warn(f"rank {self._ranks.rank} has a copy of `{place}` of its own: {entering.refused}")
            while True:
                try:
                    part = _lead(entering, contents, may_be) if entering.is_leader else _follow(entering, contents)
                    break
                except RankError as error:
                    if not error.is_gone or entering.is_leader:
                        raise
                    entering.elect()
            if part is not None:
                undo.pop_all()
        return part


def _lead(entering: Entering, contents: _Contents, units: Sequence[Unit]) -> _Part | None:
    """What others follow: the units whose memory may be let go of."""
    offsets, end = {}, 0
    for unit in units:
        offsets[unit.spec.name] = end
        end += _ends(unit.binding)[-1]
    room = available_bytes()
    if room is not None and end > room[0]:
        raise HostMemoryError(
            f"the weights do not fit in host memory a second time: {format_bytes(end)} are copied to memory that ranks "
            f"share, before what was loaded is let go of, and {format_bytes(room[0])} are left ({room[1]}). Load them "
            "from safetensors files, whose pages the system can give up, or free memory.",
            needed_bytes=end,
            available_bytes=room[0],
        )
    if not end:
        entering.publish(_WHERE, b"null")
        return None
    pages = SharedPages.make(end)
    fill([pair for unit in units for pair in _pairs(unit, offsets, pages)])
    entering.publish(_WHERE, json.dumps([pages.address.to_bytes().decode(), offsets]).encode())
    return _Part(contents.forms, pages, offsets, entering)


def _follow(entering: Entering, contents: _Contents) -> _Part | None:
    found = json.loads(entering.fetch(_WHERE, _TIMEOUT_S))
    if found is None:
        return None
    address, offsets = found
    pages = SharedPages.open(Address.from_bytes(address.encode()))
    touch([pages.range])  # by several threads: to page-lock it would take the same faults in one
    return _Part(contents.forms, pages, offsets, entering)


def _ends(binding: UnitBinding) -> list[int]:
    """Where each tensor ends in a unit, each aligned; 0 first."""
    ends = [0]
    for bound in binding.tensors:
        ends.append(ends[-1] + align(bound.num_bytes))
    return ends


def _pairs(unit: Unit, offsets: Mapping[str, int], pages: SharedPages) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor's bytes in shared memory, and where this rank has found them."""
    start = offsets[unit.spec.name]
    each = zip(unit.binding.tensors, _ends(unit.binding), strict=False)
    return [
        (pages.cut(start + offset, bound.num_bytes), bytes_of(bound.home)) for bound, offset in each if bound.num_bytes
    ]


def _is_equal(unit: Unit, part: _Part) -> bool:
    """Whether a unit has the same bytes in shared memory."""
    return all(torch.equal(shared, own) for shared, own in _pairs(unit, part.offsets, part.pages))


def _home(device: Device, unit: Unit, part: _Part) -> SharedHome:
    *offsets, end = _ends(unit.binding)
    return SharedHome(device, offsets, end, pages=part.pages, offset=part.offsets[unit.spec.name])


def _may_be_shared(binding: UnitBinding) -> bool:
    """Whether a unit's memory, as it was found, can be let go of for other memory with the same bytes."""
    tensors = [bound for bound in binding.tensors if bound.num_bytes]
    addresses = {bound.home.data_ptr() for bound in tensors}
    return (
        bool(tensors)
        and len(addresses) == len(tensors)
        and all(
            bound.home_device.type == "cpu"
            and bound.is_dense
            and bound.writer is None
            and not bound.home.is_shared()
            and not bound.is_held_elsewhere()
            for bound in tensors
        )
    )
