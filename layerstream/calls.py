"""What a call is given: what it takes beside the weights depends on that."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch


def shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Hashable, tuple[int, ...]], ...]:
    """(dtype, shape) of every tensor passed, those in lists and dicts included: what a call's memory depends on."""
    return tuple((t.dtype, t.shape) for t in _tensors((*args, *kwargs.values())))


def require_grad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor that is passed requires grad, those in lists and dicts included."""
    return any(t.requires_grad for t in _tensors((*args, *kwargs.values())))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from _tensors(value)
        elif type(value) is dict:
            yield from _tensors(value.values())
