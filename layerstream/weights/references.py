"""Who else looks at a tensor's memory."""

from __future__ import annotations

import sys

import torch

from layerstream.torch_private import use_count_of


def use_count(storage: torch.UntypedStorage) -> int | None:
    """How many tensors and storages in C++ hold this memory, the one given included; None: torch does not tell."""
    count = use_count_of(storage._cdata)
    return None if count < 0 else count


def is_held(tensor: torch.Tensor, num_own: int) -> bool:
    """Whether anything but `num_own` tensors of ours, this one included, looks at the memory of a tensor.

    Where torch does not tell, it is taken to be so.
    """
    storage = tensor.untyped_storage()
    count = use_count(storage)
    return count is None or count > num_own + 1 or _num_references(tensor) > 1 + _references_to_an_unheld_storage()


def _num_references(tensor: torch.Tensor) -> int:
    """How many references Python has to the storage: one object however often a tensor is asked for it.

    What the count of a storage that nobody holds is, and what each call adds, depends on the versions of Python and
    torch and on whether torch.compile has ever run. So counts are compared only with each other, from this very line.
    """
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


def _references_to_an_unheld_storage() -> int:
    return _num_references(torch.empty(1, device="cpu"))
