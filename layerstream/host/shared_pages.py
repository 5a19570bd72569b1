"""Host memory that several processes of one host have at once: made by one of them, found by the others through /proc.

It has no name that could stay behind, in /dev/shm or elsewhere, and no limit but that of the machine or the control
group (a container's /dev/shm has 64 MiB): it goes with the last process that has it mapped or open, however that ends.

Each process maps it twice, at most:

- *shared*, which is what is page-locked and copied from; nobody writes to it once its maker has filled it;
- *private* (`private()`), which is what is given out to be read and edited. It takes no memory until it is written to:
  a page that is becomes the process's own. Never lock or touch it: either copies all of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import mmap
import os
import uuid
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerstream.budget import format_bytes
from layerstream.errors import HostMemoryError, RankError
from layerstream.host.memory import PAGE_BYTES, SHARED_UNTIL_WRITTEN, End, forget_mapping, whole_pages

# By number: Python has these names only where it was built with a C library that does, and conda's was not.
# Source: Linux, include/uapi/linux/memfd.h and fcntl.h.
_MFD_CLOEXEC = 1
_MFD_ALLOW_SEALING = 2
_MFD_NOEXEC_SEAL = 8  # since Linux 6.3, which may refuse to make memory without it
_F_ADD_SEALS = 1033
_NEVER_RESIZED = 1 | 2 | 4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW: a page that is gone would kill whoever reads it
_MAP_FIXED = 0x10
# Opening what a number stands for by now may block, or take a terminal, if that is something else.
_OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


@dataclass(frozen=True)
class Address:
    """Where the other processes of a host find shared pages.

    Attributes:
        pid, fd: the process that made them, and its descriptor.
        device, inode, num_bytes, name: what must be found there. A number may stand for another process, or another
            file, by now; the name has 122 random bits, so that nothing else can be taken for it, on any host.
    """

    pid: int
    fd: int
    device: int
    inode: int
    num_bytes: int
    name: str

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Address:
        return cls(**json.loads(payload))

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self.pid}/fd/{self.fd}")

    def fault(self) -> RankError | None:
        """Why the pages cannot be opened; None: they can. Neither opens anything nor blocks."""
        what = f"the {format_bytes(self.num_bytes)} of shared memory of process {self.pid}"
        try:
            if self._is_this(self.path.stat()) and self.path.readlink().name.split()[0] == f"memfd:{self.name}":
                return None
        except (FileNotFoundError, ProcessLookupError):
            pass
        except OSError as exc:
            if not self._is_ended():
                return RankError(
                    f"{what} cannot be opened: {exc.strerror}. Run all ranks of a host as one user, and in one "
                    "container; no rank may make itself unreadable (PR_SET_DUMPABLE)."
                )
        return RankError(
            f"{what} is gone: that process has ended, or it shares them no longer. Enter again.", is_gone=True
        )

    def _is_this(self, found: os.stat_result) -> bool:
        return (found.st_dev, found.st_ino, found.st_size) == (self.device, self.inode, self.num_bytes)

    def _is_ended(self) -> bool:
        """Whether the process waits for its parent only (a zombie): its files are closed, and nobody may look."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True


