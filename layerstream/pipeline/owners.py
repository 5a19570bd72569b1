"""Who streams what now: in a list of the process, since pipelines come and go around the same components."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from layerstream.errors import AlreadyOffloadedError
from layerstream.hooks.compiled import uncompiled
from layerstream.model.components import components_of


class Owner(Protocol):
    """Who streams components; what the watch tells."""

    @property
    def number(self) -> int:
        """In this order one waits for those that stream, if for more than one."""

    def using(self, what: str) -> contextlib.AbstractContextManager[object]:
        """A call of a pipeline that has some of its components; others wait meanwhile."""

    def pausing(self, component: str | None = None) -> contextlib.AbstractContextManager[object]:
        """Components are about to be changed: all, or one and those that share weights with it."""

    def replacing(self, pipe: object, name: str, value: object) -> contextlib.AbstractContextManager[object]:
        """`value` is about to take the place of a component in `pipe`, or to become one."""

    @property
    def allows_rivals(self) -> bool:
        """Whether other offloaders may be switched on now."""

    def watch_class(self, cls: type) -> None:
        """A pipeline of this class has taken some of its components."""

    def reading(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """All weights of a component are about to be read, by `original`: calls it."""


# Who streams which component; weak both ways, so that nothing here keeps a pipeline alive that its user has dropped.
ACTIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
# One at a time begins to stream, or joins and leaves what decorated calls share.
ENTERING = threading.RLock()


def streamed_now() -> list[tuple[nn.Module, Any]]:
    """Each component that streams, and who streams it."""
    found = []
    # The references as one list: other threads begin and end, and a loop over the dictionary itself would raise then.
    for reference in ACTIVE.keyrefs():
        component = reference()
        owner = None if component is None else ACTIVE.get(component, _nobody)()
        if component is not None and owner is not None:
            found.append((component, owner))
    return found


def _nobody() -> None:
    """Of a component that has just been let go."""


def owners_of(modules: Iterable[object]) -> list[Any]:
    """Who streams some of these modules, each once, in the order in which one waits for them."""
    found = {}
    for module in modules:
        if isinstance(module, nn.Module):
            reference = ACTIVE.get(uncompiled(module))
            owner = reference() if reference is not None else None
            if owner is not None:
                found[id(owner)] = owner
    return sorted(found.values(), key=lambda owner: owner.number)


def modules_of(pipe: object) -> list[object]:
    """What a pipeline object holds, modules among others."""
    if isinstance(pipe, Mapping):
        return list(pipe.values())
    if isinstance(pipe, nn.Module):
        return [pipe]
    held = getattr(pipe, "__dict__", {})
    components = held.get("components")  # where they are kept in a dict of that name alone
    return [*held.values(), *(components.values() if isinstance(components, Mapping) else ())]


def owner_of(pipe: Any) -> Any:
    """Who streams components of this pipeline, module or dict now; None if there is none."""
    modules = modules_of(pipe)
    if not any(isinstance(module, nn.Module) for module in modules):
        modules = list(components_of(pipe).values())
    return next((owner for owner in owners_of(modules) if owner.is_active), None)


def touching(components: Mapping[str, nn.Module]) -> list[Any]:
    """Who streams any of these, a part of one, or what one is a part of."""
    inside = {id(part) for component in components.values() for part in component.modules()}
    wholes = {id(uncompiled(component)) for component in components.values()}
    found = {}
    for module, owner in streamed_now():
        if id(module) in inside or any(id(part) in wholes for part in module.modules()):
            found[id(owner)] = owner
    return list(found.values())


def refuse_active(components: Mapping[str, nn.Module]) -> None:
    """Raise if one of these, or a part of one, streams already.

    Raises:
        AlreadyOffloadedError: names it and its streamer.
    """
    for name, component in components.items():
        for owner in touching({name: component}):
            raise AlreadyOffloadedError(
                f"`{name}` is streamed by layerstream already ({owner!r}). Leave that context, or call its close(), "
                "before entering another. (`layerstream.active(pipe)` gives it, should you have lost it, and so does "
                "this error's `.streamer`.)",
                streamer=owner,
            )


def refuse_rival(owner: Owner, what: str) -> None:
    """Another offloader is about to be switched on for what an owner streams.

    Raises:
        AlreadyOffloadedError: unless streaming is paused.
    """
    if not owner.allows_rivals:
        raise AlreadyOffloadedError(
            f"{what} would offload what layerstream streams already ({owner!r}). Leave that context, or call its "
            "close(), before switching on another offloader; together they are not needed.",
            streamer=owner,
        )
