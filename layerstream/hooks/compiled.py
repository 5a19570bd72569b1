"""`torch.compile` and hooks: what is compiled and how, and hooks that dynamo may meet.

This module, `eager` and `dynamo_caches` are the only ones that know how dynamo stores what it compiled. What holds, on
torch 2.6 to 2.13:

- A hook wrapped in `torch.compiler.disable` (`compile_safe`) runs as ordinary Python. On a module that is compiled
  by itself it runs outside the compiled code: one graph for all equal blocks, no break, `fullgraph=True` too.
- Code that runs a hooked module *inside* something larger must be dropped when hooks come and when they go
  (`drop_dynamo_caches`).
- Between hooked blocks there is nothing worth compiling: dynamo passes over what leads to them (`keep_eager_around`).
- Or `exchange_for_block_compile` gives the compiler of the whole to the streamed blocks alone.
- One graph cannot stop at a block: `fullgraph=True` on the whole is refused by name (`refuse_fullgraph`), unless one
  of these two makes it hold for each block instead.

Order: `keep_eager_around` or the exchange, hooks on, drop; ...; hooks off, drop, undo.

Names that start with `_` in torch are read with a way out.
torch._dynamo is imported only where something is installed (`compile_safe`, `keep_eager_around`); the rest asks
`sys.modules`. Importing it takes 1 s, which diffusers has spent already by the time a pipeline exists.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import nn

from layerstream.errors import CompiledWholeError
from layerstream.torch_private import SET_EVAL_FRAME, dynamo_module, skip_code

_P = ParamSpec("_P")
_R = TypeVar("_R")

_ABSENT: Final = object()  # "this name is not in the module's own __dict__"

# Said by dynamo in its own error where a graph must not break but meets our hook (torch 2.9 does, 2.7 does not yet).
_REASON: Final = (
    "layerstream loads a block's weights in this hook, which cannot be part of a graph; compile the blocks "
    "(`component.compile_repeated_blocks()` or `block.compile()`), or drop fullgraph=True while streaming"
)


# --------------------------------------------------------------------------------------------------------------
# What is compiled, and how


@dataclass(frozen=True, slots=True)
class _Place:
    """A name in a module's own `__dict__` that decides what a call of the module runs, and what it is meanwhile."""

    module: nn.Module
    name: str
    meanwhile: object  # `_ABSENT`: the name is taken away, and the class's own comes through

    def swap(self) -> Callable[[], None]:
        """Put `meanwhile` in place; returns what puts the former value back.

        `__dict__` is written directly: `OptimizedModule.__setattr__` would pass the name on to the module inside.
        """
        names = vars(self.module)
        before = names.get(self.name, _ABSENT)
        self._write(self.meanwhile)

        def put_back() -> None:
            # Compiled anew by the user in the meantime: theirs is newer than what we remember, and stays.
            if names.get(self.name, _ABSENT) is self.meanwhile:
                self._write(before)

        return put_back

    def _write(self, value: object) -> None:
        if value is _ABSENT:
            vars(self.module).pop(self.name, None)
        else:
            vars(self.module)[self.name] = value


