"""What a model's objects have beside weights: attributes, hooks, adapters' scales, processors and what these keep.

Two passes may run side by side only where neither sees what the other does. A pass that leaves its model as it found it
has nothing to show; whatever is set on the way, or is set between two passes, is found by comparing with what was there
before. Weights are others' to watch over (`edits.py`). What nobody can look into is a reason not to pair.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import is_
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from layerstream.engine.snapshots import MOST_BYTES, copy_of, put_back
from layerstream.hooks.compiled import describe_compiled
from layerstream.hooks.intercept import is_our_hook, without_our_wrappers
from layerstream.torch_private import GLOBAL_HOOKS, GLOBAL_PRE_HOOKS, without_subclasses

_HOOK_DICTS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABOUT_HOOKS = (
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_PLAIN = (int, float, bool, str, bytes, complex)
_NOT_LOOKED_INTO = (
    *_PLAIN, type, BuiltinFunctionType, ModuleType, type(None), torch.dtype, torch.device, torch.Size,
    logging.Logger, logging.LoggerAdapter,
)  # fmt: skip
_OPAQUE = ("ndarray", "RandomState", "Generator", "PCG64")  # of numpy, which need not be imported to know them
# Classes of these keep nothing that a pass writes to, and their functions use no globals that one does.
_LIBRARIES = (
    "builtins",
    "torch",
    "functools",
    "typing",
    "enum",
    "abc",
    "weakref",
    "collections",
    "numpy",
    "layerstream",
)
_WITH_MODELS = (*_LIBRARIES, "diffusers", "transformers", "accelerate", "peft", "huggingface_hub")
# Of every class: what has no part in what its methods do, or changes by being asked for.
_OF_CLASSES = ("__dict__", "__weakref__", "__doc__", "__annotations__", "__abstractmethods__", "_abc_impl", "__slots__")
_DEPTH = 8  # of containers and objects below a module's attributes

_global_hooks = [found for each in (GLOBAL_HOOKS, GLOBAL_PRE_HOOKS) if (found := each.find()) is not None]


class ModelState:
    """All that was there when it was made.

    Args:
        is_weight: whether a tensor is one of those whose changes others find.
    """

    def __init__(self, root: nn.Module, is_weight: Callable[[torch.Tensor], bool]) -> None:
        self._is_weight = is_weight
        self._hooks: list[tuple[str, dict[Any, Any]]] = []
        self._dicts, self._keys, self._others = _Holders(dict.values), _Holders(iter), _Holders(iter)
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._paths: list[str] = []  # of these
        self._versions: list[int] = []
        self._num_bytes = 0
        self._refusal = ""  # what nobody can look into, or has buffers of its own that two passes would share
        modules = dict(root.named_modules())
        self._modules = {id(module) for module in modules.values()}
        self._seen: set[int] = set()
        for kind in dict.fromkeys(type(module) for module in modules.values()):
            self._look_at_class(kind, _DEPTH)
        for name, module in modules.items():
            names, path = vars(module), name or type(root).__name__
            self._hooks += [(path, names[kind]) for kind in _HOOK_DICTS if kind in names]
            if describe_compiled(module) is not None:
                self._refusal = self._refusal or f"`{path}` is compiled"
            self._look(path, names, _DEPTH, but=(*_HOOK_DICTS, *_ABOUT_HOOKS))

    def difference(self) -> str:
        """Why what is there now is not what was there then, or nobody can say; "": it is."""
        if self._refusal:
            return self._refusal
        if any(_global_hooks):
            return "a hook on all modules"
        for path, hooks in self._hooks:
            if hooks and not all(map(is_our_hook, hooks)):
                return f"a hook on `{path}`"
        changed = self._dicts.changed() or self._keys.changed() or self._others.changed() or self._written()
        return f"`{changed}` changes" if changed else ""

    def tensors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tensors that are no weights, each with a copy of what it was: only their bytes tell."""
        return self._tensors

    def restore(self) -> bool:
        """Put back what has changed, in tensors, too. Returns whether anything had. Waits for the device."""
        was_written = put_back(self._tensors)
        self._versions = self._versions_now()
        if not self.difference():
            return was_written
        for (_, names, keys), (_, _, values) in zip(self._keys.each(), self._dicts.each(), strict=True):
            if len(names) != len(keys) or not all(map(is_, names.values(), values)):
                names.clear()
                names.update(zip(keys, values, strict=True))
        for _, holder, values in self._others.each():
            if isinstance(holder, list | deque | set) and not (
                len(holder) == len(values) and all(map(is_, holder, values))
            ):
                holder.clear()
                holder.update(values) if isinstance(holder, set) else holder.extend(values)
        return True

    # ---- inside

    def _written(self) -> str:
        """The path of a tensor whose version has moved on; "": none. What is written past that, only bytes tell."""
        versions = self._versions_now()
        if versions == self._versions:
            return ""
        return next(path for path, a, b in zip(self._paths, versions, self._versions, strict=True) if a != b)

    def _versions_now(self) -> list[int]:
        with without_subclasses():
            return [_version_of(tensor) for tensor, _ in self._tensors]

    def _look_at_class(self, cls: type, depth: int) -> None:
        """Note what a class, and those that it is made of, have of their own, and look into what of it can be written
        to."""
        for kind in cls.__mro__:
            if id(kind) in self._seen or _root_of(kind) in _LIBRARIES:
                continue
            self._seen.add(id(kind))
            view = _View(partial(_attributes, kind))
            self._others.add(kind.__name__, view, list(view))
            for name, value in list(vars(kind).items()):
                if name not in _OF_CLASSES:
                    self._look_into(f"{kind.__name__}.{name}", _function_of(value), depth - 1)

    def _look(self, path: str, holder: Any, depth: int, but: Collection[str] = ()) -> None:
        """Note what is in a container, and look into that."""
        if id(holder) in self._seen:
            return
        self._seen.add(id(holder))
        if isinstance(holder, dict):
            names, values = list(holder), list(holder.values())
            self._dicts.add(path, holder, values)
            self._keys.add(path, holder, names)
        else:
            values = list(holder)
            names = list(range(len(values)))
            self._others.add(path, holder, values)
        for name, value in zip(names, values, strict=True):
            if not isinstance(name, str):
                self._look_into(path, value, depth)
            elif name not in but:
                self._look_into(f"{path}.{name}", value, depth)

    def _look_into(self, path: str, value: Any, depth: int) -> None:
        value = without_our_wrappers(value)
        if isinstance(value, torch.Tensor):
            self._note_tensor(path, value)
        elif isinstance(value, nn.Module):
            if id(value) not in self._modules:
                self._refuse(path, value)
        elif _is_opaque(value):
            self._refuse(path, value)
        elif isinstance(value, FunctionType):
            if id(value) not in self._seen and not _is_plain_function(value):
                self._seen.add(id(value))  # functions may name each other
                self._look_inside(path, value, depth)
        elif not isinstance(value, _NOT_LOOKED_INTO):
            self._look_inside(path, value, depth)

    def _look_inside(self, path: str, value: Any, depth: int) -> None:
        inner = list(_holders(value))
        if depth > 0:
            for each in inner:
                self._look(path, each, depth - 1)
            self._look_at_class(type(value), depth)
        elif inner:
            self._refuse(path, value)

    def _refuse(self, path: str, value: Any) -> None:
        self._refusal = self._refusal or f"nobody can look into `{path}` ({type(value).__name__})"

    def _note_tensor(self, path: str, tensor: torch.Tensor) -> None:
        with without_subclasses():
            if self._is_weight(tensor):
                return
            self._num_bytes += tensor.numel() * tensor.element_size()
            if self._num_bytes > MOST_BYTES or type(tensor) not in (torch.Tensor, nn.Parameter):
                self._refuse(path, tensor)
            else:
                self._tensors.append((tensor, copy_of(tensor)))
                self._paths.append(path)
                self._versions.append(_version_of(tensor))


