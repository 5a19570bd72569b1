"""`torch.compile` and hooks: the one place that knows how dynamo stores what it compiled.

Compiled code does not notice a hook that comes or goes. `torch._dynamo.config.skip_nnmodule_hook_guards` is True,
so code traced before a hook was registered never calls it, and code traced with it keeps calling it. Nor can one
rely on the weights to fail a guard: tensors below a module whose dicts did not change are not looked at again
(`skip_tensor_guards_with_matching_dict_tags`; torch 2.6 and 2.9 ran on with stride-0 placeholders and returned NaN).

What holds, on torch 2.6 to 2.13:

- A hook wrapped in `torch.compiler.disable` (`compile_safe`) runs as ordinary Python. On a module that is compiled
  by itself it runs outside the compiled code: one graph for all equal blocks, no break, `fullgraph=True` too.
- Code that runs a hooked module *inside* something larger must be dropped when hooks come and when they go
  (`drop_dynamo_caches`). Traced anew it breaks at the hooked module, which is then compiled by itself.
- Between hooked blocks there is nothing worth compiling, and tracing it does harm: dynamo reads storage, strides and
  gradient of every weight it meets, and weights that are elsewhere would be loaded in the middle of a trace.
  `keep_eager_around` makes dynamo pass over the forwards that lead to the blocks and go on inside the blocks,
  however and whenever the whole was compiled, and keeps what was compiled for later.
- Or `exchange_for_block_compile` gives the compiler of the whole to the streamed blocks alone.
- One graph cannot stop at a block: `fullgraph=True` on the whole is refused by name (`refuse_fullgraph`), unless one
  of these two makes it hold for each block instead.

Order: `keep_eager_around` or the exchange, hooks on, drop; ...; hooks off, drop, undo.

Names that start with `_` in torch are read with a way out: what cannot be understood counts as "may be affected".
torch._dynamo is imported only where something is installed (`compile_safe`, `keep_eager_around`); the rest asks
`sys.modules`. Importing it takes 1 s, which diffusers has spent already by the time a pipeline exists.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CellType, CodeType, FrameType, ModuleType
from typing import Any, Final, ParamSpec, TypeVar, cast

import torch
from torch import nn

from layerstream.errors import CompiledWholeError
from layerstream.finalisers import FinaliserLock
from layerstream.torch_private import SET_EVAL_FRAME, code_store, dynamo_module, skip_code

_P = ParamSpec("_P")
_R = TypeVar("_R")

_ABSENT: Final = object()  # "this name is not in the module's own __dict__"
_TORCH_DIR: Final = str(Path(torch.__file__).parent)

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
        is_fullgraph=any(_is_fullgraph(each) for _, each, _ in found),
        has_cuda_graphs=any(_has_cuda_graphs(each) for _, each, _ in found),
        _context=context,
        _places=tuple(place for _, _, place in found),
    )


def _compiled_places(component: nn.Module) -> Iterator[tuple[str, Any, _Place]]:
    """Everything that compiles a call of `component`, outermost first: form, dynamo context, and its place."""
    eval_frame = dynamo_module("eval_frame")
    module = component
    while True:
        context = _context_of(vars(module).get("_compiled_call_impl"))
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
        context = _context_of(forward)
        if context is not None:
            plain = forward._torchdynamo_orig_callable  # type: ignore[union-attr]
            if "forward" not in vars(module):  # compiled in the class: `plain` is the function, not yet bound
                plain = plain.__get__(module)
            form = "component.forward = torch.compile(component.forward)"
            yield form, context, _Place(module, "forward", plain)
        return


def _context_of(function: object) -> Any | None:
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


def _is_fullgraph(context: Any) -> bool:
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
# Forwards that dynamo is to pass over

# Code that is passed over, by its id, and how many hold it so: components of one class share it.
_held: Final[dict[int, tuple[CodeType, int]]] = {}
_held_lock: Final = FinaliserLock()


def keep_eager_around(component: nn.Module, blocks: Iterable[nn.Module]) -> Callable[[], None]:
    """Have dynamo pass over the forwards of all modules that contain one of `blocks`, until the result is called.

    Wherever a compiled call reaches such a forward it runs as ordinary Python, and what it calls is compiled piece by
    piece under the settings of that compile: all blocks, streamed or not, and small modules such as embeddings. This
    holds for every form of compiling the whole, before or during, and `fullgraph=True` then applies to each piece.

    Code compiled for the whole before is kept (torch >= 2.7) and used again after undo; `drop_dynamo_caches` leaves
    it alone meanwhile. Not passed over are forwards wrapped by torch's own decorators (`torch.no_grad`), which stop at
    the hooks as they would without this, and a forward whose code is also that of a block.

    Applies to classes, since dynamo keeps this with the code: another model of the component's class that is compiled
    as a whole runs in pieces too meanwhile.

    Returns: what undoes it, once, and holds no module. A collector may call it at any place.
    """
    units = {id(block): block for block in map(uncompiled, blocks)}
    # A forward may call that of a base class, which is a function of its own to dynamo.
    modules = list(_around(component, units).values())
    around = _forward_codes([*modules, *(base for module in modules for base in type(module).__mro__)])
    codes = [code for code in around - _forward_codes(units.values()) if not code.co_filename.startswith(_TORCH_DIR)]
    with _held_lock.held():
        for code in codes:
            _, count = _held.get(id(code), (code, 0))
            _held[id(code)] = (code, count + 1)
            skip_code(code)
    return functools.partial(_held_lock.when_free, functools.partial(_let_go, codes))


def _around(component: nn.Module, blocks: Collection[int]) -> dict[str, nn.Module]:
    """The modules that contain one of these blocks (by their ids), by their dotted names in the component."""
    root = uncompiled(component)
    paths = [path for path, module in root.named_modules(remove_duplicate=False) if id(module) in blocks and path]
    parents = {path[:end] for path in paths for end in (0, *(at.start() for at in re.finditer(r"\.", path)))}
    return {path: root.get_submodule(path) for path in parents}


_HELD_DEPTH: Final = 2  # attributes of attributes


def compiled_methods_around(
    component: nn.Module, blocks: Iterable[nn.Module]
) -> Iterator[tuple[str, nn.Module, str, Callable[..., Any]]]:
    """Methods whose functions were given to `torch.compile`, when their class or the object was made, of modules that
    contain blocks: the module's dotted name, the module, the method's name, and the method as it was written.

    Remote code does this (`sample = torch.compile(sample, fullgraph=True)` in a class body). One graph cannot stop at a
    block, so while blocks stream these functions are to run as they were written.
    """
    for path, module, name, value, is_own in _attributes_around(component, blocks):
        original = _compiled_function_of(value)
        if original is not None:
            yield path, module, name, original if is_own else functools.partial(original, module)


def holders_around(component: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module, str, str]]:
    """Methods that are objects of some class, and hold a function that was compiled with `fullgraph=True`: the module's
    dotted name, the module, the method's name, and the object's class.

    What such an object does with the function is not known, so it cannot be run as written; `explain_holder` says so
    where that fails.
    """
    for path, module, name, value, _ in _attributes_around(component, blocks):
        is_computed = isinstance(value, property | functools.cached_property)  # by asking for it
        if not is_computed and _compiled_function_of(value) is None and _holds_one_graph(value, _HELD_DEPTH):
            yield path, module, name, type(value).__name__


def explain_holder(
    place: str, component: str, kind: str, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a method that `holders_around` found.

    Raises:
        CompiledWholeError: it reached blocks that stream inside its one graph.
    """
    unsupported = getattr(dynamo_module("exc"), "Unsupported", ())
    try:
        return original(*args, **kwargs)
    except unsupported as exc:
        raise CompiledWholeError(
            f"`{place}` of `{component}` ({kind}) holds a function that was given to torch.compile with "
            "fullgraph=True, and does not run in one graph while blocks stream. Compile the blocks instead "
            f"(`block.compile()` on each), drop fullgraph=True, or leave `{component}` out of what is given to "
            "offload()."
        ) from exc


