"""Ranges: what streaming does, by name, in torch's profiler and in a timeline of our own."""

from __future__ import annotations

import contextlib

import torch

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
        self.is_on = False
        self.timeline: Timeline | None = None

    def ask(self) -> None:
        """Find out whether a profiler runs now."""
        self.is_on = bool(is_profiler_enabled()) or self.timeline is not None

    def __call__(self, what: str, name: str) -> contextlib.AbstractContextManager[object]:
        """A range "layerstream load transformer.blocks.3" in torch's profiler; nothing where none runs."""
        is_profiled = self.is_on and is_profiler_enabled()
        return torch.profiler.record_function(f"layerstream {what} {name}") if is_profiled else _NOTHING
