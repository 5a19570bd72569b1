"""CUDA (and ROCm) GPUs. With `allocator.py` the only file that names `torch.cuda`."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from layerstream.device.allocator import PAGE_BYTES, GrowingSegments
from layerstream.device.base import COPY_BYTES, Caps, Device, Event, PackedLayout
from layerstream.device.batched_copy import BatchedCopy
from layerstream.device.cuda_packing import CudaPacking, Launch
from layerstream.errors import DeviceError, brief
from layerstream.torch_private import current_raw_stream

_LINK_PROBES = 4  # the fastest counts: one of them may meet other traffic, and a quarter too little was seen
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU of the process
_SEGMENT_BYTES = 2**21  # CUDA's caching allocator takes memory for requests of 10 MiB and more in steps of this


class _Turn:
    """Copies that are queued together.

    Args:
        pairs: (target, source) pairs, at least one, all from one place to one other.
        is_locked: what is of the host in them is page-locked.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], is_locked: bool) -> None:
        self.pairs, self.is_locked = pairs, is_locked
        self.targets = [target.data_ptr() for target, _ in pairs]
        self.sources = [source.data_ptr() for _, source in pairs]
        self.sizes = [target.numel() for target, _ in pairs]
        (target, source), *_ = pairs
        self.kind = f"from {source.device.type} to {target.device.type}"
        self.num_bytes = sum(self.sizes)


def _turns(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, is_locked: bool) -> list[_Turn]:
    """The pairs in turns of `COPY_BYTES` at most, in their order."""
    turns: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    left_bytes = 0
    for target, source in pairs:
        if target.numel() > left_bytes:
            turns.append([])
            left_bytes = COPY_BYTES
        turns[-1].append((target, source))
        left_bytes -= target.numel()
    return [_Turn(turn, is_locked) for turn in turns]


