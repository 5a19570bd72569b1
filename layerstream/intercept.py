"""Forward hooks on roots and blocks, put on and taken off; knows nothing of slots or copies.

One hook function serves all blocks and finds the block by the module it is given. So a deep copy of a block,
which copies the hook with it, finds nothing and does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from layerstream import compiled
from layerstream.errors import AlreadyOffloadedError, MovedWhileStreamingError

# Names under which diffusers keeps its offloading hooks in `module._diffusers_hook`.
_DIFFUSERS_OFFLOADERS = {"group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"}


class Listener(Protocol):
    """What the hooks call, in the thread and stream of the forward."""

    def enter_root(self, root: nn.Module) -> None: ...
    def leave_root(self, root: nn.Module) -> None: ...
    def enter_block(self, block: nn.Module) -> None: ...
    def leave_block(self, block: nn.Module, output: Any) -> Any: ...


class Interception:
    """The hooks of one streamer; `remove` takes them off again, in any state."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._compile_undo: list[Callable[[], object]] = []
        self._hooked: list[nn.Module] = []

    def install(self, listener: Listener, roots: Iterable[nn.Module], blocks: Mapping[nn.Module, nn.Module]) -> None:
        """Hook the streamed blocks and the roots of their components.

        Args:
            blocks: each streamed block and what the pipeline calls to run it: its root, or that root compiled.
        """
        roots = list(roots)
        # Weights must be there before anybody's pre-hook looks, and an exception must not leave a block running.
        enter_root = compiled.compile_safe(lambda module, args: listener.enter_root(module))
        leave_root = compiled.compile_safe(lambda module, args, output: listener.leave_root(module))
        enter_block = compiled.compile_safe(lambda module, args: listener.enter_block(module))
        leave_block = compiled.compile_safe(lambda module, args, output: listener.leave_block(module, output))
        self._hooked = [*roots, *blocks]
        for called in dict.fromkeys(blocks.values()):
            own = [block for block, of in blocks.items() if of is called]
            self._compile_undo.append(compiled.exchange_for_block_compile(called, own))
            self._compile_undo.append(compiled.keep_eager_around(called, own))
        for modules, enter, leave in ((roots, enter_root, leave_root), (list(blocks), enter_block, leave_block)):
            for module in modules:
                self._undo.append(module.register_forward_pre_hook(enter, prepend=True).remove)
                self._undo.append(module.register_forward_hook(leave, prepend=True, always_call=True).remove)
        compiled.drop_dynamo_caches(self._hooked)

    def guard_moves(self, component: nn.Module, name: str, device: torch.device, *, is_streamed: bool) -> None:
        """Refuse what would move the component off `device`, or cast it while its blocks stream.

        Everything that moves or casts a module goes through `_apply`; on the root it is stopped before the first
        weight is touched. A partial, so that a deep copy of the component guards the copy, which is free to move.
        """
        guard = functools.partial(_guarded_apply, component, _Guarded(component, name, device, is_streamed))
        component.__dict__["_apply"] = guard
        self._undo.append(lambda: component.__dict__.pop("_apply", None))

    def remove(self) -> None:
        """Take everything off; idempotent."""
        while self._undo:
            self._undo.pop()()
        # While the whole is still out of the way: what was compiled for it stays, and is used again.
        compiled.drop_dynamo_caches(self._hooked)
        self._hooked = []
        while self._compile_undo:
            self._compile_undo.pop()()


class _Guarded:
    """What a guard refuses. Not copied along with its component: see `__deepcopy__`."""

    def __init__(self, component: nn.Module, name: str, device: torch.device, is_streamed: bool) -> None:
        self.component, self.name, self.device, self.is_streamed = component, name, device, is_streamed

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


def _guarded_apply(component: nn.Module, guarded: _Guarded | None, fn: Any, recurse: bool = True) -> nn.Module:
    if guarded is not None:
        dtypes = {t.dtype for t in [*component.parameters(), *component.buffers()]}
        probes = [torch.empty(0, dtype=dtype, device=guarded.device) for dtype in dtypes or {torch.float32}]
        try:
            results = [fn(probe) for probe in probes]
        except Exception as exc:
            raise MovedWhileStreamingError(_refusal(guarded, "moved")) from exc
        if any(r.device != p.device for r, p in zip(results, probes, strict=True)):
            raise MovedWhileStreamingError(_refusal(guarded, "moved"))
        if all(r.dtype == p.dtype for r, p in zip(results, probes, strict=True)) and guarded.is_streamed:
            return component  # already there, as it is; applying it would load every block
        if guarded.is_streamed:
            raise MovedWhileStreamingError(_refusal(guarded, "cast"))
    applied: nn.Module = type(component)._apply(component, fn, recurse)
    return applied


def _refusal(guarded: _Guarded, what: str) -> str:
    return (
        f"`{guarded.name}` ({type(guarded.component).__name__}) cannot be {what} while its weights are streamed to "
        f"{guarded.device}. Leave the offload context (or call close()), do it, and enter again."
    )


def refuse_rivals(pipe: object, components: Mapping[str, nn.Module]) -> None:
    """Raise if another offloader has its hooks in the pipeline; looks, and changes nothing.

    Raises:
        AlreadyOffloadedError: names the component, the other offloader, and how to undo it.
    """
    _refuse_device_map(pipe, "the pipeline")
    for name, component in components.items():
        _refuse_device_map(component, f"`{name}`")
        for path, module in component.named_modules():
            where = f"`{name}.{path}`" if path else f"`{name}`"
            if hasattr(module, "_hf_hook"):
                raise AlreadyOffloadedError(
                    f"{where} is offloaded by accelerate ({type(module._hf_hook).__name__}; model or sequential CPU "
                    "offload, or a device_map). Call pipe.remove_all_hooks() (or "
                    "accelerate.hooks.remove_hook_from_module(module, recurse=True)), or load without it."
                )
            rivals = _DIFFUSERS_OFFLOADERS & set(getattr(getattr(module, "_diffusers_hook", None), "hooks", None) or ())
            if rivals:
                raise AlreadyOffloadedError(
                    f"{where} is offloaded by diffusers ({', '.join(sorted(rivals))}), which cannot be undone. Load "
                    "the pipeline again without enable_group_offload."
                )


def _refuse_device_map(owner: object, what: str) -> None:
    device_map = getattr(owner, "hf_device_map", None)
    if isinstance(device_map, dict) and len({str(d) for d in device_map.values()}) > 1:
        raise AlreadyOffloadedError(
            f"{what} was spread by device_map over {sorted({str(d) for d in device_map.values()})}. Load it without "
            "device_map (or call pipe.reset_device_map())."
        )
