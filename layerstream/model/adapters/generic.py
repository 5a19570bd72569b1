"""Finds the stacks of any component by its structure.

A stack is a list of modules of one class that can be called (`nn.ModuleList` of blocks), taken as far out as
possible: what is inside a block belongs to the block. Classes that a model itself calls its blocks
(`_repeated_blocks` in diffusers, `_no_split_modules` in both libraries) may be mixed in one list. A list of
unlike children, of parts that hold repeated blocks, as in a UNet, or of the whole models that a component is a wrapper
of, as in a multi-ControlNet, is looked into. Where there is no stack inside, and children of several classes take turns
(Stable Cascade), it is a stack after all.

A layer with *experts*, of which tokens of text run one and tokens of images another (`mlp` and `gen_mlp` of
MammothModa2, `mlp` and `mlp_moe_gen` of Bagel), is divided: its attention and each expert are blocks by themselves, so
that what a token does not run is not loaded for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from layerstream.hooks.compiled import describe_compiled
from layerstream.model.adapters.base import Adapter
from layerstream.model.units import ComponentLayout, StackLayout

# Lists of far smaller modules than the largest (a projection per block, say) are not worth a copy each.
_LEAST_SHARE_OF_LARGEST = 0.02
# Of a layer that is divided, this much may be in none of its parts (norms): it stays with the component's base.
_MOST_SHARE_OUTSIDE = 0.02
# What tells the expert for images from that for text, in names of children.
_MARK_OF_IMAGES = "gen"
_MARKS_OF_EXPERTS = {_MARK_OF_IMAGES, "und", "moe"}


class GenericAdapter(Adapter):
    """For every component that nothing else is registered for."""

    def layout(self, name: str, component: nn.Module) -> ComponentLayout:
        found = super().layout(name, component)
        return replace(found, stacks=_each_once(found.stacks))

    def find_parts(self, component: nn.Module) -> Sequence[str]:
        """A module without a forward is never called, and one that has an autoencoder beside another model is a whole
        pipeline in one module: `llm_model`, `gen_transformer` and `gen_vae` of MammothModa2."""
        has_blocks = any(isinstance(child, nn.ModuleList) for child in component.children())
        if has_blocks or isinstance(component, nn.ModuleList) or self.find_entry_points(component):
            return ()
        models = [
            (name, child)
            for name, child in component.named_children()
            if (_is_callable(child) or self.find_entry_points(child)) and next(child.parameters(), None) is not None
        ]
        has_autoencoder = any(_is_autoencoder(child) for _, child in models)
        has_others = any(not _is_autoencoder(child) and self.find_stacks(child) for _, child in models)
        is_container = has_others and (has_autoencoder or not _is_callable(component))
        return [name for name, _ in models] if is_container and len(models) >= 2 else ()

    def find_stacks(self, component: nn.Module) -> Sequence[str]:
        if _is_autoencoder(component) or _is_opaque(component):
            return ()
        return stacks_in(component)

    def find_inner(self, block: nn.Module) -> Sequence[str]:
        """The parts of a layer with experts."""
        return experts_and_more(block)

    def find_repeated(self, component: nn.Module) -> bool:
        """Denoisers repeat. What transformers defines encodes a prompt, once or twice a call."""
        return not _is_autoencoder(component) and not type(component).__module__.startswith("transformers.")


def stacks_in(component: nn.Module) -> Sequence[str]:
    """Dotted names of the stacks in a component, whatever kind of component it is."""
    declared = _declared(component, "_repeated_blocks", "_no_split_modules")
    repeated = _declared(component, "_repeated_blocks")
    models = _models_in(component)
    found = [(name, _mean_block_bytes(module)) for name, module in _stacks(component, "", declared, repeated, models)]
    largest = max((size for _, size in found), default=0)
    return [name for name, size in found if size and size >= _LEAST_SHARE_OF_LARGEST * largest]


def experts_and_more(block: nn.Module) -> Sequence[str]:
    """The large children of a layer, if experts for text and for images are among them; else none.

    Experts are children of one class whose names differ in the marks of experts only. All that is large must be in
    modules that can be called, since what is read in another way would be loaded unforeseen, each time; and code that
    was compiled for the whole of a layer would never call hooks inside it.
    """
    sizes = {name: _num_bytes(child) for name, child in block.named_children()}
    least = _LEAST_SHARE_OF_LARGEST * max(sizes.values(), default=0)
    large = {name: child for name, child in block.named_children() if sizes[name] > least}
    outside = _num_bytes(block) - sum(sizes[name] for name in large)
    if not _has_experts(large) or outside > _MOST_SHARE_OUTSIDE * _num_bytes(block):
        return ()
    is_compiled = describe_compiled(block) is not None
    return () if is_compiled or not all(map(_is_callable, large.values())) else list(large)


def _has_experts(children: Mapping[str, nn.Module]) -> bool:
    kinds: dict[tuple[type, tuple[str, ...]], set[bool]] = {}  # by class and name without marks: which are for images
    for name, child in children.items():
        words = name.split("_")
        plain = tuple(word for word in words if word not in _MARKS_OF_EXPERTS)
        kinds.setdefault((type(child), plain), set()).add(_MARK_OF_IMAGES in words)
    return any(len(for_images) == 2 for for_images in kinds.values())


def _is_autoencoder(component: nn.Module) -> bool:
    """VAEs are entered through `encode` and `decode`, are small, and stay whole."""
    return callable(getattr(component, "encode", None)) and callable(getattr(component, "decode", None))


def _is_opaque(module: nn.Module) -> bool:
    """The forward of these asks their first layer's weights for the fast path, before that layer runs."""
    return isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder)


