"""Finds by which methods a component is really entered, while it runs.

A hook on a root says when a component's forward begins. Code of autoregressive models calls other things instead:
`model.forward(...)` as a method, `model.forward_model(...)`, `model.image_head.sample(...)`, a projector by itself.
Then each block looks like a call of its own, and every look at a weight between them like one from outside. What they
are parts of stands on the Python stack: the outermost method of a module of the component.

A method of the component itself may be the loop over all tokens, in which nothing would be measured until it is over.
So of those only what calls itself a forward is taken, and of parts anything but `generate`; adapters name the others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

_MOST_FRAMES = 200
_MOST_SEARCHES = 64  # in vain, of one component: its blocks are called from outside of it


class Entrance(NamedTuple):
    """A method of a module, whose dotted path in its component is `path`."""

    owner: nn.Module
    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


class EntranceFinder:
    """Looks on the stack for what has called blocks, or read weights, of a component from inside it.

    Attributes:
        modules: (component, path in it) by the id of each module of the components.
    """

    def __init__(self) -> None:
        self.modules: dict[int, tuple[str, str]] = {}
        self._found: set[tuple[int, str]] = set()
        self._num_searches: dict[str, int] = {}

    def watch(self, component: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Look for entrances of this component, too, whose modules have these paths."""
        for path, module in modules:
            self.modules.setdefault(id(module), (component, path))
        self._num_searches[component] = 0

    def forget(self, component: str) -> None:
        """It is streamed no longer, or laid out anew."""
        gone = {module for module, (owner, _) in self.modules.items() if owner == component}
        self.modules = {module: place for module, place in self.modules.items() if module not in gone}
        self._found = {(owner, name) for owner, name in self._found if owner not in gone}

    def find(self, component: str, *, is_between_calls: bool = False) -> tuple[Entrance | None, bool]:
        """The outermost method of a module of `component` that is running in this thread, and whether it is new.

        A module's own `__call__` counts as its `forward`.

        Args:
            is_between_calls: it is seldom asked for, however often in vain.
        """
        searches = self._num_searches.get(component, _MOST_SEARCHES)
        if not is_between_calls:
            if searches >= _MOST_SEARCHES:
                return None, False
            self._num_searches[component] = searches + 1
        outermost: Entrance | None = None
        for owner, code in _methods(sys._getframe(1)):
            place = self.modules.get(id(owner))
            if place is None or place[0] != component:
                continue
            is_found = (id(owner), code.co_name) in self._found  # and will be entered by from the next time on
            if is_found or (_is_method(owner, code) and _is_a_pass(place[1], code)):
                outermost = Entrance(owner, place[1], code.co_name)
        if outermost is None:
            return None, False
        found = id(outermost.owner), outermost.name
        is_new = found not in self._found
        if is_new:
            self._found.add(found)
            self._num_searches[component] = 0
        return outermost, is_new


def _methods(frame: FrameType | None) -> Iterator[tuple[nn.Module, CodeType]]:
    """(first argument, code) of the running functions whose first argument is a module, innermost first."""
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                yield owner, code
        frame = frame.f_back


def _is_method(owner: nn.Module, code: CodeType) -> bool:
    """Whether code is that of a method of the owner's class, by its author, that can be replaced on the instance."""
    name = code.co_name
    if name.startswith("_"):
        return False
    for cls in type(owner).__mro__:
        if cls is nn.Module:
            return False
        if name in vars(cls):
            return any(each is code for each in _codes(vars(cls)[name]))
    return False


def _is_a_pass(path: str, code: CodeType) -> bool:
    """Whether it is taken for one pass, rather than for a loop of them."""
    return code.co_name != "generate" if path else "forward" in code.co_name


def _codes(function: Any) -> Iterator[CodeType]:
    """Of a function, and of what decorators of it have wrapped."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            yield code
        function = getattr(function, "_torchdynamo_orig_callable", None) or getattr(function, "__wrapped__", None)
