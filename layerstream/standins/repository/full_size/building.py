"""How a module at true size comes to its dtype and weights; see [Note: memory] of the package."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from layerstream.standins.weights import cast_floating_, fill_normal_, skip_init

_Built = TypeVar("_Built")


def build_in(dtype: torch.dtype, make: Callable[[], _Built]) -> _Built:
    """Return what `make` returns, its parameters in `dtype` and not filled yet.

    Import the classes before: a library may compute constants while it is imported, and those would be in `dtype`, too.
    """
    with _default_dtype(dtype), skip_init():
        return make()


def fill(
    module: nn.Module, *, dtype: torch.dtype, std: float, seed: int, pool_device: torch.device | str | None
) -> nn.Module:
    """Give `module` its weights and return it in evaluation mode, gradients off."""
    # The parameters have the dtype already, some buffers have not (a table of positions takes 0.9 GB in float32): cast
    # before the weights take memory.
    cast_floating_(module, dtype)
    fill_normal_(module, std=std, seed=seed, pool_device=pool_device)
    return module.eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build modules in `dtype` at once: a cast afterwards would need the memory of both."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
