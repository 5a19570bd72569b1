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
class _Layout:
    """Where each unit of some components lies in shared memory.

    Attributes:
        offsets: of the units, by name.
        forms: of their tensors, by the name of the unit.
    """

    offsets: Mapping[str, int]
    forms: Mapping[str, str]
    num_bytes: int

    @classmethod
    def of(cls, units: Sequence[Unit]) -> _Layout:
        offsets, forms, end = {}, {}, 0
        for unit in units:
            offsets[unit.spec.name] = end
            forms[unit.spec.name] = repr([(b.name, b.dtype, b.shape, b.strides) for b in unit.binding.tensors])
            end += _ends(unit.binding)[-1]
        return cls(offsets, forms, end)

    def __str__(self) -> str:
        digest = hashlib.sha256(json.dumps(dict(self.forms), sort_keys=True).encode()).hexdigest()[:12]
        return f"{len(self.offsets)} units of {format_bytes(self.num_bytes)} (names, shapes and dtypes {digest})"


@dataclass
class _Part:
    """Shared memory of some components, as this rank has it.

    Attributes:
        known: names of the units that are in it.
    """

    layout: _Layout
    pages: SharedPages
    known: frozenset[str]
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
        self._parts: dict[str, _Part] = {}

    @property
    def is_on(self) -> bool:
        """Whether anything is to be shared."""
        return self._ranks is not None

    def line(self) -> str:
        """With whom, in words; "": nothing is shared."""
        if not self._parts or not self._stats.num_shared_units:
            return ""
        with_whom = set().union(*(part.entering.ranks() for part in self._parts.values()))
        return (
            f"{self._stats.num_shared_units} blocks, pieces or bases, {format_bytes(self._stats.shared_bytes)}, are in "
            f"host memory that is shared as {self._name!r}; by rank {', '.join(map(str, sorted(with_whom)))} so far"
        )

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
        of_units = _Layout.of(units)
        part = self._parts.get(place)
        is_new = part is None
        may_be = [unit for unit in units if unit not in looked_at and _may_be_shared(unit.binding)]
        if part is None:
            part = self._parts[place] = self._enter(place, of_units, may_be)
        forms = part.layout.forms  # what was cast since, or taken apart, has others
        compared = [
            unit
            for unit in may_be
            if unit.spec.name in part.known and forms[unit.spec.name] == of_units.forms[unit.spec.name]
        ]
        with self._device.homes():
            found = [unit for unit in compared if _is_equal(unit, part)]
        if is_new and compared and not found and not part.entering.is_leader:
            raise RankError(
                f"rank {self._ranks.rank} shares {self._name!r} with rank {part.entering.leader}, and none of its "
                f"{len(compared)} units in `{place}` has the same weights. Load the same checkpoint in all ranks, or "
                "give pipelines that differ other names.",
                rank=part.entering.leader,
            )
        return {unit: _home(self._device, unit, part) for unit in found}

    def count(self, homes: Sequence[object]) -> None:
        """Components have come or gone: these are the homes of all units."""
        shared = [home for home in homes if isinstance(home, SharedHome)]
        self._stats.num_shared_units = len(shared)
        self._stats.shared_bytes = sum(home.device_bytes for home in shared)

    def close(self) -> None:
        """This rank shares nothing more; what others have of it stays theirs."""
        while self._parts:
            self._parts.popitem()[1].entering.close()

    # ---- inside

    def _enter(self, place: str, layout: _Layout, may_be: Sequence[Unit]) -> _Part:
        assert self._ranks is not None
        entering = self._ranks.enter(f"{self._name}/{place}", str(layout))
        with contextlib.ExitStack() as undo:
            undo.callback(entering.close)
            if entering.refused is not None:
                warn(f"rank {self._ranks.rank} has a copy of `{place}` of its own: {entering.refused}")
            while True:
                try:
                    part = _lead(entering, layout, may_be) if entering.is_leader else _follow(entering, layout)
                    break
                except RankError as error:
                    if not error.is_gone or entering.is_leader:
                        raise
                    entering.elect()
            undo.pop_all()
        return part


def _lead(entering: Entering, layout: _Layout, units: Sequence[Unit]) -> _Part:
    room = available_bytes()
    if room is not None and layout.num_bytes > room[0]:
        raise HostMemoryError(
            f"the weights do not fit in host memory a second time: {format_bytes(layout.num_bytes)} are copied to "
            f"memory that ranks share, before what was loaded is let go of, and {format_bytes(room[0])} are left "
            f"({room[1]}). Load them from safetensors files, whose pages the system can give up, or free memory.",
            needed_bytes=layout.num_bytes,
            available_bytes=room[0],
        )
    pages = SharedPages.make(layout.num_bytes)
    fill([pair for unit in units for pair in _pairs(unit, layout, pages)])
    known = [unit.spec.name for unit in units]
    entering.publish(_WHERE, json.dumps([pages.address.to_bytes().decode(), known]).encode())
    return _Part(layout, pages, frozenset(known), entering)


def _follow(entering: Entering, layout: _Layout) -> _Part:
    address, known = json.loads(entering.fetch(_WHERE, _TIMEOUT_S))
    pages = SharedPages.open(Address.from_bytes(address.encode()))
    touch([pages.range])  # by several threads: to page-lock it would take the same faults in one
    return _Part(layout, pages, frozenset(known), entering)


def _ends(binding: UnitBinding) -> list[int]:
    """Where each tensor ends in a unit, each aligned; 0 first."""
    ends = [0]
    for bound in binding.tensors:
        ends.append(ends[-1] + align(bound.num_bytes))
    return ends


def _pairs(unit: Unit, layout: _Layout, pages: SharedPages) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor's bytes in shared memory, and where this rank has found them."""
    start = layout.offsets[unit.spec.name]
    each = zip(unit.binding.tensors, _ends(unit.binding), strict=False)
    return [
        (pages.cut(start + offset, bound.num_bytes), bytes_of(bound.home)) for bound, offset in each if bound.num_bytes
    ]


def _is_equal(unit: Unit, part: _Part) -> bool:
    """Whether a unit has the same bytes in shared memory."""
    return all(torch.equal(shared, own) for shared, own in _pairs(unit, part.layout, part.pages))


def _home(device: Device, unit: Unit, part: _Part) -> SharedHome:
    *offsets, end = _ends(unit.binding)
    return SharedHome(device, offsets, end, pages=part.pages, offset=part.layout.offsets[unit.spec.name])


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
