"""Divides components into units: every parameter and buffer gets one owner.

A tensor of a block belongs to that block. What lies outside the stacks, and what more than one unit uses, belongs to
the component's base, which stays on the device. Tied weights (one object, or the same bytes) are stored once and
stay tied; views that only overlap each get bytes of their own on the device, as `.to(device)` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from layerstream.blocks import UnitSpec, WholeSpec, unit_bytes
from layerstream.device.base import engine_tensors
from layerstream.errors import AdapterError, PipelineError
from layerstream.torch_private import NormBase
from layerstream.weights.binding import BoundTensor, UnitBinding

_Item = TypeVar("_Item")

# Of pieces, about. A slot is memory in which nothing stays: by the planner's model a token of GLM-Image, whose blocks
# take 389 MiB, is 9 % faster at 12 GiB than with pieces of 320 MiB. Ones of 64 MiB are slower for most: all of a
# block's are there while it runs, so there are more slots; and each costs host time.
PIECE_BYTES = 160 * 2**20


@dataclass(frozen=True)
class StackLayout:
    """An ordered list of blocks; `name` is the dotted name of what holds them."""

    name: str
    blocks: tuple[tuple[str, nn.Module], ...]


@dataclass(frozen=True)
class ComponentLayout:
    """A component and its stacks, as an adapter describes it.

    Attributes:
        is_repeated: it runs many times a call (a denoiser, not a text encoder).
        called: the module that the pipeline calls, where that is `torch.compile(root)`; `root` itself otherwise.
        entry_points: dotted names of methods by which the pipeline enters it beside its forward: `decode` of a VAE.
        without: children that are components themselves, and no part of this one.
    """

    name: str
    root: nn.Module
    stacks: tuple[StackLayout, ...]
    is_repeated: bool = False
    called: nn.Module | None = None
    entry_points: tuple[str, ...] = ()
    without: tuple[nn.Module, ...] = ()

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Its modules by their dotted names, each once."""
        others = {id(module) for part in self.without for module in part.modules()}
        return ((path, module) for path, module in self.root.named_modules() if id(module) not in others)

    @property
    def outermost(self) -> nn.Module:
        return self.root if self.called is None else self.called


