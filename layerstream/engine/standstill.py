"""Weights change hands only while no other thread computes with them.

Streaming may begin in the middle of another thread's call: a server that is given a smaller budget, a notebook cell run
beside a call that goes on. An operator that has asked for its weights by then would find others in their place. So who
begins a forward is held back, and who is in the middle of one is waited for, until it ends or comes to a block.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch import nn

from layerstream.engine.gate import Gate
from layerstream.errors import ConcurrentUseError
from layerstream.torch_private import CALL_CODE

_LOOK_S = 0.001


@contextlib.contextmanager
def standstill(
    gate: Gate,
    modules: Iterable[nn.Module],
    stops: Iterable[nn.Module],
    enter: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """Inside, no other thread is in the middle of a forward of `modules`, unless it waits at one of `stops`.

    Args:
        gate: is entered by this thread.
        enter: called where a thread has waited at a stop, once the gate is free: its call does not see hooks that were
            put on meanwhile.
    Raises:
        ConcurrentUseError: somebody's forward did not end within the gate's timeout.
    """
    if threading.active_count() < 2:
        yield
        return

    # A call goes through the hooks that there were when it began, and gives kwargs to those that are still there.
    def hold(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if not gate.is_inside:
            with gate.entered(f"a call of `{type(module).__name__}`"):
                pass
            enter(module, args, kwargs or {})

    with contextlib.ExitStack() as undo:  # each hook by itself: an interrupt between two keeps no other
        for module in dict.fromkeys(stops):
            undo.callback(module.register_forward_pre_hook(hold, prepend=True, with_kwargs=True).remove)
        _wait(gate, {id(module) for module in modules})
        yield


def _wait(gate: Gate, modules: set[int]) -> None:
    started = time.monotonic()
    while True:
        thread = next((t for t, f in sys._current_frames().items() if _is_inside(t, f, gate, modules)), None)
        if thread is None:
            return
        waited = time.monotonic() - started
        if gate.timeout_s is not None and waited >= gate.timeout_s:
            names = {t.ident: t.name for t in threading.enumerate()}
            raise ConcurrentUseError(
                f"thread {names.get(thread, thread)!r} is in the middle of a call of this pipeline, which did not end "
                f"in {waited:.1f} s (call_timeout={gate.timeout_s}). Begin to stream before or after it."
            )
        time.sleep(_LOOK_S)


def _is_inside(thread: int, frame: FrameType | None, gate: Gate, modules: set[int]) -> bool:
    """Whether a thread computes with one of these modules, and does not wait at the gate."""
    if thread == threading.get_ident():
        return False
    is_inside = False
    while frame is not None:
        if frame.f_code is CALL_CODE:
            is_inside |= id(frame.f_locals.get("self")) in modules
        elif frame.f_code is _WAIT_CODE and frame.f_locals.get("self") is gate:
            return False
        frame = frame.f_back
    return is_inside


_WAIT_CODE = Gate._wait_for_turn.__code__
