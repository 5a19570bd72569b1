"""Divides components into units: every parameter and buffer gets one owner.

A tensor of a block belongs to that block. What lies outside the stacks, and what more than one unit uses (tied
weights), belongs to the component's base, which stays on the device: stored once, and still tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layerstream.binding import BoundTensor, UnitBinding
from layerstream.blocks import UnitSpec, unit_bytes
from layerstream.device import engine_tensors
from layerstream.errors import AdapterError, PipelineError


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
    """

    name: str
    root: nn.Module
    stacks: tuple[StackLayout, ...]
    is_repeated: bool = False
    called: nn.Module | None = None

    @property
    def outermost(self) -> nn.Module:
        return self.root if self.called is None else self.called


@dataclass(eq=False)
class Unit:
    """A unit with its tensors; `module` is the block, None for a base."""

    spec: UnitSpec
    binding: UnitBinding
    module: nn.Module | None


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
        units: bases and blocks, component by component; `units[i].spec.index == i`.
        places: every place of every tensor that moves.
        others: places of tensors that stay whole: subclasses, sparse and quantised ones.
        stand_ins: ordinary tensors, over the same bytes, that take the place of tensors made under inference mode
            while streaming is on; pointing one of those elsewhere would break it.
    """

    units: list[Unit]
    places: list[TensorPlace]
    others: list[TensorPlace]
    stand_ins: list[tuple[TensorPlace, torch.Tensor]]


def divide(layouts: Sequence[ComponentLayout]) -> Division:
    """Assign every tensor of the components to a unit; changes nothing.

    Raises:
        AdapterError: a block stands twice, or inside another.
        PipelineError: weights on the meta device, which have no bytes to stream.
    """
    drafts: list[_Draft] = []
    division = Division([], [], [], [])
    named: dict[int, tuple[str, torch.Tensor, tuple[int, int]]] = {}  # per tensor object: first name, bytes
    # Users of the same bytes, whether through one object or through two tied by `.data`.
    users: dict[tuple[int, int], list[_Draft]] = {}
    for layout in layouts:
        base = _Draft(f"{layout.name} (base)", layout, None, None)
        blocks = [
            _Draft(f"{layout.name}.{name}", layout, stack.name, module)
            for stack in layout.stacks
            for name, module in stack.blocks
        ]
        owners = _owners_of_modules(layout, blocks)
        drafts += [base, *blocks]
        for path, module in layout.root.named_modules():
            for place in _places(module):
                name = ".".join(part for part in (layout.name, path, place.name) if part)
                if not _moves(place.tensor):
                    division.others.append(place)
                    continue
                if place.tensor.is_meta:
                    raise PipelineError(
                        f"`{name}` is on the meta device: it has no bytes to stream. Load the weights first "
                        "(from_pretrained without device_map, or load_state_dict(..., assign=True))."
                    )
                division.places.append(place)
                if id(place.tensor) not in named:
                    tensor = _ordinary(place.tensor) if place.tensor.is_inference() else place.tensor
                    named[id(place.tensor)] = (name, tensor, _bytes_key(place.tensor))
                if place.tensor.is_inference():
                    division.stand_ins.append((place, named[id(place.tensor)][1]))
                users.setdefault(_bytes_key(place.tensor), []).extend(owners.get(id(module), [base]))
    bases = {id(d.layout): d for d in drafts if d.module is None}
    for name, tensor, key in named.values():
        first, *rest = users[key]
        owner = bases[id(first.layout)] if any(other is not first for other in rest) else first
        owner.tensors.append(BoundTensor.of(name, tensor))
    for draft in drafts:
        if draft.tensors:
            spec = UnitSpec(
                index=len(division.units),
                name=draft.name,
                component=draft.layout.name,
                stack=draft.stack,
                num_bytes=unit_bytes(b.num_bytes for b in draft.tensors),
                is_repeated=draft.layout.is_repeated,
            )
            division.units.append(Unit(spec, UnitBinding(draft.tensors), draft.module))
    return division


@dataclass(eq=False)
class _Draft:
    """A unit while its tensors are being collected."""

    name: str
    layout: ComponentLayout
    stack: str | None
    module: nn.Module | None

    def __post_init__(self) -> None:
        self.tensors: list[BoundTensor] = []


def _owners_of_modules(layout: ComponentLayout, blocks: Sequence[_Draft]) -> dict[int, list[_Draft]]:
    """The blocks each module is part of: one, or several that share it."""
    owners: dict[int, list[_Draft]] = {}
    for block in blocks:
        assert block.module is not None
        for module in block.module.modules():
            owners.setdefault(id(module), []).append(block)
    for block in blocks:
        # A module shared by two blocks is legal (its tensors become part of the base); a block in a block is not.
        other = next((o for o in owners[id(block.module)] if o is not block), None)
        if other is not None:
            raise AdapterError(
                f"`{block.name}` and `{other.name}` overlap: one block is inside, or the same as, another. "
                f"Each block of `{layout.name}` must be listed once, and no stack inside another."
            )
    return owners


def _bytes_key(tensor: torch.Tensor) -> tuple[int, int]:
    num_bytes = tensor.numel() * tensor.element_size()
    return (tensor.data_ptr(), num_bytes) if num_bytes else (id(tensor), 0)


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
    )
