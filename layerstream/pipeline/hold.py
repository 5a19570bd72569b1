"""What a streamer holds of a pipeline while it streams it: its components, marked as its own and watched.

Components are found anew after each pause, since they may have been changed in it.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from layerstream.hooks.compiled import uncompiled
from layerstream.hooks.intercept import Interception
from layerstream.model.components import components_of, containers_of, is_plain
from layerstream.model.remembered import RememberedDevices
from layerstream.pipeline.changes import (
    CHANGING_METHODS,
    MERGING_METHODS,
    READING_METHODS,
    adapter_layers,
    methods_of,
)
from layerstream.pipeline.owners import ACTIVE, Owner, owners_of, refuse_rival, streamed_now
from layerstream.pipeline.watch import RIVAL_METHODS, PipelineWatch


class Hold:
    """One owner's hold on one pipeline: from `take` to `unmark` and `let_go`, any number of times.

    It does not know its owner but in the calls that it watches, so that both go when their user drops them.

    Attributes:
        called: the components by name, as the pipeline calls them.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._changes = Interception()
        self._pipelines = PipelineWatch()
        self.called: Mapping[str, nn.Module] = {}
        self._names: set[str] = set()  # of the modules of a dict
        self._remembered: RememberedDevices | None = None

    def take(self, owner: Owner, homes: set[torch.device], device: torch.device) -> None:
        """Mark the components, watch the pipeline, and say where its inputs are to go.

        Args:
            homes: where the weights were.
            device: where they seem to be now.
        """
        self.mark(owner)
        plain = [type(self._pipe)] if is_plain(self._pipe) else []
        self._pipelines.install(self._pipe, [*plain, *(type(m) for m in containers_of(self._pipe))])
        if plain:
            self._remembered = RememberedDevices(self._pipe, homes, device)

    def mark(self, owner: Owner) -> None:
        """Mark the components as the owner's, and pause around the calls that change them."""
        self.called = components_of(self._pipe)
        self._names = _names_of_modules(self._pipe) if isinstance(self._pipe, Mapping) else set()
        components = {name: uncompiled(module) for name, module in self.called.items()}
        containers = [m for m in containers_of(self._pipe) if m not in components.values()]
        for module in containers:
            ACTIVE[module] = weakref.ref(owner)
            self._watch_methods(owner, module)
        for component, module in components.items():
            ACTIVE[module] = weakref.ref(owner)
            for layer in adapter_layers(module):
                for name in MERGING_METHODS:  # of one component only: there is a call for each layer
                    self._changes.watch_change(layer, name, functools.partial(owner.pausing, component))
            self._watch_methods(owner, module)

    def _watch_methods(self, owner: Owner, module: nn.Module) -> None:
        """Pause around what changes or reads all of a module, and refuse other offloaders."""
        for name in methods_of(module, CHANGING_METHODS):
            self._changes.watch_change(module, name, owner.pausing)
        for name in methods_of(module, READING_METHODS):
            self._changes.watch_call(module, name, functools.partial(owner.reading, module))
        for name in methods_of(module, RIVAL_METHODS):
            refuse = functools.partial(_refuse_call, owner, f"{type(module).__name__}.{name}()")
            self._changes.watch_call(module, name, refuse)

    def unwatch(self) -> None:
        """Whatever is called on the components pauses no longer, for the time of a pause."""
        self._changes.remove()

    def unmark(self, owner: Owner) -> None:
        """The components are nobody's, and as they were; idempotent."""
        self._changes.remove()
        for module in [m for m, marked_by in streamed_now() if marked_by is owner]:
            ACTIVE.pop(module, None)

    def let_go(self) -> None:
        """The pipeline and the classes around it are as they were; idempotent."""
        self._pipelines.remove()
        if self._remembered is not None:
            self._remembered.restore()
            self._remembered = None

    def watch_class(self, cls: type) -> None:
        """A pipeline of this class has taken some of the components."""
        self._pipelines.watch_class(cls)

    # ---- components that are replaced or dropped

    def replacing(
        self, owner: Owner, pipe: object, name: str, value: object
    ) -> contextlib.AbstractContextManager[object]:
        """What `value` takes the place of a component in `pipe` in, or becomes one: a pause, where it needs one."""
        if pipe is not self._pipe:
            return contextlib.nullcontext()
        inside = [called for called in self.called if called == name or called.startswith(f"{name}.")]
        is_ours = isinstance(value, nn.Module) and owner in owners_of(value.modules())
        if inside == [name] and not is_ours:
            return owner.pausing(name)
        # What streams already under another name is let go of under that one, too; another module may be a component
        # that the pipeline did not have.
        is_new = isinstance(value, nn.Module) and not is_ours
        return owner.pausing() if inside or is_new else contextlib.nullcontext()

    def find_replaced(self) -> str | None:
        """The name of a component that is another module now than when streaming began."""
        if isinstance(self._pipe, nn.Module):
            return None
        for name, module in self.called.items():
            now = self._held(name, module)
            if now is not module and isinstance(now, nn.Module) and uncompiled(now) is not uncompiled(module):
                return name
        return None

    def let_go_of_dropped(self, owner: Owner) -> None:
        """Components that are in a dict no longer, or again; of an object, that is seen when it happens."""
        if isinstance(self._pipe, Mapping):
            # By what it holds: describing what is inside takes milliseconds, and this is asked at each pass.
            if not _names_of_modules(self._pipe) <= self._names:
                with owner.pausing():
                    pass
            for name in [name for name in self.called if self._held(name, None) is None]:
                with owner.pausing(name):
                    pass

    def _held(self, name: str, default: object) -> object:
        """What the pipeline has by the name of a component, which may be a part of what it holds."""
        if isinstance(self._pipe, Mapping):
            if name in self._pipe:
                return self._pipe[name]
        elif name in getattr(self._pipe, "__dict__", {}) or "." not in name:
            return getattr(self._pipe, name, default)
        holder, _, part = name.rpartition(".")
        held = self._held(holder, None) if holder else None
        return getattr(held, part, default) if isinstance(held, nn.Module) else default


def _refuse_call(owner: Owner, what: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    refuse_rival(owner, what)
    return original(*args, **kwargs)


def _names_of_modules(modules: Mapping[Any, Any]) -> set[str]:
    return {name for name, module in modules.items() if isinstance(module, nn.Module)}
