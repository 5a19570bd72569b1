"""What code outside has of weights, one record for each thing, and whether bytes differ from those at home."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from layerstream.host.memory import bytes_of
from layerstream.weights.binding import BoundTensor
from layerstream.weights.references import is_held, use_count

_COMPARED_BYTES = 2**23  # at once: so much of home is on the device meanwhile
_VERSION = operator.attrgetter("_version")


@dataclass(eq=False)
class KeptView:
    """Memory that a unit has left. `tensor` is the weight that it was; `view` looks at the memory.

    Attributes:
        is_found: it was found there when it began to stream.
        before: what it was when the pause that goes on began.
    """

    tensor: torch.Tensor
    view: torch.Tensor
    is_found: bool = False
    before: torch.Tensor | None = None


@dataclass(eq=False)
class Entry:
    """An entry of a `state_dict`: memory at home, with a version counter of its own.

    Attributes:
        num_holders: tensors that looked at the memory when nobody but us had taken anything from the entry.
        num_others: how many more than those, when the pause that goes on began.
    """

    tensor: torch.Tensor
    entry: torch.Tensor
    version: int
    num_holders: int = 0
    num_others: int = 0

    def count(self) -> int:
        """How many tensors look at the memory now; 0: torch does not tell."""
        count = use_count(self.entry.untyped_storage())
        return 0 if count is None else count - 1

    def is_held(self) -> bool:
        """Whether somebody else has the entry, or what was made of it: a view, an array."""
        return sys.getrefcount(self.entry) > 2 or is_held(self.entry, self.num_holders)


@dataclass(eq=False)
class Held:
    """Weights of a unit whose memory, as they were found, somebody has looked at since before they streamed.

    Attributes:
        versions: of these weights when the last call ended; empty: none did, or another has begun since.
    """

    bounds: list[BoundTensor]
    versions: list[int] = field(default_factory=list)

    def versions_now(self) -> list[int]:
        """Call under `DisableTorchFunctionSubclass`."""
        # One call in place of one for each: somebody may hold a `state_dict` of all there is.
        return list(map(_VERSION, [bound.tensor for bound in self.bounds]))


def fits(tensor: torch.Tensor, bound: BoundTensor) -> bool:
    """Whether a tensor has the dtype and shape of a weight."""
    return tensor.dtype == bound.dtype and tuple(tensor.shape) == bound.shape


def differ(there: torch.Tensor, home: torch.Tensor) -> bool:
    """Whether a tensor on the device differs from the bytes at home; waits for the device."""
    if there.shape != home.shape or there.dtype != home.dtype or there.stride() != home.stride():
        return True
    if not home.numel():
        return False
    return not all(map(_are_equal, _chunks(there), _chunks(home)))


def differ_in_value(view: torch.Tensor, home: torch.Tensor) -> bool:
    """The same of memory that a weight was found in, whose strides the device does not keep."""
    if view.stride() == home.stride():
        return differ(view, home)
    return not same_bytes(view.to(home.device), home)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype on the host have the same bytes, in whatever strides."""
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def _are_equal(there: torch.Tensor, home: torch.Tensor) -> bool:
    try:
        return torch.equal(there, home.to(there.device))
    except torch.OutOfMemoryError:  # the budget is full
        return torch.equal(there.to(home.device), home)


def _chunks(dense: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = bytes_of(dense)
    for start in range(0, flat.numel(), _COMPARED_BYTES):
        yield flat[start : start + _COMPARED_BYTES]
