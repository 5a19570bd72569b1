"""How a unit's bytes get from its home into a slot: a route of stages.

    raw, page-locked or not        Copy

A stage is prepared once for a home and a buffer, and issued at each load: behind events, on streams of its own choice,
giving the event after which its bytes are there. What a route has prepared is forgotten when the home is exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from layerstream.device.base import COPY_BYTES, Device, Event, engine_tensors
from layerstream.host.home import RawHome

_STAGING_BUFFERS = 3

Issue = Callable[[Sequence[Event]], Event]  # starts what was prepared behind these events; gives the event after it


class Stage(Protocol):
    """One step of a route."""

    def prepare(self, home: RawHome, buffer: torch.Tensor) -> Issue:
        """What brings the bytes of `home` into `buffer` (uint8 [>= device_bytes], on the device); made once, used
        often."""


class Route:
    """Stages of which each begins where the one before ends."""

    def __init__(self, *stages: Stage) -> None:
        self._stages = stages

    def prepare(self, home: RawHome, buffer: torch.Tensor) -> Issue:
        """See `Stage`."""
        first, *others = (stage.prepare(home, buffer) for stage in self._stages)
        if not others:
            return first

        def issue(after: Sequence[Event]) -> Event:
            event = first(after)
            for step in others:
                event = step([event])
            return event

        return issue


class Copy:
    """Copies the bytes as they are, on the device's copy stream.

    What is not page-locked goes through a small ring of buffers that are, for which the host waits.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._staging: _StagingRing | None = None

    def prepare(self, home: RawHome, buffer: torch.Tensor) -> Issue:
        pairs = home.pairs(buffer)
        if home.is_pinned:
            return functools.partial(
                self._device.copy, self._device.prepare([(target, source) for target, source, _ in pairs])
            )
        if self._staging is None:
            self._staging = _StagingRing(self._device)
        return functools.partial(self._staging.copy, pairs)

    def close(self) -> None:
        """Let go of the buffers. The device must be idle."""
        self._staging = None


class _StagingRing:
    """Copies from pageable memory through a few small page-locked buffers.

    The host copies into a buffer (and waits for the copy that read it last), the device copies out of it. Where
    even these are refused, the pageable memory is given to the device as it is, and the driver does the same.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        with engine_tensors():
            buffers = [device.pinned_staging(COPY_BYTES) for _ in range(_STAGING_BUFFERS)]
        self._buffers = [b for b in buffers if b is not None]
        self._events: list[Event] = [None] * len(self._buffers)
        self._next = 0

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor, bool]], after: Sequence[Event]) -> Event:
        """Like `Device.copy`, for pairs of which some are page-locked; blocks the host for the others."""
        event = self._copy([], after)
        for target, source, is_pinned in pairs:
            if is_pinned or not self._buffers:
                event = self._copy([(target, source)], [], is_locked=is_pinned)
                continue
            number, self._next = self._next, (self._next + 1) % len(self._buffers)
            if self._events[number] is not None:
                self._device.synchronize_event(self._events[number])
            staged = self._buffers[number][: source.numel()]
            staged.copy_(source)
            self._events[number] = event = self._copy([(target, staged)], [])
        return event

    def _copy(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event], *, is_locked: bool = True
    ) -> Event:
        return self._device.copy(self._device.prepare(pairs, is_locked=is_locked), after)
