"""A device made of ordinary memory: the engine's stand-in for a GPU, and its harshest reader.

Used when there is no accelerator, and by every test. Compute runs at once (it is the CPU), but copies go to
a copy stream that may run them as late as the rules allow, so that an engine that forgot to wait computes
with NaN. Optional checks:

- *copies*: "at_once", "late" (only when something waits for them) or "random" (some prefix of the queue runs
  at each operation).
- *poison*: from the moment a copy into a slot is issued, the slot holds NaN until the copy runs.
- *happens-before* (`checking()`): every operator that touches a slot is compared with the copies into it by
  vector clocks, as a race detector does. It catches the missing wait that happens to give the right values.
- *faults*: `fail_at(n, exc)` raises at the n-th device operation from now; the pairs of a copy are one each.
- *two places*: to torch both are "cpu", so that moving a module to the host cannot be seen by where its tensors end up.
  With `is_named_apart`, "cpu" is what user code calls the host, as it is beside a GPU.
- *memory*: buffers, and within `checking()` or `accounting()` every storage that an operator makes, take device
  memory while they live; beyond `memory_bytes` or the cap, `SimulatedOutOfMemoryError`. Nothing is cached, so that
  reserved and allocated are the same. What an operator needs while it runs is not seen.
- *clock*: copies take `bytes / link`, `compute(ms)` takes what a test says; stalls follow.

Source: vector clocks for race detection: Flanagan and Freund, "FastTrack", PLDI 2009.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from layerstream.blocks import ALIGNMENT_BYTES, align
from layerstream.device.base import Caps, engine_tensors
from layerstream.errors import TransferError
from layerstream.torch_private import TorchDispatchMode, is_traceable_wrapper_subclass, tree_leaves

COPY_STREAM = 0
_REMEMBERED_OPERATIONS = 256
PAGE_BYTES = 4096


class SimulatedOutOfMemoryError(torch.OutOfMemoryError):
    """The simulated device's memory is full, or its cap is reached."""


class RaceError(TransferError):
    """Two accesses to a slot that no event orders: on a GPU they may happen in either order."""


@dataclass(eq=False)
class SimulatedStream:
    """A compute stream: its vector clock says which operations of other streams it has waited for."""

    number: int
    clock: dict[int, int] = field(default_factory=dict)
    time_ms: float = 0.0

    def tick(self) -> int:
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return self.clock[self.number]


@dataclass(eq=False)
class SimulatedEvent:
    clock: dict[int, int]
    time_ms: float
    copy: _Copy | None = None  # the copy it follows, when it lies on the copy stream


@dataclass(eq=False)
class _Copy:
    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    is_done: bool = False


@dataclass(eq=False)
class _Buffer:
    """One allocation and who touched it last."""

    start: int
    num_bytes: int
    stream: SimulatedStream  # that it was allocated on, and goes back to
    last_copy: int = 0  # tick of the copy stream
    accesses: dict[int, int] = field(default_factory=dict)  # compute stream -> its tick


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


