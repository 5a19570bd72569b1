"""What the engine asks of a device, and the CUDA one. The only file that names `torch.cuda`.

The engine knows two kinds of stream: the *compute* stream, which is the current stream of the calling
thread, read anew each time, and one *copy* stream per device object. It orders them by events only.

[Note: who waits for whom]
1. A copy into a slot waits for the events of the slot's last readers (`copy(..., after=events)`).
2. Compute waits for the event that `copy` returned before it reads the slot (`wait`).
3. Readers' events are recorded when the slot is taken from its block, after its parameters were made
   absent: whatever was issued before is covered, and nothing can be issued after.
The host waits for the device only in `synchronize`, at enter and exit, and when a tensor is written back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch

from layerstream.errors import DeviceError

Stream = Hashable  # a compute stream: equal when it is the same stream
Event = Any  # a point on a stream, made by `record` or `copy`


class Device(Protocol):
    """The seam between engine and hardware. `simulated.SimulatedDevice` is the other implementation."""

    torch_device: torch.device
    name: str
    is_simulated: bool

    def total_bytes(self) -> int:
        """The device's whole memory."""

    def free_bytes(self) -> int:
        """Memory that this process may still take: free on the device, or cached by the allocator."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """A uint8 buffer of `num_bytes` on the device, contents undefined, 256-byte aligned."""

    def free(self, buffer: torch.Tensor) -> None:
        """The engine is done with a buffer; copies into it have been waited for."""

    def compute_stream(self) -> Stream:
        """The current stream of the calling thread."""

    def record(self, stream: Stream) -> Event:
        """An event after everything issued on `stream` so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Everything issued on `stream` from now on runs after `event`; does not block the host."""

    def is_done(self, event: Event) -> bool:
        """Whether the device has passed the event."""

    def copy(self, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event]) -> Event:
        """Start copying (device view, host view) pairs on the copy stream once `after` have passed.

        Does not block the host when the host views are registered. Returns the event after the last piece.
        """

    def copy_back(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a device tensor to a host one after all issued compute, and wait for it."""

    def start_stall(self, stream: Stream, event: Event) -> Any:
        """A marker before `wait`, to time what the wait costs; None where nothing will be measured."""

    def stall_ms(self, marker: Any) -> float | None:
        """What the wait begun at `marker` cost, or None while the device has not passed it."""

    def end_stall(self, stream: Stream, marker: Any) -> Any:
        """Close the marker after `wait`."""

    def register(self, address: int, num_bytes: int) -> bool:
        """Page-lock a range of host memory; False if it is refused. Page-aligned; leaves no sticky error."""

    def unregister(self, address: int) -> None:
        """Undo `register`. No copy may be in flight."""

    def pinned_staging(self, num_bytes: int) -> torch.Tensor | None:
        """A small page-locked buffer, or None if that is refused too."""

    def synchronize(self) -> None:
        """Block the host until the device is idle."""

    def synchronize_event(self, event: Event) -> None:
        """Block the host until the device has passed `event`."""

    def empty_cache(self) -> None:
        """Give cached memory that nobody uses back to the device."""


@contextlib.contextmanager
def engine_tensors() -> Iterator[None]:
    """Make and copy engine tensors as ordinary tensors, whatever mode the caller is in.

    A slot made under the user's `inference_mode` would be an inference tensor, and the next call under
    `no_grad` would fail to write it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class CudaDevice:
    """One CUDA (or ROCm) GPU.

    Source: asynchronous copies need page-locked memory, and events order streams without the host: CUDA C++
    programming guide, "Page-Locked Host Memory" and "Events".
    """

    is_simulated = False

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self.name = torch.cuda.get_device_name(torch_device)
        self._copy_stream = torch.cuda.Stream(torch_device)
        self._cudart: Any = torch.cuda.cudart()

    def total_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[1])

    def free_bytes(self) -> int:
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(torch.cuda.mem_get_info(self.torch_device)[0]) + cached

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def free(self, buffer: torch.Tensor) -> None:
        # Only references keep it: a buffer that user code still looks at lives until that reference goes.
        del buffer

    def compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.torch_device)

    def record(self, stream: Any) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def is_done(self, event: Any) -> bool:
        return bool(event.query())

    def copy(self, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event]) -> torch.cuda.Event:
        stream = self._copy_stream
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            for target, source in pieces:
                target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()
        done.record(stream)
        return done

    def copy_back(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.device(self.torch_device):
            torch.cuda.current_stream().synchronize()
            target.copy_(source)

    def start_stall(self, stream: Any, event: Any) -> Any:
        if event.query():
            return None  # the load is there already: nothing to wait for, nothing to time
        before = torch.cuda.Event(enable_timing=True)
        before.record(stream)
        return before

    def end_stall(self, stream: Any, marker: Any) -> Any:
        after = torch.cuda.Event(enable_timing=True)
        after.record(stream)
        return marker, after

    def stall_ms(self, marker: Any) -> float | None:
        before, after = marker
        return float(before.elapsed_time(after)) if after.query() else None

    def register(self, address: int, num_bytes: int) -> bool:
        # The runtime sets the device per thread, and registering may run in a pool of threads.
        with torch.cuda.device(self.torch_device):
            error = int(self._cudart.cudaHostRegister(address, num_bytes, 0))
        if error:
            _clear_sticky_error()
        return error == 0

    def unregister(self, address: int) -> None:
        if int(self._cudart.cudaHostUnregister(address)):
            _clear_sticky_error()

    def pinned_staging(self, num_bytes: int) -> torch.Tensor | None:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:
            _clear_sticky_error()
            return None

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def synchronize_event(self, event: Any) -> None:
        event.synchronize()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()


def _clear_sticky_error() -> None:
    """Take back the error a refused pin leaves behind, or the next CUDA call reports it as its own.

    torch has no binding for cudaGetLastError; the next checked call would raise it, so one is made here.
    """
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device="cuda").add_(1)


def find_device(device: torch.device | str | int | None) -> torch.device:
    """The torch device to stream to; without an argument CUDA's current one, or the CPU (simulated).

    Raises:
        DeviceError: it does not exist here, or is of a kind that cannot be streamed to.
    """
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as exc:
        raise DeviceError(f'device {device!r} is not a device. Write "cuda", "cuda:1" or "cpu" (simulated).') from exc
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