def _attributes_around(
    component: nn.Module, blocks: Iterable[nn.Module]
) -> Iterator[tuple[str, nn.Module, str, object, bool]]:
    """What the modules that contain blocks have by their own names and those of their classes: the module's dotted
    name, the module, the name, what it is, and whether the object itself has it."""
    for path, module in _around(component, {id(block) for block in map(uncompiled, blocks)}).items():
        seen = {"forward", "_compiled_call_impl"} & set(vars(module))  # of these `exchange_for_block_compile` knows
        for names in (vars(module), *map(vars, _classes_of(module))):
            for name, value in list(names.items()):
                if name not in seen:
                    seen.add(name)
                    yield path, module, name, value, names is vars(module)


def _classes_of(module: nn.Module) -> Iterator[type]:
    return itertools.takewhile(lambda cls: cls is not nn.Module, type(module).__mro__)


def _compiled_function_of(value: object) -> Callable[..., Any] | None:
    """The function that was compiled, of what `torch.compile` gave, or of a function that calls that: a decorator that
    can be switched off keeps it in its closure."""
    for each in (value, *_contents(value)):
        if _context_of(each) is not None:
            return cast("Callable[..., Any]", each._torchdynamo_orig_callable)  # type: ignore[attr-defined]
    return None


def _holds_one_graph(value: object, depth: int) -> bool:
    """Whether a function that is compiled in one graph is reached through an object's attributes, or a closure."""
    context = _context_of(value)
    if context is not None:
        return _is_fullgraph(context)
    if not depth or isinstance(value, nn.Module | type | ModuleType):
        return False
    partial = value.func if isinstance(value, functools.partial) else None
    held = [*getattr(value, "__dict__", {}).values(), partial, *_contents(value)]
    return any(_holds_one_graph(each, depth - 1) for each in held)


