"""What streams, described and nothing more: names, sizes, order. Imports no torch.

A component's weights are divided into *units*, each of which has one owner and moves as a whole:
a *block* is one entry of a stack, the *base* is everything of the component outside its stacks.
A large block is several units, its *pieces*: they are used together, but each has a place of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

# Every tensor in a slot starts at a multiple of this. The allocator that a resident model's weights come
# from aligns to 512 bytes, kernels pick fast paths by alignment (16 to 128 bytes), and bit-equality needs
# the same path.
ALIGNMENT_BYTES = 256


def align(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment of tensors in a slot."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Placement(Enum):
    """Where a unit lives while streaming is on."""

    RESIDENT = "resident"  # in a buffer of its own, and kept in every other phase
    BY_PHASE = "by phase"  # in a buffer of its own while its phase runs; given up where another phase needs the room
    PACKED = "resident packed"  # its packed bytes in a buffer of their own; decoded into a slot while it is used
    STREAMED = "streamed"  # in host memory; in a slot while it is used


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a unit takes, in bytes: `device` in a slot, `wire` over the bus at each load, `host` at home. They differ
    where it has another form at home than on the device.

    Attributes:
        is_there: it has that form; False: it is to have it, and only wire buffers are made for that yet.
    """

    device: int
    wire: int
    host: int
    is_there: bool = True


@dataclass(frozen=True, slots=True)
class UnitSpec:
    """One unit: a block of a stack, or a component's base.

    Attributes:
        index: position in the plan's list of units; the engine's name for the unit.
        name: "transformer.transformer_blocks.3", or "transformer (base)".
        component: the component it belongs to.
        stack: dotted name of its stack inside the component; None for a base.
        num_bytes: bytes it takes on the device, every tensor aligned.
        is_repeated: the component runs many times a call (a denoiser), so its bytes matter most.
        also: other components that use tensors of this unit; only bases have any.
        block: name of the block that it is a piece of; None where it is the whole of it.
        packed: its sizes, where it has another form at home, or is to have it; None: it has that of the device.
        keeper: the other GPU in whose memory it is at home; "": in that of the host.
    """

    index: int
    name: str
    component: str
    stack: str | None
    num_bytes: int
    is_repeated: bool = False
    also: tuple[str, ...] = ()
    block: str | None = None
    packed: Sizes | None = None
    keeper: str = ""

    @property
    def sizes(self) -> Sizes:
        """What it takes, where, as it is now."""
        if self.packed is not None and self.packed.is_there:
            return self.packed
        return Sizes(self.num_bytes, self.num_bytes, self.num_bytes)

    @property
    def is_packed(self) -> bool:
        """Whether it has another form at home than on the device by now."""
        return self.packed is not None and self.packed.is_there

    @property
    def is_block(self) -> bool:
        """Whether it is a block, or a piece of one."""
        return self.stack is not None

    @property
    def block_name(self) -> str:
        """What all pieces of a block have in common."""
        return self.name if self.block is None else self.block


@dataclass(frozen=True, slots=True)
class WholeSpec:
    """Weights of a component that are no plain bytes: quantised tensor subclasses, sparse ones. They cannot stream, and
    are on the device as they are while everything else streams.

    Attributes:
        num_bytes: of the plain tensors inside them.
        kinds: names of their types.
    """

    component: str
    num_tensors: int
    num_bytes: int
    kinds: tuple[str, ...]


def unit_bytes(tensor_bytes: Iterable[int]) -> int:
    """Bytes of a unit on the device: its tensors one behind another, each aligned."""
    return sum(align(n) for n in tensor_bytes)