def _declared(component: nn.Module, *attributes: str) -> frozenset[str]:
    """Names of the classes that the model's author calls its blocks."""
    names: list[str] = []
    for module in component.modules():
        for attribute in attributes:
            declared = getattr(type(module), attribute, None)
            if isinstance(declared, list | tuple | set):
                names += [n for n in declared if isinstance(n, str)]
    return frozenset(names)


def _models_in(component: nn.Module) -> nn.ModuleList | None:
    """The list of models that a component is no more than a wrapper of: the nets of a multi-ControlNet."""
    num_bytes = _num_bytes(component)
    lists = [m for m in component.children() if isinstance(m, nn.ModuleList) and _num_bytes(m) == num_bytes > 0]
    if not lists or not all(callable(getattr(m, "save_pretrained", None)) and stacks_in(m) for m in lists[0]):
        return None
    apart = sum(len(list(m.modules())) for m in lists[0].children())
    # Else a block may stand in the stacks of two; what whole nets share goes to the base.
    return lists[0] if apart == len(list(lists[0].modules())) - 1 else None


def _stacks(
    module: nn.Module,
    path: str,
    declared: frozenset[str],
    repeated: frozenset[str],
    models: nn.ModuleList | None,
) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if _is_opaque(child):
            continue
        if isinstance(child, nn.ModuleList) and child is not models and _is_stack(child, declared, repeated):
            yield child_path, child
            continue
        inner = list(_stacks(child, child_path, declared, repeated, models))
        if not inner and isinstance(child, nn.ModuleList) and _is_mixed(child):
            yield child_path, child
        yield from inner


def _is_mixed(modules: nn.ModuleList) -> bool:
    """Whether blocks of several classes take turns in a list. Layers do not: in a feed-forward each is there once."""
    children = [m for m in modules if m is not None and next(m.parameters(), None) is not None]
    counts = Counter(type(m) for m in children)
    return sum(count >= 2 for count in counts.values()) >= 2 and all(map(_is_callable, children))


def _is_stack(modules: nn.ModuleList, declared: frozenset[str], repeated: frozenset[str]) -> bool:
    # A place may be empty: some decoders have a mapper behind every other level.
    children = [m for m in modules if m is not None and next(m.parameters(), None) is not None]
    classes = {type(m).__name__ for m in children}
    if not children or any(not _is_callable(m) for m in children):
        return False
    if classes <= repeated:
        return True  # the author's own blocks, be it one
    # A list of large parts that have such blocks inside (the levels of a UNet) is looked into.
    if any(type(inner).__name__ in repeated for m in children for inner in list(m.modules())[1:]):
        return False
    return len(children) >= 2 and (len(classes) == 1 or classes <= declared)


def _is_callable(module: nn.Module) -> bool:
    """Containers without a forward (a ModuleList in a ModuleList) are never called, so hooks on them never run."""
    is_scripted = isinstance(module, torch.jit.ScriptModule)  # whose class has no forward to ask for
    return is_scripted or type(module).forward is not nn.Module.forward


def _mean_block_bytes(stack: nn.Module) -> float:
    sizes = [_num_bytes(m) for m in stack.children()]
    return sum(sizes) / len(sizes)


def _num_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _each_once(stacks: Sequence[StackLayout]) -> tuple[StackLayout, ...]:
    """The stacks with each block where it comes first: a model may run one module in several places (an expert that all
    layers share, a block in two lists). What is inside another block is part of that one."""
    modules = {id(module): module for stack in stacks for _, module in stack.blocks}
    inside = {id(part) for module in modules.values() for part in list(module.modules())[1:]}
    seen: set[int] = set(inside)
    settled = []
    for stack in stacks:
        blocks = []
        for name, module in stack.blocks:
            if id(module) not in seen:
                seen.add(id(module))
                blocks.append((name, module))
        settled.append(StackLayout(stack.name, tuple(blocks)))
    return tuple(settled)
