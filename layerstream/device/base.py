"""What the engine asks of a device.

The engine knows two kinds of stream: the *compute* stream, which is the current stream of the calling
thread, read anew each time, and one *copy* stream per device object. It orders them by events only. (On a GPU the copy
stream is two that take turns, in one order: see `cuda._CopyStreams`.) What is packed is decoded on a third.

[Note: who waits for whom]
1. A copy into a slot waits for the events of the slot's last readers (`copy(..., after=events)`). Of what is packed,
   the copy into a wire buffer waits for the decoding that read it last, and the decoding for both.
2. Compute waits for the event that `copy` returned before it reads the slot (`wait`).
3. Readers' events are recorded when the slot is taken from its block, after its parameters were made
   absent, on the streams that waited and on this thread's: whatever was issued there before is covered, and nothing
   can be issued after.
The host waits for the device only in `synchronize`, at enter and exit, and when a tensor is written back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from layerstream.finalisers import FinaliserLock

Stream = Hashable  # a compute stream: equal when it is the same stream
Event = Any  # a point on a stream, made by `record` or `copy`
Copies = Any  # what `prepare` has made of pairs of device and host views
PackedLayout = Any  # how packed bytes are decoded; plain numbers
Unpacking = Any  # what `prepare_unpack` has made of two buffers

# A tensor is copied in parts of this at most, which run at full speed, so that copies by others get their turn.
COPY_BYTES = 2**25


class DeviceMemory(Protocol):
    """What a device has of memory, and who may take how much of it."""

    def total_bytes(self) -> int:
        """The device's whole memory."""

    def free_bytes(self) -> int:
        """Memory that this process may still take: free on the device, or cached by the allocator, within its limit."""

    def reserved_bytes(self) -> int:
        """What this process' allocator holds on the device now, cached blocks included; does not block the host."""

    def allocated_bytes(self) -> int:
        """What live tensors take now, the engine's and all others; does not block the host."""

    def peak_reserved_bytes(self) -> int:
        """The most `reserved_bytes` there were since the last `reset_peaks`."""

    def peak_allocated_bytes(self) -> int:
        """The most `allocated_bytes` there were since the last `reset_peaks`."""

    def reset_peaks(self) -> None:
        """Let both peaks start again from what is held now. The counters are the process', not the engine's own."""

    def num_ooms(self) -> int:
        """Out-of-memory errors the allocator has raised so far, those that an operator swallowed included.

        An operator that cannot have its workspace may fall back to another algorithm without a word, and the bits
        of its result with it.
        """

    def context_bytes(self) -> int:
        """Device memory in use outside torch's allocator in this process, and by all others."""

    def set_cap(self, num_bytes: int | None, owner: Hashable = None) -> None:
        """From now on the allocator refuses to reserve beyond `num_bytes`; does not block the host.

        What is reserved already stays. Cached blocks are given back before a request is refused.

        Args:
            num_bytes: bytes of reserved memory, all tensors of the process included; more than there is means all
                there is. None: `owner` asks for no cap any more.
            owner: whose cap this is. The smallest of all owners' holds; without any, what was set before the first.

        Finalisers take caps back: that must not wait for a lock.
        """

    def grow_segments(self, owner: Hashable, *, is_on: bool) -> None:
        """Until `owner` is done, let what is not the engine's have memory that grows by pages, where that is possible.

        What many tensors of unlike sizes reserve is then little more than what they take together.
        """

    def stop_growing(self) -> None:
        """Another device works with this one: from now on such memory grows nowhere in this process. Blocks the host,
        the first time."""

    def page_bytes(self) -> int:
        """By what such memory grows now; 0 where it does not. Caps count it as taken, because it comes whole."""

    def rounded_bytes(self, num_bytes: int) -> int:
        """What an engine buffer of `num_bytes` adds to `reserved_bytes` when no cached block serves it."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """A uint8 buffer of `num_bytes` on the device, contents undefined, 256-byte aligned.

        Its storage has `rounded_bytes(num_bytes)`, so that nothing else comes to lie in the rest.

        Raises:
            torch.OutOfMemoryError: the device is full, or the cap is reached.
        """

    def free(self, buffer: torch.Tensor) -> None:
        """The engine is done with a buffer; copies into it have been waited for.

        Its memory comes back with the last reference to it, those of the caller included.
        """

    def count_whole(self, num_bytes: int) -> None:
        """So much more (or less) of the device is taken by weights that were brought there as they are; a GPU's
        allocator knows, a simulated device does not."""

    def empty_cache(self) -> None:
        """Give cached memory that nobody uses back to the device."""


class Streams(Protocol):
    """Compute streams, the events that order them, and how long what was issued takes."""

    def compute_stream(self) -> Stream:
        """The current stream of the calling thread."""

    def stream_number(self) -> int:
        """The current stream of the calling thread as a number, for comparing: cheap enough to ask at each block."""

    def beside(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        """What another thread enters to issue its work as if it were this one's: on the same device and stream. The
        two must take turns."""

    def is_own_mode(self, mode: object) -> bool:
        """Whether a dispatch mode is this device's, which `beside` has the other thread enter, too."""

    def is_capturing(self) -> bool:
        """Whether what is issued now goes into a graph, to be run later."""

    def random_state(self) -> torch.Tensor | None:
        """Of the device's own default generator; None: it has none."""

    def set_random_state(self, state: torch.Tensor) -> None:
        """Go back to what `random_state` gave."""

    def record(self, stream: Stream) -> Event:
        """An event after everything issued on `stream` so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Everything issued on `stream` from now on runs after `event`; does not block the host."""

    def is_done(self, event: Event) -> bool:
        """Whether the device has passed the event."""

    def mark(self, stream: Stream) -> Any:
        """A point in time on a compute stream, after everything issued on it so far; does not block the host."""

    def elapsed_ms(self, start: Any, end: Any) -> float | None:
        """Device time from one mark to a later one, or None while the device has not passed `end`; never blocks."""

    def start_stall(self, stream: Stream, event: Event) -> Any:
        """A marker before `wait`, to time what the wait costs; None where nothing will be measured."""

    def stall_ms(self, marker: Any) -> float | None:
        """What the wait begun at `marker` cost, or None while the device has not passed it."""

    def end_stall(self, stream: Stream, marker: Any) -> Any:
        """Close the marker after `wait`."""

    def synchronize(self) -> None:
        """Block the host until the device is idle."""

    def synchronize_event(self, event: Event) -> None:
        """Block the host until the device has passed `event`."""


