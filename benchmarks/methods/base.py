"""What a method is, and what several of them need."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cases import FORMS, Form, Work
from benchmarks.records import Record, tensors_of
from benchmarks.repeats import Counters
from layerstream.budget import parse_bytes
from layerstream.model.adapters.registry import adapter_for


class MissingPeerError(Exception):
    """A peer's package is not installed here."""


@dataclass
class Setup:
    """What a method is applied to.

    Attributes:
        undo: what is pushed here runs when the measurement is over, last first.
        tell: fields of the record that only the method knows.
        counters: what it counts while it runs, for tokens and passes.
        folder: where the case's weights are, and what the first resident measurement gave.
    """

    work: Work
    device: torch.device
    vram_budget: int | str | None
    undo: contextlib.ExitStack
    tell: Callable[[], Record] = dict
    counters: Counters | None = None
    folder: Path | None = None

    @property
    def budget_bytes(self) -> int:
        """For peers, which take a number."""
        return self.vram_budget if isinstance(self.vram_budget, int) else parse_bytes(self.vram_budget or "")


@dataclass(frozen=True)
class Method:
    """One way of running.

    Attributes:
        apply: make the work run this way, from host memory.
        mode: what its forwards run under; some peers cannot run under inference mode.
        num_warm_ups: calls or passes before it is what it will be.
        needs_budget: it takes one, and cannot do without.
        packages: to be installed, as (module, name on the package index).
    """

    name: str
    apply: Callable[[Setup], None]
    forms: tuple[Form, ...] = FORMS
    mode: Callable[[], contextlib.AbstractContextManager[Any]] = torch.inference_mode
    num_warm_ups: int = 2
    needs_budget: bool = False
    takes_budget: bool = False
    packages: tuple[tuple[str, str], ...] = ()

    def check(self) -> None:
        """Raise MissingPeerError if it cannot be tried here."""
        for module, package in self.packages:
            need(module, package)


def need(module: str, package: str) -> Any:
    """Import a peer's module.

    Raises:
        MissingPeerError: it is not installed, or lacks something itself.
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingPeerError(f"{package} is not installed here ({exc}); pip install {package}") from exc


def stacks(denoiser: nn.Module) -> dict[str, list[nn.Module]]:
    """The denoiser's lists of blocks by name, in the order in which they run."""
    layout = adapter_for(denoiser).layout("transformer", denoiser)
    return {s.name: [block for _, block in s.blocks] for s in layout.stacks if len(s.blocks) > 1}


def move(tensors: Iterable[torch.Tensor], setup: Setup) -> None:
    """These tensors to the device, and afterwards back to the very memory that they came from."""
    homes = [(tensor, tensor.data) for tensor in dict.fromkeys(tensors)]

    def restore() -> None:
        for tensor, home in homes:
            tensor.data = home

    setup.undo.callback(restore)
    for tensor, home in homes:
        tensor.data = home.to(setup.device)


def move_all_but_blocks(setup: Setup) -> None:
    """What a method that streams the denoiser's blocks leaves on the device: the rest of it, and all other parts."""
    blocks = [block for stack in stacks(setup.work.denoiser).values() for block in stack]
    inside = {id(t) for t in tensors_of(blocks)}
    move((t for t in tensors_of(list(setup.work.modules.values())) if id(t) not in inside), setup)
