"""What torch keeps for each thread, and a second pass must have as the first has it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from layerstream.device.base import Device
from layerstream.torch_private import (
    DISPATCH_MODE_STACK,
    FUNCTION_MODE_STACK,
    FUNCTORCH_LEVEL,
)

_mode_stack = DISPATCH_MODE_STACK.find()
_num_function_modes = FUNCTION_MODE_STACK.find()
_functorch_level = FUNCTORCH_LEVEL.find()


@dataclass(frozen=True)
class ThreadState:
    """As it is in the calling thread.

    Attributes:
        is_inference: under `inference_mode`.
        stream_number: of the compute stream.
    """

    is_inference: bool
    stream_number: int

    @classmethod
    def here(cls, device: Device) -> ThreadState:
        return cls(torch.is_inference_mode_enabled(), device.stream_number())


def refusal(device: Device) -> str:
    """Why what runs in this thread cannot run in another as well; "": it can."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return "gradients are wanted"
    if _mode_stack is None or _num_function_modes is None or _functorch_level is None:
        return "this torch does not tell which modes are on"
    if torch.is_autocast_enabled(device.torch_device.type):
        return "autocast is on"
    if any(not device.is_own_mode(mode) for mode in _mode_stack()) or _num_function_modes():
        return "a mode of torch is on"
    if _functorch_level() is not None:
        return "a transform of torch.func runs"
    if device.is_capturing():
        return "a graph is captured"
    return ""


def runner(device: Device, run: Callable[[], object]) -> Callable[[], object]:
    """`run` as it would run in the calling thread now, to be called in another."""
    context = contextvars.copy_context()
    is_inference = torch.is_inference_mode_enabled()
    beside = device.beside()

    @contextlib.contextmanager
    def modes() -> Iterator[None]:
        with beside(), torch.inference_mode(is_inference), torch.set_grad_enabled(False):
            yield

    def inside() -> object:
        with modes():
            return run()

    return lambda: context.run(inside)