class _CopyStreams:
    """Two streams that take turns with copies, each behind the one before: to the engine, one stream.

    Forwards copy to the device as well (GLM-Image brings its table of rotary frequencies there in every block), and
    the copy engine serves one stream as long as that has anything to do: behind a load of 432 MiB on one stream a
    tensor of 1 MiB arrived after 6.4 ms, which the compute of that block waited for. With loads on two streams in turns
    of 32 MiB it arrives after 0.7 ms, and loads run at 56.8 GB/s in place of 57.0 (H200).
    """

    def __init__(self, torch_device: torch.device) -> None:
        self._streams = torch.cuda.Stream(torch_device), torch.cuda.Stream(torch_device)
        self._turn_ends: list[torch.cuda.Event | None] = [None, None]
        self._number = 0
        self._left_bytes = 0  # of the turn
        self._batched = BatchedCopy.find()

    @property
    def now(self) -> torch.cuda.Stream:
        """Whose turn it is; what is issued on it comes after all copies so far."""
        return self._streams[self._number]

    @property
    def is_batched(self) -> bool:
        """Whether the copies of a turn are one call of the driver."""
        return self._batched is not None and self._batched.can()

    def copy(self, turns: Sequence[_Turn]) -> None:
        """Queue copies, a turn behind the other; small ones share a turn."""
        for turn in turns:
            if turn.num_bytes > self._left_bytes:
                self._next_turn()
            self._left_bytes -= turn.num_bytes
            self.issue(turn, self.now)

    def issue(self, turn: _Turn, stream: torch.cuda.Stream) -> None:
        """Queue copies on a stream of this GPU."""
        batched = self._batched
        if batched is not None and turn.is_locked:
            with self._is_current():
                if not torch.cuda.is_current_stream_capturing() and batched(
                    turn.targets, turn.sources, turn.sizes, stream.cuda_stream, turn.kind
                ):
                    return
        with torch.cuda.stream(stream):
            for target, source in turn.pairs:
                target.copy_(source, non_blocking=True)

    def _is_current(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the streams' GPU is the current one."""
        return _current(self.now.device_index)

    def _next_turn(self) -> None:
        # Recorded anew at each turn: who waits for the one before has been told to by then.
        self._turn_ends[self._number] = done = self._turn_ends[self._number] or torch.cuda.Event()
        done.record(self.now)
        self._number = 1 - self._number
        self.now.wait_event(done)
        self._left_bytes = COPY_BYTES


def _current(index: int) -> contextlib.AbstractContextManager[object]:
    """Inside, this GPU is the current one; cheap where it is already."""
    return _NOTHING if torch.cuda.current_device() == index else torch.cuda.device(index)


_NOTHING = contextlib.nullcontext()
_CAPS: dict[int, Caps] = {}  # of the process, by GPU


class _Thread(threading.local):
    """What a thread has done.

    Attributes:
        contexts: GPUs on which it has launched a kernel.
    """

    def __init__(self) -> None:
        self.contexts: set[int] = set()


_THREAD = _Thread()
_GROWING = GrowingSegments()


class CudaDevice:
    """One CUDA (or ROCm) GPU.

    Source: asynchronous copies need page-locked memory, and events order streams without the host: CUDA C++
    programming guide, "Page-Locked Host Memory" and "Events".
    """

    is_simulated = False
    is_named_apart = True

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self.name = torch.cuda.get_device_name(torch_device)
        self._copies = _CopyStreams(torch_device)
        self._beside: torch.cuda.Stream | None = None  # for copies beside others, once there are any
        self._packing = CudaPacking(torch_device)
        self._cudart: Any = torch.cuda.cudart()

    @property
    def label(self) -> str:
        return str(self.torch_device)

    @property
    def copied_by(self) -> str:
        return "cudaMemcpyBatchAsync" if self._copies.is_batched else "copy_"

    def total_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[1])

    def free_bytes(self) -> int:
        reserved, allocated = self.reserved_bytes(), self.allocated_bytes()
        allowed = round(_fraction_now(self.torch_device) * self.total_bytes())
        return max(0, min(int(torch.cuda.mem_get_info(self.torch_device)[0]) + reserved, allowed) - allocated)

    def reserved_bytes(self) -> int:
        return self._counter("reserved_bytes", "current")

    def allocated_bytes(self) -> int:
        return self._counter("allocated_bytes", "current")

    def peak_reserved_bytes(self) -> int:
        return self._counter("reserved_bytes", "peak")

    def peak_allocated_bytes(self) -> int:
        return self._counter("allocated_bytes", "peak")

    def _counter(self, name: str, which: str) -> int:
        # Once a pass: the usual functions make a sorted dictionary of a hundred entries each time, in 0.3 ms.
        stats: Any = torch.cuda.memory_stats_as_nested_dict(self.torch_device)
        return int(stats[name]["all"][which]) if stats else 0

    def reset_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def num_ooms(self) -> int:
        stats: Any = torch.cuda.memory_stats_as_nested_dict(self.torch_device)
        return int(stats.get("num_ooms", 0))

    def context_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return max(int(total) - int(free) - self.reserved_bytes(), 0)

    def set_cap(self, num_bytes: int | None, owner: Hashable = None) -> None:
        index = self._index
        caps = _CAPS.setdefault(index, Caps())
        caps.set(num_bytes, owner, functools.partial(self._apply_cap, caps))

    def _apply_cap(self, caps: Caps, least: int | None) -> None:
        total = int(torch.cuda.get_device_properties(self.torch_device).total_memory)
        if least is None:
            if caps.before is not None:
                # It was read as bytes / total; set as it is, rounding could lose a byte each time.
                fraction = _fraction(round(caps.before * total), total)
                torch.cuda.set_per_process_memory_fraction(fraction, self.torch_device)
                caps.before = None
            return
        if caps.before is None:
            caps.before = _fraction_now(self.torch_device)
        least = min(least, round(caps.before * total))  # a limit that the user set holds as well
        least = max(0, least - self.page_bytes())  # the allocator compares what is asked for, and takes whole pages
        torch.cuda.set_per_process_memory_fraction(_fraction(least, total), self.torch_device)

    def grow_segments(self, owner: Hashable, *, is_on: bool) -> None:
        if not is_on:
            _GROWING.remove(owner)
        elif self._may_grow():
            _GROWING.add(owner)

    def _may_grow(self) -> bool:
        """Whether torch keeps such memory safe.

        Before it unmaps what has grown, on whichever GPU that is, it waits for the default stream of the current GPU
        and for nothing else (PyTorch issue 196258): where another one is current, memory is unmapped that queued
        kernels use, which ends in "unspecified launch failure".
        """
        return torch.cuda.current_device() == self._index

    def stop_growing(self) -> None:
        if _GROWING.forbid():
            self.empty_cache()  # what has grown and nobody uses goes now, before two GPUs work on it

    @property
    def _index(self) -> int:
        index = self.torch_device.index
        return torch.cuda.current_device() if index is None else index

    def page_bytes(self) -> int:
        return PAGE_BYTES if _GROWING.is_on else 0

    def rounded_bytes(self, num_bytes: int) -> int:
        # Requests under 10 MiB share segments of 20 MiB, those under 1 MiB of 2 MiB: they may add more, or nothing.
        return -(-num_bytes // _SEGMENT_BYTES) * _SEGMENT_BYTES

    def allocate(self, num_bytes: int) -> torch.Tensor:
        with _GROWING.off():
            rounded = torch.empty(self.rounded_bytes(num_bytes), dtype=torch.uint8, device=self.torch_device)
        return rounded[:num_bytes]

    def free(self, buffer: torch.Tensor) -> None:
        # Only references keep it: a buffer that user code still looks at lives until that reference goes.
        if _GROWING.is_forbidden:
            _wait_for_all_gpus()  # the next to empty torch's cache may be somebody else
        del buffer

    def count_whole(self, num_bytes: int) -> None:
        return None

    def compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.torch_device)

    def stream_number(self) -> int:
        index = self.torch_device.index
        return int(current_raw_stream(torch.cuda.current_device() if index is None else index))

    def beside(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        index, stream = torch.cuda.current_device(), torch.cuda.current_stream(self.torch_device)

        @contextlib.contextmanager
        def entered() -> Iterator[None]:
            # The stream first: entering it makes its GPU the current one.
            with torch.cuda.stream(stream), torch.cuda.device(index):
                if self._index not in _THREAD.contexts:
                    # cuBLAS warns in a thread whose first call it is: a kernel makes the context current.
                    torch.zeros(1, device=self.torch_device)
                    _THREAD.contexts.add(self._index)
                yield

        return entered

    def is_own_mode(self, mode: object) -> bool:
        return False

    def is_capturing(self) -> bool:
        with _current(self._index):
            return torch.cuda.is_current_stream_capturing()

    def random_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self.torch_device)

    def set_random_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state, self.torch_device)

    def record(self, stream: Any) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def is_done(self, event: Any) -> bool:
        return bool(event.query())

    def reaches(self, other: Device) -> bool:
        if not isinstance(other, CudaDevice):
            return False
        here, there = self.torch_device, other.torch_device
        if not all(torch.cuda.can_device_access_peer(*way) for way in ((here, there), (there, here))):
            return False
        # Torch opens a way at the first copy of its own, each direction by itself. Before that the driver copies
        # through the host, which waits: 37 in place of 390 GB/s (two H200s).
        mine, its = torch.empty(1, device=here), torch.empty(1, device=there)
        mine.copy_(its)
        its.copy_(mine)
        for place in (here, there):
            torch.cuda.synchronize(place)
        return True

    def prepare(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, is_locked: bool = True) -> list[_Turn]:
        return _turns(pairs, is_locked=is_locked)

    def copy(self, copies: list[_Turn], after: Sequence[Event]) -> torch.cuda.Event:
        for event in after:
            self._copies.now.wait_event(event)
        self._copies.copy(copies)
        return self.record(self._copies.now)

    def copy_beside(self, copies: list[_Turn], after: Sequence[Event]) -> torch.cuda.Event:
        stream = self._beside = self._beside or torch.cuda.Stream(self.torch_device)
        for event in after:
            stream.wait_event(event)
        for turn in copies:
            self._copies.issue(turn, stream)
        return self.record(stream)

    def record_copies(self) -> torch.cuda.Event:
        if self._beside is not None:
            self._copies.now.wait_event(self.record(self._beside))
        return self._packing.behind(self.record(self._copies.now))

    def copy_back(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.device(self.torch_device):
            torch.cuda.current_stream().synchronize()
            target.copy_(source)

    def why_not_packed(self) -> str:
        return self._packing.why_not

    def pack(self, raw: torch.Tensor, word_bytes: int, most_bytes: int) -> tuple[torch.Tensor, PackedLayout] | None:
        return self._packing.pack(raw, word_bytes, most_bytes)

    def prepare_unpack(self, wire: torch.Tensor, layout: PackedLayout, target: torch.Tensor) -> Launch:
        return self._packing.prepare(wire, layout, target)

    def unpack(self, unpacking: Launch, after: Sequence[Event]) -> torch.cuda.Event:
        return self._packing.unpack(unpacking, after)

    def mark_unpacking(self, after: Sequence[Event]) -> torch.cuda.Event:
        return self._packing.mark(after)

    def unpack_on_host(self, wire: torch.Tensor, layout: PackedLayout, target: torch.Tensor) -> None:
        self._packing.unpack_on_host(wire, layout, target)

    def mark(self, stream: Any) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def mark_copies(self, after: Sequence[Event]) -> torch.cuda.Event:
        for event in after:
            self._copies.now.wait_event(event)
        return self.mark(self._copies.now)

    def elapsed_ms(self, start: Any, end: Any) -> float | None:
        return float(start.elapsed_time(end)) if start.query() and end.query() else None

    def measure_link(self, target: torch.Tensor, source: torch.Tensor) -> float:
        stream = self._copies.now
        # The allocator may have handed out memory that queued compute still reads.
        stream.wait_event(self.record(self.compute_stream()))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)  # to warm up: it also waits for the compute above
            marks = [self.mark(stream)]
            for _ in range(_LINK_PROBES):
                target.copy_(source, non_blocking=True)
                marks.append(self.mark(stream))
        marks[-1].synchronize()
        best_ms = min(float(start.elapsed_time(end)) for start, end in pairwise(marks))
        return target.numel() * target.element_size() / best_ms / 1e6

    def start_stall(self, stream: Any, event: Any) -> Any:
        if event.query():
            return None  # the load is there already: nothing to wait for, nothing to time
        return self.mark(stream)

    def end_stall(self, stream: Any, marker: Any) -> Any:
        return marker, self.mark(stream)

    def stall_ms(self, marker: Any) -> float | None:
        return self.elapsed_ms(*marker)

    def register(self, address: int, num_bytes: int) -> bool:
        # The runtime sets the device per thread, and registering may run in a pool of threads.
        with torch.cuda.device(self.torch_device):
            error = int(self._cudart.cudaHostRegister(address, num_bytes, _PORTABLE))
            if error:
                self._clear_sticky_error()
        return error == 0

    def unregister(self, address: int) -> None:
        with torch.cuda.device(self.torch_device):
            if int(self._cudart.cudaHostUnregister(address)):
                self._clear_sticky_error()

    def pinned_staging(self, num_bytes: int) -> torch.Tensor | None:
        with torch.cuda.device(self.torch_device):
            try:
                return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError:
                self._clear_sticky_error()
                return None

    def _clear_sticky_error(self) -> None:
        """Take back the error a refused pin leaves behind, or the next CUDA call reports it as its own.

        torch has no binding for cudaGetLastError; the next checked call would raise it, so one is made here, on this
        GPU: on another it would make a context.
        """
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self.torch_device).add_(1)

    def homes(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def synchronize_event(self, event: Any) -> None:
        event.synchronize()

    def empty_cache(self) -> None:
        # That is of all GPUs. Of what has grown none is waited for but the current one: see `_may_grow`.
        with torch.cuda.device(self._index):
            if _GROWING.may_have_grown or _GROWING.is_forbidden:
                _wait_for_all_gpus()
            torch.cuda.empty_cache()


def _wait_for_all_gpus() -> None:
    """Before memory is unmapped that another GPU may write to or read.

    Freeing waits for the GPU whose memory it is, and a copy between two may be carried out by the other one: where
    phase changes waited for one GPU alone, its copy engine wrote to what was unmapped (Xid 31, "MMU Fault: ENGINE CE4,
    ACCESS_TYPE_VIRT_WRITE", two H200s), and "unspecified launch failure" ended all of the process.
    """
    for index in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(index):
            torch.cuda.synchronize(index)


def _fraction_now(device: torch.device) -> float:
    """What the allocator may take. Older torch cannot say; 1.0 is what it is unless somebody set it."""
    read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if read is None else float(read(device))


def _fraction(num_bytes: int, total_bytes: int) -> float:
    """The largest fraction that allows no more than `num_bytes`, where the allocator takes int(fraction * total)."""
    if num_bytes >= total_bytes:
        return 1.0
    nearest = num_bytes / total_bytes
    candidates = (math.nextafter(nearest, 1.0), nearest, math.nextafter(nearest, 0.0))
    return next(f for f in candidates if int(f * total_bytes) <= num_bytes)


def find_device(device: torch.device | str | int | None) -> torch.device:
    """The torch device to stream to; without an argument CUDA's current one, or the CPU (simulated).

    Raises:
        DeviceError: it does not exist here, or is of a kind that cannot be streamed to.
    """
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, ValueError) as exc:
        raise DeviceError(
            f'device {brief(device)} is not a device. Write "cuda", "cuda:1" or "cpu" (simulated).'
        ) from exc
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise DeviceError(
            f'device "{found}" cannot be streamed to: only CUDA or ROCm GPUs ("cuda:0"), and "cpu" to simulate one.'
        )
    if not torch.cuda.is_available():
        raise DeviceError(f'device "{found}" does not exist: torch sees no GPU here. Use device="cpu" to simulate one.')
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= count:
        raise DeviceError(f'device "{found}" does not exist: torch sees {count} GPU(s), cuda:0 to cuda:{count - 1}.')
    return torch.device("cuda", index)
