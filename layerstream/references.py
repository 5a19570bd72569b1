"""Who else looks at a tensor's memory."""

from __future__ import annotations

import functools
import sys

import torch


def use_count(storage: torch.UntypedStorage) -> int | None:
    """How many tensors and storages in C++ hold this memory, the one given included; None: torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else int(count(storage._cdata))


def is_held(storage: torch.UntypedStorage, num_own: int) -> bool:
    """Whether anything but `num_own` tensors of ours, and the caller's variable, looks at a storage.

    Where torch does not tell, it is taken to be so.
    """
    count = use_count(storage)
    # In Python a storage is one object however often it is asked for: as many references as to one that nobody holds,
    # which depends on the version of torch. The call of this function is one more.
    return count is None or count > num_own + 1 or sys.getrefcount(storage) > _references_to_an_unheld_storage() + 1


@functools.cache
def _references_to_an_unheld_storage() -> int:
    tensor = torch.empty(1, device="cpu")  # alive, or its storage would be held by one less
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)
