"""A unit's home: its bytes outside of the device. What a load reads, what is handed back, and who writes.

A home belongs to one unit, and is the only writer of that unit's bytes at home while it streams. Homes can be exchanged
(`exchange.py`). A `RawHome` has the bytes as they are on the device, in host memory, page-locked where that is
possible. Of the others a unit's tensors have no memory at home: a `StoredHome` has the bytes in another GPU's memory, a
`SharedHome` in host memory that other processes have, too, a `PackedHome` has fewer, on the host or another GPU, from
which these are decoded. Whoever asks for such a tensor at home (to
write to it, to save it, to have it back) makes the unit raw again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from layerstream.device.base import COPY_BYTES, Device, PackedLayout
from layerstream.host.keeper import Keeper
from layerstream.host.memory import Range
from layerstream.host.shared_pages import SharedPages
from layerstream.weights.binding import BoundTensor, UnitBinding


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of memory at home and where it lands in the slot.

    Attributes:
        source: uint8 [num_bytes], the bytes.
        offset: byte in the slot where the copy starts.
        is_pinned: page-locked, or on another GPU, so that the copy is asynchronous.
    """

    source: torch.Tensor
    offset: int
    is_pinned: bool

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Its bytes in parts that are copied one by one, each with where it begins."""
        for at in range(0, self.source.numel(), COPY_BYTES):
            yield at, self.source[at : at + COPY_BYTES]


@dataclass(eq=False)
class Home:
    """What all kinds have in common.

    Attributes:
        offsets: byte offset of each bound tensor in the slot, in the order of the binding.
        device_bytes: of the whole unit in a slot, alignment included.
        ranges: its bytes on the host, each with where a copy of it begins, and what is to be locked for it.
        locks: the page locks it holds.
        segments: what to copy; filled by `HostStore`.
        keeper: the GPU in whose memory the bytes are; None: they are on the host.
    """

    device: Device
    offsets: list[int]
    device_bytes: int
    ranges: list[tuple[torch.Tensor, int, Range]] = field(default_factory=list)
    locks: list[Range] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    keeper: Keeper | None = None

    # Both are asked for at every load, and settled once the segments are there.
    @functools.cached_property
    def wire_bytes(self) -> int:
        """What a load brings over the bus."""
        return sum(s.source.numel() for s in self.segments)

    @functools.cached_property
    def is_pinned(self) -> bool:
        """Whether a load of it does not block the host."""
        return all(s.is_pinned for s in self.segments)

    @property
    def locked_bytes(self) -> int:
        """Page-locked host memory of it."""
        return 0 if self.keeper is not None else sum(s.source.numel() for s in self.segments if s.is_pinned)

    def pairs(self, buffer: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
        """What to copy into a device buffer: (its range, the host bytes, whether these are page-locked), segment by
        segment, in parts of `COPY_BYTES` at most."""
        return [
            (buffer[s.offset + at : s.offset + at + part.numel()], part, s.is_pinned)
            for s in self.segments
            for at, part in s.parts()
        ]

    def views(self, binding: UnitBinding, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The unit's tensors inside a buffer with its bytes as they are (uint8 [>= device_bytes]), with the strides
        they keep."""
        views = []
        for bound, offset in zip(binding.tensors, self.offsets, strict=True):
            flat = buffer[offset : offset + bound.num_bytes].view(bound.dtype)
            views.append(flat.as_strided(bound.shape, bound.strides))
        return views

    def value(self, bound: BoundTensor) -> torch.Tensor:
        """What a tensor is handed back with. Touches no device unless that is where it came from, or it is packed."""
        return handed_back(bound)

    def write(self, bound: BoundTensor, value: torch.Tensor) -> None:
        """What the next load reads, and what is handed back, is `value`, of the tensor's own form; blocks the host."""
        if value.data_ptr() != bound.master.data_ptr():
            self.device.copy_back(bound.master, value)
        if bound.home is not bound.master and bound.home.data_ptr() != value.data_ptr():
            bound.home.copy_(bound.master)

    def replace(self, bound: BoundTensor, value: torch.Tensor) -> None:
        """Hand back `value`, perhaps of another form, in place of what was found. What a load reads stays."""
        _ = bound.master  # where that is packed, it is made first: it would take the place of the value
        bound.hand_back_instead(value.to(bound.home_device))


class RawHome(Home):
    """The bytes of one unit as they are, in host memory."""


class StoredHome(Home):
    """The bytes of one unit as they are, in another GPU's memory, laid out as in a slot. Its tensors have no memory at
    home until somebody asks for it (`BoundTensor.put_away`)."""


@dataclass(eq=False)
class SharedHome(Home):
    """The bytes of one unit as they are, in host memory that several processes read and none writes, laid out as in a
    slot. Its tensors have no memory at home until somebody asks for it (`BoundTensor.put_away`).

    Attributes:
        pages: the memory.
        offset: where in it the unit begins.
    """

    pages: SharedPages = None  # type: ignore[assignment]
    offset: int = 0


@dataclass(eq=False)
class PackedHome(Home):
    """The bytes of one unit in fewer: what a load copies goes to a wire buffer, and is decoded from there into the
    slot. Its tensors have no memory at home until somebody asks for it (`BoundTensor.put_away`).

    Attributes:
        layout: how they are decoded.
    """

    layout: PackedLayout = None

    @property
    def wire(self) -> torch.Tensor:
        """uint8 [wire_bytes], all of it."""
        return self.segments[0].source


def handed_back(bound: BoundTensor) -> torch.Tensor:
    """What a tensor is handed back with: the memory it was found in, or its values in memory of their own."""
    found = bound.home  # first: it may have to be brought, and how it is handed back is known then
    if bound.is_exact:
        return found
    home = torch.empty_strided(bound.shape, bound.strides, dtype=bound.dtype, device=bound.home_device)
    return home.copy_(found)
