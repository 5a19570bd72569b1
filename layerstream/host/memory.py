"""What host memory is ours to page-lock, and memory of our own where it is not.

A copy that the driver makes from page-locked memory must end in the registration in which it begins: one byte beyond
it is `invalid argument`, also in code that knows nothing of us. (A copy that begins outside is an ordinary one,
whatever it crosses. Measured on an H100, both directions, blocking or not.) So a registration must never end inside
a tensor, ours or a stranger's. Three kinds of memory can promise that, each a *stretch* that is locked as one:

- a block that glibc's malloc mapped for one request alone (*chunk*): its pages hold nothing else;
- what is left of a private file mapping behind the first tensor of ours: every tensor in it ends before its end;
- a page mapping of our own.

Everything else is on a heap, or somewhere that we cannot tell: there, the pages that hold a tensor's first and last
bytes hold strangers as well. Once a block of 30 MiB was freed, glibc keeps tensors of up to 32 MiB on its heap.
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
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

PAGE_BYTES = mmap.PAGESIZE
# Pieces in which memory is touched and copied by several threads.
_CHUNK_BYTES = 2**24
# Touching new pages runs at 2 GB/s on one thread and 5.5 on four; registering at 24 on one and 26 on four (H100).
NUM_THREADS = min(4, os.cpu_count() or 1)
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_HUGE_LEAST_BYTES = 2**22
# Where memory is fragmented the kernel tidies it up for each huge page, which may take a hundred times longer than
# small ones do. A mapping that was filled slower than this is the last one with huge pages.
_HUGE_LEAST_GB_PER_S = 1.0

Range = tuple[int, int]  # [start, end) in addresses


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as uint8 [num_bytes], sharing its memory; the tensor is dense."""
    start = tensor.storage_offset() * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), start, (tensor.numel() * tensor.element_size(),), (1,))


