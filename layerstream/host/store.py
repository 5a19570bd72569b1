"""Where a unit's bytes live in host memory, page-locked, and how they are cut into copies.

Two ways, per tensor:

- *In place*: memory the tensor was loaded with is page-locked where it lies and stays the only copy. For a
  private mapping of a file (what safetensors gives) its pages are written to first, in parallel, which makes
  them anonymous.
- *Gathered*: all others of a unit are put together in one page mapping of its own. Small ones, because a copy of
  64 KiB runs at 3 GB/s where one of 16 MiB runs at 51; large ones on a heap, because the pages they begin and end on
  hold strangers (see `memory.py`). The originals are let go, unless somebody else holds them.

The safe rule for in place: at least 1 MiB, dense, in a stretch of memory that can be locked as one, most of which is
ours, and whose storage we hold for as long as it is locked. So locked pages hold only bytes of tensors that we hold,
and of storages and files that these lie in; and user code may copy whatever it likes. Memory that is not `rw-p` is
never written to.

Page locks belong to units: each holds those that its own bytes need, and they are counted per process.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from layerstream.blocks import align
from layerstream.budget import format_bytes
from layerstream.device.base import Device, synchronize_all
from layerstream.errors import HostMemoryError
from layerstream.finalisers import Birthplace, only_here
from layerstream.host.home import Home, RawHome, Segment, SharedHome
from layerstream.host.keeper import Keeper
from layerstream.host.memory import (
    MemoryMaps,
    PageMapping,
    Pages,
    Range,
    address_range,
    anonymous_bytes,
    available_bytes,
    bytes_of,
    fill,
    in_storage_of_its_own,
    is_shared_until_written,
    merged,
    over,
    touch,
    trim_heap,
    whole_pages,
)
from layerstream.host.page_locks import PageLocks, page_locks_of
from layerstream.saying import warn
from layerstream.weights.binding import BoundTensor, UnitBinding

IN_PLACE_LEAST_BYTES = 2**20
# Of a stretch of memory that is locked as one. What else it holds is locked, and of a file mapping made anonymous
# memory, with it: with less than this of it ours, copying what is ours takes less memory.
_LEAST_SHARE_OF_STRETCH = 0.75
_SPARED_SHARE = 0.05  # of the memory there is, for all else that happens


class Stretches:
    """Which tensors may stay where they lie, and what is locked for each.

    Looked at before anything changes, for all tensors that are attached together: those of one file share a stretch.

    Raises:
        HostMemoryError: the weights cannot be held in memory.
    """

    def __init__(self, device: Device, tensors: Iterable[BoundTensor]) -> None:
        self._of: dict[int, Range] = {}  # by the id of the bound tensor
        self.files: set[Range] = set()  # of the stretches, those that are mapped from files
        maps, locks = MemoryMaps.read(), page_locks_of(device)
        found: dict[Range, list[BoundTensor]] = {}
        needed = 0  # what becomes memory of this process that is none yet
        for bound in tensors:
            if bound.home_device.type != "cpu":
                needed += bound.num_bytes
            elif bound.is_dense and bound.num_bytes:
                stretch = maps.stretch(bound.home)
                if is_shared_until_written(bound.home.data_ptr()):
                    needed += bound.num_bytes  # gathered, and what others have is not given up
                elif stretch is not None:
                    found.setdefault(stretch, []).append(bound)
        for stretch, inside in found.items():
            spans = [address_range(bound.home) for bound in inside]
            is_file = maps.is_file(spans[0])
            locked = _locked_for(stretch, merged(spans), locks, is_file=is_file)
            large = [bound for bound in inside if bound.num_bytes >= IN_PLACE_LEAST_BYTES]
            if locked is not None:
                self._of |= {id(bound): locked for bound in large}
            if is_file and large and locked is not None:
                self.files.add(locked)
                needed += locked[1] - locked[0] if locks.overlapping(locked) is None else 0
            elif is_file:
                needed += sum(bound.num_bytes for bound in inside)
        _refuse_too_much(needed, self.files)

    def of(self, bound: BoundTensor) -> Range | None:
        """What is locked so that a tensor can stay; None: it cannot."""
        return self._of.get(id(bound))


def _locked_for(stretch: Range, own: Sequence[Range], locks: PageLocks, *, is_file: bool) -> Range | None:
    """What is locked so that tensors at `own` (sorted, disjoint) can stay in their stretch; None: they cannot."""
    wanted = (whole_pages(own[0])[0], stretch[1]) if is_file else stretch
    known = locks.overlapping(wanted)
    if known is not None:
        return known if known[0] <= own[0][0] and own[-1][1] <= known[1] else None
    covered = sum(end - start for start, end in own)
    return wanted if covered >= _LEAST_SHARE_OF_STRETCH * (wanted[1] - wanted[0]) else None


def _refuse_too_much(num_bytes: int, spans: Iterable[Range]) -> None:
    """Raise if so much of files, or of a GPU, cannot become memory of this process, where all of it must be to be
    page-locked."""
    room = available_bytes()
    if room is None or num_bytes <= (1 - _SPARED_SHARE) * room[0]:
        return
    num_bytes -= anonymous_bytes(list(spans))  # what was written to before; asked last, because it takes long
    if num_bytes > (1 - _SPARED_SHARE) * room[0]:
        raise HostMemoryError(
            f"the weights do not fit in host memory: {format_bytes(num_bytes)} of them are mapped from files, or on "
            f"the device, and become memory of this process; {format_bytes(room[0])} are left ({room[1]}). Free host "
            "memory, raise the limit of the container, or load fewer components, or in a smaller dtype.",
            needed_bytes=num_bytes,
            available_bytes=room[0],
        )


class HostStore:
    """Owns the host side of units that were attached together: gathered buffers and page locks.

    Args:
        stretches: of all tensors of these units, at least.
        others: devices beside this one that read or fill what is owned here.
    """

    def __init__(self, device: Device, stretches: Stretches, others: Sequence[Device] = ()) -> None:
        self._device = device
        self._others = tuple(others)
        self._birthplace = Birthplace()
        self._stretches = stretches
        self._homes: list[Home] = []
        # Memory must not be unmapped while it is page-locked. A pipeline dropped without closing takes its page locks
        # along: the finaliser holds the storages until they are released.
        self._release = weakref.finalize(
            self, only_here(_release_dropped), device, page_locks_of(device), self._homes, self._others
        )
        _STORES.add(self)
        self.pinned_bytes = 0
        self.unpinned_bytes = 0
        self.pin_s = 0.0

    def add(self, binding: UnitBinding) -> RawHome:
        """Give the unit's bytes their host form; copies what cannot stay where it is."""
        in_place = [b for b in binding.tensors if self._stretches.of(b) is not None]
        # By storage as well as by object: two parameters over the same bytes are stored, and copied, once.
        gathered = [b for b in binding.tensors if self._stretches.of(b) is None]
        places: dict[tuple[object, ...], int] = {}
        offsets: dict[int, int] = {}
        size = 0
        for bound in [*gathered, *in_place]:
            key = (bound.home.data_ptr(), bound.dtype, bound.shape, bound.home.stride(), str(bound.home_device))
            if bound.num_bytes == 0 or key not in places:
                places[key], size = size, size + align(bound.num_bytes)
            offsets[id(bound)] = places[key]
        home = RawHome(self._device, [offsets[id(b)] for b in binding.tensors], size)
        self._gather(binding, gathered, offsets, home)
        seen: set[int] = set()
        for bound in in_place:
            stretch = self._stretches.of(bound)
            if stretch is not None and offsets[id(bound)] not in seen:
                seen.add(offsets[id(bound)])
                home.ranges.append((bytes_of(bound.home), offsets[id(bound)], stretch))
        self._homes.append(home)
        return home

    def pin(self, tell: Callable[[int], object] = lambda num_bytes: None) -> None:
        """Page-lock everything added, and cut it into segments; `tell` hears of bytes that are done."""
        started = time.perf_counter()
        locks = page_locks_of(self._device)
        wanted = self._wanted(locks)
        spans = list(dict.fromkeys(span for each in wanted for span in each))
        touch([span for span in spans if span in self._stretches.files and locks.overlapping(span) is None])
        held = dict(zip(spans, locks.acquire(self._device, spans, tell), strict=True))
        counted: set[Range] = set()
        for home, each in zip(self._homes, wanted, strict=True):
            for lock in [lock for span in each if (lock := held[span]) is not None]:
                if lock in counted:  # of another unit as well, in the same file or storage: held once more
                    locks.acquire(self._device, [lock])
                counted.add(lock)
                home.locks.append(lock)
        self.pin_s = time.perf_counter() - started
        for home in self._homes:
            for source, offset, _ in home.ranges:
                start, end = address_range(source)
                is_pinned = any(lock[0] <= start and end <= lock[1] for lock in home.locks)
                home.segments.append(Segment(in_storage_of_its_own(source), offset, is_pinned))
                if is_pinned:
                    self.pinned_bytes += source.numel()
                else:
                    self.unpinned_bytes += source.numel()
        if self.unpinned_bytes:
            warn(
                f"page-locking {format_bytes(self.unpinned_bytes)} of host memory was refused; those weights are "
                "copied through a small staging buffer, which is several times slower. Raise the memlock limit "
                "(ulimit -l), or the container's or WSL's memory.",
            )

    def adopt(self, home: Home, binding: UnitBinding, make_raw: Callable[[], object]) -> None:
        """A unit's home is this one from now on; may be done again. Memory that a tensor was found in stays, and is
        written to as well, since it is what is handed back; of what is packed, or elsewhere, nothing stays.

        Args:
            make_raw: gives the unit a `RawHome`. No home may hold it: it would keep the engine alive.
        """
        if home not in self._homes:
            self._homes.append(home)
        if not isinstance(home, RawHome):
            for bound in binding.tensors:
                bound.put_away(make_raw)
            return
        (source, _, _), *_ = home.ranges
        for bound, master in zip(binding.tensors, home.views(binding, source), strict=True):
            keeps_home = bound.is_exact or not bound.has_one_home
            bound.copied_to(master, keeps_home=keeps_home, is_handed_back=False)

    def adopt_unpacked(self, home: RawHome, binding: UnitBinding, pages: Pages) -> None:
        """A unit that was packed, or elsewhere, has this home in `pages`: its tensors are handed back in it,
        too, if they were found on the host; may be done again."""
        if home not in self._homes:
            self._homes.append(home)
        (source, _, _), *_ = home.ranges
        each = zip(binding.tensors, home.offsets, home.views(binding, source), strict=True)
        for bound, offset, view in each:
            # As of what was gathered: a large one has a storage of its own, a small one would keep all of the mapping.
            is_large = bound.num_bytes >= IN_PLACE_LEAST_BYTES
            if is_large:
                view = over(pages.cut(offset, bound.num_bytes), bound.dtype, bound.shape, bound.strides)
            is_handed_back = is_large and bound.home_device.type == "cpu"
            bound.copied_to(view, keeps_home=False, is_handed_back=is_handed_back)

    def hold(self, home: Home, pages: Pages, num_bytes: int, *, is_locked: bool = True) -> torch.Tensor:
        """Page-lock a mapping for a home that lies in it and is to be adopted, or released; where that is refused, or
        not wanted, it is copied from as it is.

        Returns: uint8 [num_bytes], the memory.
        """
        source = pages.cut(0, num_bytes)
        self._homes.append(home)  # first: what is interrupted here is released in the end
        lock = None
        if is_locked:
            with contextlib.suppress(Exception):  # of a device that has failed: it is copied from all the same
                (lock,) = page_locks_of(self._device).acquire(self._device, [pages.range])
        home.locks = [] if lock is None else [lock]
        home.ranges = [(source, 0, pages.range)]
        home.segments = [Segment(source, 0, is_pinned=lock is not None)]
        return source

    def share(self, home: SharedHome) -> None:
        """Page-lock the shared memory of a home that is to be adopted, all of it with the first; where that is refused,
        it is copied from as it is."""
        self._homes.append(home)  # first: what is interrupted here is released in the end
        (lock,) = page_locks_of(self._device).acquire(self._device, [home.pages.range])
        home.locks = [] if lock is None else [lock]
        home.segments = [Segment(home.pages.cut(home.offset, home.device_bytes), 0, is_pinned=lock is not None)]

    def keep(self, home: Home, num_bytes: int) -> torch.Tensor:
        """Take memory of its keeper for a home that is to be adopted, or released.

        Returns: uint8 [num_bytes], the memory.
        Raises:
            torch.OutOfMemoryError: the keeper has no room.
        """
        assert home.keeper is not None
        self._homes.append(home)  # first: what is interrupted here is released in the end
        source = home.keeper.take(num_bytes)
        home.segments = [Segment(source, 0, is_pinned=True)]
        return source

    def release(self, home: Home) -> None:
        """Give up the page locks, or the memory elsewhere, of a home that is no unit's any more; idempotent. No copy
        from it may be in flight. In a forked child nothing is given up."""
        if home in self._homes and self._birthplace.is_here:
            try:
                page_locks_of(self._device).release(self._device, _taken_locks([home]))
            finally:
                _give_kept([home])
            self._homes.remove(home)  # last: what is interrupted before is released by `close`

    def close(self) -> None:
        """Release the page locks, and the memory elsewhere, once no GPU reads it any more; idempotent. In a forked
        child nothing is given up."""
        self._release.detach()  # whatever happens now, happens once
        if not self._birthplace.is_here:
            self._homes.clear()
            return
        locks, taken = page_locks_of(self._device), _taken_locks(self._homes)
        with contextlib.ExitStack() as each:  # the last of these first; all of them, also when one fails
            each.callback(locks.release_all, self._device, taken, self._homes, self._others)
            each.callback(_give_kept, self._homes)
            if any(home.keeper is not None for home in self._homes):
                each.callback(synchronize_all, [self._device, *self._others])

    @property
    def lends_bytes(self) -> int:
        """Of units in another GPU's memory, or in memory that ranks share."""
        return sum(
            segment.source.numel()
            for home in tuple(self._homes)
            if home.keeper is not None or isinstance(home, SharedHome)
            for segment in tuple(home.segments)
        )

    def _wanted(self, locks: PageLocks) -> list[list[Range]]:
        """What each unit needs locked: its stretches; neighbours as one, where they are its alone."""
        stretches = [dict.fromkeys(stretch for _, _, stretch in home.ranges) for home in self._homes]
        counts = Counter(stretch for each in stretches for stretch in each)
        files = self._stretches.files
        found = []
        for each in stretches:
            own = [s for s in each if counts[s] == 1 and s not in files and locks.overlapping(s) is None]
            found.append([*merged(own), *(s for s in each if s not in own)])
        return found

    def _gather(
        self, binding: UnitBinding, gathered: Sequence[BoundTensor], offsets: dict[int, int], home: RawHome
    ) -> None:
        """Copy tensors into one page mapping, laid out as in the slot, and let the originals go."""
        size = max((offsets[id(b)] + b.num_bytes for b in gathered), default=0)
        if not size:
            return
        pages = PageMapping(size)
        buffer = pages.cut(0, size)
        masters: list[torch.Tensor] = []
        large: list[tuple[torch.Tensor, torch.Tensor]] = []
        for bound in gathered:
            # A large one has a storage of its own, and is handed back in it, with nothing to copy. A small one would
            # keep all of the mapping in memory.
            is_large = bound.num_bytes >= IN_PLACE_LEAST_BYTES
            at = offsets[id(bound)]
            flat = pages.cut(at, bound.num_bytes) if is_large else buffer[at : at + bound.num_bytes]
            masters.append(over(flat, bound.dtype, bound.shape, bound.strides))
            if is_large and bound.is_dense and bound.home_device.type == "cpu":
                large.append((flat, bytes_of(bound.home)))
            else:
                masters[-1].copy_(bound.home)
        fill(large)
        del large
        for bound, master in zip(gathered, masters, strict=True):
            # An original that is held elsewhere is not freed by letting it go, and handing it back keeps the tie.
            # One of other strides, or in shared memory, is handed back because that is part of what is restored. All
            # memory of a GPU is "shared" to torch; that is what is to be let go.
            is_on_host = bound.home_device.type == "cpu"
            is_shared = is_on_host and bound.home.is_shared()
            is_large = bound.num_bytes >= IN_PLACE_LEAST_BYTES
            is_kept = not bound.is_dense or is_shared or bound.is_held_elsewhere()
            binding.rehome(bound, master, keeps_home=is_kept, is_handed_back=is_on_host and is_large)
        if size >= IN_PLACE_LEAST_BYTES:
            trim_heap()  # whose fragments would keep what was let go
        home.ranges.append((buffer, 0, pages.range))


