"""Code that was compiled before hooks came or went: what of it is dropped.

Compiled code does not notice a hook that comes or goes. `torch._dynamo.config.skip_nnmodule_hook_guards` is True,
so code traced before a hook was registered never calls it, and code traced with it keeps calling it. Nor can one
rely on the weights to fail a guard: tensors below a module whose dicts did not change are not looked at again
(`skip_tensor_guards_with_matching_dict_tags`; torch 2.6 and 2.9 ran on with stride-0 placeholders and returned NaN).

So code that runs a hooked module *inside* something larger must be dropped when hooks come and when they go. Traced
anew it breaks at the hooked module, which is then compiled by itself. What cannot be understood counts as "may be
affected".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import CodeType
from typing import Any, Final

import torch
from torch import nn

from layerstream.hooks.compiled import uncompiled
from layerstream.hooks.eager import TORCH_DIR, forward_codes, is_passed_over
from layerstream.torch_private import code_store, dynamo_module

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
    forwards = forward_codes(hooked)
    num_dropped = 0
    with convert_frame.compile_lock:
        # Every function that dynamo was ever asked to compile; `torch.compiler.reset` walks the same list.
        for reference in list(convert_frame.input_codes.seen):
            code = reference()
            if code is None or is_passed_over(code):  # which does not run while there are hooks, and is right without
                continue
            entries = list(store._debug_get_cache_entry_list(code))
            if hasattr(store, "_debug_get_precompile_entries"):  # torch >= 2.8
                entries += store._debug_get_precompile_entries(code)
            own = _self_names(code, forwards)
            if any(_may_call(entry, identities, own) for entry in entries):
                store.reset_code(code)
                num_dropped += 1
            elif not entries and not code.co_filename.startswith(TORCH_DIR):
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
    if code not in forwards or code.co_filename.startswith(TORCH_DIR):  # torch's decorators wrap anything
        return frozenset()
    if code.co_argcount:
        return frozenset({f"L['{code.co_varnames[0]}']"})
    first = code.co_kwonlyargcount  # a decorator's `*args` comes after its keyword-only arguments
    return frozenset(f"L['{name}'][0]" for name in code.co_varnames[first : first + 1])