def over(flat: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """A tensor over the bytes of another (uint8, dense) that is no view of it to autograd, which would hold what it was
    made of, and look held by that."""
    start = flat.storage_offset() // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=flat.device).set_(flat.untyped_storage(), start, shape, strides)


def in_storage_of_its_own(flat: torch.Tensor) -> torch.Tensor:
    """The same bytes (uint8, dense) as memory of another storage, which keeps them alive. Who else looks at a storage
    is told by counting its tensors, and what loads keep cut from this one does not count there."""
    if not flat.numel():
        return flat
    held = (ctypes.c_char * flat.numel()).from_address(flat.data_ptr())
    held.owner = flat  # type: ignore[attr-defined]
    return torch.frombuffer(held, dtype=torch.uint8)


def address_range(tensor: torch.Tensor) -> Range:
    """Where a dense tensor's bytes lie."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def whole_pages(span: Range) -> Range:
    """The span with the rest of its first and last page."""
    return span[0] // PAGE_BYTES * PAGE_BYTES, -(-span[1] // PAGE_BYTES) * PAGE_BYTES


def merged(spans: Iterable[Range]) -> list[Range]:
    """Sorted spans, with those that touch or overlap made one."""
    found: list[Range] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


# ---- page mappings of our own


class Pages(Protocol):
    """Memory out of which tensors are cut.

    Attributes:
        range: where it lies.
    """

    @property
    def range(self) -> Range: ...

    def cut(self, offset: int, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] with a storage of its own, which begins `offset` bytes into the memory."""


class PageMapping:
    """Private anonymous memory of exactly the pages needed, out of which tensors are cut.

    Not the page-locked allocator of torch, which rounds up to powers of two and pins at 2 GB/s. The memory lives as
    long as anything cut from it, beyond the streaming that it was made for.
    """

    def __init__(self, num_bytes: int) -> None:
        flags = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        self._pages = mmap.mmap(-1, whole_pages((0, num_bytes))[1], **flags)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self.range: Range = start, start + len(self._pages)
        _OWN[start] = end = End(self.range[1])
        weakref.finalize(self._pages, forget_mapping, _OWN, start, end).atexit = False

    def cut(self, offset: int, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] with a storage of its own, which begins `offset` bytes into the mapping."""
        return torch.frombuffer(self._pages, dtype=torch.uint8, count=num_bytes, offset=offset)


@dataclass(frozen=True, eq=False)
class End:
    """Where a page mapping ends; one object for each, although two may lie at one place, one after the other."""

    address: int


_OWN: dict[int, End] = {}  # page mappings that live now, by their starts
# Mappings that share memory with other processes until they are written to, by their starts, with their ends: to lock
# them, or to touch their pages, would copy all of them.
SHARED_UNTIL_WRITTEN: dict[int, End] = {}


def forget_mapping(known: dict[int, End], start: int, end: End) -> None:
    """A mapping is gone."""
    # The memory goes before its finaliser runs: another thread may have mapped the same place by then.
    if known.get(start) is end:
        del known[start]


def is_shared_until_written(address: int) -> bool:
    """Whether memory is in a mapping that shares it with other processes until it is written to."""
    return any(start <= address < end.address for start, end in SHARED_UNTIL_WRITTEN.copy().items())


def fill(copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy dense tensors' bytes, (target, source) of equal size and dense alike, with several threads."""
    whole = [(*address_range(target), source.data_ptr()) for target, source in copies]

    # An interrupt may leave a thread behind that copies still: the tensors live as long as what it calls.
    def copy(piece: tuple[int, int, int], kept: object = copies) -> None:
        ctypes.memmove(*piece)

    with _huge_pages([(start, end) for start, end, _ in whole]):
        _in_threads(
            copy,
            [
                (at, source + at - start, min(_CHUNK_BYTES, end - at))
                for start, end, source in whole
                for at in range(start, end, _CHUNK_BYTES)
            ],
        )


@contextlib.contextmanager
def _huge_pages(spans: Sequence[Range]) -> Iterator[None]:
    """Inside, memory is written to for the first time: in huge pages, as long as these are quick."""
    total = sum(end - start for start, end in spans)
    is_huge = total >= _HUGE_LEAST_BYTES and _HUGE.is_set()
    for span in spans if is_huge else ():
        _advise(whole_pages(span), _MADV_HUGEPAGE)
    started = time.perf_counter()
    yield
    if is_huge and total < _HUGE_LEAST_GB_PER_S * 1e9 * (time.perf_counter() - started):
        _HUGE.clear()


_HUGE = threading.Event()  # set: huge pages are worth asking for
_HUGE.set()


def touch(spans: Sequence[Range], *, is_new: bool = False) -> None:
    """Write to every page of private memory, so that those of file mappings become anonymous; the bytes stay.

    Page-locking runs at 20 GB/s after that and at 2.7 before.

    Args:
        is_new: of mappings of our own that nobody has written to: huge pages are asked for, where these are quick.
    """

    def write(span: Range) -> None:
        if not _advise(span, _MADV_POPULATE_WRITE):  # since Linux 5.14, several times faster than writing
            for address in range(*span, PAGE_BYTES):
                byte = ctypes.c_char.from_address(address)
                byte.value = byte.value

    pieces = [(a, min(a + _CHUNK_BYTES, end)) for start, end in spans for a in range(start, end, _CHUNK_BYTES)]
    with _huge_pages(spans) if is_new else contextlib.nullcontext():
        _in_threads(write, pieces)


def _in_threads(work: Callable[..., object], pieces: Sequence[object]) -> None:
    if len(pieces) < 2:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(work, pieces))