def _release_dropped(device: Device, locks: PageLocks, homes: list[Home], others: Sequence[Device]) -> None:
    locks.release_all_when_free(device, _taken_locks(homes), homes, others)


_STORES: weakref.WeakSet[HostStore] = weakref.WeakSet()


def _warn_at_fork() -> None:
    num_bytes = sum(store.lends_bytes for store in tuple(_STORES))
    if num_bytes:
        warn(
            f"the process forks while {format_bytes(num_bytes)} of weights that layerstream streams are in another "
            "GPU's memory, or in memory that ranks share. The child can use neither them nor the pipeline. Start "
            "worker processes before streaming, or with the 'spawn' method.",
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_warn_at_fork)


def _give_kept(homes: Sequence[Home]) -> None:
    """Free memory of other GPUs that homes have: of all, also when one fails."""
    with contextlib.ExitStack() as each:
        for home in homes:
            if home.keeper is not None:
                each.callback(_give_back, home.keeper, home)


def _give_back(keeper: Keeper, home: Home) -> None:
    """May be done again, where it was interrupted."""
    while home.segments:
        keeper.give(home.segments[-1].source)
        home.segments.pop()


def _taken_locks(homes: Sequence[Home]) -> list[Range]:
    """The page locks of homes, which are theirs no longer."""
    taken = [lock for home in homes for lock in home.locks]
    for home in homes:
        home.locks = []
    return taken
