"""Where a unit's bytes live in host memory, page-locked, and how they are cut into copies.

Two ways, per tensor:

- *In place*: memory the tensor was loaded with is page-locked where it lies and stays the only copy. For a
  private mapping of a file (what safetensors gives) its pages are written to first, in parallel, which makes
  them anonymous: registering runs at 20 GB/s after that and at 2.7 before.
- *Gathered*: small and awkward tensors of a unit are put together in one buffer, because a copy of 64 KiB runs
  at 3 GB/s where one of 16 MiB runs at 51. The originals are let go, unless somebody else holds them.

The safe rule for in place: at least 1 MiB, dense, in memory that /proc/self/maps calls private and writable,
and whose storage we hold for as long as it is registered. Everything else is gathered. Memory that is not
`rw-p` is never written to. glibc puts tensors of a few MiB next to strangers on its heap, so ranges are rounded
to pages, merged, and counted per process: two streamers may share a page.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import threading
import time
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from layerstream.binding import BoundTensor, UnitBinding
from layerstream.blocks import align
from layerstream.budget import format_bytes
from layerstream.device import Device
from layerstream.errors import LayerstreamWarning

IN_PLACE_LEAST_BYTES = 2**20
PAGE_BYTES = mmap.PAGESIZE
# Chunks in which memory is touched and registered: larger ones hold the driver's lock for long.
_TOUCH_BYTES = 2**26
_REGISTER_BYTES = 2**30
_MADV_POPULATE_WRITE = 23
# Touching new pages runs at 2 GB/s on one thread and 5.5 on four; registering at 24 on one and 26 on four (H100).
_NUM_THREADS = min(4, os.cpu_count() or 1)

Range = tuple[int, int]  # [start, end) in addresses


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of host memory and where it lands in the slot.

    Attributes:
        source: uint8 [num_bytes], the host bytes.
        offset: byte in the slot where the copy starts.
        is_pinned: page-locked, so that the copy is asynchronous.
    """

    source: torch.Tensor
    offset: int
    is_pinned: bool


