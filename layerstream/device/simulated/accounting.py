"""Operators, as the simulated device sees them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from layerstream.torch_private import TorchDispatchMode, is_traceable_wrapper_subclass, tree_leaves


class Unseen(threading.local):
    """Whether this thread runs operations of the engine's or of the device's own, which nobody is to see."""

    is_on = False

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        outer, self.is_on = self.is_on, True
        try:
            yield
        finally:
            self.is_on = outer


class Watcher(Protocol):
    """Who wants to know of operators."""

    def made(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """An operator has made `outputs` of `inputs`."""

    def touched(self, inputs: list[torch.Tensor]) -> None:
        """An operator has read, or written, the bytes of these."""


class Accounting(TorchDispatchMode):
    """Sees every operator below autograd, and tells what it made."""

    def __init__(self, watcher: Watcher, unseen: Unseen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watcher = watcher
        self._unseen = unseen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._unseen.is_on:
            self._see(func, _plain_tensors((args, kwargs)), _plain_tensors(out))
        return out

    def _see(self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        self.watcher.made(inputs, outputs)


class HappensBefore(Accounting):
    """Tells of what operators touch, too."""

    def _see(self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        super()._see(func, inputs, outputs)
        if not func._schema.is_mutable:
            # A view reads nothing; only what reads through it does.
            made = {t.untyped_storage() for t in outputs}
            if any(t.untyped_storage() in made for t in inputs):
                return
        self.watcher.touched(inputs)


def _plain_tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree whose bytes lie in the simulated device's or host memory."""
    found: list[torch.Tensor] = []
    pending = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    while pending:
        tensor = pending.pop()
        if is_traceable_wrapper_subclass(tensor):
            pending.extend(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        elif tensor.layout is torch.strided and tensor.device.type == "cpu":
            found.append(tensor)
    return found
