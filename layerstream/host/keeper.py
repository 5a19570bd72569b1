"""Another GPU, in whose memory units have their bytes at home: `offload(pipe, store="cuda:1")`.

From there loads take the way between the two GPUs, NVLink or PCIe, in place of the one from host memory; where they
cannot reach each other, every copy goes through the host (`transfer/route.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from layerstream.device.base import Device, Stream, engine_tensors, synchronize_all
from layerstream.errors import WeightsLostError
from layerstream.finalisers import only_here


class Keeper:
    """One other GPU.

    Attributes:
        device: that GPU.
        name: for people, such as "cuda:1".
        budget_bytes: what the process may reserve there; None: all that is free.
        is_reached: copies from there to the GPU that computes go straight.

    Args:
        target: the GPU that computes.
    """

    def __init__(self, device: Device, budget_bytes: int | None, target: Device) -> None:
        self.device = device
        self.name = device.label
        self.budget_bytes = budget_bytes
        target.stop_growing()  # before the first copy between the two
        self.is_reached = target.reaches(device)
        self._target = target
        self._claim: object = object()  # on the limit, which the process keeps for whoever asked
        self._release = weakref.finalize(self, only_here(_give_back), device, self._claim)
        self._is_held = False
        self._streams: dict[int, Stream] = {}  # that memory goes back to, by its address

    def room_bytes(self) -> int:
        """What may still be taken there within the budget."""
        free = self.device.free_bytes()
        if self.budget_bytes is None:
            return free
        return max(0, min(free, self.budget_bytes - self.device.allocated_bytes()))

    def hold(self) -> None:
        """Hold that GPU's allocator to the budget, until `close`; idempotent."""
        if not self._is_held and self.budget_bytes is not None:
            self.device.set_cap(self.budget_bytes, owner=self._claim)
        self._is_held = True

    def take(self, num_bytes: int) -> torch.Tensor:
        """Memory there: uint8 [num_bytes].

        Raises:
            torch.OutOfMemoryError: that GPU is full, or its budget is.
        """
        with engine_tensors(), self._target.homes():
            stream = self.device.compute_stream()
            buffer = self.device.allocate(num_bytes)
        self._streams[buffer.data_ptr()] = stream
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        """Free what was taken. What comes to lie there next waits for copies from it."""
        try:
            # Copies by this GPU itself, to the host, and those by the GPU that computes: none of them is known to the
            # stream that the memory goes back to.
            stream = self._streams.get(buffer.data_ptr()) or self.device.compute_stream()
            for reader in (self.device, self._target):
                self.device.wait(stream, reader.record_copies())
        except BaseException:
            synchronize_all([self.device, self._target])
            raise
        finally:
            self._streams.pop(buffer.data_ptr(), None)
            self.device.free(buffer)

    def fill(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, is_locked: bool) -> None:
        """Copy (memory here, host memory) pairs, and wait for it, also where it is interrupted.

        Args:
            is_locked: the host memory is page-locked.
        """
        device = self.device
        after = [device.record(device.compute_stream())]
        try:
            with self._target.homes():
                device.synchronize_event(device.copy(device.prepare(pairs, is_locked=is_locked), after))
        except BaseException:  # some of it may be on its way, from pages that are about to be unlocked
            device.synchronize()
            raise

    def fetch(self, source: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """Copy what is here to the host, and wait for it.

        Args:
            target: host memory of the same size; None: new memory.
        Raises:
            WeightsLostError: this GPU has failed.
        """
        with self._target.homes():
            if target is None:
                target = torch.empty(source.numel(), dtype=source.dtype, device="cpu")
            try:
                try:
                    self.device.copy_back(target, source)
                except RuntimeError:  # perhaps of what was issued before: asked once more, a GPU that works gives it
                    self.device.copy_back(target, source)
            except RuntimeError as error:
                raise WeightsLostError(
                    f"weights that were in the memory of {self.name} are lost: it does not give them back ({error}). "
                    "Load the pipeline anew."
                ) from error
        return target

    def close(self) -> None:
        """Give up the limit, and memory that nobody uses."""
        self._is_held = False
        self.device.set_cap(None, owner=self._claim)
        try:
            self._target.synchronize()  # memory that is unmapped must not be read any more, by either GPU
        finally:
            self.device.empty_cache()


def _give_back(device: Device, claim: object) -> None:
    device.set_cap(None, owner=claim)