class SharedPages:
    """Whole pages that several processes have, out of which tensors are cut.

    Everything cut from it keeps its mapping alive, and with it the memory, in this process and by itself. The
    descriptor goes with this object, or by `close_fd()`.

    Attributes:
        range: where this process has them mapped, shared: what is to be page-locked.
        address: where other processes find them, as long as the process that made them has not closed its descriptor.
    """

    def __init__(self, fd: _Descriptor, address: Address) -> None:
        self.address = address
        self._fd = fd
        self._pages = _map(fd, address.num_bytes, mmap.MAP_SHARED)
        self.range = _range_of(self._pages)
        self._private: PrivatePages | None = None

    @classmethod
    def make(cls, num_bytes: int) -> SharedPages:
        """New memory, all zero, none of which is taken before it is written to.

        Raises:
            HostMemoryError: the system gives none.
            RankError: other processes could not find it (there is no /proc, or another's).
        """
        size = whole_pages((0, num_bytes))[1]
        name = f"layerstream-{uuid.uuid4().hex}"
        try:
            fd = _Descriptor(_anonymous_file(name))
            os.ftruncate(fd.number, size)
            fcntl.fcntl(fd.number, _F_ADD_SEALS, _NEVER_RESIZED)
        except OSError as exc:
            raise HostMemoryError(
                f"the system gives no memory of {format_bytes(size)} that processes can share: {exc.strerror}. Do not "
                "share host memory, or let the container call memfd_create.",
                needed_bytes=size,
            ) from exc
        found = os.fstat(fd.number)
        # As /proc counts processes, which may be that of another container than this one runs in.
        pid = int(Path("/proc/self").readlink().name) if Path("/proc/self").exists() else os.getpid()
        pages = cls(fd, Address(pid, fd.number, found.st_dev, found.st_ino, size, name))
        if fault := pages.address.fault():
            raise RankError(f"this process does not find its own memory in /proc: {fault}") from fault
        return pages

    @classmethod
    def open(cls, address: Address) -> SharedPages:
        """Memory that another process has made, or this one. Pages that it has already are only mapped: a fault each
        where they are written to or locked, one for 16 where they are read.

        Raises:
            RankError: it is gone (`is_gone`), or may not be opened.
            HostMemoryError: this process cannot map so much.
        """
        if fault := address.fault():
            raise fault
        try:
            fd = _Descriptor(os.open(address.path, _OPEN_FLAGS))
        except OSError as exc:
            raise address.fault() or RankError(
                f"{format_bytes(address.num_bytes)} of shared memory of process {address.pid} cannot be opened: "
                f"{exc.strerror}. Run all ranks of a host as one user, and in one container."
            ) from exc
        # Its number may have come to stand for something else since it was looked at.
        if not address._is_this(os.fstat(fd.number)):
            raise address.fault() or RankError(f"process {address.pid} has closed its shared memory", is_gone=True)
        return cls(fd, address)

    def cut(self, offset: int, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] with a storage of its own, which begins `offset` bytes into the memory. All processes see
        what is written to it."""
        return torch.frombuffer(self._pages, dtype=torch.uint8, count=num_bytes, offset=offset)

    def private(self) -> PrivatePages:
        """The same bytes at another place, where this process may write: one for each process, however often asked.

        Nobody may write to the shared memory after it was asked for: what is seen of that is not defined.
        """
        if self._private is None:
            self._private = PrivatePages(_map(self._fd, self.address.num_bytes, mmap.MAP_PRIVATE))
        return self._private

    def close_fd(self) -> None:
        """Nobody else joins: the descriptor is closed, in the maker's process that by which others open.

        The memory stays, as long as somebody has it mapped; so does `private()`. May be called again.
        """
        if self._fd.is_open:
            self.private()  # can be mapped by a descriptor only
            self._fd.close()


class PrivatePages:
    """Shared pages as this process may edit them: what it writes to becomes its own, page by page.

    Attributes:
        range: where they are mapped.
    """

    def __init__(self, pages: mmap.mmap) -> None:
        self._pages = pages
        self.range = _range_of(pages)
        SHARED_UNTIL_WRITTEN[self.range[0]] = end = End(self.range[1])
        weakref.finalize(pages, forget_mapping, SHARED_UNTIL_WRITTEN, self.range[0], end).atexit = False

    def cut(self, offset: int, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] with a storage of its own, which begins `offset` bytes into the memory."""
        return torch.frombuffer(self._pages, dtype=torch.uint8, count=num_bytes, offset=offset)

    def part(self, offset: int, num_bytes: int) -> PrivatePart:
        """A part of it, in the same way."""
        return PrivatePart(self, offset, num_bytes)

    def own_bytes(self, offset: int, num_bytes: int) -> int:
        """How many bytes, in whole pages, have become this process's own: those that were written to, and all that lie
        on the same pages. Where the system does not tell, all.

        Takes 25 ms a GiB.
        Source: Linux, Documentation/admin-guide/mm/pagemap.rst: bit 63 a page is present, 62 swapped, 61 of a file.
        """
        start, end = (
            at // PAGE_BYTES for at in whole_pages((self.range[0] + offset, self.range[0] + offset + num_bytes))
        )
        try:
            with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
                file.seek(start * 8)
                entries = bytearray(file.read((end - start) * 8))
        except OSError:
            entries = bytearray()
        if len(entries) != (end - start) * 8:
            return (end - start) * PAGE_BYTES
        bits = torch.frombuffer(entries, dtype=torch.int64) if entries else torch.empty(0, dtype=torch.int64)
        is_own = ((bits >> 62) & 3 != 0) & ((bits >> 61) & 1 == 0)
        return int(is_own.sum()) * PAGE_BYTES


@dataclass(frozen=True, eq=False)
class PrivatePart:
    """A part of private pages: what a unit is handed back in."""

    pages: PrivatePages
    offset: int
    num_bytes: int

    @property
    def range(self) -> tuple[int, int]:
        start = self.pages.range[0] + self.offset
        return start, start + self.num_bytes

    def cut(self, offset: int, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] with a storage of its own, which begins `offset` bytes into the part."""
        return self.pages.cut(self.offset + offset, num_bytes)


class _Descriptor:
    """A descriptor that is closed once: by `close()`, or with the last who holds this."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._closing = weakref.finalize(self, os.close, number)
        self._closing.atexit = False

    @property
    def is_open(self) -> bool:
        return self._closing.alive

    def close(self) -> None:
        self._closing()


def _anonymous_file(name: str) -> int:
    """Raises: OSError: the system makes none."""
    make = getattr(_libc(), "memfd_create", None)
    if make is None:
        raise OSError(0, "the C library has no memfd_create (glibc 2.27 or newer on Linux has)")
    for flags in (_MFD_NOEXEC_SEAL, 0):
        fd = int(make(name.encode(), _MFD_CLOEXEC | _MFD_ALLOW_SEALING | flags))
        if fd >= 0:
            return fd
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _map(fd: _Descriptor, num_bytes: int, flags: int) -> mmap.mmap:
    """A mapping that needs no descriptor.

    One that Python maps of a file keeps a descriptor of its own open. This one of no file holds the place, and unmaps
    it in the end, whatever was mapped there meanwhile.
    """
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start, _ = _range_of(pages)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc().mmap(start, num_bytes, access, flags | _MAP_FIXED, fd.number, 0) != start:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as exc:
        raise HostMemoryError(
            f"{format_bytes(num_bytes)} of shared host memory cannot be mapped: {exc.strerror}. Raise the limits of "
            "the process (ulimit -v) or of its container.",
            needed_bytes=num_bytes,
        ) from exc
    return pages


def _range_of(pages: mmap.mmap) -> tuple[int, int]:
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    return start, start + len(pages)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t),
    ]
    return libc
