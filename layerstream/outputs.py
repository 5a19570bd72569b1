"""What a block returns: kept out of its slot, and explained to autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch

from layerstream.errors import BackwardError


def without_aliases(output: Any, buffer: torch.Tensor) -> Any:
    """`output` with tensors that lie inside a slot replaced by copies; itself if there are none."""
    if isinstance(output, torch.Tensor):
        if output.layout is not torch.strided or not output.numel():
            return output
        start = buffer.data_ptr()
        with contextlib.suppress(RuntimeError):  # a tensor without storage (a subclass) cannot lie in a slot
            if start <= output.data_ptr() < start + buffer.numel():
                return output.clone()
        return output
    if type(output) in (tuple, list):
        items = [without_aliases(item, buffer) for item in output]
        return output if all(a is b for a, b in zip(items, output, strict=True)) else type(output)(items)
    if type(output) is dict:
        values = {key: without_aliases(item, buffer) for key, item in output.items()}
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