class CopyEngine(Protocol):
    """Copies between host and device, and from other devices. They run on one copy stream, beside compute, but for
    what is asked to run beside them."""

    @property
    def copied_by(self) -> str:
        """The call by which page-locked memory is copied to the device, for people; "": nothing to be told."""

    def prepare(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, is_locked: bool = True) -> Copies:
        """What `copy` needs to copy (target, source) pairs, of `COPY_BYTES` at most; made once, used often. One of each
        is this device's memory, the other host memory or, as a source, that of another device.

        Args:
            is_locked: the host views are registered.
        """

    def reaches(self, other: Device) -> bool:
        """Whether copies from another device's memory go there straight; opens the way. Blocks the host."""

    def copy(self, copies: Copies, after: Sequence[Event]) -> Event:
        """Start copying on the copy stream once `after` have passed.

        Does not block the host when the host views are registered, and other devices within reach.

        Args:
            after: events of this device, or of another.
        Returns: the event after the last piece.
        """

    def copy_beside(self, copies: Copies, after: Sequence[Event]) -> Event:
        """The same on another copy stream: from another device, while other copies keep the link to the host busy."""

    def record_copies(self) -> Event:
        """An event after all copies and decoding issued so far, those of a call that failed half-way included."""

    def mark_copies(self, after: Sequence[Event]) -> Any:
        """A point in time on the copy stream, after all copies issued so far and after these events; what is copied
        from now on comes after it. Does not block the host."""

    def copy_back(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a device tensor to a host one after all issued compute, and wait for it."""

    def measure_link(self, target: torch.Tensor, source: torch.Tensor) -> float:
        """How fast the copy stream is, in GB/s (10^9 bytes), by the fastest of a few copies; blocks the host meanwhile.

        Args:
            target: device view, overwritten; this thread's compute that was issued before may still read it.
            source: page-locked host view of the same size; a few tens of MiB are enough for full speed.
        """


class Unpacker(Protocol):
    """Packs bytes on the device, and decodes them on a stream of its own, beside compute."""

    def why_not_packed(self) -> str:
        """Why nothing can be packed or decoded here; "": it can. The first time it takes seconds: kernels are made."""

    def pack(self, raw: torch.Tensor, word_bytes: int, most_bytes: int) -> tuple[torch.Tensor, PackedLayout] | None:
        """Pack a device buffer (uint8 [a multiple of 256]) that this thread's compute has filled; blocks the host.

        Args:
            word_bytes: 2, of words of 16 bits; 4, of 32, whose low halves must be zero.
        Returns: what it is in fewer bytes (uint8, on the device), and how that is decoded; None: it would be more than
            `most_bytes`.
        """

    def prepare_unpack(self, wire: torch.Tensor, layout: PackedLayout, target: torch.Tensor) -> Unpacking:
        """What `unpack` needs to decode one device buffer into another; made once, used often. It keeps neither alive,
        and adds nobody who looks at the target's memory."""

    def unpack(self, unpacking: Unpacking, after: Sequence[Event]) -> Event:
        """Start decoding once `after` have passed, the copy to the wire buffer among them; does not block the host.

        Returns: the event after it.
        """

    def mark_unpacking(self, after: Sequence[Event]) -> Any:
        """A point in time on the stream that decodes, after all decoding issued so far and after these events; what is
        decoded from now on comes after it. Does not block the host."""

    def unpack_on_host(self, wire: torch.Tensor, layout: PackedLayout, target: torch.Tensor) -> None:
        """Decode host memory into host memory; touches no device."""


class HostLocks(Protocol):
    """Page locks, and host memory that has them."""

    def register(self, address: int, num_bytes: int) -> bool:
        """Page-lock a range of host memory; False if it is refused. Page-aligned; leaves no sticky error."""

    def unregister(self, address: int) -> None:
        """Undo `register`. No copy may be in flight."""

    def pinned_staging(self, num_bytes: int) -> torch.Tensor | None:
        """A small page-locked buffer, or None if that is refused too."""

    def homes(self) -> contextlib.AbstractContextManager[None]:
        """Inside, tensors are made that take no memory of this device: for weights that go back to where they came
        from, or to another device."""


@runtime_checkable
class Device(DeviceMemory, Streams, CopyEngine, Unpacker, HostLocks, Protocol):
    """The seam between engine and hardware. `simulated.SimulatedDevice` is the other implementation."""

    torch_device: torch.device
    name: str  # of its kind: two GPUs of a host may have the same
    is_simulated: bool
    is_named_apart: bool  # whether `torch_device` and host memory have different names to torch

    @property
    def label(self) -> str:
        """Which one it is, for people: "cuda:1"."""


def synchronize_all(devices: Iterable[Device]) -> None:
    """Block the host until all these devices are idle; one that fails does not keep the others from being waited for.

    Raises:
        What a device that has failed does.
    """
    with contextlib.ExitStack() as each:
        for device in devices:
            each.callback(device.synchronize)


def engine_tensors() -> contextlib.AbstractContextManager[None]:
    """Make and copy engine tensors as ordinary tensors, whatever mode the caller is in.

    A slot made under the user's `inference_mode` would be an inference tensor, and the next call under
    `no_grad` would fail to write it.
    """
    is_ordinary = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return _NOTHING if is_ordinary else _ordinary_mode()  # blocks enter it several times each


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _ordinary_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class Caps:
    """The caps on one device's memory, by owner: streamers may end in any order."""

    def __init__(self) -> None:
        self._lock = FinaliserLock()
        self._bytes: dict[Hashable, int] = {}
        self.before: float | None = None  # what was set before there were any, in the allocator's own terms

    def set(self, num_bytes: int | None, owner: Hashable, apply: Callable[[int | None], object]) -> None:
        """Note an owner's cap, or forget it (None; finalisers do, too), and have the one that holds now applied."""
        if num_bytes is None:
            self._lock.when_free(functools.partial(self._forget, owner, apply))
            return
        with self._lock.held():
            self._bytes[owner] = num_bytes
            apply(min(self._bytes.values()))

    def _forget(self, owner: Hashable, apply: Callable[[int | None], object]) -> None:
        self._bytes.pop(owner, None)
        apply(min(self._bytes.values(), default=None))
