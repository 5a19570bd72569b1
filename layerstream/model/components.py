"""What a pipeline consists of: its modules by name, and how their adapters describe them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from layerstream.errors import AdapterError, PipelineError, brief
from layerstream.hooks.compiled import uncompiled
from layerstream.model.adapters.registry import adapter_for
from layerstream.model.units import ComponentLayout

_MOST_TOLD = 8  # things in the place of modules, in a message


def is_plain(pipe: Any) -> bool:
    """Whether a pipeline is an object of an ordinary class, whose attributes are its modules."""
    return not isinstance(pipe, nn.Module | Mapping) and not isinstance(_components_attribute(pipe), Mapping)


def _components_attribute(pipe: Any) -> Any:
    """What an object has as `.components`; None: nothing.

    Raises:
        PipelineError: that cannot be read, as with a diffusers pipeline that lacks what it was made with.
    """
    is_declared = inspect.getattr_static(pipe, "components", None) is not None
    try:
        return pipe.components if is_declared else getattr(pipe, "components", None)
    except Exception as exc:
        raise PipelineError(
            f"the `.components` of {type(pipe).__name__} cannot be read ({type(exc).__name__}: "
            f"{' '.join(str(exc).split())}). Give the pipeline what it lacks, or offload() a dict of its modules."
        ) from exc


def held_modules(pipe: Any) -> dict[str, nn.Module]:
    """The modules that the pipeline holds by name, as it calls them (compiled or not), each once; there may be none.

    Raises:
        PipelineError: it is no pipeline, module, dict, or object with attributes; or its components cannot be read.
    """
    found: Mapping[Any, Any]
    if isinstance(pipe, nn.Module):
        found = {type(uncompiled(pipe)).__name__: pipe}
    elif isinstance(pipe, Mapping):
        found = pipe
    elif isinstance(components := _components_attribute(pipe), Mapping):
        found = components
    elif hasattr(pipe, "__dict__") and not isinstance(pipe, type):
        found = vars(pipe)
    else:
        raise PipelineError(
            f"cannot stream a {type(pipe).__name__}: it is no diffusers pipeline (no `.components`), no "
            "torch.nn.Module, no dict of modules and no object with modules as attributes."
        )
    modules: dict[str, nn.Module] = {}
    for name, module in found.items():  # tokenizers, schedulers and None are passed over
        if isinstance(module, nn.Module) and not any(
            uncompiled(module) is uncompiled(known) for known in modules.values()
        ):
            modules[str(name)] = module
    return modules


def containers_of(pipe: Any) -> list[nn.Module]:
    """Modules that the pipeline holds and that are taken apart, since their children are what runs."""
    return [uncompiled(module) for module in held_modules(pipe).values() if _parts_of(module)]


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's components by name, as it calls them (compiled or not), each once; there may be none.

    Of a module that is a container of models, these are its parts; and the container, if it has more than they.

    Raises:
        PipelineError: see `held_modules`.
        AdapterError: a part is named that does not exist.
    """
    components: dict[str, nn.Module] = {}
    for name, module in held_modules(pipe).items():
        for inner, part in _components_in(name, module, is_alone=isinstance(pipe, nn.Module)):
            if not any(uncompiled(part) is uncompiled(known) for known in components.values()):
                components[inner] = part
    return components


def _components_in(name: str, module: nn.Module, *, is_alone: bool) -> Iterator[tuple[str, nn.Module]]:
    """A module that the pipeline holds, or what it is a container of."""
    parts = _parts_of(module)
    for path, part in parts.items():
        yield path if is_alone else f"{name}.{path}", part
    if not parts or _has_more_than(module, list(parts.values())):
        yield name, module


def _parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The children that are components themselves; none: the module is one."""
    container = uncompiled(module)
    children = dict(container.named_children())
    parts = {}
    for path in adapter_for(container).parts_of(container):
        if path not in children:
            raise AdapterError(
                f"part `{path}` does not exist in `{type(container).__name__}`. Its children are: "
                f"{', '.join(children) or 'none'}."
            )
        parts[path] = children[path]
    return parts


def _has_more_than(module: nn.Module, parts: list[nn.Module]) -> bool:
    """Whether there are weights outside of these parts."""
    inside = {id(t) for part in parts for t in [*part.parameters(), *part.buffers()]}
    return any(id(t) not in inside for t in [*module.parameters(), *module.buffers()])


def some_components_of(pipe: Any) -> dict[str, nn.Module]:
    """`components_of`, of which there must be one that has weights, and none whose weights have no shape.

    Raises:
        PipelineError: see there; or that is not so.
    """
    _refuse_uninitialized(held_modules(pipe))
    components = components_of(pipe)
    if not components:
        raise PipelineError(f"{type(pipe).__name__} has no modules{_held_instead(pipe)}")
    if not any(next(_tensors_of(module), None) for module in components.values()):
        named = ", ".join(f"`{name}` ({type(uncompiled(module)).__name__})" for name, module in components.items())
        has = "has" if len(components) == 1 else "have"
        raise PipelineError(f"{named} {has} no parameters and no buffers: there are no weights to stream.")
    return components


def _held_instead(pipe: Any) -> str:
    """The rest of the sentence about a pipeline without modules."""
    if is_plain(pipe) and hasattr(pipe, "components"):
        return f": its `.components` is a {type(pipe.components).__name__}, and no dict of modules by name."
    found = pipe if isinstance(pipe, Mapping) else vars(pipe) if is_plain(pipe) else {}
    told = [f"{brief(k)}: {type(v).__name__}" for k, v in islice(found.items(), _MOST_TOLD)]
    if len(found) > _MOST_TOLD:
        told.append(f"{len(found) - _MOST_TOLD} more")
    held = ", ".join(told)
    return f"{f' (it holds {held})' if held else ''}: there are no weights to stream."


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _refuse_uninitialized(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        for path, tensor in _tensors_of(uncompiled(module)):
            if is_lazy(tensor):
                raise PipelineError(
                    f"`{name}.{path}` has no shape yet ({type(tensor).__name__}): it gets one in the first forward. "
                    "Run the model once before streaming it."
                )


def refuse_scripted(components: Mapping[str, nn.Module]) -> None:
    """Raise if a component is, or has inside, a module that torch.jit has compiled.

    Raises:
        PipelineError: names it; its code holds the weights itself, where nothing can be put in their place.
    """
    for name, component in components.items():
        for path, module in uncompiled(component).named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                where = f"{name}.{path}" if path else name
                raise PipelineError(
                    f"`{where}` ({type(module).__name__}) was compiled by torch.jit, whose code holds its weights "
                    "itself: it cannot be streamed. Put the module that it was made of in its place, or give offload() "
                    "a dict of the other components."
                )


def layouts_of(pipe: Any) -> list[ComponentLayout]:
    """The pipeline's components as their adapters describe them, as they are now."""
    layouts = []
    for name, module in components_of(pipe).items():
        root = uncompiled(module)
        parts = _parts_of(module)
        if parts:  # what a container has beside them
            layout = ComponentLayout(name, root, (), without=tuple(parts.values()))
        else:
            layout = adapter_for(root).layout(name, root)
        layouts.append(replace(layout, called=module))
    return layouts
