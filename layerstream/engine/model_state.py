"""What a model's objects have beside weights: attributes, hooks, adapters' scales, processors and what these keep.

Two passes may run side by side only where neither sees what the other does. A pass that leaves its model as it found it
has nothing to show; whatever is set on the way, or is set between two passes, is found by comparing with what was there
before. Weights are others' to watch over (`edits.py`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from layerstream.hooks.compiled import describe_compiled
from layerstream.hooks.intercept import is_our_hook
from layerstream.torch_private import GLOBAL_HOOKS, GLOBAL_PRE_HOOKS, without_subclasses

_HOOK_DICTS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABOUT_HOOKS = (
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_NOT_LOOKED_INTO = (
    nn.Module, torch.Tensor, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, str, bytes, int, float,
    bool, complex, type(None), torch.dtype, torch.device,
)  # fmt: skip
_OPAQUE = ("ndarray", "RandomState", "Generator", "PCG64")  # of numpy, which need not be imported to know them
_DEPTH = 4  # of containers and objects below a module's attributes

_global_hooks = [found for each in (GLOBAL_HOOKS, GLOBAL_PRE_HOOKS) if (found := each.find()) is not None]


class ModelState:
    """All that was there when it was made.

    Args:
        is_weight: whether a tensor is one of those whose changes others find.
    """

    def __init__(self, root: nn.Module, is_weight: Callable[[torch.Tensor], bool]) -> None:
        self._is_weight = is_weight
        self._hooks: list[tuple[str, dict[Any, Any]]] = []
        self._dicts = _Holders(dict.values)
        self._others = _Holders(iter)
        self._tensors: list[tuple[str, torch.Tensor, int]] = []  # that are no weights, with their versions
        seen: set[int] = set()
        self._refusal = ""  # what nobody can look into, or has buffers of its own that two passes would share
        for name, module in root.named_modules():
            names, path = vars(module), name or type(root).__name__
            self._hooks += [(path, names[kind]) for kind in _HOOK_DICTS if kind in names]
            if describe_compiled(module) is not None:
                self._refusal = self._refusal or f"`{path}` is compiled"
            self._look(path, names, seen, _DEPTH, but=(*_HOOK_DICTS, *_ABOUT_HOOKS))

    def difference(self) -> str:
        """Why what is there now is not what was there then, or nobody can say; "": it is."""
        if self._refusal:
            return self._refusal
        if any(_global_hooks):
            return "a hook on all modules"
        for path, hooks in self._hooks:
            if hooks and not all(map(is_our_hook, hooks)):
                return f"a hook on `{path}`"
        changed = self._dicts.changed() or self._others.changed()
        if changed:
            return f"`{changed}` changes"
        return next(
            (f"`{path}` is written" for path, tensor, version in self._tensors if tensor._version != version), ""
        )

    # ---- inside

    def _look(self, path: str, holder: Any, seen: set[int], depth: int, but: Collection[str] = ()) -> None:
        if id(holder) in seen:
            return
        seen.add(id(holder))
        values = _values(holder)
        (self._dicts if isinstance(holder, dict) else self._others).add(path, holder, values)
        for name, value in zip(_names(holder), values, strict=True):
            if isinstance(value, torch.Tensor):
                self._note_tensor(f"{path}.{name}", value)
            elif _is_opaque(value):
                self._refusal = self._refusal or f"`{path}` has a {type(value).__name__}"
            elif depth and name not in but and not isinstance(value, _NOT_LOOKED_INTO):
                for inner in _holders(value):
                    self._look(f"{path}.{name}", inner, seen, depth - 1)

    def _note_tensor(self, path: str, tensor: torch.Tensor) -> None:
        with without_subclasses():
            if not self._is_weight(tensor) and not tensor.is_inference():
                self._tensors.append((path, tensor, tensor._version))


class _Holders:
    """Dictionaries or other containers, and what was in them. Thousands are compared at each step of a pipeline, while
    the device waits: by a few calls for all of them."""

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
        start = 0
        for path, holder, size in zip(self._paths, self._holders, self._sizes, strict=True):
            values, start = self._values[start : start + size], start + size
            if len(holder) != size or not all(map(_is_alike, self._values_of(holder), values)):
                return path
        return ""


def _holders(value: Any) -> Iterator[Any]:
    """What may be changed without the value becoming another one."""
    if isinstance(value, dict | list | set | tuple | deque):
        yield value
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield attributes


def _is_opaque(value: Any) -> bool:
    """Whether it changes as it is used, and does not show it."""
    kinds = (torch.Generator, random.Random, Iterator)
    return isinstance(value, kinds) or type(value).__name__ in _OPAQUE


def _values(holder: Any) -> Sequence[Any]:
    if isinstance(holder, dict):
        return list(holder.values())
    return list(holder) if isinstance(holder, set | deque) else holder


def _names(holder: Any) -> Sequence[Any]:
    return list(holder) if isinstance(holder, dict) else range(len(holder))


def _is_alike(a: Any, b: Any) -> bool:
    plain = (int, float, bool, str, bytes, complex)
    return a is b or (type(a) is type(b) and isinstance(a, plain) and a == b)
