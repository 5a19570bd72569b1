"""The simulated device: its parts together, as the engine asks for them, and what tests steer."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import torch

from layerstream.blocks import ALIGNMENT_BYTES, align
from layerstream.codec.reference import decode, encode
from layerstream.device.base import Device, PackedLayout, engine_tensors
from layerstream.device.simulated.accounting import Accounting, HappensBefore, Unseen
from layerstream.device.simulated.copies import CopyQueue, When
from layerstream.device.simulated.memory import SimulatedMemory
from layerstream.device.simulated.page_locks import Registrations
from layerstream.device.simulated.races import Buffer, Buffers, RaceError, check_given_back
from layerstream.device.simulated.streams import COPY_STREAM, Copy, SimulatedEvent, SimulatedStream, Streams
from layerstream.errors import TransferError
from layerstream.torch_private import DISPATCH_MODE_STACK

_REMEMBERED_OPERATIONS = 256
_LOCK = threading.RLock()  # of all of them: a copy from one to another touches both
DISPATCH_MODES: Callable[[], Sequence[Any]] = DISPATCH_MODE_STACK.find() or list


class SimulatedDevice:
    """See the package's text. Implements `device.Device`.

    Args:
        memory_bytes: size of the device; allocations beyond it raise. The default holds anything.
        copies: when queued copies run.
        is_poisoned: fill a slot with NaN while a copy into it is queued.
        link_gb_per_s: speed of the simulated bus.
        decode_gb_per_s: of decoding, in bytes of what comes of it.
        peer_gb_per_s: of copies from another simulated device within reach.
        reaches_peers: copies from another one go straight; or the names of those of which this is so.
        name: for people.
        refuses_pinning: `register` answers False, as under WSL or a memlock limit.
        is_named_apart: a module that is moved to "cpu" is moved off the device.
        seed: of the "random" order.
    """

    is_simulated = True
    copied_by = ""
    torch_device = torch.device("cpu")

    def __init__(
        self,
        *,
        memory_bytes: int = 2**50,
        copies: When = "at_once",
        is_poisoned: bool = False,
        link_gb_per_s: float = 50.0,
        decode_gb_per_s: float = 1500.0,
        peer_gb_per_s: float = 400.0,
        reaches_peers: bool | Collection[str] = True,
        name: str = "simulated",
        refuses_pinning: bool = False,
        is_named_apart: bool = False,
        seed: int = 0,
    ) -> None:
        self.is_poisoned = is_poisoned
        self.link_gb_per_s = link_gb_per_s
        self.decode_gb_per_s = decode_gb_per_s
        self.peer_gb_per_s = peer_gb_per_s
        self.reaches_peers = reaches_peers
        self.name = name
        self.refuses_pinning = refuses_pinning
        self.is_named_apart = is_named_apart
        self.operations: deque[str] = deque(maxlen=_REMEMBERED_OPERATIONS)  # the last ones, by name
        self.num_operations = 0
        self._fault: tuple[int, BaseException] | None = None
        self._is_lost = False  # a fault struck while the host waited for the device
        self._lock = _LOCK
        self._unseen = Unseen()
        self._streams = Streams(self._lock)
        self._buffers = Buffers()
        self._memory = SimulatedMemory(memory_bytes, self._lock)
        self._queue = CopyQueue(copies, seed, self._unseen, self._lock)
        self._registrations = Registrations(self._lock)
        self._peers: weakref.WeakSet[SimulatedDevice] = weakref.WeakSet()  # that copy from here, or are copied from

    @property
    def label(self) -> str:
        return self.name

    # ---- what tests steer

    def fail_at(self, operation: int, error: BaseException) -> None:
        """Raise `error` at the `operation`-th device operation from now (0 is the next), once."""
        self._fault = (self.num_operations + operation, error)

    def new_stream(self) -> SimulatedStream:
        return self._streams.add()

    @contextlib.contextmanager
    def use_stream(self, stream: SimulatedStream, *, is_ordered: bool = True) -> Iterator[None]:
        """Make `stream` this thread's compute stream, ordered after and before the one it replaces, or by nothing."""
        outer = self._streams.here
        if is_ordered:
            self.wait(stream, self.record(outer))
        self._streams.here = stream
        try:
            yield
        finally:
            self._streams.here = outer
            if is_ordered:
                self.wait(outer, self.record(stream))

    def beside(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        stream = self._streams.here
        own = [type(mode) for mode in DISPATCH_MODES() if self.is_own_mode(mode)]

        @contextlib.contextmanager
        def entered() -> Iterator[None]:
            with contextlib.ExitStack() as modes, self.use_stream(stream, is_ordered=False):
                for kind in own:
                    modes.enter_context(kind(self, self._unseen))
                yield

        return entered

    def is_own_mode(self, mode: object) -> bool:
        return isinstance(mode, Accounting) and mode.watcher is self

    def is_capturing(self) -> bool:
        return False

    def random_state(self) -> torch.Tensor | None:
        return None

    def set_random_state(self, state: torch.Tensor) -> None:
        return None

    def compute(self, ms: float) -> None:
        """Spend simulated time on this thread's compute stream."""
        self._streams.here.time_ms += ms

    def checking(self) -> contextlib.AbstractContextManager[Any]:
        """`accounting`, and every operator of this thread that touches a slot is checked for races."""
        return HappensBefore(self, self._unseen)

    def accounting(self) -> contextlib.AbstractContextManager[Any]:
        """While entered, every storage that an operator of this thread makes takes device memory until it is freed.

        Storages from before are host memory, and so are what the engine makes for itself and what is made by no
        operator (`torch.tensor`, `from_numpy`). May be entered more than once; each storage counts once.
        """
        return Accounting(self, self._unseen)

    def foreign(self, num_bytes: int) -> contextlib.AbstractContextManager[None]:
        """While entered, another library's tensors take `num_bytes` of device memory.

        Raises:
            SimulatedOutOfMemoryError: they do not fit, as in `allocate`.
        """
        return self._memory.foreign(num_bytes)

    # ---- what tests see

    @property
    def time_ms(self) -> float:
        """Simulated time on this thread's compute stream."""
        return self._streams.here.time_ms

    @property
    def memory_bytes(self) -> int:
        """Size of the device."""
        return self._memory.total_bytes

    @property
    def buffer_bytes(self) -> int:
        """Of the engine's buffers."""
        return self._memory.buffer_bytes

    @property
    def peak_buffer_bytes(self) -> int:
        return self._memory.peak_buffer_bytes

    @property
    def num_buffers(self) -> int:
        return len(self._buffers)

    @property
    def registered(self) -> dict[int, int]:
        """Page-locked ranges: number of bytes, by start."""
        return self._registrations.ranges

    @property
    def num_copied_pieces(self) -> int:
        return self._registrations.num_copied

    @property
    def num_pageable_pieces(self) -> int:
        return self._registrations.num_pageable

    def check_host_copy(self, tensor: torch.Tensor) -> bool:
        """Whether a copy from or to a dense host tensor, by whomever, would be one of page-locked memory.

        Raises:
            TransferError: where a GPU answers `invalid argument`.
        """
        return self._registrations.is_locked(tensor)

    # ---- memory

    def total_bytes(self) -> int:
        return self._memory.total_bytes

    def free_bytes(self) -> int:
        return max(0, self._memory.limit_bytes - self._memory.taken_bytes())

    def reserved_bytes(self) -> int:
        return self._memory.taken_bytes()

    def allocated_bytes(self) -> int:
        return self._memory.taken_bytes()

    def peak_reserved_bytes(self) -> int:
        return self._memory.peak_bytes

    def peak_allocated_bytes(self) -> int:
        return self._memory.peak_bytes

    def reset_peaks(self) -> None:
        self._memory.peak_bytes = self._memory.taken_bytes()

    def num_ooms(self) -> int:
        return self._memory.num_ooms

    def context_bytes(self) -> int:
        return 0

    def set_cap(self, num_bytes: int | None, owner: Hashable = None) -> None:
        self._memory.set_cap(num_bytes, owner)

    def grow_segments(self, owner: Hashable, *, is_on: bool) -> None:
        return None  # nothing is cut here: reserved is what is allocated

    def stop_growing(self) -> None:
        return None

    def page_bytes(self) -> int:
        return 0

    def rounded_bytes(self, num_bytes: int) -> int:
        return align(num_bytes)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self._step("allocate")
        rounded = self.rounded_bytes(num_bytes)
        with self._lock, self._unseen.on():
            self._memory.check_room(rounded)
            # Over-allocated by one alignment so that the slot can start on a boundary, as a GPU allocation does.
            raw = torch.empty(rounded + ALIGNMENT_BYTES, dtype=torch.uint8, device="cpu")
            shift = -raw.data_ptr() % ALIGNMENT_BYTES
            buffer = raw[shift : shift + num_bytes]
            if self.is_poisoned:
                buffer.fill_(0xFF)
            self._buffers.add(Buffer(buffer.data_ptr(), num_bytes, self._streams.here))
            self._memory.take_buffer(rounded)
        return buffer

    def free(self, buffer: torch.Tensor) -> None:
        with self._lock:
            known = self._buffers.take(buffer.data_ptr())
            if known is not None:
                if not self._is_lost:
                    check_given_back(known)
                    self._check_unread(buffer)
                self._memory.free_buffer(self.rounded_bytes(known.num_bytes), buffer.untyped_storage())
        self._step("free")

    def count_whole(self, num_bytes: int) -> None:
        self._memory.take_whole(num_bytes)

    def empty_cache(self) -> None:
        """Nothing is cached."""

    # ---- streams

    def compute_stream(self) -> SimulatedStream:
        return self._streams.here

    def stream_number(self) -> int:
        return self._streams.here.number

    def record(self, stream: Any) -> SimulatedEvent:
        self._step("record")
        stream.tick()
        return self._event_of(stream)

    def wait(self, stream: Any, event: Any) -> None:
        self._step("wait")
        if event.device is not None and event.device is not self:
            _run_until([event])
            stream.time_ms = max(stream.time_ms, event.time_ms)  # clocks are each device's own
            return
        if event.copy is not None:
            self._queue.run(until=event.copy)
        stream.follow([event])

    def is_done(self, event: Any) -> bool:
        if event.copy is not None and not event.copy.is_done:
            return False
        self._streams.seen_by_host(event)
        return True

    def synchronize(self) -> None:
        self._is_lost = True
        self._step("synchronize")
        self._is_lost = False
        self._queue.run(until=None)
        self._streams.synchronize()

    def synchronize_event(self, event: Any) -> None:
        if event.copy is not None:
            self._queue.run(until=event.copy)
        self._streams.waited_for_by_host(event)

    # ---- copies

    def reaches(self, other: Device) -> bool:
        if not isinstance(other, SimulatedDevice):
            return False
        self._peers.add(other)
        other._peers.add(self)
        return self._is_within_reach(other)

    def prepare(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, is_locked: bool = True
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(pairs)

    def copy(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Any]) -> SimulatedEvent:
        return self._copy(copies, after, self._streams.copies)

    def copy_beside(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Any]) -> SimulatedEvent:
        return self._copy(copies, after, self._streams.beside)

    def _copy(
        self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Any], stream: SimulatedStream
    ) -> SimulatedEvent:
        self._step("copy")
        with self._lock, engine_tensors(), self._unseen.on():
            elsewhere = [event for event in after if event.device is not self]
            stream.follow(event for event in after if event.device is self)  # clocks are each device's own
            stream.time_ms = max([stream.time_ms, *(event.time_ms for event in elsewhere)])
            stream.tick()
            queued = self._queue.add()
            if elsewhere:
                queued.needs = functools.partial(_run_until, elsewhere)
            try:
                for number, (target, source) in enumerate(copies):
                    if number:
                        self._step("piece", progresses=False)  # what fails here leaves the pairs before on their way
                    is_to_host = self._note_copy(target, source, stream)
                    # What waits for another device may be read there still.
                    if self.is_poisoned and not is_to_host and not (elsewhere and self._is_read_elsewhere(target)):
                        self._poison(target)
                    queued.pairs.append((target, source))
                    stream.time_ms += target.numel() / self._gb_per_s_from(source) / 1e6
            except BaseException:
                self._queue.drop_if_empty(queued)
                raise
            self._queue.progress()
            return self._event_of(stream, queued)

    def record_copies(self) -> SimulatedEvent:
        with self._lock:
            after = SimulatedStream(COPY_STREAM)
            after.follow([stream.event() for stream in self._streams.own])
            return self._event_of(after, self._queue.last)

    def copy_back(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._step("copy_back")
        with engine_tensors():
            target.copy_(source)

    def measure_link(self, target: torch.Tensor, source: torch.Tensor) -> float:
        event = self.copy([(target, source)], [self.record(self._streams.here)])
        self.synchronize_event(event)
        return self._gb_per_s_from(source)

    # ---- packing

    def why_not_packed(self) -> str:
        return ""

    def pack(self, raw: torch.Tensor, word_bytes: int, most_bytes: int) -> tuple[torch.Tensor, PackedLayout] | None:
        self._step("pack")
        with self._lock, engine_tensors(), self._unseen.on():
            return encode(raw.view(torch.int16), word_bytes, most_bytes)

    def prepare_unpack(
        self, wire: torch.Tensor, layout: PackedLayout, target: torch.Tensor
    ) -> tuple[torch.Tensor, PackedLayout, torch.Tensor]:
        return wire, layout, target

    def unpack(
        self, unpacking: tuple[torch.Tensor, PackedLayout, torch.Tensor], after: Sequence[Any]
    ) -> SimulatedEvent:
        self._step("unpack")
        wire, layout, target = unpacking
        with self._lock, engine_tensors(), self._unseen.on():
            stream = self._streams.unpacking
            stream.follow(after)
            stream.tick()
            self._buffers.access(wire, stream)
            self._buffers.overwrite(target, stream)
            if self.is_poisoned:
                self._poison(target)
            queued = self._queue.add()
            queued.decode = functools.partial(decode, wire, layout, target)
            buffer = self._buffers.at(wire.data_ptr())
            if buffer is not None:
                buffer.decoded_by = queued
            stream.time_ms += layout.raw_bytes / self.decode_gb_per_s / 1e6
            self._queue.progress()
            return self._event_of(stream, queued)

    def mark_unpacking(self, after: Sequence[Any]) -> float:
        with self._lock:
            self._streams.unpacking.follow(after)
            return self._streams.unpacking.time_ms

    def unpack_on_host(self, wire: torch.Tensor, layout: PackedLayout, target: torch.Tensor) -> None:
        with self._unseen.on():
            decode(wire, layout, target)

    # ---- times

    def mark(self, stream: Any) -> float:
        return float(stream.time_ms)

    def mark_copies(self, after: Sequence[Any]) -> float:
        with self._lock:
            self._streams.copies.follow(after)
            return self._streams.copies.time_ms

    def elapsed_ms(self, start: Any, end: Any) -> float | None:
        return float(end - start)

    def start_stall(self, stream: Any, event: Any) -> Any:
        return float(event.time_ms - stream.time_ms) if event.time_ms > stream.time_ms else None

    def end_stall(self, stream: Any, marker: Any) -> Any:
        return marker

    def stall_ms(self, marker: Any) -> float | None:
        return float(marker)

    # ---- host memory

    def register(self, address: int, num_bytes: int) -> bool:
        self._step("register")
        if self.refuses_pinning:
            return False
        self._registrations.add(address, num_bytes)
        return True

    def unregister(self, address: int) -> None:
        self._registrations.remove(address, self._queue.sources())
        self._step("unregister")

    def pinned_staging(self, num_bytes: int) -> torch.Tensor | None:
        with self._unseen.on():
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def homes(self) -> contextlib.AbstractContextManager[None]:
        return self._unseen.on()

    # ---- what operators of this thread do, while that is looked at

    def made(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        self._memory.take_results(inputs, outputs, lambda address: self._buffers.at(address) is not None)

    def touched(self, inputs: list[torch.Tensor]) -> None:
        for tensor in inputs:
            self._buffers.access(tensor, self._streams.here)

    # ---- inside

    def _peer_with(self, tensor: torch.Tensor) -> SimulatedDevice | None:
        """The other device in whose memory a tensor is; None: it is in none's."""
        return next((peer for peer in self._peers if peer._buffers.at(tensor.data_ptr()) is not None), None)

    def _gb_per_s_from(self, source: torch.Tensor) -> float:
        return self.link_gb_per_s if self._peer_with(source) is None else self.peer_gb_per_s

    def _note_copy(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> bool:
        """A copy is issued: from the host, from another device, or to the host. Returns whether it is the last."""
        if self._buffers.at(target.data_ptr()) is None and self._buffers.at(source.data_ptr()) is not None:
            self._buffers.access(source, stream)
            return True
        self._buffers.overwrite(target, stream)
        peer = self._peer_with(source)
        if peer is None:
            self._registrations.count_copy(source)
        elif not self._is_within_reach(peer):
            raise TransferError("a copy from another device, which is not within reach")
        return False

    def _is_within_reach(self, peer: SimulatedDevice) -> bool:
        return self.reaches_peers if isinstance(self.reaches_peers, bool) else peer.name in self.reaches_peers

    def _is_read_elsewhere(self, buffer: torch.Tensor) -> bool:
        """Whether a copy from a buffer to another device has not run yet."""
        start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
        return any(
            start <= source.data_ptr() < end
            for peer in self._peers
            if not peer._is_lost
            for source in peer._queue.sources()
        )

    def _check_unread(self, buffer: torch.Tensor) -> None:
        if self._is_read_elsewhere(buffer):
            raise RaceError("memory given back with a copy from it to another device on its way")

    def _poison(self, target: torch.Tensor) -> None:
        """Fill what a copy is queued for with NaN; what is to be decoded from there first is decoded."""
        buffer = self._buffers.at(target.data_ptr())
        if buffer is not None and buffer.decoded_by is not None:
            self._queue.run(until=buffer.decoded_by)
        target.fill_(0xFF)

    def _event_of(self, stream: SimulatedStream, copy: Copy | None = None) -> SimulatedEvent:
        event = stream.event(copy)
        event.device = self
        return event

    def _step(self, name: str, *, progresses: bool = True) -> None:
        """One device operation: faults strike here, and under "random" some queued copies run."""
        number = self.num_operations
        self.num_operations += 1
        self.operations.append(name)
        if self._fault is not None and number >= self._fault[0]:
            error, self._fault = self._fault[1], None
            self._memory.num_ooms += isinstance(error, torch.OutOfMemoryError)
            raise error
        if progresses:
            self._queue.progress()


def _run_until(events: Sequence[SimulatedEvent]) -> None:
    """Have other devices come as far as these events."""
    for event in events:
        if event.copy is not None:
            event.device._queue.run(until=event.copy)
