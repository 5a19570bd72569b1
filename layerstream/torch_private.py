"""Every private name of torch that layerstream uses, and what happens where a version does not have it.

torch promises nothing about these. Each is looked up here once, by its name; whoever uses one imports it from here, and
goes on without it as its entry says. `tests/test_torch_private.py` looks each up in the version that is installed, runs
the engine without each that it can go without, and finds private names that are used anywhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

__all__ = [
    "CALL_CODE",
    "DISPATCH_MODE_STACK",
    "FUNCTION_MODE_STACK",
    "FUNCTORCH_LEVEL",
    "GET_ALLOCATOR_SETTINGS",
    "GLOBAL_HOOKS",
    "GLOBAL_PRE_HOOKS",
    "NAMES",
    "SET_ALLOCATOR_SETTINGS",
    "SET_CUDA_ALLOCATOR_SETTINGS",
    "SET_EVAL_FRAME",
    "NormBase",
    "PrivateName",
    "TorchDispatchMode",
    "code_store",
    "current_raw_stream",
    "dynamo_module",
    "is_profiler_enabled",
    "is_traceable_wrapper_subclass",
    "skip_code",
    "tree_leaves",
    "use_count_of",
    "without_subclasses",
]

_ABSENT = object()


@dataclass(frozen=True)
class PrivateName:
    """One name.

    Attributes:
        name: as it is reached, such as "torch._C._storage_Use_Count".
        what: what it is used for.
        without: what happens where there is none; "": layerstream cannot do without.
        since, until: the first and the last version that have it, where that is known to be neither the oldest nor the
            newest that is tested ("2.6" and "2.14").
    """

    name: str
    what: str
    without: str = ""
    since: str = "2.6"
    until: str = "2.14"
    is_of_cuda: bool = False  # only builds for CUDA have it

    def find(self) -> Any | None:
        """What it names in the torch that is installed; None: nothing."""
        *path, last = self.name.split(".")
        for end in range(len(path), 0, -1):
            try:
                found: Any = import_module(".".join(path[:end]))
            except ImportError:
                continue
            for part in [*path[end:], last]:
                found = getattr(found, part, _ABSENT)
                if found is _ABSENT:
                    return None
            return found
        return None


STORAGE_USE_COUNT = PrivateName(
    "torch._C._storage_Use_Count",
    "who else looks at the memory of a slot that is about to get other bytes",
    "it is taken to be looked at: who has read weights is given copies, and slots are left to them",
)
MODULE_CALL = PrivateName(
    "torch.nn.Module._wrapped_call_impl",
    "which modules are on the Python stack: what an interrupt has cut short",
    "`Module.__call__` is looked for",
)
DISABLE_SUBCLASSES = PrivateName(
    "torch._C.DisableTorchFunctionSubclass", "to look at absent tensors without loading them"
)
CURRENT_RAW_STREAM = PrivateName(
    "torch._C._cuda_getCurrentRawStream",
    "whether a block runs on the stream that its weights were waited for on",
    "torch makes an object of the stream each time, which takes 8 µs a block",
    is_of_cuda=True,
)
PROFILER_ENABLED = PrivateName(
    "torch._C._autograd._profiler_enabled",
    "whether a profiler runs, to name loads and waits in it",
    "they have no names",
)
GET_ALLOCATOR_SETTINGS = PrivateName(
    "torch._C._accelerator_getAllocatorSettings",
    "to have what is not weights in segments that grow, and put the setting back",
    "the setting is read from a snapshot of the allocator; where there is none, it is left alone",
    since="2.10",
)
SET_ALLOCATOR_SETTINGS = PrivateName(
    "torch._C._accelerator_setAllocatorSettings",
    "the same",
    "`torch.cuda.memory._set_allocator_settings` does it",
    since="2.10",
)
SET_CUDA_ALLOCATOR_SETTINGS = PrivateName(
    "torch.cuda.memory._set_allocator_settings", "the same, before 2.10", "the setting is left alone"
)
SKIP_CODE = PrivateName(
    "torch._dynamo.eval_frame.skip_code", "to have dynamo pass over forwards around blocks, and hooks"
)
SET_EVAL_FRAME = PrivateName(
    "torch._C._dynamo.eval_frame.set_eval_frame",
    "to keep dynamo out of hooks, by two calls each",
    "each hook has the wrapper of `torch.compiler.disable`, which takes ten",
)
SET_CODE_STRATEGY = PrivateName(
    "torch._C._dynamo.eval_frame.set_code_exec_strategy",
    "to have dynamo compile forwards again that it passed over",
    "what was compiled of them is dropped, and compiled anew",
    since="2.7",
)
CACHE_ENTRIES = PrivateName(
    "torch._C._dynamo.eval_frame._debug_get_cache_entry_list",
    "which compiled code calls a block, to drop it as hooks come and go",
    "all compiled code is dropped",
)
BATCH_NORM = PrivateName(
    "torch.nn.modules.batchnorm._NormBase", "which buffers a forward writes without counting a version"
)
TREE_LEAVES = PrivateName("torch.utils._pytree.tree_leaves", "the absent tensors among an operator's arguments")
DISPATCH_MODE = PrivateName(
    "torch.utils._python_dispatch.TorchDispatchMode", "the simulated device: to see what operators read and write"
)
DISPATCH_MODE_STACK = PrivateName(
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "whether a pass can run in another thread: modes are each thread's own",
    "no two passes run side by side",
)
FUNCTION_MODE_STACK = PrivateName("torch._C._len_torch_function_stack", "the same", "the same")
FUNCTORCH_LEVEL = PrivateName("torch._C._functorch.peek_interpreter_stack", "the same", "the same")
GLOBAL_HOOKS = PrivateName(
    "torch.nn.modules.module._global_forward_hooks", "whether somebody listens to all modules", "nobody does"
)
GLOBAL_PRE_HOOKS = PrivateName("torch.nn.modules.module._global_forward_pre_hooks", "the same", "the same")
WRAPPER_SUBCLASS = PrivateName(
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass", "the simulated device: tensors inside of tensors"
)

NAMES = tuple(value for value in list(vars().values()) if isinstance(value, PrivateName))


def _unknown(cdata: int) -> int:
    return -1


def _raw_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# How many tensors and storages in C++ hold the storage with this `_cdata`; below 0: torch does not tell.
use_count_of: Callable[[int], int] = STORAGE_USE_COUNT.find() or _unknown
# The code of what every call of a module goes through.
CALL_CODE = (MODULE_CALL.find() or nn.Module.__call__).__code__
# A context in which subclasses of tensors are looked at as plain ones.
without_subclasses: Any = DISABLE_SUBCLASSES.find()
# The current stream of a CUDA device, as a number.
current_raw_stream: Callable[[int], int] = CURRENT_RAW_STREAM.find() or _raw_stream
is_profiler_enabled: Callable[[], Any] = PROFILER_ENABLED.find() or bool


def dynamo_module(name: str) -> Any | None:
    """`torch._dynamo.<name>` if something has imported it already; None: then nothing is compiled."""
    return sys.modules.get(f"torch._dynamo.{name}")


def code_store() -> Any:
    """What dynamo keeps with code objects. Names in it come and go: see those above."""
    return import_module("torch._C._dynamo.eval_frame")


def skip_code(code: Any) -> None:
    """Have dynamo pass over a code object. Imports torch._dynamo (1 s), if nothing has."""
    import_module("torch._dynamo.eval_frame").skip_code(code)