class _Holders:
    """Containers, and what was in them. Thousands are compared at each step of a pipeline, while the device waits: by a
    few calls for all of them."""

    def __init__(self, values_of: Callable[[Any], Iterable[Any]]) -> None:
        self._values_of = values_of
        self._paths: list[str] = []
        self._holders: list[Any] = []
        self._sizes: list[int] = []
        self._values: list[Any] = []

    def add(self, path: str, holder: Any, values: Collection[Any]) -> None:
        self._paths.append(path)
        self._holders.append(holder)
        self._sizes.append(len(values))
        self._values += values

    def changed(self) -> str:
        """The path of one that is not as it was; "": there is none."""
        is_as_large = list(map(len, self._holders)) == self._sizes
        if is_as_large and all(map(is_, chain.from_iterable(map(self._values_of, self._holders)), self._values)):
            return ""
        for path, holder, values in self.each():
            if len(holder) != len(values) or not all(map(_is_alike, self._values_of(holder), values)):
                return path
        return ""

    def each(self) -> Iterator[tuple[str, Any, list[Any]]]:
        """Path, container, and what was in it."""
        start = 0
        for path, holder, size in zip(self._paths, self._holders, self._sizes, strict=True):
            yield path, holder, self._values[start : start + size]
            start += size


def _holders(value: Any) -> Iterator[Any]:
    """What may be changed without the value becoming another one."""
    if isinstance(value, dict | list | set | frozenset | tuple | deque):
        yield value
    elif isinstance(value, MethodType):
        yield (value.__self__, value.__func__)
        return
    elif isinstance(value, FunctionType):
        yield _View(lambda: (value.__defaults__, value.__kwdefaults__, *_contents(value), *_globals_of(value)))
    elif isinstance(value, partial):
        yield (value.func, value.args, value.keywords)
    else:
        slots = [name for kind in type(value).__mro__ for name in _slots_of(kind)]
        if slots:
            yield _View(lambda: tuple(getattr(value, name, None) for name in slots))
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield attributes


