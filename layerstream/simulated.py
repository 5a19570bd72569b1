"""A device made of ordinary memory: the engine's stand-in for a GPU, and its harshest reader.

Used when there is no accelerator, and by every test. Compute runs at once (it is the CPU), but copies go to
a copy stream that may run them as late as the rules allow, so that an engine that forgot to wait computes
with NaN. Optional checks:

- *copies*: "at_once", "late" (only when something waits for them) or "random" (some prefix of the queue runs
  at each operation).
- *poison*: from the moment a copy into a slot is issued, the slot holds NaN until the copy runs.
- *happens-before* (`checking()`): every operator that touches a slot is compared with the copies into it by
  vector clocks, as a race detector does. It catches the missing wait that happens to give the right values.
- *faults*: `fail_at(n, exc)` raises at the n-th device operation from now.
- *clock*: copies take `bytes / link`, `compute(ms)` takes what a test says; stalls follow.

Source: vector clocks for race detection: Flanagan and Freund, "FastTrack", PLDI 2009.
"""

from __future__ import annotations

import contextlib
import random
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerstream.device import engine_tensors
from layerstream.errors import TransferError

COPY_STREAM = 0
PAGE_BYTES = 4096


class SimulatedOutOfMemoryError(torch.OutOfMemoryError):
    """The simulated device's memory is full."""


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
    pieces: list[tuple[torch.Tensor, torch.Tensor]]
    is_done: bool = False


@dataclass(eq=False)
class _Buffer:
    """One allocation and who touched it last."""

    start: int
    num_bytes: int
    last_copy: int = 0  # tick of the copy stream
    accesses: dict[int, int] = field(default_factory=dict)  # compute stream -> its tick


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


