"""What takes memory of the simulated device, and how much there is."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

from layerstream.device.base import Caps


class SimulatedOutOfMemoryError(torch.OutOfMemoryError):
    """The simulated device's memory is full, or its cap is reached."""


class SimulatedMemory:
    """Buffers of the engine, activations, weights that are there as they are, and what others have.

    Attributes:
        total_bytes: of the device.
        buffer_bytes: of the engine's buffers.
        peak_bytes: the most that was taken since it was last set.
        num_ooms: how often more was asked for than there was.
    """

    def __init__(self, total_bytes: int, lock: threading.RLock) -> None:
        self.total_bytes = total_bytes
        self.buffer_bytes = 0
        self.peak_buffer_bytes = 0
        self.peak_bytes = 0
        self.num_ooms = 0
        self.activations = Activations()
        self._foreign_bytes = 0
        self._whole_bytes = 0
        self._caps = Caps()
        self._cap_bytes: int | None = None
        self._lock = lock

    def taken_bytes(self) -> int:
        with self._lock:
            return self.buffer_bytes + self._foreign_bytes + self._whole_bytes + self.activations.num_bytes()

    @property
    def limit_bytes(self) -> int:
        """What may be taken: all there is, or what the cap allows."""
        return self.total_bytes if self._cap_bytes is None else min(self.total_bytes, self._cap_bytes)

    def set_cap(self, num_bytes: int | None, owner: Hashable) -> None:
        self._caps.set(num_bytes, owner, self._apply_cap)

    def _apply_cap(self, least: int | None) -> None:
        self._cap_bytes = least

    def check_room(self, num_bytes: int) -> None:
        """Whether so much more fits, and the peak with it; call under the lock, and take it under the same.

        Raises:
            SimulatedOutOfMemoryError: it does not.
        """
        taken = self.taken_bytes()
        limit = self.limit_bytes
        if num_bytes and taken + num_bytes > limit:
            self.num_ooms += 1
            kind = "" if limit == self.total_bytes else f" that the cap allows of {self.total_bytes}"
            raise SimulatedOutOfMemoryError(
                f"simulated device: {num_bytes} bytes asked for, {max(limit - taken, 0)} of {limit}{kind} free "
                f"(buffers {self.buffer_bytes}, activations {self.activations.num_bytes()}, "
                f"whole {self._whole_bytes}, foreign {self._foreign_bytes}); {taken} bytes is allocated"
            )
        self.peak_bytes = max(self.peak_bytes, taken + num_bytes)

    # ---- who takes it

    def take_buffer(self, num_bytes: int) -> None:
        self.buffer_bytes += num_bytes
        self.peak_buffer_bytes = max(self.peak_buffer_bytes, self.buffer_bytes)

    def free_buffer(self, num_bytes: int, storage: torch.UntypedStorage) -> None:
        """It takes memory as long as somebody looks at its storage."""
        self.buffer_bytes -= num_bytes
        self.activations.count(storage, num_bytes)

    def take_whole(self, num_bytes: int) -> None:
        """Weights come to the device as they are, or leave it (negative)."""
        with self._lock:
            self.check_room(max(0, num_bytes))
            self._whole_bytes += num_bytes

    @contextlib.contextmanager
    def foreign(self, num_bytes: int) -> Iterator[None]:
        """While entered, another library's tensors are there."""
        with self._lock:
            self.check_room(num_bytes)
            self._foreign_bytes += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._foreign_bytes -= num_bytes

    def take_results(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], is_buffer: Callable[[int], bool]
    ) -> None:
        """An operator made `outputs` of `inputs`: what is new of them takes memory, all of it or nothing.

        Args:
            is_buffer: whether an address lies in a buffer of the engine.
        """
        with self._lock:
            given = {t.untyped_storage() for t in inputs}
            new: dict[torch.UntypedStorage, int] = {}
            for tensor in outputs:
                storage = tensor.untyped_storage()
                if self.activations.knows(storage):
                    if growth := self.activations.growth(storage):
                        new[storage] = growth
                elif storage not in given and not is_buffer(tensor.data_ptr()):
                    new[storage] = storage.nbytes()
            if new:
                self.check_room(sum(new.values()))
                for storage, num_bytes in new.items():
                    self.activations.count(storage, num_bytes)


class Activations:
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

    def __len__(self) -> int:
        return len(self._counted)

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
