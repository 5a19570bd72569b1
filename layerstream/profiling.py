"""Ranges in profiles: what streaming does, by name, beside the operators that `torch.profiler` records."""

from __future__ import annotations

import contextlib

import torch

from layerstream.torch_private import is_profiler_enabled

_NOTHING = contextlib.nullcontext()


class Ranges:
    """Makes `record_function` ranges while a profiler runs, which is asked once a component's call.

    Attributes:
        is_on: whether a profiler runs.
    """

    def __init__(self) -> None:
        self.is_on = False

    def ask(self) -> None:
        """Find out whether a profiler runs now."""
        self.is_on = bool(is_profiler_enabled())

    def __call__(self, what: str, name: str) -> contextlib.AbstractContextManager[object]:
        """A range "layerstream load transformer.blocks.3"; nothing where no profiler runs."""
        return torch.profiler.record_function(f"layerstream {what} {name}") if self.is_on else _NOTHING