def _contents(value: object) -> list[object]:
    """What a function closes over."""
    return [_content(cell) for cell in getattr(value, "__closure__", None) or ()]


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None


def _let_go(codes: list[CodeType]) -> None:
    """Let dynamo compile these again, unless others hold them."""
    while codes:
        code = codes.pop()
        _, count = _held.pop(id(code))
        if count > 1:
            _held[id(code)] = (code, count - 1)
        else:
            _compile_again(code)


def _compile_again(code: CodeType) -> None:
    store = code_store()
    try:
        action = store._FrameAction.DEFAULT
        store.set_code_exec_strategy(code, store._FrameExecStrategy(action, action))
    except AttributeError:  # torch 2.6 keeps the mark where the compiled code is, and takes both away
        store.reset_code(code)


# --------------------------------------------------------------------------------------------------------------
# Code that was compiled before hooks came or went


# Guards as dynamo prints them: `___check_type_id(L['self']._modules['blocks']._modules['0'], 94844736727520)`.
# At least nine digits, so that a tuple of small numbers in the path is not taken for the address.
_IDENTITY_CHECK: Final = re.compile(r"___check_(?:type|obj)_id\((.*?), (\d{9,})\)")

# Names that compiled code uses when it fetches the weights of modules from their owners.
_MODULE_STATE: Final = frozenset({"_modules", "_parameters", "_buffers"})

# Layers of torch.nn that own weights. Containers are left out: torch's own guard filter keeps those.
_LAYER_CLASSES: Final = frozenset(
    str(id(each))
    for each in vars(nn.modules).values()
    if isinstance(each, type) and issubclass(each, nn.Module) and each.__module__ != nn.modules.container.__name__
)


def is_in_use() -> bool:
    """Whether dynamo may have compiled something in this process: its code does not notice hooks that come or go."""
    eval_frame = dynamo_module("eval_frame")
    if eval_frame is None:
        return False
    backends = getattr(eval_frame, "cached_backends", None)  # None among them: where dynamo is off
    return backends is None or any(backend is not None for backend in backends.values())


def drop_dynamo_caches(modules: Iterable[nn.Module]) -> int:
    """Drop compiled code that runs one of `modules` inside itself; call it after hooks were put on or taken off them.

    Affected is whatever may have inlined a call of one of them: the forward of an ancestor, a function around the
    component, the rest of either after a graph break. It is found by its guards, which name the class of every
    module it went through, so all modules of one class are taken together. Kept is the code of a module's own
    forward, as of blocks compiled by `block.compile()` or `compile_repeated_blocks()`, because hooks run outside of
    it: entering and leaving streaming again and again does not compile the blocks again. Kept is also the code of
    models that have nothing to do with `modules`. Functions that dynamo gave up on (a loop that broke at a hook) are
    cleared too, so that it tries them again.

    Does nothing if dynamo was never imported, and costs microseconds if nothing was compiled. Otherwise guards are
    read as text: 0.1 s for a model of a thousand modules compiled as a whole.

    Not seen: code that `torch._dynamo.config.caching_precompile` loaded from disk and that has not run yet.

    Returns: the number of functions whose compiled code was dropped (those that were only given up do not count).
    """
    convert_frame = dynamo_module("convert_frame")
    hooked = [uncompiled(module) for module in modules]
    if convert_frame is None or not hooked:
        return 0
    try:
        return _drop_affected(convert_frame, hooked)
    except (AttributeError, TypeError):
        # A torch that keeps compiled code in a way unknown here. All of it goes: slow once, never wrong.
        torch.compiler.reset()
        return 1