class _View:
    """Values that lie in no container."""

    def __init__(self, values: Callable[[], Sequence[Any]]) -> None:
        self._of = values

    def __len__(self) -> int:
        return len(self._of())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._of())


def _attributes(kind: type) -> list[Any]:
    """What a class has of its own."""
    return list(vars(kind).values())


def _contents(function: FunctionType) -> Iterator[Any]:
    """What a function closes over."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # empty yet
            yield None


def _globals_of(function: FunctionType) -> Iterator[Any]:
    """Globals that it names, of code that is no library's."""
    if _is_of_library(function):
        return
    names = function.__globals__
    for name in _names_in(function.__code__):
        if not isinstance(value := names.get(name), type | ModuleType | BuiltinFunctionType | type(None)):
            yield value


def _names_in(code: CodeType) -> list[str]:
    """Names of globals and attributes in a function's code, and in that of functions inside it."""
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names_in(const)]
    return [*code.co_names, *inner]


def _is_of_library(function: FunctionType) -> bool:
    """Whether its code is one's that comes with models; `__module__` may be that of another, which it wraps."""
    return str(function.__globals__.get("__name__")).partition(".")[0] in _WITH_MODELS


def _is_plain_function(value: FunctionType) -> bool:
    """Whether a function keeps nothing between its calls, as most of a class do."""
    if _is_of_library(value):
        return True
    kept = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *_contents(value), *_globals_of(value)]
    kept += vars(value).values()
    return all(isinstance(each, _NOT_LOOKED_INTO) for each in kept)


def _function_of(value: Any) -> Any:
    """What a class has of a method, which is not what an instance has."""
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _root_of(value: Any) -> str:
    """The package that a class or a function is of."""
    return str(getattr(value, "__module__", None) or "").partition(".")[0]


def _version_of(tensor: torch.Tensor) -> int:
    """Call under `DisableTorchFunctionSubclass`. What is made under `inference_mode` has none."""
    return -1 if tensor.is_inference() else tensor._version


def _slots_of(kind: type) -> Sequence[str]:
    if _root_of(kind) in _LIBRARIES:
        return ()
    found = vars(kind).get("__slots__", ())
    return [name for name in ([found] if isinstance(found, str) else found) if name not in ("__dict__", "__weakref__")]


def _is_opaque(value: Any) -> bool:
    """Whether it changes as it is used, and does not show it."""
    kinds = (torch.Generator, random.Random, Iterator, bytearray, memoryview, threading.local)
    return isinstance(value, kinds) or any(kind.__name__ in _OPAQUE for kind in type(value).__mro__)


def _is_alike(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and repr(a) == repr(b))  # 0.0 is not -0.0