@dataclass(eq=False)
class StoredUnit:
    """One unit in host memory.

    Attributes:
        offsets: byte offset of each bound tensor in the slot, in the order of the binding.
        num_bytes: of the whole unit in the slot, alignment included.
        segments: what to copy; filled by `HostStore.pin`.
    """

    offsets: list[int]
    num_bytes: int
    ranges: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # (host bytes, offset in the slot)
    segments: list[Segment] = field(default_factory=list)

    # Both are asked for at every load, and settled once `pin` has cut the segments.
    @functools.cached_property
    def copied_bytes(self) -> int:
        return sum(s.source.numel() for s in self.segments)

    @functools.cached_property
    def is_pinned(self) -> bool:
        return all(s.is_pinned for s in self.segments)

    def pieces(self, buffer: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What to copy into a device buffer: (its range, the host bytes) for each segment."""
        return [(buffer[s.offset : s.offset + s.source.numel()], s.source) for s in self.segments]

    def views(self, binding: UnitBinding, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The unit's tensors inside a device buffer (uint8 [>= num_bytes]), with the strides they keep."""
        views = []
        for bound, offset in zip(binding.tensors, self.offsets, strict=True):
            flat = buffer[offset : offset + bound.num_bytes].view(bound.dtype)
            views.append(flat.as_strided(bound.shape, bound.strides))
        return views


class HostStore:
    """Owns the host side of all units of one streamer: the gathered buffers and the page locks."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._maps = _MemoryMaps.read()
        self._units: list[StoredUnit] = []
        self._locks: list[Range] = []
        # Memory must not be unmapped while it is page-locked. A pipeline dropped without closing takes its page locks
        # along: the finaliser holds the storages until they are released.
        self._release = weakref.finalize(self, _release_locks, device, _ranges_of(device), self._locks, self._units)
        self.pinned_bytes = 0
        self.unpinned_bytes = 0
        self.pin_s = 0.0

    def add(self, binding: UnitBinding) -> StoredUnit:
        """Give the unit's bytes their host form; may copy small tensors, never large ones that can stay."""
        in_place = [b for b in binding.tensors if self._can_stay(b)]
        # By storage as well as by object: two parameters over the same bytes are stored, and copied, once.
        gathered = [b for b in binding.tensors if not self._can_stay(b)]
        places: dict[tuple[object, ...], int] = {}
        offsets: dict[int, int] = {}
        size = 0
        for bound in [*gathered, *in_place]:
            key = (bound.home.data_ptr(), bound.dtype, bound.shape, bound.home.stride(), str(bound.home_device))
            if bound.num_bytes == 0 or key not in places:
                places[key], size = size, size + align(bound.num_bytes)
            offsets[id(bound)] = places[key]
        unit = StoredUnit([offsets[id(b)] for b in binding.tensors], size)
        self._gather(binding, gathered, offsets, unit)
        seen: set[int] = set()
        for bound in in_place:
            if offsets[id(bound)] not in seen:
                seen.add(offsets[id(bound)])
                unit.ranges.append((_bytes_of(bound.home), offsets[id(bound)]))
        self._units.append(unit)
        return unit

    def pin(self) -> None:
        """Page-lock everything added, and cut it into segments that lie in one page lock each."""
        started = time.perf_counter()
        wanted = [_address_range(source) for unit in self._units for source, _ in unit.ranges]
        touched = [r for r in wanted if self._maps.is_file(r)]
        if touched and not _has_room_for(sum(end - start for start, end in touched)):
            wanted = [r for r in wanted if not self._maps.is_file(r)]
            touched = []
        _touch([s for unit in self._units for s, _ in unit.ranges if _address_range(s) in set(touched)])
        self._locks += _ranges_of(self._device).acquire(_merged(_whole_pages(r) for r in wanted))
        self.pin_s = time.perf_counter() - started
        for unit in self._units:
            unit.segments = [segment for source, offset in unit.ranges for segment in self._cut(source, offset)]
            for segment in unit.segments:
                if segment.is_pinned:
                    self.pinned_bytes += segment.source.numel()
                else:
                    self.unpinned_bytes += segment.source.numel()
        if self.unpinned_bytes:
            warnings.warn(
                f"page-locking {format_bytes(self.unpinned_bytes)} of host memory was refused; those weights are "
                "copied through a small staging buffer, which is several times slower. Raise the memlock limit "
                "(ulimit -l), or the container's or WSL's memory.",
                LayerstreamWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Release the page locks; idempotent. No copy may be in flight."""
        self._release.detach()  # whatever happens now, happens once
        _release_locks(self._device, _ranges_of(self._device), self._locks, self._units)

    def _can_stay(self, bound: BoundTensor) -> bool:
        """The safe rule; see the module's text."""
        return (
            bound.home_device.type == "cpu"
            and bound.is_exact
            and bound.num_bytes >= IN_PLACE_LEAST_BYTES
            and bound.is_dense
            and self._maps.is_private_writable(_address_range(bound.home))
        )

    def _gather(
        self, binding: UnitBinding, gathered: Sequence[BoundTensor], offsets: dict[int, int], unit: StoredUnit
    ) -> None:
        """Copy tensors into one page-aligned buffer, laid out as in the slot, and let the originals go."""
        size = max((offsets[id(b)] + b.num_bytes for b in gathered), default=0)
        if not size:
            return
        buffer = _exact_pages(size)
        for bound in gathered:
            flat = buffer[offsets[id(bound)] : offsets[id(bound)] + bound.num_bytes].view(bound.dtype)
            view = flat.as_strided(bound.shape, bound.strides)
            view.copy_(bound.home)
            # An original that is held elsewhere is not freed by letting it go, and handing it back keeps the tie.
            # One of other strides is handed back because its strides are part of what is restored.
            binding.rehome(bound, view, is_exact=not bound.is_dense or _is_held_elsewhere(bound))
        unit.ranges.append((buffer, 0))

    def _cut(self, source: torch.Tensor, offset: int) -> Iterable[Segment]:
        """One copy must not straddle two page locks (`invalid argument`)."""
        start, end = _address_range(source)
        for piece_start, piece_end, is_pinned in _pieces(start, end, self._locks):
            piece = source[piece_start - start : piece_end - start]
            yield Segment(piece, offset + piece_start - start, is_pinned)


def _release_locks(device: Device, ranges: _PageLocks, locks: list[Range], units: list[StoredUnit]) -> None:
    with contextlib.ExitStack() as each:  # all of them, also when one fails
        for lock in locks:
            each.callback(ranges.release, lock)
        if locks:
            device.synchronize()
    locks.clear()
    units.clear()


# ---- ranges of memory


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as uint8 [num_bytes], sharing its memory; the tensor is dense."""
    start = tensor.storage_offset() * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device="cpu")  # whatever the default device is
    return flat.set_(tensor.untyped_storage(), start, (tensor.numel() * tensor.element_size(),), (1,))


def _address_range(tensor: torch.Tensor) -> Range:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def _whole_pages(span: Range) -> Range:
    return span[0] // PAGE_BYTES * PAGE_BYTES, -(-span[1] // PAGE_BYTES) * PAGE_BYTES


def _merged(spans: Iterable[Range]) -> list[Range]:
    """Sorted spans, with those that touch or overlap made one."""
    merged: list[Range] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _pieces(start: int, end: int, locks: Sequence[Range]) -> Iterable[tuple[int, int, bool]]:
    """[start, end) cut at the borders of `locks` (sorted, disjoint); says which pieces lie in one."""
    position = max(bisect_right(locks, (start, 2**64)) - 1, 0)
    while start < end:
        while position < len(locks) and locks[position][1] <= start:
            position += 1
        if position == len(locks) or locks[position][0] >= end:
            yield start, end, False
            return
        if start < locks[position][0]:
            yield start, locks[position][0], False
            start = locks[position][0]
        stop = min(end, locks[position][1])
        yield start, stop, True
        start = stop


def _exact_pages(num_bytes: int) -> torch.Tensor:
    """A private anonymous mapping of exactly the pages needed, as uint8 [num_bytes].

    Not the page-locked allocator of torch, which rounds up to powers of two and pins at 2 GB/s.
    """
    flags = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    pages = mmap.mmap(-1, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES, **flags)
    return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]


def _is_held_elsewhere(bound: BoundTensor) -> bool:
    """Whether anything but this parameter looks at its storage."""
    storage = bound.home.untyped_storage()
    try:
        count = torch._C._storage_Use_Count(storage._cdata)
    except AttributeError:
        return True  # cannot tell: keep it, at the price of the copy
    # In C++: the parameter, `home` and `storage` itself. In Python, where a storage is one object however often it is
    # asked for: as many as of a storage that nobody holds, which depends on the version of torch.
    return bool(count > 3) or sys.getrefcount(storage) > _python_references()


@functools.cache
def _python_references() -> int:
    tensor = torch.empty(1, device="cpu")  # alive, or its storage would be held by one less
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


def _touch(sources: Sequence[torch.Tensor]) -> None:
    """Write every page of private file mappings, so that they become anonymous memory."""
    chunks = [s[i : i + _TOUCH_BYTES] for s in sources for i in range(0, s.numel(), _TOUCH_BYTES)]
    if not chunks:
        return

    def touch(chunk: torch.Tensor) -> None:
        if not _populate(_whole_pages(_address_range(chunk))):
            chunk[::PAGE_BYTES].bitwise_or_(0)
            chunk[-1:].bitwise_or_(0)  # the range may end on a page that no step of the stride reached

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(touch, chunks))


def _populate(span: Range) -> bool:
    """Let the kernel do what writing to each page of a private mapping does, several times faster; False: it cannot.

    Source: madvise(2), MADV_POPULATE_WRITE, since Linux 5.14. The bytes stay as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    start, end = span
    failed: int = _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_WRITE)
    return not failed


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _has_room_for(num_bytes: int) -> bool:
    """Whether the control group's memory limit leaves room for so much new anonymous memory.

    A container is killed at that limit whatever the machine has free. No limit, or no control group: yes.
    """
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit_bytes, used_bytes = Path(limit).read_text().strip(), int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        if limit_bytes != "max":
            # Pages of the mapped file count as used and are given up when memory runs short, so this errs on the
            # side of not touching.
            return used_bytes + num_bytes < 0.95 * int(limit_bytes)
    return True


# ---- what the operating system says of our memory


class _MemoryMaps:
    """/proc/self/maps at one moment. Where there is none (not Linux), nothing is known to be safe."""

    def __init__(self, entries: Sequence[tuple[int, int, str, bool]]) -> None:
        self._entries = sorted(entries)
        self._starts = [e[0] for e in self._entries]

    @classmethod
    def read(cls) -> _MemoryMaps:
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return cls([])
        entries = []
        for line in lines:
            fields = line.split(maxsplit=5)
            start, end = (int(x, 16) for x in fields[0].split("-"))
            entries.append((start, end, fields[1], fields[4] != "0"))
        return cls(entries)

    def is_private_writable(self, span: Range) -> bool:
        found = self._covering(span)
        return bool(found) and all(
            permissions.startswith("rw") and permissions[3] == "p" for _, _, permissions, _ in found
        )

    def is_file(self, span: Range) -> bool:
        return any(is_file for _, _, _, is_file in self._covering(span))

    def _covering(self, span: Range) -> list[tuple[int, int, str, bool]]:
        """The mappings that hold the span without a gap; empty if there is one."""
        start, end = span
        position = max(bisect_right(self._starts, start) - 1, 0)
        found = []
        while start < end:
            if position >= len(self._entries) or not self._entries[position][0] <= start < self._entries[position][1]:
                return []
            found.append(self._entries[position])
            start = self._entries[position][1]
            position += 1
        return found


# ---- page locks, counted per process


class _PageLocks:
    """Ranges registered with the device, each counted: registering a page twice fails, and two streamers may
    both need it."""

    def __init__(self, device: Device) -> None:
        # Weakly where this object is the value of a dictionary keyed weakly by the device.
        self._device: Callable[[], Device | None] = weakref.ref(device) if device.is_simulated else lambda: device
        self._locks: dict[Range, int] = {}
        self._mutex = threading.Lock()

    def __len__(self) -> int:
        return len(self._locks)

    def acquire(self, spans: Sequence[Range]) -> list[Range]:
        """Page-lock `spans` as far as it is allowed; returns the locks that now cover them, sorted."""
        with self._mutex:
            mine = [lock for lock in self._locks if any(s < lock[1] and lock[0] < e for s, e in spans)]
            held = sorted(mine)
            missing = [
                (start, min(start + _REGISTER_BYTES, end))
                for span in spans
                for gap_start, gap_end, is_held in _pieces(*span, held)
                if not is_held
                for start, end in [(s, gap_end) for s in range(gap_start, gap_end, _REGISTER_BYTES)]
            ]
            made: list[Range] = []
            try:
                self._register(missing, made)
            except BaseException:
                for start, _ in made:
                    self._unregister(start)
                raise
            for lock in [*mine, *made]:
                self._locks[lock] = self._locks.get(lock, 0) + 1
            return sorted([*mine, *made])

    def release(self, lock: Range) -> None:
        """Give up one lock that `acquire` returned; the pages are unlocked with the last."""
        with self._mutex:
            self._locks[lock] -= 1
            if not self._locks[lock]:
                del self._locks[lock]  # first: whatever becomes of it, nobody must count on it
                self._unregister(lock[0])

    def _register(self, spans: Sequence[Range], made: list[Range]) -> None:
        device = self._device()
        assert device is not None
        is_refused = threading.Event()

        def register(span: Range) -> None:
            # After the first refusal the rest would be refused too, one slow call at a time.
            if not is_refused.is_set():
                if device.register(span[0], span[1] - span[0]):
                    made.append(span)
                else:
                    is_refused.set()

        if device.is_simulated or len(spans) < 2:
            for span in spans:
                register(span)
            return
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(register, spans))

    def _unregister(self, start: int) -> None:
        device = self._device()
        if device is not None:
            device.unregister(start)


# Real page locks belong to the process; those of a simulated device belong to it.
_LOCKS_BY_DEVICE: weakref.WeakKeyDictionary[Device, _PageLocks] = weakref.WeakKeyDictionary()
_REAL_LOCKS: list[_PageLocks] = []


def _ranges_of(device: Device) -> _PageLocks:
    if device.is_simulated:
        return _LOCKS_BY_DEVICE.setdefault(device, _PageLocks(device))
    if not _REAL_LOCKS:
        _REAL_LOCKS.append(_PageLocks(device))
        os.register_at_fork(before=_warn_at_fork)
    return _REAL_LOCKS[0]


def _warn_at_fork() -> None:
    if _REAL_LOCKS and len(_REAL_LOCKS[0]):
        warnings.warn(
            "the process forks while layerstream has host memory page-locked: the kernel copies those pages for the "
            "child at once. Start worker processes before streaming, or with the 'spawn' method.",
            LayerstreamWarning,
            stacklevel=2,
        )
