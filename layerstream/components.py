"""What a pipeline consists of: its modules by name, and how their adapters describe them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layerstream.adapters.registry import adapter_for
from layerstream.compiled import uncompiled
from layerstream.errors import AdapterError, PipelineError
from layerstream.units import ComponentLayout


def is_plain(pipe: Any) -> bool:
    """Whether a pipeline is an object of an ordinary class, whose attributes are its modules."""
    return not isinstance(pipe, nn.Module | Mapping) and not isinstance(getattr(pipe, "components", None), Mapping)


def held_modules(pipe: Any) -> dict[str, nn.Module]:
    """The modules that the pipeline holds by name, as it calls them (compiled or not), each once; there may be none.

    Raises:
        PipelineError: it is no pipeline, module, dict, or object with attributes.
    """
    found: Mapping[Any, Any]
    if isinstance(pipe, nn.Module):
        found = {type(uncompiled(pipe)).__name__: pipe}
    elif isinstance(pipe, Mapping):
        found = pipe
    elif isinstance(getattr(pipe, "components", None), Mapping):
        found = pipe.components
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
    for path in adapter_for(container).find_parts(container):
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
    """`components_of`, of which there must be one.

    Raises:
        PipelineError: see there; or it has no modules.
    """
    components = components_of(pipe)
    if not components:
        found = pipe if isinstance(pipe, Mapping) else vars(pipe) if is_plain(pipe) else {}
        held = ", ".join(f"{k!r}: {type(v).__name__}" for k, v in found.items())
        raise PipelineError(
            f"{type(pipe).__name__} has no modules{f' (it holds {held})' if held else ''}: there are no weights to "
            "stream."
        )
    return components


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
