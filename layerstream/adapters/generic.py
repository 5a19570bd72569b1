"""Finds the stacks of any component by its structure.

A stack is a list of modules of one class that can be called (`nn.ModuleList` of blocks), taken as far out as
possible: what is inside a block belongs to the block. Classes that a model itself calls its blocks
(`_repeated_blocks` in diffusers, `_no_split_modules` in both libraries) may be mixed in one list. A list of
unlike children, as in a UNet, is looked into.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from layerstream.adapters.base import Adapter

# Lists of far smaller modules than the largest (a projection per block, say) are not worth a copy each.
_LEAST_SHARE_OF_LARGEST = 0.02


class GenericAdapter(Adapter):
    """For every component that nothing else is registered for."""

    def find_stacks(self, component: nn.Module) -> Sequence[str]:
        if _is_autoencoder(component):
            return ()
        found = [
            (name, _mean_block_bytes(module)) for name, module in _stacks(component, "", _block_classes(component))
        ]
        largest = max((size for _, size in found), default=0)
        return [name for name, size in found if size and size >= _LEAST_SHARE_OF_LARGEST * largest]

    def find_repeated(self, component: nn.Module) -> bool:
        """Denoisers repeat. What transformers defines encodes a prompt, once or twice a call."""
        return not _is_autoencoder(component) and not type(component).__module__.startswith("transformers.")


def _is_autoencoder(component: nn.Module) -> bool:
    """VAEs are entered through `encode` and `decode`, are small, and stay whole."""
    return callable(getattr(component, "encode", None)) and callable(getattr(component, "decode", None))


def _block_classes(component: nn.Module) -> frozenset[str]:
    """Names of the classes that the model's author calls its blocks."""
    names: list[str] = []
    for module in component.modules():
        for attribute in ("_repeated_blocks", "_no_split_modules"):
            declared = getattr(type(module), attribute, None)
            if isinstance(declared, list | tuple | set):
                names += [n for n in declared if isinstance(n, str)]
    return frozenset(names)


def _stacks(module: nn.Module, path: str, block_classes: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        # The encoder's own forward asks its first layer's weights for the fast path, before that layer runs.
        if isinstance(child, nn.TransformerEncoder | nn.TransformerDecoder):
            continue
        if isinstance(child, nn.ModuleList) and _is_stack(child, block_classes):
            yield child_path, child
        else:
            yield from _stacks(child, child_path, block_classes)


def _is_stack(modules: nn.ModuleList, block_classes: frozenset[str]) -> bool:
    children = [m for m in modules if next(m.parameters(), None) is not None]
    if len(children) < 2 or any(not _is_callable(m) for m in children):
        return False
    classes = {type(m).__name__ for m in children}
    return len(classes) == 1 or classes <= block_classes


def _is_callable(module: nn.Module) -> bool:
    """Containers without a forward (a ModuleList in a ModuleList) are never called, so hooks on them never run."""
    return type(module).forward is not nn.Module.forward


def _mean_block_bytes(stack: nn.Module) -> float:
    sizes = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in stack.children()]
    return sum(sizes) / len(sizes)
