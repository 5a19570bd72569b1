"""Ranges: what streaming does, by name, in torch's profiler and in a timeline of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from layerstream.device.base import Event
from layerstream.torch_private import is_profiler_enabled
from layerstream.transfer.timeline import Timeline

_NOTHING = contextlib.nullcontext()


class Ranges:
    """Whether anybody wants to know what is done, which is asked once a component's call, and who.

    Attributes:
        is_on: a profiler or a timeline runs.
        timeline: None: there is none.
    """

    def __init__(self) -> None:
        self.is_on = self._is_profiled = False
        self.timeline: Timeline | None = None

    def ask(self) -> None:
        """Find out whether a profiler runs now."""
        self._is_profiled = bool(is_profiler_enabled())
        self.is_on = self._is_profiled or self.timeline is not None

    def loading(self, name: str, num_bytes: int, after: Sequence[Event]) -> contextlib.AbstractContextManager[None]:
        """Inside, the load of a unit is queued behind these events."""
        told = None if self.timeline is None else self.timeline.loading(name, num_bytes, after)
        return self._told("load", name, told)

    def decoding(self, name: str, num_bytes: int, after: Sequence[Event]) -> contextlib.AbstractContextManager[None]:
        """Inside, the decoding of a unit is queued behind these events."""
        told = None if self.timeline is None else self.timeline.decoding(name, num_bytes, after)
        return self._told("decode", name, told)

    def waiting(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Inside, compute is queued behind the load of a unit."""
        told = None if self.timeline is None else self.timeline.waiting(name)
        return self._told("wait", name, told)

    def changing(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """Inside, slots are laid out for a phase."""
        told = None if self.timeline is None else self.timeline.changing(phase)
        return self._told("phase", phase, told)

    @contextlib.contextmanager
    def _told(self, what: str, name: str, told: contextlib.AbstractContextManager[None] | None) -> Iterator[None]:
        """Inside is a range "layerstream load transformer.blocks.3" in torch's profiler, where one runs, and `told`."""
        in_profile = torch.profiler.record_function(f"layerstream {what} {name}") if self._is_profiled else _NOTHING
        with in_profile, told or _NOTHING:
            yield