def _advise(span: Range, advice: int) -> bool:
    """madvise(2) on whole pages; False: it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    start, end = span
    return not _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def trim_heap() -> None:
    """Let malloc give back to the system what was freed in the middle of its heaps."""
    trim = getattr(_libc(), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


# ---- what the operating system says of our memory


class MemoryMaps:
    """/proc/self/maps at one moment. Where there is none (not Linux), nothing is known to be safe.

    Args:
        entries: start, end, permissions, and which file (None: none), of each mapping.
    """

    def __init__(self, entries: Sequence[tuple[int, int, str, str | None]]) -> None:
        self._entries = sorted(entries)
        self._starts = [e[0] for e in self._entries]
        # A copy, made at once: mappings come and go in other threads, and finalisers run between any two steps of this.
        self._own = sorted((start, end.address) for start, end in _OWN.copy().items())

    @classmethod
    def read(cls) -> MemoryMaps:
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return cls([])
        entries = []
        for line in lines:
            span, permissions, _, device, inode = line.split(maxsplit=5)[:5]
            start, end = (int(x, 16) for x in span.split("-"))
            entries.append((start, end, permissions, None if inode == "0" else f"{device} {inode}"))
        return cls(entries)

    def stretch(self, tensor: torch.Tensor) -> Range | None:
        """The memory that could be locked as one to lock a tensor where it lies; None: its pages hold strangers, or
        it is unknown what else they hold.

        Of a file mapping, all of it: what matters is where it ends.
        """
        span = address_range(tensor)
        mapping = self._mapping(span)
        if mapping is None or is_shared_until_written(span[0]):
            return None
        start, end, file = mapping
        if file is not None:
            return start, end
        own = self._own_mapping(span)
        return own if own is not None else _chunk(tensor.untyped_storage())

    def is_file(self, span: Range) -> bool:
        """Whether the span lies in a private, writable mapping of a file."""
        mapping = self._mapping(span)
        return mapping is not None and mapping[2] is not None

    def _mapping(self, span: Range) -> tuple[int, int, str | None] | None:
        """The private, writable mapping that holds a span: its start and end, and its file.

        The kernel may have cut it in several, or joined neighbours: those of one file that touch count as one.
        """
        first = bisect_right(self._starts, span[0]) - 1
        if first < 0 or span[0] >= self._entries[first][1]:
            return None
        last, file = first, self._entries[first][3]
        while self._is_continued(last) and (file is not None or self._entries[last][1] < span[1]):
            last += 1
        while file is not None and first and self._is_continued(first - 1):
            first -= 1
        if not all(_is_private_writable(permissions) for _, _, permissions, _ in self._entries[first : last + 1]):
            return None
        start, end = self._entries[first][0], self._entries[last][1]
        return (start, end, file) if span[1] <= end else None

    def _is_continued(self, position: int) -> bool:
        if position + 1 >= len(self._entries):
            return False
        (_, end, _, file), (start, _, _, its_file) = self._entries[position : position + 2]
        return start == end and file == its_file

    def _own_mapping(self, span: Range) -> Range | None:
        position = bisect_right(self._own, (span[0], 2**64)) - 1
        if position < 0:
            return None
        start, end = self._own[position]
        return (start, end) if span[1] <= end and start in _OWN else None


def _is_private_writable(permissions: str) -> bool:
    return permissions.startswith("rw") and permissions[3] == "p"


_WORD_BYTES = ctypes.sizeof(ctypes.c_size_t)
_IS_MAPPED = 2


def _chunk(storage: torch.UntypedStorage) -> Range | None:
    """The pages that malloc mapped for this storage alone; None: it did not, or is not glibc's.

    Source: glibc, malloc/malloc.c: two words before the memory it gives, a chunk has the bytes before it in its
    mapping and its size, whose second bit says that it was mapped by itself. Memory of another allocator has
    something else there; that it should have two numbers that fit the storage to the page is as good as impossible.
    """
    address, num_bytes = storage.data_ptr(), storage.nbytes()
    # Shared and foreign memory cannot be resized; and before a page's first words lies, perhaps, no memory at all.
    if not storage.resizable() or address % PAGE_BYTES < 2 * _WORD_BYTES or not sys.platform.startswith("linux"):
        return None
    before, size = (ctypes.c_size_t * 2).from_address(address - 2 * _WORD_BYTES)
    start = address - 2 * _WORD_BYTES - before
    end = address - 2 * _WORD_BYTES + (size & ~7)
    is_whole = start % PAGE_BYTES == end % PAGE_BYTES == 0
    is_this = 0 <= address - start < PAGE_BYTES and 0 <= end - address - num_bytes < 2 * PAGE_BYTES
    return (start, end) if size & 7 == _IS_MAPPED and is_whole and is_this else None


# ---- how much there is


def available_bytes() -> tuple[int, str] | None:
    """How much more memory this process can take, and what says so; None: it cannot be told.

    The machine's own word for it (MemAvailable), or that of a control group, whichever is less: a container is killed
    at its limit whatever the machine has free. Pages of files count as available, as they are given up when memory
    runs short.
    """
    found = [*_machine(), *_control_groups()]
    return min(found, default=None)


def _machine() -> Iterator[tuple[int, str]]:
    fields = _fields("/proc/meminfo")
    if "MemAvailable:" in fields:
        yield fields["MemAvailable:"] * 1024, "MemAvailable of the machine"


_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def _control_groups() -> Iterator[tuple[int, str]]:
    for folder, limit, used, cached in _CGROUPS:
        try:
            limit_text, used_text = ((Path(folder) / name).read_text().strip() for name in (limit, used))
            if limit_text == "max":
                continue
            fields = _fields(f"{folder}/memory.stat")
            given_up = sum(fields.get(name, 0) for name in cached)
            yield max(0, int(limit_text) - int(used_text) + given_up), f"the control group's {limit}"
        except (OSError, ValueError):
            continue


def _fields(path: str) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def anonymous_bytes(spans: Sequence[Range]) -> int:
    """How much of mappings that touch these spans is the process's own memory already. Walks all page tables."""
    total, is_inside = 0, False
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(x, 16) for x in words[0].split("-"))
            is_inside = any(start < e and s < end for s, e in spans)
        elif is_inside and words[0] == "Anonymous:":
            total += int(words[1]) * 1024
    return total
