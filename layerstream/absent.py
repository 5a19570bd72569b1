"""Parameters and buffers whose bytes are elsewhere.

An absent tensor is the user's own object with its class switched to `AbsentParameter` or `AbsentTensor`, over
one NaN of the right dtype on the right device, expanded to the right shape. Shape, dtype, device, strides and
the like are answered from there; anything that could look at the bytes (`__torch_function__` sees every
operator, getter and method) first loads the whole unit, after which the object is a plain parameter again and
the operation runs on that. Code that slips past `__torch_function__` meets NaN, never another block's weights.

Per-operation loading would not do: `nn.TransformerEncoderLayer` asks `has_torch_function` and leaves its fast
path, which changes the last bits. After the first touch nothing is left to ask about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


class AbsentRecord(NamedTuple):
    """What is known of one absent tensor.

    `load(unit indices)` makes the units' tensors present, all at once; it belongs to their streamer.
    """

    name: str
    unit: int
    strides: tuple[int, ...]
    load: Callable[[Sequence[int]], None]


# The record hangs on the tensor, so that it goes with it, and only while it is absent: whatever copies or pickles the
# tensor loads it first, so the attribute never travels.
_RECORD = "_layerstream_absent"


def make_absent(
    tensors: Iterable[torch.Tensor], placeholders: Iterable[torch.Tensor], records: Iterable[AbsentRecord]
) -> None:
    """Let go of the tensors' bytes: they answer metadata, and load on any other use."""
    for tensor, placeholder, record in zip(tensors, placeholders, records, strict=True):
        # Data first: once the class is switched, setting `.data` would itself be a use.
        tensor.data = placeholder
        tensor.__dict__[_RECORD] = record
        tensor.__class__ = AbsentParameter if type(tensor) is nn.Parameter else AbsentTensor


def make_present(tensors: Iterable[torch.Tensor], data: Iterable[torch.Tensor]) -> None:
    """Point each tensor at its data; it is a plain `Parameter` or `Tensor` again."""
    for tensor, view in zip(tensors, data, strict=True):
        # Class first: the setter would otherwise go through `__torch_function__`.
        kind = type(tensor)
        if kind is AbsentParameter:
            tensor.__dict__.pop(_RECORD, None)
            tensor.__class__ = nn.Parameter
        elif kind is AbsentTensor:
            tensor.__dict__.pop(_RECORD, None)
            tensor.__class__ = torch.Tensor
        tensor.data = view


def is_absent(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes are elsewhere now."""
    return type(tensor) is AbsentParameter or type(tensor) is AbsentTensor


def nan_scalar(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What absent tensors of a dtype lie over: one NaN; for integers the lowest value, which is no valid index."""
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.full((), 1 if dtype is torch.bool else torch.iinfo(dtype).min, dtype=dtype, device=device)
    # As bytes: torch cannot fill or cast to every dtype. All bits set is NaN, but where there is no negative zero.
    byte = 0x80 if "fnuz" in str(dtype) else 0xFF
    return torch.full((dtype.itemsize,), byte, dtype=torch.uint8, device=device).view(dtype)[0]


class _Absent:
    """Behaviour shared by the two classes; only ever reached by switching `__class__`."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _LAYOUT:
            record = args[0].__dict__.get(_RECORD)
            if record is not None:
                with torch._C.DisableTorchFunctionSubclass():
                    size, dtype = args[0].size(), args[0].dtype
                    twin = torch.empty_strided(size, record.strides, dtype=dtype, device="meta")
                return func(twin, *args[1:], **kwargs)
        _load_all((args, kwargs))
        return func(*args, **kwargs)

    # Both would keep the absent class in the copy, since they ask for `type(self)` before they look at the bytes.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        _load_all(self)
        return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _load_all(self)
        return self.__reduce_ex__(protocol)


def keep_out_of_graphs(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let dynamo leave `__torch_function__` alone; `wrap` is `torch.compiler.disable`, which takes 1 s to import."""
    function = _Absent.__dict__["__torch_function__"].__func__
    if not hasattr(function, "_torchdynamo_disable"):
        _Absent.__torch_function__ = classmethod(wrap(function))  # type: ignore[method-assign, assignment]


class AbsentParameter(_Absent, nn.Parameter):
    """A parameter whose bytes are not on the device now."""


class AbsentTensor(_Absent, torch.Tensor):
    """A buffer whose bytes are not on the device now."""


def _load_all(used: Any) -> None:
    """Load the units of all absent tensors in `used`, together, so that none evicts another."""
    units: dict[Callable[[Sequence[int]], None], list[int]] = {}
    for leaf in tree_leaves(used):
        record = leaf.__dict__.get(_RECORD) if isinstance(leaf, _Absent) else None
        if record is not None:
            units.setdefault(record.load, []).append(record.unit)
    for load, numbers in units.items():
        load(sorted(set(numbers)))


def _getters(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names if hasattr(torch.Tensor, name)}


def _methods(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name) for name in names if hasattr(torch.Tensor, name)}


# Answered without the bytes. Everything not listed loads, so an omission costs a load and never an answer.
_METADATA: set[Any] = (
    _getters("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "_version")
    | _getters("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_xpu")
    | _getters("is_mps", "is_mkldnn", "is_vulkan", "itemsize", "nbytes", "output_nr", "name", "retains_grad")
    | _getters("_backward_hooks", "_post_accumulate_grad_hooks", "is_mtia", "is_ipu", "is_xla", "is_maia")
    | {getattr(torch.Tensor, name).__set__ for name in ("requires_grad", "grad")}
    | _methods("size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__", "get_device")
    | _methods("is_floating_point", "is_complex", "is_signed", "requires_grad_", "is_inference", "is_conj", "is_neg")
    | _methods("__hash__", "__dir__", "register_hook", "register_post_accumulate_grad_hook", "is_same_size", "type")
    | {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, torch.is_inference}
)
# `type` with an argument casts; without one it names the dtype. Casting needs the bytes.
_METADATA -= _methods("type")
_LAYOUT: set[Any] = _methods("stride", "is_contiguous", "storage_offset", "is_non_overlapping_and_dense", "dim_order")