class SimulatedDevice:
    """See the module's text. Implements `device.Device`.

    Args:
        memory_bytes: size of the device; allocations beyond it raise. The default holds anything.
        copies: when queued copies run.
        is_poisoned: fill a slot with NaN while a copy into it is queued.
        link_gb_per_s: speed of the simulated bus.
        refuses_pinning: `register` answers False, as under WSL or a memlock limit.
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
        seed: int = 0,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.copies = copies
        self.is_poisoned = is_poisoned
        self.link_gb_per_s = link_gb_per_s
        self.refuses_pinning = refuses_pinning
        self.allocated_bytes = 0
        self.peak_allocated_bytes = 0
        self.registered: dict[int, int] = {}
        self.num_copied_pieces = 0
        self.num_pageable_pieces = 0
        self.operations: list[str] = []
        self._fault: tuple[int, BaseException] | None = None
        self._random = random.Random(seed)
        self._buffers: dict[int, _Buffer] = {}
        self._starts: list[int] = []
        self._queue: deque[_Copy] = deque()
        self._copy_clock: dict[int, int] = {COPY_STREAM: 0}
        self._copy_time_ms = 0.0
        self._host_clock: dict[int, int] = {}  # what the host has waited for
        self._streams: dict[int, SimulatedStream] = {}
        self._used_stream: dict[int, SimulatedStream] = {}
        self._lock = threading.RLock()
        self._is_engine = False

    # ---- what tests steer

    def fail_at(self, operation: int, error: BaseException) -> None:
        """Raise `error` at the `operation`-th device operation from now (0 is the next), once."""
        self._fault = (len(self.operations) + operation, error)

    def new_stream(self) -> SimulatedStream:
        with self._lock:
            stream = SimulatedStream(len(self._streams) + 1, dict(self._host_clock))
            self._streams[-len(self._streams) - 1] = stream
            return stream

    @contextlib.contextmanager
    def use_stream(self, stream: SimulatedStream) -> Iterator[None]:
        """Make `stream` this thread's compute stream, ordered after and before the one it replaces."""
        thread = threading.get_ident()
        outer = self.compute_stream()
        self.wait(stream, self.record(outer))
        self._used_stream[thread] = stream
        try:
            yield
        finally:
            self._used_stream[thread] = outer
            self.wait(outer, self.record(stream))

    def compute(self, ms: float) -> None:
        """Spend simulated time on this thread's compute stream."""
        self.compute_stream().time_ms += ms

    @property
    def time_ms(self) -> float:
        """Simulated time on this thread's compute stream."""
        return self.compute_stream().time_ms

    def checking(self) -> contextlib.AbstractContextManager[Any]:
        """While entered, every operator of this thread that touches a slot is checked for races."""
        return _HappensBefore(self)

    # ---- the device

    def total_bytes(self) -> int:
        return self.memory_bytes

    def free_bytes(self) -> int:
        return self.memory_bytes - self.allocated_bytes

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self._step("allocate")
        if self.allocated_bytes + num_bytes > self.memory_bytes:
            raise SimulatedOutOfMemoryError(
                f"simulated device: {num_bytes} bytes asked for, {self.free_bytes()} of {self.memory_bytes} free"
            )
        # Over-allocated by one alignment so that the slot can start on a boundary, as a GPU allocation does.
        raw = torch.empty(num_bytes + 256, dtype=torch.uint8, device="cpu")
        shift = -raw.data_ptr() % 256
        buffer = raw[shift : shift + num_bytes]
        if self.is_poisoned:
            buffer.fill_(0xFF)
        start = buffer.data_ptr()
        with self._lock:
            self._buffers[start] = _Buffer(start, num_bytes)
            self._starts = sorted(self._buffers)
            self.allocated_bytes += num_bytes
            self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return buffer

    def free(self, buffer: torch.Tensor) -> None:
        with self._lock:
            known = self._buffers.pop(buffer.data_ptr(), None)
            if known is not None:
                self.allocated_bytes -= known.num_bytes
                self._starts = sorted(self._buffers)
        self._step("free")

    def compute_stream(self) -> SimulatedStream:
        thread = threading.get_ident()
        stream = self._used_stream.get(thread) or self._streams.get(thread)
        if stream is None:
            with self._lock:
                stream = SimulatedStream(len(self._streams) + 1, dict(self._host_clock))
                self._streams[thread] = stream
        return stream

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
        return event.copy is None or event.copy.is_done

    def copy(self, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Any]) -> SimulatedEvent:
        self._step("copy")
        with self._lock, engine_tensors(), self._own_operations():
            clock = self._copy_clock
            for event in after:
                _merge(clock, event.clock)
            clock[COPY_STREAM] += 1
            num_bytes = 0
            for target, source in pieces:
                self._check_overwrite(target)
                self._check_registration(source)
                num_bytes += target.numel()
                if self.is_poisoned:
                    target.fill_(0xFF)
            starts_ms = max([self._copy_time_ms, *(e.time_ms for e in after)])
            self._copy_time_ms = starts_ms + num_bytes / self.link_gb_per_s / 1e6
            queued = _Copy(list(pieces))
            self._queue.append(queued)
            self._progress()
            return SimulatedEvent(dict(clock), self._copy_time_ms, queued)

    def copy_back(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._step("copy_back")
        with engine_tensors():
            target.copy_(source)

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
        if self._queue:
            raise TransferError("host memory unregistered while a copy is in flight")
        with self._lock:
            del self.registered[address]
        self._step("unregister")

    def pinned_staging(self, num_bytes: int) -> torch.Tensor | None:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def synchronize(self) -> None:
        self._step("synchronize")
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

    def _step(self, name: str) -> None:
        """One device operation: faults strike here, and under "random" some queued copies run."""
        number = len(self.operations)
        self.operations.append(name)
        if self._fault is not None and number >= self._fault[0]:
            error, self._fault = self._fault[1], None
            raise error
        if self._queue:
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
                for target, source in queued.pieces:
                    target.copy_(source)
                queued.is_done = True

    @contextlib.contextmanager
    def _own_operations(self) -> Iterator[None]:
        outer, self._is_engine = self._is_engine, True
        try:
            yield
        finally:
            self._is_engine = outer

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

    def _check_registration(self, source: torch.Tensor) -> None:
        """A copy must come from one registration or from none: a GPU answers `invalid argument` else."""
        self.num_copied_pieces += 1
        first, last = source.data_ptr(), source.data_ptr() + max(source.numel(), 1)
        touching = [s for s, n in self.registered.items() if s < last and first < s + n]
        if not touching:
            self.num_pageable_pieces += 1
        elif len(touching) > 1 or not (touching[0] <= first and last <= touching[0] + self.registered[touching[0]]):
            raise TransferError(f"one copy of {source.numel()} bytes straddles {len(touching)} registrations")

    def _access(self, tensor: torch.Tensor) -> None:
        if self._is_engine or not tensor.numel():
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


class _HappensBefore(TorchDispatchMode):
    """Sees every operator below autograd and reports those that touch device memory."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._device._is_engine:
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not func._schema.is_mutable:
            # A view reads nothing; only what reads through it does.
            outputs = {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
            if any(t.untyped_storage().data_ptr() in outputs for t in inputs):
                return out
        for tensor in inputs:
            if tensor.layout is torch.strided and tensor.device.type == "cpu":
                self._device._access(tensor)
        return out
