"""What is watched of pipelines while their components are streamed: their calls, what changes them, other offloaders.

Pipelines come and go as cheap objects around the same components: `from_pipe`, `Cls(**pipe.components)`, a copy for
each request. So nothing is put on an object, where a copy would carry it along. *Classes* are patched, for as long as
something is streamed, and each call asks whose components the object has that it is called on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerstream.finalisers import FinaliserLock
from layerstream.hooks.intercept import RIVAL_HOOKS
from layerstream.interrupts import undo_all
from layerstream.pipeline.changes import CHANGING_METHODS, READING_METHODS
from layerstream.pipeline.owners import modules_of, owners_of, refuse_rival, streamed_now
from layerstream.weights.absent import at_home, reading

_LIBRARIES = ("builtins", "torch", "transformers", "diffusers", "accelerate", "huggingface_hub")
# Methods of pipelines and models by which other offloaders are switched on.
RIVAL_METHODS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
_MISSING = object()


@dataclass(eq=False)
class _Patch:
    before: object  # `_MISSING`: inherited
    replacement: Any
    holders: set[object] = field(default_factory=set)


class _Patches:
    """Attributes that are replaced while anybody needs it."""

    def __init__(self) -> None:
        self._patches: dict[tuple[object, str], _Patch] = {}
        self.lock = FinaliserLock()

    def add(self, target: Any, name: str, wrap: Callable[[Any], Any]) -> Callable[[], None]:
        """Replace `target.name` by what `wrap` makes of it; returns what takes that back, under the lock."""
        with self.lock.held():
            patch = self._patches.get((target, name))
            if patch is None:
                patch = _Patch(vars(target).get(name, _MISSING), wrap(getattr(target, name)))
                setattr(target, name, patch.replacement)
                self._patches[target, name] = patch
            holder = object()
            patch.holders.add(holder)
        return functools.partial(self._remove, target, name, patch, holder)

    def _remove(self, target: Any, name: str, patch: _Patch, holder: object) -> None:
        patch.holders.discard(holder)
        if patch.holders or self._patches.get((target, name)) is not patch:
            return
        if vars(target).get(name) is patch.replacement:
            if patch.before is _MISSING:
                delattr(target, name)
            else:
                setattr(target, name, patch.before)
        # Else somebody has put something around it, which stays; ours does nothing where nothing is streamed.
        del self._patches[target, name]


_PATCHES = _Patches()


class PipelineWatch:
    """The patches that one streamer needs; `remove` takes them back, in any state.

    A streamer dropped without closing takes them along.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._classes: set[type] = set()
        weakref.finalize(self, _PATCHES.lock.when_free, functools.partial(undo_all, self._undo))

    def install(self, pipe: object, plain: Iterable[type] = ()) -> None:
        """Watch the class of `pipe`, and of all pipelines that may have the same components.

        Args:
            plain: ordinary classes, of pipelines or of modules that hold components, whose own methods use them.
        """
        for cls in plain:
            self._watch_methods(cls)
        if not isinstance(pipe, Mapping | nn.Module):
            self.watch_class(type(pipe))
            self._patch(type(pipe), "__setattr__", _around_setattr)
            self._patch(type(pipe), "__delattr__", _around_delattr)
        base = getattr(sys.modules.get("diffusers.pipelines.pipeline_utils"), "DiffusionPipeline", None)
        if base is not None:
            for cls in _with_subclasses(base):
                self.watch_class(cls)
            self._patch(base, "register_modules", _around_register_modules)
        self._refuse_rivals()
        self._patch(torch.utils, "swap_tensors", _around_swap)
        # Blocks share addresses by turns, which a file of weights takes for weights that are tied: it is made of the
        # bytes at home. These read all tensors, also for whoever has imported the functions around them before.
        saving = sys.modules.get("safetensors.torch")
        for name in ("_flatten_as_ptr", "_flatten"):
            if hasattr(saving, name):
                self._patch(saving, name, _around_flatten)

    def watch_class(self, cls: type) -> None:
        """Watch calls of the objects of a class, and what changes their components."""
        if cls in self._classes:
            return
        self._classes.add(cls)
        # Where it is defined: that serves all classes that inherit it.
        for definer in cls.__mro__:
            call = vars(definer).get("__call__")
            if call is not None:
                is_plain = not inspect.isgeneratorfunction(call) and not inspect.iscoroutinefunction(call)
                if is_plain and definer is not nn.Module and (definer is cls or inspect.isfunction(call)):
                    self._patch(definer, "__call__", _around_call)
                break
        for names, wrap in ((CHANGING_METHODS, _around_change), (RIVAL_METHODS, _around_rival)):
            for name in names:
                for definer in cls.__mro__:
                    if callable(vars(definer).get(name)) and not issubclass(definer, nn.Module):
                        self._patch(definer, name, wrap)
                        break

    def _watch_methods(self, cls: type) -> None:
        """Each call of a method that the author of the class wrote is a use."""
        for definer in cls.__mro__:
            if definer.__module__.partition(".")[0] in _LIBRARIES:
                continue
            for name, function in list(vars(definer).items()):
                if inspect.isfunction(function) and not name.startswith("_") and not _is_no_use(name, function):
                    self._patch(definer, name, _around_call)

    def remove(self) -> None:
        """Take everything back; idempotent."""
        with _PATCHES.lock.held():
            undo_all(self._undo)
        self._classes.clear()

    def _refuse_rivals(self) -> None:
        """Functions of other libraries that put offloading hooks on modules."""
        registry = getattr(sys.modules.get("diffusers.hooks.hooks"), "HookRegistry", None)
        if registry is not None:
            self._patch(registry, "register_hook", _around_register_hook)
        for place, name, wrap in (
            # Before it leaves an empty registry on every module.
            ("diffusers.hooks.group_offloading", "_apply_group_offloading", _around_group_offloading),
            ("accelerate.hooks", "add_hook_to_module", _around_add_hook),
            ("accelerate.big_modeling", "add_hook_to_module", _around_add_hook),
        ):
            module = sys.modules.get(place)
            if hasattr(module, name):
                self._patch(module, name, wrap)

    def _patch(self, target: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        self._undo.append(_PATCHES.add(target, name, wrap))


def _is_no_use(name: str, function: Any) -> bool:
    """Whether a method is told apart otherwise, or moves things rather than computing, or runs on after it returned."""
    is_known = name in (*CHANGING_METHODS, *RIVAL_METHODS, *READING_METHODS) or hasattr(nn.Module, name)
    return is_known or inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function)


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield from _with_subclasses(child)


