"""Which adapter describes which class."""

from __future__ import annotations

from torch import nn

from layerstream.errors import AdapterError, brief
from layerstream.model.adapters.base import Adapter
from layerstream.model.adapters.generic import GenericAdapter
from layerstream.model.adapters.named import NAMED

_REGISTERED: dict[type | str, Adapter] = {}  # in the order of registration
_GENERIC = GenericAdapter()


def register_adapter(target: type[nn.Module] | str, adapter: Adapter) -> None:
    """Use `adapter` for components of a class, named by the class or, where it cannot be imported, by its name.

    The nearest class in the component's method resolution order wins; a later registration replaces an earlier.

    Raises:
        AdapterError: `target` is neither a module class nor the name of a class, or `adapter` is no Adapter.
    """
    if isinstance(target, nn.Module):
        raise AdapterError(
            "register_adapter needs a subclass of torch.nn.Module or a class name, not an instance of "
            f"{type(target).__name__}. Give its class: type(model)."
        )
    if not isinstance(target, str) and not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise AdapterError(
            f"register_adapter needs a subclass of torch.nn.Module or a class name, not {brief(target)}."
        )
    if isinstance(target, str) and not target.isidentifier():
        raise AdapterError(
            "register_adapter needs the name of a class by itself, as type(model).__name__ gives it, not "
            f"{brief(target)}."
        )
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"register_adapter needs an Adapter instance, not {brief(adapter)}. Adapter(stacks=[...]) makes one."
        )
    _REGISTERED.pop(target, None)
    _REGISTERED[target] = adapter


def adapter_for(component: nn.Module) -> Adapter:
    """The registered adapter of the component's class, the one that comes with the package, or the generic one."""
    for cls in type(component).__mro__:
        for key, adapter in reversed(_REGISTERED.copy().items()):  # other threads may register meanwhile
            if key in (cls, cls.__name__):
                return adapter
        named = NAMED.get(cls.__name__)
        if named is not None and named.fits(component):
            return named
    return _GENERIC