@dataclass(eq=False)
class Unit:
    """A unit with its tensors.

    Attributes:
        module: the block, also of each of its pieces; None for a base.
        twins: other modules that have the same weights, of which each may be called in its place.
    """

    spec: UnitSpec
    binding: UnitBinding
    module: nn.Module | None
    twins: tuple[nn.Module, ...] = ()

    @property
    def called(self) -> tuple[nn.Module, ...]:
        """Modules whose forward needs the unit; none of a base."""
        return () if self.module is None else (self.module, *self.twins)


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor hangs in the module tree, to notice when code replaced it by another."""

    module: nn.Module
    kind: str  # "_parameters" or "_buffers"
    name: str
    tensor: torch.Tensor


@dataclass(eq=False)
class Division:
    """All units of a pipeline in plan order, and what does not move as plain bytes.

    Attributes:
        units: bases and blocks, component by component; `units[i].spec.index == i` as `divide` gives them.
        places: every place of every tensor that moves.
        others: by component, places of tensors that are no plain bytes: subclasses, sparse and quantised ones.
        stand_ins: ordinary tensors, over the same bytes, that take the place of tensors made under inference mode
            while streaming is on; pointing one of those elsewhere would break it.
    """

    units: list[Unit]
    places: list[TensorPlace]
    others: dict[str, list[TensorPlace]]
    stand_ins: list[tuple[TensorPlace, torch.Tensor]]

    def whole(self) -> list[WholeSpec]:
        """What stays on the device as it is, by component; each tensor once."""
        seen: set[int] = set()
        found = []
        for component, places in self.others.items():
            new = {id(p.tensor): p.tensor for p in places if id(p.tensor) not in seen}
            seen.update(new)
            kinds = tuple(sorted({_kind(t) for t in new.values()}))
            if new:
                found.append(WholeSpec(component, len(new), sum(map(whole_bytes, new.values())), kinds))
        return found


def _kind(tensor: torch.Tensor) -> str:
    """What a tensor that does not move is called: by its class, where that says something."""
    name = type(tensor).__name__
    return f"nested {name}" if tensor.is_nested and type(tensor) in (torch.Tensor, nn.Parameter) else name


def whole_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the plain tensors inside a tensor that is none."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(whole_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.layout is torch.sparse_coo:
        return whole_bytes(tensor._indices()) + whole_bytes(tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return sum(whole_bytes(part) for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()))
    return tensor.numel() * tensor.element_size()


def divide(layouts: Sequence[ComponentLayout], *, is_preview: bool = False) -> Division:
    """Assign every tensor of the components to a unit; changes nothing.

    Args:
        is_preview: weights on the meta device are described as well; nothing of it can be streamed.
    Raises:
        AdapterError: a block stands twice, or inside another.
        PipelineError: weights on the meta device, which have no bytes to stream.
    """
    owners: list[_Owner] = []
    division = Division([], [], {}, [])
    uses: dict[int, _Use] = {}  # one per tensor object
    for layout in layouts:
        base = _Owner(f"{layout.name} (base)", layout, None, None)
        blocks = [
            _Owner(f"{layout.name}.{name}", layout, stack.name, module)
            for stack in layout.stacks
            for name, module in stack.blocks
        ]
        _refuse_overlaps(blocks)
        owners += [base, *blocks]
        seen: set[int] = set()
        others = {(id(part), id(base)) for part in layout.without}
        for path, module, owner in _walk(layout.root, "", base, {id(b.module): b for b in blocks}, others):
            for place in _places(module):
                name = ".".join(part for part in (layout.name, path, place.name) if part)
                if id(module) in seen:
                    if id(place.tensor) in uses:
                        uses[id(place.tensor)].used_by(owner, module)
                    continue
                if not _moves(place.tensor):
                    division.others.setdefault(layout.name, []).append(place)
                    continue
                if place.tensor.is_meta and not is_preview:
                    raise PipelineError(
                        f"`{name}` is on the meta device: it has no bytes to stream. Load the weights first "
                        "(from_pretrained without device_map, or load_state_dict(..., assign=True))."
                    )
                division.places.append(place)
                use = uses.get(id(place.tensor))
                if use is None:
                    tensor = _ordinary(place.tensor) if place.tensor.is_inference() else place.tensor
                    use = uses[id(place.tensor)] = _Use(name, place.tensor, tensor)
                use.used_by(owner, module)
                if place.tensor.is_inference():
                    division.stand_ins.append((place, use.tensor))
            seen.add(id(module))
    bases = {id(d.layout): d for d in owners if d.module is None}
    also: dict[int, set[str]] = {}  # by base: other components that use what it holds
    for group in _sharing_bytes(uses.values(), lambda use: use.found):
        users = [user for use in group for user in use.users]
        leaf = _leaf_of(group)
        is_shared = leaf is None and any(user is not users[0] for user in users)
        for use in group:
            use.owner = owner = leaf or (bases[id(users[0].layout)] if is_shared else users[0])
            also.setdefault(id(owner), set()).update(u.layout.name for u in users if u.layout is not owner.layout)
    for use in uses.values():  # in the order of the modules
        assert use.owner is not None
        writer = next((module for module in use.modules if isinstance(module, NormBase)), None)
        is_statistic = writer is not None and use.name.rpartition(".")[2] in ("running_mean", "running_var")
        use.owner.tensors.append(BoundTensor(use.name, use.tensor, writer if is_statistic else None))
    for owner in owners:
        pieces = _pieces(owner.tensors) if owner.module is not None else [owner.tensors]
        for number, tensors in enumerate(pieces):
            if tensors:
                is_whole = len(pieces) == 1
                spec = UnitSpec(
                    index=len(division.units),
                    name=owner.name if is_whole else f"{owner.name} ({number + 1} of {len(pieces)})",
                    component=owner.layout.name,
                    stack=owner.stack,
                    num_bytes=unit_bytes(b.num_bytes for b in tensors),
                    is_repeated=owner.layout.is_repeated,
                    also=tuple(sorted(also[id(owner)])),
                    block=None if is_whole else owner.name,
                )
                division.units.append(Unit(spec, UnitBinding(tensors), owner.module, tuple(owner.twins)))
    return division


def part_of(division: Division, layouts: Sequence[ComponentLayout]) -> Division:
    """What a division holds of some of its components, which share no weights with the others.

    The units keep their indices.
    """
    names = {layout.name for layout in layouts}
    inside = {id(module) for layout in layouts for _, module in layout.modules()}
    return Division(
        units=[unit for unit in division.units if unit.spec.component in names],
        places=[place for place in division.places if id(place.module) in inside],
        others={name: places for name, places in division.others.items() if name in names},
        stand_ins=[(place, tensor) for place, tensor in division.stand_ins if id(place.module) in inside],
    )


def _pieces(tensors: Sequence[BoundTensor]) -> list[list[BoundTensor]]:
    """A block's tensors in pieces of about equal size, in their order; those that share memory stay together."""
    total = sum(b.num_bytes for b in tensors)
    count = round(total / PIECE_BYTES)
    if count < 2:
        return [list(tensors)]
    pieces: list[list[BoundTensor]] = [[] for _ in range(count)]
    number_of: dict[int, int] = {}  # by the id of a tensor's group, the piece of its first one
    groups = {id(b): min(map(id, group)) for group in _sharing_bytes(tensors, lambda b: b.home) for b in group}
    done = 0
    for bound in tensors:
        # By where its middle falls among all bytes.
        fair = min(count - 1, (done + bound.num_bytes // 2) * count // total)
        pieces[number_of.setdefault(groups[id(bound)], fair)].append(bound)
        done += bound.num_bytes
    return [piece for piece in pieces if piece]


def connected(layouts: Sequence[ComponentLayout], division: Division) -> list[list[ComponentLayout]]:
    """The components in groups that share weights; most stand alone."""
    groups = {layout.name: {layout.name} for layout in layouts}
    for unit in division.units:
        for other in unit.spec.also:
            joined = groups[unit.spec.component] | groups[other]
            for name in joined:
                groups[name] = joined
    found = [[layout for layout in layouts if layout.name in groups[first.name]] for first in layouts]
    return [group for position, group in enumerate(found) if group[0] is layouts[position]]


@dataclass(eq=False)
class _Owner:
    """A unit while its tensors are being collected."""

    name: str
    layout: ComponentLayout
    stack: str | None
    module: nn.Module | None

    def __post_init__(self) -> None:
        self.tensors: list[BoundTensor] = []
        self.twins: list[nn.Module] = []


@dataclass(eq=False)
class _Use:
    """A tensor and the units that use it; `tensor` stands in for `found` where that cannot be bound."""

    name: str
    found: torch.Tensor
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        self.users: list[_Owner] = []
        self.modules: list[nn.Module] = []  # of each user, the one that the tensor hangs in
        self.owner: _Owner | None = None

    def used_by(self, user: _Owner, module: nn.Module) -> None:
        self.users.append(user)
        self.modules.append(module)


def _leaf_of(group: Sequence[_Use]) -> _Owner | None:
    """The unit of a single layer whose weight hangs in like layers outside the stacks, too: T5 has its embedding twice,
    as `shared` and as `encoder.embed_tokens`. All of them are that unit."""
    pairs = [pair for use in group for pair in zip(use.users, use.modules, strict=True)]
    owners = {id(user): user for user, _ in pairs if user.module is not None}
    if len(owners) != 1 or len(pairs) == 1:
        return None
    (owner,) = owners.values()
    assert owner.module is not None
    weights = {id(place.tensor) for place in _places(owner.module)}
    others = [module for user, module in pairs if user.module is None]
    are_alike = all(
        type(module) is type(owner.module) and {id(place.tensor) for place in _places(module)} == weights
        for module in others
    )
    is_leaf = next(owner.module.children(), None) is None
    if not is_leaf or not are_alike or any(user.layout is not owner.layout for user, _ in pairs):
        return None
    owner.twins += [module for module in others if module not in owner.twins]
    return owner


def _walk(
    module: nn.Module, path: str, owner: _Owner, blocks: dict[int, _Owner], done: set[tuple[int, int]]
) -> Iterator[tuple[str, nn.Module, _Owner]]:
    """Every module once for each unit it is part of, however often it is reached."""
    owner = blocks.get(id(module), owner)
    if (id(module), id(owner)) in done:
        return
    done.add((id(module), id(owner)))
    yield path, module, owner
    for name, child in module.named_children():
        yield from _walk(child, f"{path}.{name}" if path else name, owner, blocks, done)


def _refuse_overlaps(blocks: Sequence[_Owner]) -> None:
    """A module inside two blocks is legal (its tensors become part of the base); a block inside a block is not."""
    names = {id(block.module): block.name for block in blocks}
    for position, block in enumerate(blocks):
        assert block.module is not None
        inner = next((names[id(m)] for m in list(block.module.modules())[1:] if id(m) in names), None)
        twin = next((b.name for b in blocks[:position] if b.module is block.module), None)
        if inner or twin:
            raise AdapterError(
                f"`{inner or block.name}` and `{block.name if inner else twin}` overlap: one block is inside, or "
                f"the same as, another. Each block of `{block.layout.name}` must be listed once, and no stack inside "
                "another."
            )


def _sharing_bytes(items: Iterable[_Item], tensor_of: Callable[[_Item], torch.Tensor]) -> Iterator[list[_Item]]:
    """Items in groups whose tensors share memory: one object, two tied by `.data`, or views that overlap."""

    def start(item: _Item) -> tuple[str, int]:
        tensor = tensor_of(item)
        return str(tensor.device), tensor.data_ptr()

    group: list[_Item] = []
    end = ("", 0)
    for item in sorted(items, key=start):
        tensor = tensor_of(item)
        if not tensor.numel() or tensor.is_meta:
            yield [item]
            continue
        place, address = start(item)
        if group and not (place == end[0] and address < end[1]):
            yield group
            group = []
        group.append(item)
        end = max(end, (place, address + _extent(tensor)))
    if group:
        yield group


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the last, whatever lies between."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _places(module: nn.Module) -> Iterator[TensorPlace]:
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield TensorPlace(module, kind, name, tensor)


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor over the bytes of one made under inference mode."""
    with engine_tensors():
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        return nn.Parameter(alias, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else alias


def _moves(tensor: torch.Tensor) -> bool:
    """Whether the tensor is plain bytes. In a wrapper subclass `p.data = q` silently does nothing."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_nested
    )
