"""What surrounds a pass beside its model: modes and flags of torch, generators of random numbers, context variables.

A second pass runs in another thread and must have all that is each thread's own as the first has it; and what the two
would change for each other must stay as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import operator
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from layerstream.device.base import Device
from layerstream.engine.gate import is_own_variable
from layerstream.torch_private import DISPATCH_MODE_STACK, FUNCTION_MODE_STACK, FUNCTORCH_LEVEL

_mode_stack = DISPATCH_MODE_STACK.find()
_num_function_modes = FUNCTION_MODE_STACK.find()
_functorch_level = FUNCTORCH_LEVEL.find()


_UNSET = object()
Variables = tuple[tuple[contextvars.ContextVar[Any], Any], ...]


class _Autocast(NamedTuple):
    """The calling thread's autocast, for one type of device."""

    device_type: str
    dtype: torch.dtype
    is_on: bool
    keeps_casts: bool

    def entered(self) -> torch.autocast:
        """The same, for another thread, in which none is on."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.is_on, cache_enabled=self.keeps_casts)


def _autocasts(device: Device) -> tuple[_Autocast, ...]:
    types = dict.fromkeys(("cpu", device.torch_device.type))
    return tuple(
        _Autocast(
            each,
            torch.get_autocast_dtype(each),
            torch.is_autocast_enabled(each),
            torch.is_autocast_cache_enabled(),
        )
        for each in types
    )


@dataclass(frozen=True)
class ThreadState:
    """Modes of the calling thread, and flags of the process that kernels are chosen by.

    Attributes:
        is_inference: under `inference_mode`.
        is_grad: gradients are recorded where that allows it.
        stream_number: of the compute stream.
        autocasts: what `autocast` makes of operators.
    """

    is_inference: bool
    is_grad: bool
    stream_number: int
    autocasts: tuple[_Autocast, ...]
    flags: tuple[object, ...]

    @classmethod
    def here(cls, device: Device) -> ThreadState:
        return cls(
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            device.stream_number(),
            _autocasts(device),
            _flags(),
        )


def _flags() -> tuple[object, ...]:
    backends: Any = torch.backends
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        backends.cudnn.enabled,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
        backends.mkldnn.enabled,
        *(_flag(owner, name) for owner, name in _PRECISIONS),
    )


# Of products and convolutions. Some a version of torch does not have yet, and some it refuses to tell once the same has
# been set by a newer name.
_PRECISIONS = (
    ("", "get_float32_matmul_precision"),
    ("_C", "_get_cublas_allow_fp16_accumulation"),
    ("_C", "_get_sdp_priority_order"),
    ("backends", "fp32_precision"),
    ("backends.cuda", "preferred_blas_library"),
    ("backends.cuda.matmul", "allow_tf32"),
    ("backends.cuda.matmul", "allow_fp16_reduced_precision_reduction"),
    ("backends.cuda.matmul", "allow_bf16_reduced_precision_reduction"),
    ("backends.cuda.matmul", "fp32_precision"),
    ("backends.cudnn", "allow_tf32"),
    ("backends.cudnn.conv", "fp32_precision"),
    ("backends.cudnn.rnn", "fp32_precision"),
)


def _flag(owner: str, name: str) -> object:
    """What torch says of one; None: nothing."""
    try:
        value = getattr(operator.attrgetter(owner)(torch) if owner else torch, name)
        found = value() if callable(value) else value
    except (AttributeError, RuntimeError):
        return None
    return tuple(found) if isinstance(found, list) else found


@dataclass(frozen=True)
class Surroundings:
    """What a forward may change around it: the state of every generator that it draws from by itself, and context
    variables.

    Attributes:
        numpy: the state of its global generator; None: it is not imported.
    """

    cpu: torch.Tensor
    device: torch.Tensor | None
    python: Any
    numpy: tuple[Any, ...] | None
    variables: Variables

    @classmethod
    def here(cls, device: Device) -> Surroundings:
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            device.random_state(),
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
            context_variables(),
        )

    def difference(self, other: Surroundings) -> str:
        """What somebody has done between the two; "": nothing."""
        if self.is_drawn(other):
            return "it draws random numbers"
        return "" if are_same(self.variables, other.variables) else "it sets context variables"

    def is_drawn(self, other: Surroundings) -> bool:
        """Whether random numbers were drawn between the two."""
        if not torch.equal(self.cpu, other.cpu) or self.python != other.python:
            return True
        if self.device is not None and other.device is not None and not torch.equal(self.device, other.device):
            return True
        if self.numpy is None or other.numpy is None:  # whoever imports it has drawn nothing yet
            return False
        pairs = zip(self.numpy, other.numpy, strict=True)
        return any(a.tobytes() != b.tobytes() if hasattr(a, "tobytes") else a != b for a, b in pairs)

    def restore_random(self, device: Device) -> None:
        """As if nothing had been drawn since."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            device.set_random_state(self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def context_variables() -> Variables:
    """Those of the calling thread's context, with their values; not ours, which says what this thread is inside of."""
    return tuple((name, value) for name, value in contextvars.copy_context().items() if not is_own_variable(name))


def are_same(mine: Variables, its: Variables) -> bool:
    """Whether the same variables have the same values."""
    values = dict(its)
    return len(mine) == len(its) and all(values.get(name, _UNSET) is value for name, value in mine)


def refusal(device: Device) -> str:
    """Why what runs in this thread cannot run in another as well; "": it can."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return "gradients are wanted"
    if _mode_stack is None or _num_function_modes is None or _functorch_level is None:
        return "this torch does not tell which modes are on"
    if any(not device.is_own_mode(mode) for mode in _mode_stack()) or _num_function_modes():
        return "a mode of torch is on"
    if _functorch_level() is not None:
        return "a transform of torch.func runs"
    if device.is_capturing():
        return "a graph is captured"
    return ""


class ContextChangedError(Exception):
    """What ran has set context variables, which another thread's context keeps for itself."""


def runner(device: Device, run: Callable[[], object]) -> Callable[[], object]:
    """`run` as it would run in the calling thread now, to be called in another.

    Raises, when called:
        ContextChangedError: it has set context variables.
    """
    context = contextvars.copy_context()
    is_inference = torch.is_inference_mode_enabled()
    autocasts = _autocasts(device)
    beside = device.beside()

    @contextlib.contextmanager
    def modes() -> Iterator[None]:
        with contextlib.ExitStack() as each:
            each.enter_context(beside())
            each.enter_context(torch.inference_mode(is_inference))
            each.enter_context(torch.set_grad_enabled(False))
            for autocast in autocasts:
                if autocast.is_on:
                    each.enter_context(autocast.entered())
            yield

    def inside() -> object:
        before = context_variables()
        with modes():
            output = run()
        if not are_same(before, context_variables()):
            raise ContextChangedError("context variables")
        return output

    return lambda: context.run(inside)
