"""Streams of the simulated device: what happens before what, and when.

Source: vector clocks for race detection: Flanagan and Freund, "FastTrack", PLDI 2009.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

# The numbers of those that copies, decoding, and copies beside others run on; compute streams have others.
COPY_STREAM, UNPACK_STREAM, BESIDE_STREAM = 0, -1, -2

Clock = dict[int, int]  # by the number of a stream: how many of its operations happen before


@dataclass(eq=False)
class Copy:
    """One copy on its way: pairs of targets and sources; or decoding, which is a call.

    Attributes:
        needs: has run what this one waits for on other devices.
    """

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    is_done: bool = False
    decode: Callable[[], object] | None = None
    needs: Callable[[], object] | None = None


@dataclass(eq=False)
class SimulatedEvent:
    """A point on a stream.

    Attributes:
        copy: that it follows, when it lies on the stream of copies or of decoding.
        device: on which it is; None: it is no one's but the streams' here.
    """

    clock: Clock
    time_ms: float
    copy: Copy | None = None
    device: Any = None


@dataclass(eq=False)
class SimulatedStream:
    """One stream: its vector clock says which operations of other streams it has waited for."""

    number: int
    clock: Clock = field(default_factory=dict)
    time_ms: float = 0.0

    def tick(self) -> int:
        """One more operation; returns how many there were."""
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return self.clock[self.number]

    def num_seen(self, number: int) -> int:
        """How many operations of another stream happen before what comes next on this one."""
        return self.clock.get(number, 0)

    def follow(self, events: Iterable[SimulatedEvent]) -> None:
        """What comes next happens after all of these."""
        for event in events:
            merge(self.clock, event.clock)
            self.time_ms = max(self.time_ms, event.time_ms)

    def event(self, copy: Copy | None = None) -> SimulatedEvent:
        """What has been issued so far."""
        return SimulatedEvent(dict(self.clock), self.time_ms, copy)


def merge(clock: Clock, other: Clock) -> None:
    """What happens before `other` happens before `clock`, too."""
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


class Streams:
    """All streams, which of them each thread computes on, and what the host has waited for."""

    def __init__(self, lock: threading.RLock) -> None:
        self.copies = SimulatedStream(COPY_STREAM, {COPY_STREAM: 0})
        self.unpacking = SimulatedStream(UNPACK_STREAM, {UNPACK_STREAM: 0})
        self.beside = SimulatedStream(BESIDE_STREAM, {BESIDE_STREAM: 0})
        self._host: Clock = {}
        self._streams: list[SimulatedStream] = []
        self._own: dict[int, SimulatedStream] = {}  # by thread
        self._used: dict[int, SimulatedStream] = {}  # instead of it, by thread
        self._lock = lock

    @property
    def own(self) -> tuple[SimulatedStream, ...]:
        """Those that are the engine's."""
        return self.copies, self.unpacking, self.beside

    def add(self) -> SimulatedStream:
        with self._lock:
            stream = SimulatedStream(len(self._streams) + 1, dict(self._host))
            self._streams.append(stream)
            return stream

    @property
    def here(self) -> SimulatedStream:
        """The stream that this thread computes on."""
        thread = threading.get_ident()
        stream = self._used.get(thread) or self._own.get(thread)
        if stream is None:
            stream = self._own[thread] = self.add()
        return stream

    @here.setter
    def here(self, stream: SimulatedStream) -> None:
        self._used[threading.get_ident()] = stream

    def seen_by_host(self, event: SimulatedEvent) -> None:
        """The host has found that an event is over: whatever it issues from now on, on whichever stream, follows."""
        with self._lock:
            for clock in (self._host, *(stream.clock for stream in (*self.own, *self._streams))):
                merge(clock, event.clock)

    def waited_for_by_host(self, event: SimulatedEvent) -> None:
        """The same, and the host has stood still meanwhile."""
        with self._lock:
            self.seen_by_host(event)
            for stream in self._streams:
                stream.time_ms = max(stream.time_ms, event.time_ms)

    def synchronize(self) -> None:
        """The host has waited for everything so far."""
        with self._lock:
            everything = [*self.own, *self._streams]
            clock: Clock = {}
            for stream in everything:
                merge(clock, stream.clock)
            self.waited_for_by_host(SimulatedEvent(clock, max(stream.time_ms for stream in everything)))
