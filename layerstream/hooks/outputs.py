"""What a block returns: kept out of its slot, and explained to autograd."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

from layerstream.errors import BackwardError


def without_aliases(output: Any, start: int, end: int) -> Any:
    """`output` with copies of tensors that lie in memory from address `start` to `end`; itself if there are none."""
    if isinstance(output, torch.Tensor):
        if output.layout is not torch.strided or not output.numel():
            return output
        try:
            is_inside = start <= output.data_ptr() < end
        except RuntimeError:  # a tensor without storage (a subclass) cannot lie in a slot
            return output
        return output.clone() if is_inside else output
    kind = type(output)
    if kind is tuple or kind is list:
        items = [without_aliases(item, start, end) for item in output]
        return output if all(map(operator.is_, items, output)) else kind(items)
    if kind is dict:
        values = {key: without_aliases(item, start, end) for key, item in output.items()}
        return output if all(values[key] is output[key] for key in output) else values
    return output


def _tensors(output: Any) -> Iterable[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        for item in output.values():
            yield from _tensors(item)


def refuse_backward(output: Any, name: str) -> None:
    """Let a backward pass that reaches the block's output say what is wrong, before autograd says it in its words."""

    def refuse(gradient: torch.Tensor) -> None:
        raise BackwardError(
            f"a backward pass reached `{name}`, whose weights were streamed: their bytes have been replaced since the "
            "forward pass. Run under torch.no_grad() or torch.inference_mode(), or train without offloading."
        )

    for tensor in _tensors(output):
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(refuse)
