"""What a pipeline consists of: its modules by name, and how their adapters describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from layerstream.adapters.registry import adapter_for
from layerstream.compiled import uncompiled
from layerstream.errors import PipelineError
from layerstream.units import ComponentLayout


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's modules by name, as it calls them (compiled or not), each once; there may be none.

    Raises:
        PipelineError: it is no pipeline, module or dict.
    """
    found: Mapping[Any, Any]
    if isinstance(pipe, nn.Module):
        found = {type(uncompiled(pipe)).__name__: pipe}
    elif isinstance(pipe, Mapping):
        found = pipe
    elif isinstance(getattr(pipe, "components", None), Mapping):
        found = pipe.components
    else:
        raise PipelineError(
            f"cannot stream a {type(pipe).__name__}: it is no diffusers pipeline (no `.components`), no "
            "torch.nn.Module and no dict of modules."
        )
    components: dict[str, nn.Module] = {}
    for name, module in found.items():  # tokenizers, schedulers and None are passed over
        if isinstance(module, nn.Module) and not any(
            uncompiled(module) is uncompiled(known) for known in components.values()
        ):
            components[str(name)] = module
    return components


def some_components_of(pipe: Any) -> dict[str, nn.Module]:
    """`components_of`, of which there must be one.

    Raises:
        PipelineError: see there; or it has no modules.
    """
    components = components_of(pipe)
    if not components:
        held = ", ".join(f"{k!r}: {type(v).__name__}" for k, v in pipe.items()) if isinstance(pipe, Mapping) else ""
        raise PipelineError(
            f"{type(pipe).__name__} has no modules{f' (it holds {held})' if held else ''}: there are no weights to "
            "stream."
        )
    return components


def layouts_of(pipe: Any) -> list[ComponentLayout]:
    """The pipeline's components as their adapters describe them, as they are now."""
    return [
        replace(adapter_for(uncompiled(module)).layout(name, uncompiled(module)), called=module)
        for name, module in components_of(pipe).items()
    ]
