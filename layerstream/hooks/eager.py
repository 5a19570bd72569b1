"""What runs as ordinary Python around blocks that stream: forwards that dynamo passes over, and compiled methods.

Between hooked blocks there is nothing worth compiling, and tracing it does harm: dynamo reads storage, strides and
gradient of every weight it meets, and weights that are elsewhere would be loaded in the middle of a trace.
`keep_eager_around` makes dynamo pass over the forwards that lead to the blocks and go on inside the blocks, however and
whenever the whole was compiled, and keeps what was compiled for later. Methods that were compiled by themselves are
found (`compiled_methods_around`, `holders_around`), for whoever can put each as it was written in its place.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import CellType, CodeType, ModuleType
from typing import Any, Final, cast

import torch
from torch import nn

from layerstream.errors import CompiledWholeError
from layerstream.finalisers import FinaliserLock
from layerstream.hooks.compiled import context_of, is_fullgraph, uncompiled
from layerstream.torch_private import code_store, dynamo_module, skip_code

TORCH_DIR: Final = str(Path(torch.__file__).parent)  # where code is torch's own


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
    around = forward_codes([*modules, *(base for module in modules for base in type(module).__mro__)])
    codes = [code for code in around - forward_codes(units.values()) if not code.co_filename.startswith(TORCH_DIR)]
    with _held_lock.held():
        for code in codes:
            _, count = _held.get(id(code), (code, 0))
            _held[id(code)] = (code, count + 1)
            skip_code(code)
    return functools.partial(_held_lock.when_free, functools.partial(_let_go, codes))


def is_passed_over(code: CodeType) -> bool:
    """Whether dynamo passes over this code because of `keep_eager_around`."""
    return id(code) in _held


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


def _around(component: nn.Module, blocks: Collection[int]) -> dict[str, nn.Module]:
    """The modules that contain one of these blocks (by their ids), by their dotted names in the component."""
    root = uncompiled(component)
    paths = [path for path, module in root.named_modules(remove_duplicate=False) if id(module) in blocks and path]
    parents = {path[:end] for path in paths for end in (0, *(at.start() for at in re.finditer(r"\.", path)))}
    return {path: root.get_submodule(path) for path in parents}


def forward_codes(modules: Iterable[object]) -> frozenset[CodeType]:
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
# Methods that were compiled by themselves

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
        if context_of(each) is not None:
            return cast("Callable[..., Any]", each._torchdynamo_orig_callable)  # type: ignore[attr-defined]
    return None


def _holds_one_graph(value: object, depth: int) -> bool:
    """Whether a function that is compiled in one graph is reached through an object's attributes, or a closure."""
    context = context_of(value)
    if context is not None:
        return is_fullgraph(context)
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
