"""Who reads a weight, or calls a block, in the middle of an operation: found on the stack of the running thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch

from layerstream.engine.streamer import Streamer
from layerstream.torch_private import tree_leaves


def running_code() -> str:
    """The code that reads a weight, or calls a block: the innermost that is neither ours nor torch's."""
    for frame in _frames():
        if _is_of_others(frame):
            owner = frame.f_locals.get("self")
            cls = f"{type(owner).__name__}." if owner is not None and frame.f_code.co_varnames[:1] == ("self",) else ""
            file = frame.f_code.co_filename.rpartition("/")[2]
            return f"`{cls}{frame.f_code.co_name}` ({file}:{frame.f_lineno})"
    return "code that is not known"


def weights_read(engine: Streamer) -> list[str]:
    """The absent weights that the operation at hand was given."""
    for frame in _frames():
        if frame.f_code.co_name in ("__torch_function__", "__deepcopy__", "__reduce_ex__"):
            given = frame.f_locals.get("args", ()), frame.f_locals.get("kwargs"), frame.f_locals.get("self")
            ids = {id(leaf) for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)}
            bound = [b for unit in engine._units.values() for b in unit.binding.tensors if id(b.tensor) in ids]
            if bound:
                return [b.name for b in bound]
    return []


def outermost_method(engine: Streamer, component: str) -> str | None:
    """The outermost running method of a module of the component."""
    modules = engine._attached.entrances.modules
    found = None
    for frame in _frames():
        if frame.f_code.co_varnames[:1] == ("self",) and _is_of_others(frame):
            place = modules.get(id(frame.f_locals.get("self")))
            if place is not None and place[0] == component:
                found = f"{place[1]}.{frame.f_code.co_name}" if place[1] else frame.f_code.co_name
    return found


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_of_others(frame: FrameType) -> bool:
    """Whether code is neither ours nor torch's."""
    name = str(frame.f_globals.get("__name__", ""))
    is_ours = name.startswith("layerstream.") and not name.startswith("layerstream.standins")
    return not is_ours and name.partition(".")[0] not in ("torch", "contextlib", "functools")