def _drop_affected(convert_frame: Any, hooked: list[nn.Module]) -> int:
    store = code_store()
    # By class: the guards of code traced for one block hold for its equal twins. By object: some guards do name it.
    identities = frozenset(str(id(each)) for module in hooked for each in (module, type(module)))
    forwards = _forward_codes(hooked)
    num_dropped = 0
    with convert_frame.compile_lock:
        # Every function that dynamo was ever asked to compile; `torch.compiler.reset` walks the same list.
        for reference in list(convert_frame.input_codes.seen):
            code = reference()
            if code is None or id(code) in _held:  # held: does not run while there are hooks, and is right without
                continue
            entries = list(store._debug_get_cache_entry_list(code))
            if hasattr(store, "_debug_get_precompile_entries"):  # torch >= 2.8
                entries += store._debug_get_precompile_entries(code)
            own = _self_names(code, forwards)
            if any(_may_call(entry, identities, own) for entry in entries):
                store.reset_code(code)
                num_dropped += 1
            elif not entries and not code.co_filename.startswith(_TORCH_DIR):
                # Given up on, or nothing to compile in it: it cannot be told which, and trying again is cheap.
                store.reset_code(code)
    return num_dropped


def _may_call(entry: Any, identities: frozenset[str], own: frozenset[str]) -> bool:
    """Whether a piece of compiled code may contain a call of a hooked module.

    Args:
        identities: `id` of the hooked modules and of their classes.
        own: paths by which the code's own module is reached, whose hooks run before and after the code.
    """
    checks = _IDENTITY_CHECK.findall(str(entry.guard_manager))
    if any(identity in identities and path not in own for path, identity in checks):
        return True
    # Guards on modules can be switched off (`torch.compiler.skip_guard_on_all_nn_modules_unsafe`). Code that fetches
    # weights from modules, but checks not one layer on the way, was compiled like that and could call anything.
    code = getattr(entry, "code", None)
    reads_weights = code is None or not _MODULE_STATE.isdisjoint(code.co_names)
    return reads_weights and _LAYER_CLASSES.isdisjoint(identity for _, identity in checks)


def _self_names(code: CodeType, forwards: frozenset[CodeType]) -> frozenset[str]:
    """The path that stands for the module itself in the guards of `code`, if `code` is one of `forwards`.

    Elsewhere there is none: in `def run(model, x): return model(x)` the first argument is a module that is called.
    """
    # The rest of a function after a graph break is a function of its own; its guards use the same names.
    resumed = getattr(dynamo_module("resume_execution"), "ContinueExecutionCache", None)
    metadata = getattr(resumed, "generated_code_metadata", {})
    while code in metadata:
        code = metadata[code].code
    if code not in forwards or code.co_filename.startswith(_TORCH_DIR):  # torch's decorators wrap anything
        return frozenset()
    if code.co_argcount:
        return frozenset({f"L['{code.co_varnames[0]}']"})
    first = code.co_kwonlyargcount  # a decorator's `*args` comes after its keyword-only arguments
    return frozenset(f"L['{name}'][0]" for name in code.co_varnames[first : first + 1])


def _forward_codes(modules: Iterable[object]) -> frozenset[CodeType]:
    return frozenset(code for module in modules for code in _codes_of(getattr(module, "forward", None)))


def _codes_of(function: object) -> Iterator[CodeType]:
    """The code of a forward and of what its decorators wrap: compiled code is kept under the outermost of them."""
    while function is not None:
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            yield code
        function = getattr(function, "__wrapped__", None)


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
