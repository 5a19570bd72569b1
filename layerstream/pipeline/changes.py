"""Which calls change a pipeline while it streams, so that streaming pauses around them.

LoRA weights that are loaded, fused or deleted, projections that are fused, weights that are loaded or saved: what such
a call finds and leaves is what it would find and leave without layerstream, because the weights are at home meanwhile.
Merging LoRA weights computes, and a GPU rounds other than a CPU: it is done on the device, layer by layer, as it would
be there in a resident pipeline.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from layerstream.weights.binding import lent_to

# Of pipelines and of components, in diffusers, transformers and peft. Those that only switch adapters or scale them
# (set_adapters, enable_lora) change no weight, and need no pause.
CHANGING_METHODS = (
    "add_adapter",
    "add_weighted_adapter",
    "delete_adapter",
    "delete_adapters",
    "fuse_lora",
    "fuse_qkv_projections",
    "inject_adapter",
    "load_adapter",
    "load_attn_procs",
    "load_ip_adapter",
    "load_lora_adapter",
    "load_lora_weights",
    "load_state_dict",
    "load_textual_inversion",
    "merge_adapter",
    "resize_token_embeddings",
    "save_lora_adapter",
    "save_pretrained",
    "unfuse_lora",
    "unfuse_qkv_projections",
    "unload_ip_adapter",
    "unload_lora",
    "unload_lora_weights",
    "unload_textual_inversion",
    "unmerge_adapter",
)

# What these return is kept and saved: it is given the weights at home, so that it takes no memory on the device. In the
# middle of a call they give what is on the device.
READING_METHODS = ("state_dict",)

# Of adapter layers, which another pipeline of the same components calls by itself.
MERGING_METHODS = ("merge", "unmerge")


def adapter_layers(component: nn.Module) -> list[nn.Module]:
    """The component's modules that peft has put adapters in."""
    base = _adapter_layer()
    return [] if base is None else [module for module in component.modules() if isinstance(module, base)]


def methods_of(owner: object, names: Sequence[str]) -> list[str]:
    """Those of the methods `names` that `owner` has."""
    return [name for name in names if callable(getattr(type(owner), name, None))]


def entries_of(state: Any, module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The entries of a `state_dict` of the module, whose weights are at home, that are memory of its weights.

    Each is put in the place of one with a version counter of its own: writing to it is no write to the weight that the
    engine would take for one of a forward.

    Returns: (weight, entry) pairs.
    """
    weights = {(t.data_ptr(), t.dtype, t.shape): t for t in [*module.parameters(), *module.buffers()] if t.numel()}
    found = []
    for name, value in list(state.items()) if isinstance(state, dict) else ():
        if type(value) is torch.Tensor and value.numel():
            weight = weights.get((value.data_ptr(), value.dtype, value.shape))
            if weight is not None and weight is not value:
                state[name] = entry = value.data
                found.append((weight, entry))
    return found


@contextlib.contextmanager
def merging_on(device: torch.device, components: Collection[nn.Module]) -> Iterator[None]:
    """Let peft merge adapters into the weights of `components` on `device`, one layer at a time."""
    base = _adapter_layer()
    if device.type == "cpu" or base is None:
        yield
        return

    def on_device(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def merge(layer: Any, *args: Any, **kwargs: Any) -> Any:
            # Asked now: the layer may have been put in since the pause began.
            if not any(layer is module for component in components for module in component.modules()):
                return original(layer, *args, **kwargs)
            with lent_to(device, [*layer.parameters(), *layer.buffers()]):
                return original(layer, *args, **kwargs)

        return merge

    with contextlib.ExitStack() as undo:
        for cls in _subclasses(base):
            for name in ("merge", "unmerge"):
                original = vars(cls).get(name)
                if callable(original):
                    setattr(cls, name, on_device(original))
                    undo.callback(setattr, cls, name, original)
        yield


def _adapter_layer() -> type | None:
    return getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)


def _subclasses(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)