class _Activations:
    """Storages that take device memory while they live: what operators made, and freed buffers still looked at.

    A storage is known by its object, never by its address, which torch uses again. The object lives as long as the
    storage it stands for, views and autograd graphs included; its weak reference says when it is gone. Polling
    `StorageWeakRef.expired` would tell the same, but an exact peak would ask every storage at every new peak.
    """

    def __init__(self) -> None:
        self._counted: dict[weakref.ref[torch.UntypedStorage], tuple[int, int]] = {}  # counted, size of the storage
        # Storages die in the middle of anything, the lines below included: they only leave a note here.
        self._dead: deque[weakref.ref[torch.UntypedStorage]] = deque()
        self._num_bytes = 0
        self.num_forgotten = 0

    def num_bytes(self) -> int:
        """Bytes of those that live now."""
        while self._dead:
            self._num_bytes -= self._counted.pop(self._dead.popleft())[0]
            self.num_forgotten += 1
        return self._num_bytes

    def knows(self, storage: torch.UntypedStorage) -> bool:
        return weakref.ref(storage) in self._counted

    def growth(self, storage: torch.UntypedStorage) -> int:
        """Bytes by which a known storage was resized since it was counted, as `out=` does."""
        return storage.nbytes() - self._counted[weakref.ref(storage)][1]

    def count(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Count `num_bytes` for the storage, on top of what is counted for it already."""
        reference = weakref.ref(storage, self._dead.append)
        counted, _ = self._counted.pop(reference, (0, 0))
        self._counted[reference] = counted + num_bytes, storage.nbytes()
        self._num_bytes += num_bytes


class _ThreadState(threading.local):
    is_engine = False  # whether this thread runs the engine's own operations


class SimulatedDevice:
    """See the module's text. Implements `device.Device`.

    Args:
        memory_bytes: size of the device; allocations beyond it raise. The default holds anything.
        copies: when queued copies run.
        is_poisoned: fill a slot with NaN while a copy into it is queued.
        link_gb_per_s: speed of the simulated bus.
        refuses_pinning: `register` answers False, as under WSL or a memlock limit.
        is_named_apart: a module that is moved to "cpu" is moved off the device.
        seed: of the "random" order.
    """

    is_simulated = True
    name = "simulated"
    torch_device = torch.device("cpu")

    def __init__(
        self,
        *,
        memory_bytes: int = 2**50,
        copies: Literal["at_once", "late", "random"] = "at_once",
        is_poisoned: bool = False,
        link_gb_per_s: float = 50.0,
        refuses_pinning: bool = False,
        is_named_apart: bool = False,
        seed: int = 0,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.copies = copies
        self.is_poisoned = is_poisoned
        self.link_gb_per_s = link_gb_per_s
        self.refuses_pinning = refuses_pinning
        self.is_named_apart = is_named_apart
        self.buffer_bytes = 0  # of the engine's buffers
        self.peak_buffer_bytes = 0
        self.registered: dict[int, int] = {}
        self.num_copied_pieces = 0
        self.num_pageable_pieces = 0
        self.operations: deque[str] = deque(maxlen=_REMEMBERED_OPERATIONS)  # the last ones, by name
        self.num_operations = 0
        self._fault: tuple[int, BaseException] | None = None
        self._random = random.Random(seed)
        self._buffers: dict[int, _Buffer] = {}
        self._starts: list[int] = []
        self._queue: deque[_Copy] = deque()
        self._last_copy: _Copy | None = None
        self._is_lost = False  # a fault struck while the host waited for the device
        self._copy_clock: dict[int, int] = {COPY_STREAM: 0}
        self._copy_time_ms = 0.0
        self._host_clock: dict[int, int] = {}  # what the host has waited for
        self._streams: dict[int, SimulatedStream] = {}
        self._used_stream: dict[int, SimulatedStream] = {}
        self._activations = _Activations()
        self._foreign_bytes = 0
        self._whole_bytes = 0
        self._caps = Caps()
        self._cap_bytes: int | None = None
        self._peak_bytes = 0
        self._num_ooms = 0
        self._lock = threading.RLock()
        self._thread = _ThreadState()

    # ---- what tests steer

    def fail_at(self, operation: int, error: BaseException) -> None:
        """Raise `error` at the `operation`-th device operation from now (0 is the next), once."""
        self._fault = (self.num_operations + operation, error)

    def new_stream(self) -> SimulatedStream:
        with self._lock:
            stream = SimulatedStream(len(self._streams) + 1, dict(self._host_clock))
            self._streams[-len(self._streams) - 1] = stream
            return stream

    @contextlib.contextmanager
    def use_stream(self, stream: SimulatedStream, *, is_ordered: bool = True) -> Iterator[None]:
        """Make `stream` this thread's compute stream, ordered after and before the one it replaces, or by nothing."""
        thread = threading.get_ident()
        outer = self.compute_stream()
        if is_ordered:
            self.wait(stream, self.record(outer))
        self._used_stream[thread] = stream
        try:
            yield
        finally:
            self._used_stream[thread] = outer
            if is_ordered:
                self.wait(outer, self.record(stream))

    def compute(self, ms: float) -> None:
        """Spend simulated time on this thread's compute stream."""
        self.compute_stream().time_ms += ms

    @property
    def time_ms(self) -> float:
        """Simulated time on this thread's compute stream."""
        return self.compute_stream().time_ms

    def checking(self) -> contextlib.AbstractContextManager[Any]:
        """`accounting`, and every operator of this thread that touches a slot is checked for races."""
        return _HappensBefore(self)

    def accounting(self) -> contextlib.AbstractContextManager[Any]:
        """While entered, every storage that an operator of this thread makes takes device memory until it is freed.

        Storages from before are host memory, and so are what the engine makes for itself and what is made by no
        operator (`torch.tensor`, `from_numpy`). May be entered more than once; each storage counts once.
        """
        return _Accounting(self)

    @contextlib.contextmanager
    def foreign(self, num_bytes: int) -> Iterator[None]:
        """While entered, another library's tensors take `num_bytes` of device memory.

        Raises:
            SimulatedOutOfMemoryError: they do not fit, as in `allocate`.
        """
        with self._lock:
            self._check_room(num_bytes)
            self._foreign_bytes += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._foreign_bytes -= num_bytes

    # ---- the device

    @property
    def copied_by(self) -> str:
        return ""

    def total_bytes(self) -> int:
        return self.memory_bytes

    def free_bytes(self) -> int:
        return max(0, self._limit_bytes - self.reserved_bytes())

    def reserved_bytes(self) -> int:
        with self._lock:
            return self.buffer_bytes + self._foreign_bytes + self._whole_bytes + self._activations.num_bytes()

    def allocated_bytes(self) -> int:
        return self.reserved_bytes()

    def peak_reserved_bytes(self) -> int:
        return self._peak_bytes

    def peak_allocated_bytes(self) -> int:
        return self._peak_bytes

    def reset_peaks(self) -> None:
        self._peak_bytes = self.reserved_bytes()

    def num_ooms(self) -> int:
        return self._num_ooms

    def context_bytes(self) -> int:
        return 0

    def set_cap(self, num_bytes: int | None, owner: Hashable = None) -> None:
        self._caps.set(num_bytes, owner, functools.partial(setattr, self, "_cap_bytes"))

    def grow_segments(self, owner: Hashable, *, is_on: bool) -> None:
        return None  # nothing is cut here: reserved is what is allocated

    def page_bytes(self) -> int:
        return 0

    def rounded_bytes(self, num_bytes: int) -> int:
        return align(num_bytes)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self._step("allocate")
        rounded = self.rounded_bytes(num_bytes)
        with self._lock, self._own_operations():
            self._check_room(rounded)
            # Over-allocated by one alignment so that the slot can start on a boundary, as a GPU allocation does.
            raw = torch.empty(rounded + ALIGNMENT_BYTES, dtype=torch.uint8, device="cpu")
            shift = -raw.data_ptr() % ALIGNMENT_BYTES
            buffer = raw[shift : shift + num_bytes]
            if self.is_poisoned:
                buffer.fill_(0xFF)
            start = buffer.data_ptr()
            self._buffers[start] = _Buffer(start, num_bytes, self.compute_stream())
            self._starts = sorted(self._buffers)
            self.buffer_bytes += rounded
            self.peak_buffer_bytes = max(self.peak_buffer_bytes, self.buffer_bytes)
        return buffer

    def free(self, buffer: torch.Tensor) -> None:
        with self._lock:
            known = self._buffers.pop(buffer.data_ptr(), None)
            if known is not None:
                self._check_free(known)
                rounded = self.rounded_bytes(known.num_bytes)
                self.buffer_bytes -= rounded
                self._activations.count(buffer.untyped_storage(), rounded)
                self._starts = sorted(self._buffers)
        self._step("free")

    def count_whole(self, num_bytes: int) -> None:
        with self._lock:
            self._check_room(max(0, num_bytes))
            self._whole_bytes += num_bytes

    def compute_stream(self) -> SimulatedStream:
        thread = threading.get_ident()
        stream = self._used_stream.get(thread) or self._streams.get(thread)
        if stream is None:
            with self._lock:
                stream = SimulatedStream(len(self._streams) + 1, dict(self._host_clock))
                self._streams[thread] = stream
        return stream

    def stream_number(self) -> int:
        return self.compute_stream().number

    def record(self, stream: Any) -> SimulatedEvent:
        self._step("record")
        stream.tick()
        return SimulatedEvent(dict(stream.clock), stream.time_ms)

    def wait(self, stream: Any, event: Any) -> None:
        self._step("wait")
        if event.copy is not None:
            self._run_copies(until=event.copy)
        _merge(stream.clock, event.clock)
        stream.time_ms = max(stream.time_ms, event.time_ms)

    def is_done(self, event: Any) -> bool:
        if event.copy is not None and not event.copy.is_done:
            return False
        with self._lock:  # whatever the host issues from now on, on whichever stream, happens after it
            for clock in (self._host_clock, self._copy_clock, *(stream.clock for stream in self._streams.values())):
                _merge(clock, event.clock)
        return True

    def prepare(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, is_locked: bool = True
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(pairs)

    def copy(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Any]) -> SimulatedEvent:
        self._step("copy")
        with self._lock, engine_tensors(), self._own_operations():
            clock = self._copy_clock
            for event in after:
                _merge(clock, event.clock)
            clock[COPY_STREAM] += 1
            self._copy_time_ms = max([self._copy_time_ms, *(e.time_ms for e in after)])
            self._last_copy = queued = _Copy([])
            self._queue.append(queued)
            try:
                for number, (target, source) in enumerate(copies):
                    if number:
                        self._step("piece", progresses=False)  # what fails here leaves the pairs before on their way
                    self._check_overwrite(target)
                    self._check_source(source)
                    if self.is_poisoned:
                        target.fill_(0xFF)
                    queued.pairs.append((target, source))
                    self._copy_time_ms += target.numel() / self.link_gb_per_s / 1e6
            except BaseException:
                if not queued.pairs:
                    self._queue.remove(queued)
                    queued.is_done = True
                raise
            self._progress()
            return SimulatedEvent(dict(clock), self._copy_time_ms, queued)

    def record_copies(self) -> SimulatedEvent:
        with self._lock:
            return SimulatedEvent(dict(self._copy_clock), self._copy_time_ms, self._last_copy)

    def copy_back(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._step("copy_back")
        with engine_tensors():
            target.copy_(source)

    def mark(self, stream: Any) -> float:
        return float(stream.time_ms)

    def mark_copies(self, after: Sequence[Any]) -> float:
        with self._lock:
            for event in after:
                _merge(self._copy_clock, event.clock)
            self._copy_time_ms = max([self._copy_time_ms, *(event.time_ms for event in after)])
            return self._copy_time_ms

    def elapsed_ms(self, start: Any, end: Any) -> float | None:
        return float(end - start)

    def measure_link(self, target: torch.Tensor, source: torch.Tensor) -> float:
        event = self.copy([(target, source)], [self.record(self.compute_stream())])
        self.synchronize_event(event)
        return self.link_gb_per_s

    def start_stall(self, stream: Any, event: Any) -> Any:
        return float(event.time_ms - stream.time_ms) if event.time_ms > stream.time_ms else None

    def end_stall(self, stream: Any, marker: Any) -> Any:
        return marker

    def stall_ms(self, marker: Any) -> float | None:
        return float(marker)

    def register(self, address: int, num_bytes: int) -> bool:
        self._step("register")
        if self.refuses_pinning:
            return False
        if address % PAGE_BYTES or num_bytes % PAGE_BYTES:
            raise TransferError(f"registration of {num_bytes} bytes at {address:#x} is not page-aligned")
        with self._lock:
            for start, length in self.registered.items():
                if start < address + num_bytes and address < start + length:
                    raise TransferError(f"registration of {num_bytes} bytes at {address:#x} overlaps another")
            self.registered[address] = num_bytes
        return True

    def unregister(self, address: int) -> None:
        with self._lock:
            end = address + self.registered[address]
            sources = (source.data_ptr() for queued in self._queue for _, source in queued.pairs)
            if any(address <= source < end for source in sources):
                raise TransferError("host memory unregistered while a copy from it is in flight")
            del self.registered[address]
        self._step("unregister")

    def pinned_staging(self, num_bytes: int) -> torch.Tensor | None:
        with self._own_operations():  # host memory
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def homes(self) -> contextlib.AbstractContextManager[None]:
        return self._own_operations()  # host memory

    def synchronize(self) -> None:
        self._is_lost = True
        self._step("synchronize")
        self._is_lost = False
        self._run_copies(until=None)
        # Everything so far happens before whatever the host issues next, on any stream.
        with self._lock:
            for stream in self._streams.values():
                _merge(self._host_clock, stream.clock)
            _merge(self._host_clock, self._copy_clock)
            self._after_host_wait(max([self._copy_time_ms, *(s.time_ms for s in self._streams.values())]))

    def synchronize_event(self, event: Any) -> None:
        if event.copy is not None:
            self._run_copies(until=event.copy)
        with self._lock:
            _merge(self._host_clock, event.clock)
            self._after_host_wait(event.time_ms)

    def empty_cache(self) -> None:
        """Nothing is cached."""

    # ---- inside

    def _after_host_wait(self, time_ms: float) -> None:
        _merge(self._copy_clock, self._host_clock)
        for stream in self._streams.values():
            _merge(stream.clock, self._host_clock)
            stream.time_ms = max(stream.time_ms, time_ms)

    def _step(self, name: str, *, progresses: bool = True) -> None:
        """One device operation: faults strike here, and under "random" some queued copies run."""
        number = self.num_operations
        self.num_operations += 1
        self.operations.append(name)
        if self._fault is not None and number >= self._fault[0]:
            error, self._fault = self._fault[1], None
            self._num_ooms += isinstance(error, torch.OutOfMemoryError)
            raise error
        if self._queue and progresses:
            self._progress()

    def _progress(self) -> None:
        if self.copies == "at_once":
            self._run_copies(until=None)
        elif self.copies == "random":
            for _ in range(self._random.randint(0, len(self._queue))):
                self._run_next()

    def _run_copies(self, *, until: _Copy | None) -> None:
        with self._lock:
            while self._queue and (until is None or not until.is_done):
                self._run_next()

    def _run_next(self) -> None:
        with self._lock, engine_tensors(), self._own_operations():
            if self._queue:
                queued = self._queue.popleft()
                for target, source in queued.pairs:
                    target.copy_(source)
                queued.pairs = []  # events that are kept must not look like somebody who looks at the slot
                queued.is_done = True

    @contextlib.contextmanager
    def _own_operations(self) -> Iterator[None]:
        outer, self._thread.is_engine = self._thread.is_engine, True
        try:
            yield
        finally:
            self._thread.is_engine = outer

    @property
    def _limit_bytes(self) -> int:
        return self.memory_bytes if self._cap_bytes is None else min(self.memory_bytes, self._cap_bytes)

    def _check_room(self, num_bytes: int) -> None:
        """Whether so much more fits, and the peak with it; call under the lock, and take it under the same."""
        taken = self.reserved_bytes()
        limit = self._limit_bytes
        if num_bytes and taken + num_bytes > limit:
            self._num_ooms += 1
            kind = "" if limit == self.memory_bytes else f" that the cap allows of {self.memory_bytes}"
            raise SimulatedOutOfMemoryError(
                f"simulated device: {num_bytes} bytes asked for, {max(limit - taken, 0)} of {limit}{kind} free "
                f"(buffers {self.buffer_bytes}, activations {self._activations.num_bytes()}, "
                f"whole {self._whole_bytes}, foreign {self._foreign_bytes}); {taken} bytes is allocated"
            )
        self._peak_bytes = max(self._peak_bytes, taken + num_bytes)

    def _account(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """An operator made `outputs` of `inputs`: what is new of them takes memory, all of it or nothing."""
        with self._lock:
            given = {t.untyped_storage() for t in inputs}
            new: dict[torch.UntypedStorage, int] = {}
            for tensor in outputs:
                storage = tensor.untyped_storage()
                if self._activations.knows(storage):
                    if growth := self._activations.growth(storage):
                        new[storage] = growth
                elif storage not in given and self._buffer_of(tensor.data_ptr()) is None:
                    new[storage] = storage.nbytes()
            if new:
                self._check_room(sum(new.values()))
                for storage, num_bytes in new.items():
                    self._activations.count(storage, num_bytes)

    def _buffer_of(self, address: int) -> _Buffer | None:
        position = bisect_right(self._starts, address) - 1
        if position < 0:
            return None
        buffer = self._buffers[self._starts[position]]
        return buffer if address < buffer.start + buffer.num_bytes else None

    def _check_overwrite(self, target: torch.Tensor) -> None:
        buffer = self._buffer_of(target.data_ptr())
        if buffer is None:
            if target.numel():
                raise TransferError("copy to memory that is not allocated on the simulated device")
            return
        for stream, tick in buffer.accesses.items():
            if self._copy_clock.get(stream, 0) < tick:
                raise RaceError(
                    f"copy into a slot does not wait for its reader: compute stream {stream} read it at {tick}, "
                    f"the copy waited for {self._copy_clock.get(stream, 0)}"
                )
        buffer.last_copy = self._copy_clock[COPY_STREAM]

    def _check_free(self, buffer: _Buffer) -> None:
        """What is given back goes to the stream it came from, which may hand it out at once."""
        clock = buffer.stream.clock
        if clock.get(COPY_STREAM, 0) < buffer.last_copy and not self._is_lost:
            raise RaceError(
                f"memory given back with copy {buffer.last_copy} on its way to it: its stream has waited for "
                f"{clock.get(COPY_STREAM, 0)}"
            )
        for stream, tick in buffer.accesses.items():
            if clock.get(stream, 0) < tick and not self._is_lost:
                raise RaceError(f"memory given back while compute stream {stream} may still read it")

    def check_host_copy(self, tensor: torch.Tensor) -> bool:
        """Whether a copy from or to a dense host tensor, by whomever, would be one of page-locked memory.

        Raises:
            TransferError: it begins in a registration and ends beyond it, in another one or in none, where a GPU
                answers `invalid argument`. One that begins outside is an ordinary copy, whatever it crosses.
        """
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        for start, num_bytes in self.registered.items():
            if start <= first < start + num_bytes and first < last:
                if last > start + num_bytes:
                    raise TransferError(
                        f"invalid argument: a copy of {last - first} bytes ends {last - start - num_bytes} bytes "
                        "behind the registration it begins in"
                    )
                return True
        return False

    def _check_source(self, source: torch.Tensor) -> None:
        self.num_copied_pieces += 1
        self.num_pageable_pieces += not self.check_host_copy(source)

    def _access(self, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        buffer = self._buffer_of(tensor.data_ptr())
        if buffer is None:
            return
        stream = self.compute_stream()
        if stream.clock.get(COPY_STREAM, 0) < buffer.last_copy:
            raise RaceError(
                f"slot read without waiting for its load: copy {buffer.last_copy} was issued, compute stream "
                f"{stream.number} has waited for {stream.clock.get(COPY_STREAM, 0)}"
            )
        buffer.accesses[stream.number] = stream.tick()


class _Accounting(TorchDispatchMode):
    """Sees every operator below autograd and counts the memory of what it makes."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._device._thread.is_engine:
            self._see(func, _plain_tensors((args, kwargs)), _plain_tensors(out))
        return out

    def _see(self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        self._device._account(inputs, outputs)


class _HappensBefore(_Accounting):
    """Reports the operators that touch device memory, too."""

    def _see(self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        super()._see(func, inputs, outputs)
        if not func._schema.is_mutable:
            # A view reads nothing; only what reads through it does.
            made = {t.untyped_storage() for t in outputs}
            if any(t.untyped_storage() in made for t in inputs):
                return
        for tensor in inputs:
            self._device._access(tensor)


def _plain_tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree whose bytes lie in the simulated device's or host memory."""
    found: list[torch.Tensor] = []
    pending = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    while pending:
        tensor = pending.pop()
        if is_traceable_wrapper_subclass(tensor):
            pending.extend(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        elif tensor.layout is torch.strided and tensor.device.type == "cpu":
            found.append(tensor)
    return found
