"""Forward hooks on roots and blocks, and wrappers of the methods that enter or change a component: put on and taken
off. Knows nothing of slots or copies.

One hook function serves all blocks and finds the block by the module it is given. So a deep copy of a block,
which copies the hook with it, finds nothing and does nothing. A wrapper is an entry in the instance's `__dict__`; in a
deep copy of the instance it calls the class's own method.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from layerstream.errors import AlreadyOffloadedError, MovedWhileStreamingError
from layerstream.hooks import compiled
from layerstream.hooks.dynamo_caches import drop_dynamo_caches
from layerstream.hooks.eager import compiled_methods_around, explain_holder, holders_around, keep_eager_around
from layerstream.interrupts import undo_all

# Names under which diffusers keeps its offloading hooks in `module._diffusers_hook`.
RIVAL_HOOKS = frozenset({"group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"})


class Listener(Protocol):
    """What the hooks call, in the thread and stream of the forward."""

    def enter_root(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None: ...
    def leave_root(self, root: nn.Module) -> None: ...
    def enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None: ...
    def leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any: ...
    def enter_method(self, root: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A method is called by which pipelines enter the component; returns whether `leave_method` is to follow."""

    def leave_method(self, root: nn.Module) -> None: ...
    def run_forward(self, root: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of a component's forward, where `is_pairing`."""

    @property
    def is_pairing(self) -> bool:
        """Whether the two passes of a step of guidance may run side by side."""

    def reading(self, units: Sequence[int]) -> contextlib.AbstractContextManager[object]:
        """Weights are read, these units' at least; no other thread's call runs meanwhile."""

    def changing(self, component: str) -> contextlib.AbstractContextManager[object]:
        """The component, or a part of it, is about to be cast, or laid out anew; inside, its weights are at home."""

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in the middle of a call of a pipeline or component."""


class Interception:
    """The hooks of some components; `remove` takes them off again, in any state."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._compile_undo: list[Callable[[], object]] = []
        self._eager_undo: list[Callable[[], object]] = []  # holds no module, and must be called even if this is dropped
        self._hooked: list[nn.Module] = []
        self._handles: dict[int, list[Any]] = {}  # of hooks, by the id of the module that has them
        self._block_hooks: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.eager: list[str] = []  # methods that run uncompiled meanwhile
        weakref.finalize(self, undo_all, self._eager_undo).atexit = False

    def install(self, listener: Listener, roots: Iterable[nn.Module], blocks: Mapping[nn.Module, nn.Module]) -> None:
        """Hook the blocks and the roots of their components.

        Args:
            roots: what to hook as a root: the component, or its compiled form.
            blocks: each block and what the pipeline calls to run it: its root, or that root compiled.
        """
        roots = list(roots)
        # Weights must be there before anybody's pre-hook looks, and an exception must not leave a block running.
        enter_root = compiled.compile_safe(listener.enter_root)
        leave_root = compiled.compile_safe(lambda module, args, output: listener.leave_root(module))
        enter_block = compiled.compile_safe(listener.enter_block)
        leave_block = compiled.compile_safe(listener.leave_block)
        self._hooked = [*roots, *blocks]
        for called in dict.fromkeys(blocks.values()):
            own = [block for block, of in blocks.items() if of is called]
            self._compile_undo.append(compiled.exchange_for_block_compile(called, own))
            self._eager_undo.append(keep_eager_around(called, own))
            for path, module, name, function in compiled_methods_around(called, own):
                self.eager.append(f"{path}.{name}" if path else name)
                self._replace(module, name, function)
            for path, module, name, kind in holders_around(called, own):
                place, component = f"{path}.{name}" if path else name, type(compiled.uncompiled(called)).__name__
                self.watch_call(module, name, functools.partial(explain_holder, place, component, kind))
        self._block_hooks = enter_block, leave_block
        for root in roots:
            self._hook(root, enter_root, leave_root)
        for block in blocks:
            self._hook(block, enter_block, leave_block)
        drop_dynamo_caches(self._hooked)

    def _hook(self, module: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]) -> None:
        # Known one by one, so that an interrupt leaves none behind.
        self._handles[id(module)] = handles = []
        handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, prepend=True, always_call=True))
        _HOOKS.update(handle.id for handle in handles)

    def stop_listening(self, block: nn.Module) -> None:
        """Take the hooks off a block that needs none for now. Nothing may be compiled meanwhile that has it inside."""
        handles = self._handles.get(id(block), [])
        while handles:  # an interrupt leaves known what is still on
            handles[0].remove()
            _HOOKS.discard(handles[0].id)
            handles.pop(0)
        self._handles.pop(id(block), None)

    def listen_again(self, block: nn.Module) -> None:
        """Put the hooks of a block back, before all others that it has."""
        if len(self._handles.get(id(block), ())) < _HOOKS_PER_MODULE and self._block_hooks is not None:
            self.stop_listening(block)  # an interrupt may have left one of them
            self._hook(block, *self._block_hooks)
            drop_dynamo_caches([block])

    def watch_method(self, listener: Listener, root: nn.Module, name: str) -> None:
        """Tell the listener when `root.name(...)` is called, which enters the component without its forward."""
        original = getattr(root, name)
        enter, leave = compiled.compile_safe(listener.enter_method), compiled.compile_safe(listener.leave_method)

        def around(*args: Any, **kwargs: Any) -> Any:
            if not enter(root, name, args, kwargs):
                return original(*args, **kwargs)
            try:
                return original(*args, **kwargs)
            finally:
                leave(root)

        self._replace(root, name, around)

    def watch_change(self, owner: nn.Module, name: str, changing: Callable[[], Any]) -> None:
        """Run `owner.name(...)`, which changes modules, inside `changing()`."""

        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with changing():
                return original(*args, **kwargs)

        self.watch_call(owner, name, around)

    def watch_call(self, owner: nn.Module, name: str, around: Callable[..., Any]) -> None:
        """Run `around(original, ...)` where `owner.name(...)` is called."""
        self._replace(owner, name, functools.partial(around, getattr(owner, name)))

    def _replace(self, owner: object, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        names = vars(owner)
        was = names.get(name, _NOT_THERE)
        replacement = functools.partial(_replaced, owner, name, _Around(around, was))
        functools.update_wrapper(replacement, original)  # signature and documentation stay visible

        def undo() -> None:
            if names.get(name) is replacement:  # else somebody put another in its place, which stays
                if was is _NOT_THERE:
                    del names[name]
                else:
                    names[name] = was

        self._undo.append(undo)  # first: an interrupt may come between the two
        names[name] = replacement

    def guard_moves(
        self,
        listener: Listener,
        modules: Iterable[tuple[str, nn.Module]],
        component: str,
        device: torch.device,
        *,
        is_named_apart: bool = True,
        at_home: Callable[[torch.Tensor], torch.Tensor | None] = lambda tensor: None,
    ) -> None:
        """Refuse what would move a component, or a part of it, off `device`, and let the listener lay the component out
        anew when some of it is changed otherwise: pipelines cast single layers of a VAE.

        Everything that moves or casts a module goes through `_apply`; here it is met before the first weight is
        touched. A pipeline that moves its own components in the middle of its call (Cosmos does so with its safety
        checker) is left believing that it did. Copies of the module, pickled or not, are plain and free to move.

        Args:
            modules: of the component, by their dotted names in it.
            is_named_apart: `device` has another name than host memory; else both are "cpu", and nothing moves.
            at_home: gives a weight's stand-in for a pickle, over its bytes at home; None: it is none of ours.
        """
        for path, module in modules:
            if "_apply" not in module.__dict__:  # else it is part of another component, too
                name = f"{component}.{path}" if path else component
                guarded = _Guarded(listener, component, name, device, is_named_apart, at_home)
                for own, replacement in {
                    "_apply": functools.partial(_guarded_apply, module, guarded),
                    "__reduce_ex__": functools.partial(_reduce, module, guarded),
                }.items():
                    self._undo.append(functools.partial(module.__dict__.pop, own, None))
                    module.__dict__[own] = replacement

    def remove(self) -> None:
        """Take everything off; idempotent."""
        self._block_hooks = None
        for handle in [handle for handles in self._handles.values() for handle in handles]:
            handle.remove()
            _HOOKS.discard(handle.id)
        self._handles = {}
        undo_all(self._undo)
        # While the whole is still out of the way: what was compiled for it stays, and is used again.
        drop_dynamo_caches(self._hooked)
        self._hooked = []
        undo_all(self._eager_undo)
        undo_all(self._compile_undo)


_NOT_THERE = object()
_HOOKS_PER_MODULE = 2
_HOOKS: set[int] = set()  # ids of all hooks that are on modules now; torch numbers them throughout
_HOOK_DICTS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def is_our_hook(number: int) -> bool:
    """Whether a hook, by its number in a module's dictionary, is one of ours."""
    return number in _HOOKS


def without_our_wrappers(value: Any) -> Any:
    """What an instance had in its `__dict__` in the place of something of ours; None: nothing."""
    was = _given(value)
    return None if was is _NOT_THERE else was


def _reduce(module: nn.Module, guarded: _Guarded | None, protocol: Any) -> Any:
    """What makes a copy of the module, as its class says, without anything of ours.

    A pickle has the weights as they are at home, since one storage on the device holds tensors of several types, and
    blocks by turns. A copy has the weights themselves, or their copies on the device, as that of a resident module.
    """
    reduced: Any = type(module).__reduce_ex__(module, protocol)
    function, arguments, *rest = reduced
    caller = sys._getframe(1)
    is_copy = caller.f_code in (copy.deepcopy.__code__, copy.copy.__code__)
    if guarded is not None and caller.f_code is copy.deepcopy.__code__:
        # Now, while no other thread's call gives their slots to other units; `deepcopy` finds the copies in its memo.
        with guarded.listener.reading(()):
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                copy.deepcopy(tensor, caller.f_locals["memo"])
    if rest and isinstance(rest[0], dict):
        found = {name: _given(value) for name, value in rest[0].items()}
        state = {name: value for name, value in found.items() if value is not _NOT_THERE}
        if guarded is not None and not is_copy:
            for name in ("_parameters", "_buffers"):
                state[name] = type(state[name])((key, guarded.stand_in(value)) for key, value in state[name].items())
        # Only now, and into dicts of their own: bringing weights home may put hooks back on blocks that had none.
        for name in _HOOK_DICTS:
            if name in state:
                state[name] = type(state[name])((key, hook) for key, hook in state[name].items() if key not in _HOOKS)
        rest[0] = state
    return function, arguments, *rest


def _given(value: Any) -> Any:
    """What an instance had in the place of something of ours; `_NOT_THERE`: nothing."""
    while isinstance(value, functools.partial) and value.func in (_guarded_apply, _reduce, _replaced):
        around = value.args[2] if value.func is _replaced else None
        value = _NOT_THERE if around is None else around.was
    return value


class _Around:
    """A wrapper's function. Not copied along with the instance it wraps a method of: see `__deepcopy__`."""

    def __init__(self, function: Callable[..., Any], was: object) -> None:
        self.function = function
        self.was = was  # by the same name, in the instance's `__dict__`

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


def _replaced(owner: Any, name: str, around: _Around | None, /, *args: Any, **kwargs: Any) -> Any:
    if around is None:  # a copy of the owner
        return getattr(type(owner), name)(owner, *args, **kwargs)
    return around.function(*args, **kwargs)


class _Guarded:
    """What a guard knows. Not copied along with its component: see `__deepcopy__`."""

    def __init__(
        self,
        listener: Listener,
        component: str,
        name: str,
        device: torch.device,
        is_named_apart: bool,
        at_home: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        self.listener, self.component, self.name, self.device = listener, component, name, device
        self.is_named_apart, self.at_home = is_named_apart, at_home

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def stand_in(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """What a pickle has of one of the module's tensors."""
        found = None if tensor is None else self.at_home(tensor)
        return tensor if found is None else found

    def is_moved(self, fn: Callable[[torch.Tensor], torch.Tensor], dtypes: Iterable[torch.dtype]) -> bool:
        """Whether `fn` brings tensors to another device than where streamed ones seem to be."""
        if self.device.type != "cpu":
            return any(fn(self.probe(dtype, 1)).device != self.device for dtype in dtypes)
        if any(fn(self.probe(dtype, 1)).device.type != "cpu" for dtype in dtypes):
            return True
        if not self.is_named_apart:
            return False
        try:
            # A tensor without bytes cannot be copied, to the host either; what else cannot be done with it is no move.
            for dtype in dtypes:
                fn(torch.empty(1, dtype=dtype, device="meta"))
        except NotImplementedError:
            return True
        except Exception:
            return False
        return False

    def probe(self, dtype: torch.dtype, dim: int) -> torch.Tensor:
        """A tensor to try a change on."""
        return torch.empty(((1, 2, 1, 2, 2) + (1,) * dim)[:dim], dtype=dtype, device=self.device)


# The changes of `Module` that do nothing where they give the tensor back that they were given.
_IDEMPOTENT = tuple(
    f"Module.{name}.<locals>."
    for name in ("to", "cuda", "cpu", "xpu", "type", "float", "double", "half", "bfloat16", "to_empty")
)


def _guarded_apply(module: nn.Module, guarded: _Guarded | None, fn: Any, recurse: bool = True) -> nn.Module:
    if guarded is None:
        applied: nn.Module = type(module)._apply(module, fn, recurse)
        return applied
    kinds = {(t.dtype, t.dim()) for t in [*module.parameters(), *module.buffers()]} or {(torch.float32, 1)}
    try:
        is_moved = guarded.is_moved(fn, {dtype for dtype, _ in kinds})
    except Exception as exc:
        raise MovedWhileStreamingError(_refusal(module, guarded)) from exc
    if is_moved and not guarded.listener.is_inside:
        raise MovedWhileStreamingError(_refusal(module, guarded))
    probes = [guarded.probe(dtype, dim) for dtype, dim in kinds]  # memory formats depend on the number of dimensions
    results = [fn(probe) for probe in probes]
    is_known = getattr(fn, "__qualname__", "").startswith(_IDEMPOTENT) and not _sets_format(fn)
    are_same = all(
        r is p or (is_moved and r.dtype == p.dtype and r.stride() == p.stride())
        for r, p in zip(results, probes, strict=True)
    )
    if is_known and are_same:
        return module  # already there, as it is; applying it would load every block
    with guarded.listener.changing(guarded.component):
        # At home the weights are on another device than the one they seem to be on: only the rest of it is done.
        changed: nn.Module = type(module)._apply(module, lambda t: _at_its_place(t, fn), recurse)
        return changed


def _sets_format(fn: Any) -> bool:
    """Whether `fn` is that of `Module.to(memory_format=...)`, which may change a weight and leave a probe as it is."""
    code, cells = getattr(fn, "__code__", None), getattr(fn, "__closure__", None) or ()
    names = code.co_freevars if code is not None else ()
    held = dict(zip(names, cells, strict=False))
    return "convert_to_format" in held and held["convert_to_format"].cell_contents is not None


def _at_its_place(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    changed = fn(tensor)
    return changed if changed.device == tensor.device else changed.to(tensor.device)


def _refusal(module: nn.Module, guarded: _Guarded) -> str:
    return (
        f"`{guarded.name}` ({type(module).__name__}) cannot be moved while its weights are streamed to "
        f"{guarded.device}. Leave the call out, since it runs there as it is; or leave the offload context (or call "
        "close()), move it, and enter again."
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
            rivals = RIVAL_HOOKS & set(getattr(getattr(module, "_diffusers_hook", None), "hooks", None) or ())
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
