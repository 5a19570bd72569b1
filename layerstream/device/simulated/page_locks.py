"""The driver's rules for host memory that is page-locked, on the simulated device."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from layerstream.errors import TransferError

PAGE_BYTES = 4096


class Registrations:
    """Ranges that are page-locked.

    Attributes:
        ranges: number of bytes, by start.
        num_copied: tensors whose copies from the host were issued.
        num_pageable: of these, those that were not page-locked.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.ranges: dict[int, int] = {}
        self.num_copied = 0
        self.num_pageable = 0
        self._lock = lock

    def add(self, address: int, num_bytes: int) -> None:
        if address % PAGE_BYTES or num_bytes % PAGE_BYTES:
            raise TransferError(f"registration of {num_bytes} bytes at {address:#x} is not page-aligned")
        with self._lock:
            for start, length in self.ranges.items():
                if start < address + num_bytes and address < start + length:
                    raise TransferError(f"registration of {num_bytes} bytes at {address:#x} overlaps another")
            self.ranges[address] = num_bytes

    def remove(self, address: int, in_flight: Iterable[torch.Tensor]) -> None:
        """Give one up.

        Args:
            in_flight: sources of copies that have not run.
        """
        with self._lock:
            end = address + self.ranges[address]
            if any(address <= source.data_ptr() < end for source in in_flight):
                raise TransferError("host memory unregistered while a copy from it is in flight")
            del self.ranges[address]

    def is_locked(self, tensor: torch.Tensor) -> bool:
        """Whether a copy from or to a dense host tensor, by whomever, would be one of page-locked memory.

        Raises:
            TransferError: it begins in a registration and ends beyond it, in another one or in none, where a GPU
                answers `invalid argument`. One that begins outside is an ordinary copy, whatever it crosses.
        """
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        for start, num_bytes in self.ranges.items():
            if start <= first < start + num_bytes and first < last:
                if last > start + num_bytes:
                    raise TransferError(
                        f"invalid argument: a copy of {last - first} bytes ends {last - start - num_bytes} bytes "
                        "behind the registration it begins in"
                    )
                return True
        return False

    def count_copy(self, source: torch.Tensor) -> None:
        """A copy from a host tensor is issued."""
        self.num_copied += 1
        self.num_pageable += not self.is_locked(source)