# ---- what takes the place of a method


def _around_call(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as uses:
            for owner in owners_of(modules_of(self)):
                uses.enter_context(owner.using(f"`{type(self).__name__}.{original.__name__}`"))
            return original(self, *args, **kwargs)

    return call


def _around_change(original: Any) -> Any:
    @functools.wraps(original)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as pauses:
            for owner in owners_of(modules_of(self)):
                pauses.enter_context(owner.pausing())
            return original(self, *args, **kwargs)

    return change


def _around_rival(original: Any) -> Any:
    @functools.wraps(original)
    def enable(self: Any, *args: Any, **kwargs: Any) -> Any:
        for owner in owners_of(modules_of(self)):
            refuse_rival(owner, f"{type(self).__name__}.{original.__name__}()")
        return original(self, *args, **kwargs)

    return enable


def _around_setattr(original: Any) -> Any:
    @functools.wraps(original)
    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
        with _replacing(self, name, value):
            original(self, name, value)

    return __setattr__


def _around_delattr(original: Any) -> Any:
    @functools.wraps(original)
    def __delattr__(self: Any, name: str) -> None:  # noqa: N807
        with _replacing(self, name, None):
            original(self, name)

    return __delattr__


@contextlib.contextmanager
def _replacing(pipe: object, name: str, value: object) -> Iterator[None]:
    before = getattr(pipe, "__dict__", {}).get(name)
    with contextlib.ExitStack() as pauses:
        if before is not value and (isinstance(before, nn.Module) or isinstance(value, nn.Module)):
            for owner in owners_of(modules_of(pipe)):
                pauses.enter_context(owner.replacing(pipe, name, value))
        del before  # or this frame would hold a component that is let go
        yield


def _around_register_modules(original: Any) -> Any:
    @functools.wraps(original)
    def register_modules(self: Any, **modules: Any) -> Any:
        for owner in owners_of(modules.values()):
            owner.watch_class(type(self))
        return original(self, **modules)

    return register_modules


def _around_register_hook(original: Any) -> Any:
    @functools.wraps(original)
    def register_hook(self: Any, hook: Any, name: str) -> Any:
        if name in RIVAL_HOOKS:
            _refuse_on(getattr(self, "_module_ref", None), f"diffusers' {name} hook")
        return original(self, hook, name)

    return register_hook


def _around_group_offloading(original: Any) -> Any:
    @functools.wraps(original)
    def apply_group_offloading(module: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_on(module, "diffusers' group_offloading hook")
        return original(module, *args, **kwargs)

    return apply_group_offloading


def _around_add_hook(original: Any) -> Any:
    @functools.wraps(original)
    def add_hook_to_module(module: Any, hook: Any, append: bool = False) -> Any:
        _refuse_on(module, f"accelerate's {type(hook).__name__}")
        return original(module, hook, append)

    return add_hook_to_module


def _around_swap(original: Any) -> Any:
    @functools.wraps(original)
    def swap_tensors(t1: torch.Tensor, t2: torch.Tensor) -> Any:
        # Of weights that are absent it would exchange classes and placeholders, which nobody asks about.
        with reading((t1, t2)):
            return original(t1, t2)

    return swap_tensors


def _around_flatten(original: Any) -> Any:
    @functools.wraps(original)
    def flatten(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensors, dict):
            tensors = {name: at_home(t) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}
        return original(tensors, *args, **kwargs)

    return flatten


def _refuse_on(module: object, what: str) -> None:
    """Raise if a module is streamed, or is a part of what is."""
    for component, owner in streamed_now():
        if any(module is part for part in component.modules()):
            refuse_rival(owner, what)
