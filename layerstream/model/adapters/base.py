"""What an adapter is, and how its description becomes a layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from layerstream.errors import AdapterError, brief
from layerstream.model.units import ComponentLayout, StackLayout

# Where diffusers' pipelines enter models other than by calling them. `generate` ends in the model's forward.
_ENTRY_POINTS = ("encode", "decode", "get_image_features", "get_text_features", "get_image_tokens")


@dataclass(frozen=True)
class Adapter:
    """Says which blocks of a component stream. Describes; moves nothing.

    For most models the names of its stacks are all there is to say:

        layerstream.register_adapter("MyTransformer", Adapter(stacks=["layers"], is_repeated=True))

    Args:
        stacks: dotted names, inside the component, of the containers whose children are the blocks (an
            `nn.ModuleList`, usually), in the order they run. Empty: the component is one unit.
        is_repeated: the component runs many times a call (a denoiser), so its blocks are kept on the device first.
        resident: dotted names of stacks, of single blocks, or of large single layers outside of stacks, that are no
            units of their own: they come and go with the component's base.
        entry_points: names of methods by which pipelines enter the component, or a part of it, without its forward
            (`decode`, `image_head.sample`), beside those that are known. Those of which each call is a pass: what is
            measured of a call is known when it returns.
        parts: names of children that are components themselves, where the module is a container whose own forward is
            not what runs. What is in none of them stays with the container, as one unit. Each part has an adapter of
            its own, so that nothing else can be said here.

    Subclass and override `find_stacks` where the names depend on the component.
    """

    stacks: Sequence[str] = ()
    is_repeated: bool = False
    resident: Sequence[str] = ()
    entry_points: Sequence[str] = ()
    parts: Sequence[str] = ()

    def __post_init__(self) -> None:
        for argument in ("stacks", "resident", "entry_points", "parts"):
            value = getattr(self, argument)
            what = f"Adapter({argument}=...)"
            if not isinstance(value, Sequence):  # it is asked again and again, and in an order
                raise AdapterError(f"{what}: {brief(value)} is no list of names.")
            names_in(value, what, is_once=argument == "stacks")
        if not isinstance(self.is_repeated, bool):
            raise AdapterError(f"Adapter(is_repeated=...): {brief(self.is_repeated)} is neither True nor False.")
        beside = [argument for argument in ("stacks", "resident", "entry_points") if getattr(self, argument)]
        if self.parts and beside:
            raise AdapterError(
                f"Adapter(parts=..., {beside[0]}=...): a container is taken apart into its parts, and each is streamed "
                "by the adapter of its own class. Register one for that class, and leave it out here."
            )

    def find_parts(self, component: nn.Module) -> Sequence[str]:
        """Names of the children that are components themselves; none: the module is one."""
        return self.parts

    def find_stacks(self, component: nn.Module) -> Sequence[str]:
        """Dotted names of the stacks of this component, in the order they run."""
        return self.stacks

    def find_inner(self, block: nn.Module) -> Sequence[str]:
        """Names of the children of a block that are blocks in its place, where a pass runs only some of them; none: it
        is one block. What else it holds is part of the component's base."""
        return ()

    def find_repeated(self, component: nn.Module) -> bool:
        """Whether this component runs many times a call."""
        return self.is_repeated

    def find_entry_points(self, component: nn.Module) -> Sequence[str]:
        """Methods of this component that pipelines call instead of its forward."""
        known = [m for m in _ENTRY_POINTS if callable(getattr(type(component), m, None))]
        return list(dict.fromkeys([*known, *self.entry_points]))

    def layout(self, name: str, component: nn.Module) -> ComponentLayout:
        """The component's stacks and blocks.

        Raises:
            AdapterError: a name does not exist in the component, or does not hold modules.
        """
        modules = dict(component.named_modules())
        for wanted in self.resident:
            if wanted not in modules:
                raise AdapterError(self._unknown(name, component, wanted, "resident block"))
        stacks = []
        for stack in self._found("find_stacks", component):
            if stack not in modules:
                raise AdapterError(self._unknown(name, component, stack, "stack"))
            if stack in self.resident:
                continue
            prefix = f"{stack}." if stack else ""  # "": the component's own children are the blocks
            blocks = tuple(
                inner
                for child, module in modules[stack].named_children()
                if f"{prefix}{child}" not in self.resident and next(_weights(module), None) is not None
                for inner in self._blocks_of(f"{prefix}{child}", module)
            )
            if not blocks and not len(list(modules[stack].children())):
                raise AdapterError(
                    f"stack `{stack}` of `{name}` ({type(component).__name__}) is a {type(modules[stack]).__name__} "
                    "without children. Name the container whose children are the blocks."
                )
            stacks.append(StackLayout(stack, blocks))
        self._refuse_inside(name, component, [block for stack in stacks for block, _ in stack.blocks])
        stacks = _with_large_leaves(component, stacks, self.resident)
        entry_points = self._found("find_entry_points", component)
        missing = [m for m in entry_points if not has_method(component, m)]
        if missing:
            raise AdapterError(f"`{name}` ({type(component).__name__}) has no method {', '.join(missing)} to enter by.")
        return ComponentLayout(name, component, tuple(stacks), self.find_repeated(component), entry_points=entry_points)

    def _refuse_inside(self, name: str, component: nn.Module, blocks: Iterable[str]) -> None:
        """Raise if a part of a block is to be resident: it comes and goes with its block."""
        for block in blocks:
            inside = next((wanted for wanted in self.resident if wanted.startswith(f"{block}.")), None)
            if inside is not None:
                raise AdapterError(
                    f"resident block `{inside}` of `{name}` ({type(component).__name__}) is inside the block "
                    f"`{block}`, and streams with it. Name `{block}`, or leave it out."
                )

    def _found(self, method: str, component: nn.Module) -> tuple[str, ...]:
        """The names that a method of this adapter, or of a subclass, gives."""
        what = f"{type(self).__name__}.{method}() of {type(component).__name__}"
        return names_in(getattr(self, method)(component), what, is_once=method == "find_stacks")

    def parts_of(self, component: nn.Module) -> Sequence[str]:
        """What `find_parts` gives, which may be a user's.

        Raises:
            AdapterError: no list of names.
        """
        return self._found("find_parts", component)

    def _blocks_of(self, path: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """A block, or those inside that are blocks in its place, by their names in the component."""
        inner = self._found("find_inner", block)
        missing = [child for child in inner if not _has_module(block, child)]
        if missing:
            children = ", ".join(name for name, _ in block.named_children()) or "none"
            raise AdapterError(
                f"{type(self).__name__}.find_inner() of {type(block).__name__} names {', '.join(missing)}, which "
                f"`{path}` does not have. Its children are: {children}."
            )
        if not inner:
            yield path, block
        for child in inner:
            if f"{path}.{child}" not in self.resident:
                yield f"{path}.{child}", block.get_submodule(child)

    def _unknown(self, name: str, component: nn.Module, wanted: str, what: str) -> str:
        found = [n for n, m in component.named_modules() if isinstance(m, nn.ModuleList)]
        return (
            f"{what} `{wanted}` does not exist in `{name}` ({type(component).__name__}). "
            f"Its module lists are: {', '.join(found) or 'none'}."
        )


def names_in(value: object, what: str, *, is_once: bool) -> tuple[str, ...]:
    """The names in what a user gave as a list of them, each once.

    Args:
        what: where it comes from, for the error.
        is_once: naming one twice is an error.
    Raises:
        AdapterError: it is no list of names.
    """
    if isinstance(value, str):
        raise AdapterError(f"{what}: {brief(value)} is a string. Write [{brief(value)}].")
    if not isinstance(value, Iterable) or isinstance(value, set | frozenset):  # which have no order
        raise AdapterError(f"{what}: {brief(value)} is no list of names.")
    names: dict[str, None] = {}
    for name in value:
        if not isinstance(name, str):
            raise AdapterError(f"{what}: {brief(name)} is no name.")
        if is_once and name in names:
            raise AdapterError(f"{what}: `{name}` is named twice. Each block is to be listed once.")
        names[name] = None
    return tuple(names)


def _has_module(owner: nn.Module, dotted: str) -> bool:
    return any(name == dotted for name, _ in owner.named_modules())


def has_method(component: nn.Module, dotted: str) -> bool:
    """Whether a component has a method of this dotted name. The forward of a module that has none is no method."""
    path, _, method = dotted.rpartition(".")
    try:
        owner = component.get_submodule(path)
    except AttributeError:
        return False
    if method == "forward" and type(owner).forward is nn.Module.forward:
        return "forward" in vars(owner)
    found = getattr(owner, method, None)
    # What every module has moves, casts or describes it, and is no way to enter it.
    is_of_all = method != "forward" and hasattr(nn.Module, method)
    return callable(found) and not isinstance(found, nn.Module) and not is_of_all


def _with_large_leaves(
    component: nn.Module, stacks: Sequence[StackLayout], resident: Sequence[str]
) -> list[StackLayout]:
    """An embedding or projection outside the blocks that is larger than any of them is a unit of its own, unless it is
    to be none."""
    blocks = [block for stack in stacks for _, block in stack.blocks]
    if not blocks:
        return list(stacks)
    largest = max(_num_bytes(block) for block in blocks)
    inside = {id(m) for block in blocks for m in block.modules()}
    before: list[StackLayout] = []
    after: list[StackLayout] = []
    taken: set[tuple[type, frozenset[int]]] = set()  # layers that share their weights with one like it are one unit
    for path, module in component.named_modules():
        # Not subclasses of Linear: attention modules have some that they never call.
        is_leaf = isinstance(module, nn.Embedding) or type(module) is nn.Linear
        if path and path not in resident and is_leaf and id(module) not in inside and _num_bytes(module) > largest:
            weights = type(module), frozenset(id(t) for t in _weights(module))
            if weights in taken:
                continue
            taken.add(weights)
            stack = StackLayout(path, ((path, module),))
            (before if isinstance(module, nn.Embedding) else after).append(stack)
    return [*before, *stacks, *after]


def _num_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in _weights(module))


def _weights(module: nn.Module):  # type: ignore[no-untyped-def]  # a chain of two generators, used for emptiness
    yield from module.parameters()
    yield from module.buffers()
