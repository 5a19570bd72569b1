"""What a call of a module computes, and what it takes beside its weights, counted on the meta device: without a GPU."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as fx_config
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

OUTSIDE = ""  # the part of the counts that belongs to none of the named modules


@dataclass(frozen=True)
class Counts:
    """Of one call.

    Attributes:
        flops: of matrix products, convolutions and attention, by the named module that was running.
        peak_bytes: the most that tensors other than the weights took together.
    """

    flops: Mapping[str, int]
    peak_bytes: int

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def count(module: nn.Module, call: Callable[[], object], names: Sequence[str] = ()) -> Counts:
    """Count what `call` makes `module`, whose weights are on the meta device, do.

    Args:
        names: dotted names of modules inside it whose work is counted apart; none lies inside another.
    """
    counting = _Counting(module)
    # How many entries a mask picks is not known without bytes: all of them is the most.
    masks = fx_config.patch(meta_nonzero_assume_all_nonzero=True)
    with torch.no_grad(), torch.device("meta"), masks, counting.apart(module, names), _Attention(counting), counting:
        call()
    return Counts(dict(counting.flops), counting.peak_bytes)


class _Counting(TorchDispatchMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.peak_bytes = 0
        self._where = OUTSIDE
        self._live_bytes = 0
        self._known = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}

    @contextmanager
    def apart(self, module: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """Count what these modules do under their names."""
        handles = []
        for name in names:
            inner = module.get_submodule(name)
            handles.append(inner.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            handles.append(inner.register_forward_hook(lambda *_: self._enter(OUTSIDE)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> None:
        self._where = name

    def add(self, flops: int) -> None:
        self.flops[self._where] += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.add(formula(*args, **(kwargs or {}), out_val=out))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._saw(tensor.untyped_storage())
        return out

    def _saw(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)
            weakref.finalize(storage, self._freed, key, num_bytes)

    def _freed(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._live_bytes -= num_bytes


class _Attention(TorchFunctionMode):
    """Takes attention as a fused kernel does it, without a matrix of scores: that is what runs on a GPU."""

    def __init__(self, counting: _Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = named["query"], named["key"], named["value"]
        width = query.shape[-1] + value.shape[-1]
        self._counting.add(2 * query.shape[:-1].numel() * key.shape[-2] * width)
        return query.new_empty(*query.shape[:-1], value.shape[-1])
