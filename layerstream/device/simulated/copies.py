"""Copies, and decoding, that were issued, and when they run, on the simulated device."""

from __future__ import annotations

import random
import threading
from collections import deque
from typing import Literal

import torch

from layerstream.device.base import engine_tensors
from layerstream.device.simulated.accounting import Unseen
from layerstream.device.simulated.streams import Copy

When = Literal["at_once", "late", "random"]


class CopyQueue:
    """Copies on their way, in the order in which they run.

    Attributes:
        last: the copy that was issued last.
    """

    def __init__(self, when: When, seed: int, unseen: Unseen, lock: threading.RLock) -> None:
        self.last: Copy | None = None
        self._when = when
        self._random = random.Random(seed)
        self._queue: deque[Copy] = deque()
        self._unseen = unseen
        self._lock = lock

    def __len__(self) -> int:
        return len(self._queue)

    def add(self) -> Copy:
        """Issue a copy; its pairs are added to it."""
        with self._lock:
            self.last = copy = Copy([])
            self._queue.append(copy)
            return copy

    def drop_if_empty(self, copy: Copy) -> None:
        """It failed. Pairs that were issued before are on their way."""
        with self._lock:
            if not copy.pairs and copy.decode is None:
                self._queue.remove(copy)
                copy.is_done = True

    def sources(self) -> list[torch.Tensor]:
        """What is still read."""
        with self._lock:
            return [source for copy in self._queue for _, source in copy.pairs]

    def progress(self) -> None:
        """Time passes."""
        if self._when == "at_once":
            self.run(until=None)
        elif self._when == "random" and self._queue:
            for _ in range(self._random.randint(0, len(self._queue))):
                self._run_next()

    def run(self, *, until: Copy | None) -> None:
        """Run copies to the one that is waited for; None: all."""
        with self._lock:
            while self._queue and (until is None or not until.is_done):
                self._run_next()

    def _run_next(self) -> None:
        with self._lock, engine_tensors(), self._unseen.on():
            if self._queue:
                copy = self._queue.popleft()
                if copy.needs is not None:
                    copy.needs()
                for target, source in copy.pairs:
                    target.copy_(source)
                if copy.decode is not None:
                    copy.decode()
                # Events that are kept must not look like somebody who looks at the slot.
                copy.pairs, copy.decode, copy.needs = [], None, None
                copy.is_done = True