@dataclass(frozen=True, slots=True)
class CompiledWhole:
    """How a module is compiled as one piece.

    Attributes:
        form: the code that did it, for messages: "component.compile()", "torch.compile(component)" or
            "component.forward = torch.compile(component.forward)".
        is_fullgraph: a graph break raises (`fullgraph=True`, or dynamo's `error_on_graph_break`).
        has_cuda_graphs: kernels are recorded with the addresses of their weights (`mode="reduce-overhead"`), so a
            weight that moves to another slot means recording again: correct, but slow and costly in memory.
    """

    form: str
    is_fullgraph: bool
    has_cuda_graphs: bool
    _context: Any = field(repr=False, compare=False)  # dynamo's OptimizeContext: backend, mode, dynamic, options
    _places: tuple[_Place, ...] = field(repr=False, compare=False)  # all that must give way for an eager call

    def compile_call(self, module: nn.Module) -> Callable[..., Any]:
        """The compiled `_call_impl` of `module` under the same settings; what `module.compile(...)` would store.

        The same context, hence the same backend object: dynamo keeps compiled code by backend, so code that a
        block already has under this backend is found again rather than compiled twice.
        """
        return self._context(module._call_impl)  # type: ignore[no-any-return]


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, however often wrapped; `module` itself otherwise."""
    optimized_module = getattr(dynamo_module("eval_frame"), "OptimizedModule", None)
    while optimized_module is not None and isinstance(module, optimized_module):
        module = module._orig_mod
    return module


def describe_compiled(component: nn.Module) -> CompiledWhole | None:
    """How `component` is compiled as a whole, or None if a call of it runs as ordinary Python.

    Knows `component.compile(...)`, `torch.compile(component, ...)` and a compiled `forward` (on the instance, or
    decorated in the class). `torch.compiler.disable(component)` and `torch.compile(..., disable=True)` are not
    compiled. Modules inside `component` are not looked at: use this on a block to learn about the block.
    """
    if dynamo_module("eval_frame") is None:
        return None
    found = list(_compiled_places(component))
    if not found:
        return None
    form, context, _ = found[0]
    return CompiledWhole(
        form=form,
        is_fullgraph=any(is_fullgraph(each) for _, each, _ in found),
        has_cuda_graphs=any(_has_cuda_graphs(each) for _, each, _ in found),
        _context=context,
        _places=tuple(place for _, _, place in found),
    )


def is_in_use() -> bool:
    """Whether dynamo may have compiled something in this process: its code does not notice hooks that come or go."""
    eval_frame = dynamo_module("eval_frame")
    if eval_frame is None:
        return False
    backends = getattr(eval_frame, "cached_backends", None)  # None among them: where dynamo is off
    return backends is None or any(backend is not None for backend in backends.values())


def _compiled_places(component: nn.Module) -> Iterator[tuple[str, Any, _Place]]:
    """Everything that compiles a call of `component`, outermost first: form, dynamo context, and its place."""
    eval_frame = dynamo_module("eval_frame")
    module = component
    while True:
        context = context_of(vars(module).get("_compiled_call_impl"))
        if context is not None:
            yield "component.compile()", context, _Place(module, "_compiled_call_impl", _ABSENT)
        if isinstance(module, eval_frame.OptimizedModule):  # type: ignore[union-attr]
            inner = module._orig_mod
            # What its `forward` is does not matter (`_aot_compile` puts another kind of object there), unless it is
            # the plain call of the module inside: then an exchange is under way.
            if _is_compiling(module.dynamo_ctx) and vars(module).get("forward") != inner.__call__:
                yield "torch.compile(component)", module.dynamo_ctx, _Place(module, "forward", inner.__call__)
            module = inner
            continue
        forward = getattr(module, "forward", None)
        context = context_of(forward)
        if context is not None:
            plain = forward._torchdynamo_orig_callable  # type: ignore[union-attr]
            if "forward" not in vars(module):  # compiled in the class: `plain` is the function, not yet bound
                plain = plain.__get__(module)
            form = "component.forward = torch.compile(component.forward)"
            yield form, context, _Place(module, "forward", plain)
        return


def context_of(function: object) -> Any | None:
    """The dynamo context that `function` runs under if `torch.compile` made it, else None.

    torch keeps it only as the variable `self` that the wrapper closes over (2.6: `_fn`, later `compile_wrapper`).
    Attributes such as `_torchdynamo_orig_callable` prove nothing: `functools.wraps` copies them to other functions.
    """
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells or code.co_filename != getattr(dynamo_module("eval_frame"), "__file__", None):
        return None
    for name, cell in zip(code.co_freevars, cells, strict=True):
        if name == "self" and _is_compiling(cell.cell_contents):
            return cell.cell_contents
    return None


def _is_compiling(context: object) -> bool:
    # Sisters of OptimizeContext turn the compiler off (DisableContext) or only run what is there (RunOnlyContext).
    return isinstance(context, getattr(dynamo_module("eval_frame"), "OptimizeContext", ()))


def is_fullgraph(context: Any) -> bool:
    if getattr(context, "fullgraph", False) or getattr(context, "error_on_graph_break", False):  # torch >= 2.9
        return True
    return _is_one_graph(context.callback)


def _is_one_graph(callback: object) -> bool:
    """Whether a frame callback of dynamo traces with `fullgraph=True`; False where there is no callback.

    All versions end in a `ConvertFrameAssert`, whose `_one_graph` is the setting itself; without fullgraph it is
    inside a `ConvertFrame`. The attribute that leads from a wrapper to what it wraps was renamed after 2.7.
    """
    for each in _unwrapped(callback):
        convert = getattr(each, "_inner_convert", each)
        if hasattr(convert, "_one_graph"):
            return bool(convert._one_graph)
    return False


def _has_cuda_graphs(context: Any) -> bool:
    for each in _unwrapped(context.callback):
        config = getattr(each, "config", None)  # of torch's wrapper for the inductor backend: the mode, spelt out
        if isinstance(config, dict) and config.get("triton.cudagraphs"):
            return True
        if getattr(getattr(each, "compiler_fn", None), "compiler_name", None) == "cudagraphs":
            return True
    return False


def _unwrapped(callback: object) -> Iterator[object]:
    """`callback` and what it wraps: error catcher, frame converter, debug wrapper, backend."""
    while callback is not None:
        yield callback
        inner = getattr(callback, "_torchdynamo_orig_backend", None)
        callback = getattr(callback, "_torchdynamo_orig_callable", None) if inner is None else inner


# --------------------------------------------------------------------------------------------------------------
# fullgraph=True on a component whose blocks are hooked


def refuse_fullgraph(component: nn.Module, name: str) -> None:
    """Raise if `component` is compiled with `fullgraph=True` around the blocks that are to be hooked.

    Call it before hooks are installed, and at each call from the component's own pre-hook (wrapped by
    `compile_safe`): that hook runs before dynamo sees the component's forward, so a component compiled *after*
    hooks were installed gets this error instead of dynamo's. What is compiled further out (`torch.compile(fn,
    fullgraph=True)` around the component) is traced through the hook, and stays dynamo's own error; it names
    layerstream and says what to do (`compile_safe`). Takes 3 µs.

    Raises: CompiledWholeError: names the component and the call that compiled it.
    """
    if dynamo_module("eval_frame") is None:
        return
    whole = describe_compiled(component)
    if whole is not None and whole.is_fullgraph:
        form = whole.form
    elif _is_call_fullgraph():
        form = "torch.compile(component)"
    else:
        return
    code = form.replace("component", name).removesuffix(")")
    separator = "" if code.endswith("(") else ", "
    raise CompiledWholeError(
        f"`{name}` is compiled as a whole by `{code}{separator}fullgraph=True)`, which leaves no place to load its "
        f"blocks one by one. Compile the blocks instead (`{name}.compile_repeated_blocks(fullgraph=True)`, or "
        "`block.compile(fullgraph=True)` for each), or leave out fullgraph=True while it is streamed."
    )


def _is_call_fullgraph() -> bool:
    """Whether the call that reached the running `compile_safe` hook is being compiled with `fullgraph=True`.

    The hook itself runs with the compiler off; what was on before is a local of the function that turned it off.
    """
    file = getattr(dynamo_module("eval_frame"), "__file__", None)
    frame: FrameType | None = sys._getframe(1)
    for _ in range(6):  # our callers, and the engine's between the hook and here
        if frame is None:
            return False
        is_disable = frame.f_code.co_filename == file and "prior" in frame.f_code.co_varnames
        if is_disable or (frame.f_code.co_filename == __file__ and "before" in frame.f_code.co_varnames):
            callback = frame.f_locals.get("prior" if is_disable else "before")
            strict = getattr(dynamo_module("eval_frame"), "_get_error_on_graph_break", None)  # torch >= 2.9
            return callable(callback) and (_is_one_graph(callback) or bool(strict is not None and strict()))
        frame = frame.f_back
    return False


# --------------------------------------------------------------------------------------------------------------
# From a compiled whole to compiled blocks, and back


def exchange_for_block_compile(component: nn.Module, blocks: Iterable[nn.Module]) -> Callable[[], None]:
    """Compile `blocks` one by one instead of `component` as a whole, until the returned function is called.

    Meanwhile the component's own forward runs as ordinary Python, and each block that is not compiled already is,
    with the backend, mode, dynamic and fullgraph of the whole. Calling the result undoes exactly that: names in the
    `__dict__` of component and blocks are as before, except where the user compiled anew in between, which stays.
    A second call does nothing.

    Code compiled for the whole is not touched, so after undo it is used again without compiling. (Unless it was
    dropped: `drop_dynamo_caches` with the hooks that were the reason for the exchange does, as it must.)

    Does nothing if the component is not compiled, or is itself one of the blocks: then its compile *is* per block.

    Raises: what dynamo raises for a block it cannot wrap; nothing is changed then.
    """
    whole = describe_compiled(component)
    units = list(blocks)
    if whole is None or any(uncompiled(block) is uncompiled(component) for block in units):
        return _do_nothing
    # All wrappers first: whatever fails here fails before anything is swapped.
    places = [
        _Place(block, "_compiled_call_impl", whole.compile_call(block))
        for block in dict.fromkeys(units)
        if block._compiled_call_impl is None and describe_compiled(block) is None
    ]
    undo: list[Callable[[], None]] = []

    def put_back() -> None:
        while undo:
            undo.pop()()

    try:
        for place in (*whole._places, *places):
            undo.append(place.swap())
    except BaseException:
        put_back()
        raise
    return put_back


def _do_nothing() -> None:
    """An undo where nothing was done."""


# --------------------------------------------------------------------------------------------------------------
# Hooks


def compile_safe(hook: Callable[_P, _R]) -> Callable[_P, _R]:
    """`hook` as `torch.compiler.disable` makes it: never traced, always run as ordinary Python, where it stands.

    A plain hook would be compiled with the block, and once more for every block, since it guards on the engine's own
    state (13 graphs and the recompile limit for one class of block).

    Where a graph must not break (`fullgraph=True` around a hooked module) dynamo raises `Unsupported`; newer versions
    (2.9; not yet 2.7) print the reason and the remedy set here. Use `refuse_fullgraph` for an error of our own.

    `disable` asks for more than is needed here (what is exported, the stance of the process), and costs 0.4 µs and ten
    function calls each time (torch 2.13; 3.6 µs in 2.6). So its wrapper is what dynamo sees, and a shorter one runs. If
    nothing has done so before, this imports torch._dynamo (1 s).
    """
    disable: Any = torch.compiler.disable
    options = {"reason": _REASON} if "reason" in inspect.signature(disable).parameters else {}
    disabled: Any = disable(hook, **options)
    set_eval_frame = SET_EVAL_FRAME.find()
    if set_eval_frame is None:
        return disabled  # type: ignore[no-any-return]

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        before = set_eval_frame(None)  # nothing is compiled until it is put back
        try:
            return hook(*args, **kwargs)
        finally:
            set_eval_frame(before)

    functools.update_wrapper(call, disabled)  # with the marks by which dynamo knows what it must not trace
    skip_code(call.__code__)
    return call
