"""vllm-omni's layerwise offloading, the seed: its hooks on the denoiser's blocks, everything else on the GPU.

The package needs vllm, which none of this does. `pip install --no-deps vllm-omni` is enough here: the modules around
its backend are stood in for, and the backend itself is imported as it is.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

from benchmarks.methods.base import Method, MissingPeerError, Setup, move_all_but_blocks, stacks


def _apply(setup: Setup) -> None:
    backend = _backend()
    move_all_but_blocks(setup)
    blocks = [block for stack in stacks(setup.work.denoiser).values() for block in stack]
    hooks = backend._install_layerwise_hook_group(blocks, setup.device, torch.cuda.Stream(), True)
    hooks[0].prefetch_layer(non_blocking=False)

    def remove() -> None:
        for hook in hooks:
            hook.restore_next_block()
        for block in blocks:
            backend.remove_block_hook(block)

    setup.undo.callback(remove)


@functools.cache
def _backend() -> Any:
    found = importlib.util.find_spec("vllm_omni")  # looks, and imports nothing
    if found is None or not found.submodule_search_locations:
        raise MissingPeerError("vllm-omni is not installed here; pip install --no-deps vllm-omni")
    root = Path(next(iter(found.submodule_search_locations)))
    _stand_in("vllm")
    _stand_in("vllm.logger", init_logger=logging.getLogger)
    _stand_in("vllm_omni", path=root)
    _stand_in("vllm_omni.platforms", current_omni_platform=_Platform)
    _stand_in("vllm_omni.diffusion", path=root / "diffusion")
    _stand_in(
        "vllm_omni.diffusion.data", OmniDiffusionConfig=object, validate_dlo_host_registration_options=MagicMock()
    )
    _stand_in("vllm_omni.diffusion.models", path=root / "diffusion/models")
    _stand_in("vllm_omni.diffusion.models.interface", SupportsComponentDiscovery=object)
    hooks = _stand_in("vllm_omni.diffusion.hooks", path=root / "diffusion/hooks")
    base = importlib.import_module("vllm_omni.diffusion.hooks.base")
    hooks.HookRegistry, hooks.ModelHook = base.HookRegistry, base.ModelHook
    _stand_in("vllm_omni.diffusion.offloader", path=root / "diffusion/offloader")
    for name in ("config", "offload_plan", "module_collector"):
        full_name = f"vllm_omni.diffusion.offloader.{name}"
        try:
            importlib.import_module(full_name)
        except ImportError:
            sys.modules[full_name] = MagicMock()
    return importlib.import_module("vllm_omni.diffusion.offloader.layerwise_backend")


class _Platform:
    Stream = torch.cuda.Stream
    Event = torch.cuda.Event
    current_stream = staticmethod(torch.cuda.current_stream)
    stream = staticmethod(torch.cuda.stream)


def _stand_in(name: str, *, path: Path | None = None, **names: Any) -> Any:
    module: Any = types.ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    elif "." not in name:
        module.__path__ = []
    vars(module).update(names)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


VLLM_OMNI = Method("vllm_omni", _apply)
