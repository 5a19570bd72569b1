"""Parameters and buffers whose bytes are elsewhere, or that nobody may look at unseen.

An absent tensor is the user's own object with its class switched to a child of `AbsentParameter` or `AbsentTensor`,
over one NaN of the right dtype on the right device, expanded to the right shape. Shape, dtype, device, strides and
the like are answered from there; anything that could look at the bytes (`__torch_function__` sees every
operator, getter and method) first loads the whole unit, after which the object is a plain parameter again and
the operation runs on that. Code that slips past `__torch_function__` meets NaN, never another block's weights.

Per-operation loading would not do: `nn.TransformerEncoderLayer` asks `has_torch_function` and leaves its fast
path, which changes the last bits. After the first touch nothing is left to ask about.

While no call runs, tensors whose bytes *are* on the device have their class switched, too (*guarded*): what is read
through them then may be written (`weight.data[0] = row`), which no version counter tells.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from layerstream.torch_private import tree_leaves, without_subclasses

Reading = Callable[[Sequence[int]], AbstractContextManager[None]]


class AbsentRecord(NamedTuple):
    """What is known of one absent tensor."""

    name: str
    unit: int
    strides: tuple[int, ...]


class AbsentClasses:
    """The two classes of one streamer's absent tensors.

    They are its own, so that a tensor leads to its streamer by its class, and keeps it alive, with nothing hung on the
    tensor that a copy or a pickle would carry along.

    Args:
        reading: makes units' tensors present, all at once, given their indices; no other thread takes them away again
            before the `with` block is left.
        number: in this order one waits for streamers, if for more than one.
        stand_in: gives an absent tensor's twin over its bytes at home.
    """

    def __init__(
        self,
        reading: Reading,
        number: int = 0,
        stand_in: Callable[[torch.Tensor], torch.Tensor | None] = lambda t: None,
    ) -> None:
        self.reading, self.number, self.stand_in = reading, number, stand_in
        self.records: dict[int, AbsentRecord] = {}  # by the id of the tensor, which lives as long as its record
        _LIVE[self] = None
        own = {"__module__": __name__, "__slots__": (), "_classes": self}
        self.of_parameters: type[torch.Tensor] = type("AbsentParameter", (AbsentParameter,), dict(own))
        self.of_buffers: type[torch.Tensor] = type("AbsentTensor", (AbsentTensor,), dict(own))

    def of(self, tensor: torch.Tensor) -> type[torch.Tensor]:
        """The class of a plain tensor while it is absent."""
        return self.of_parameters if type(tensor) is nn.Parameter else self.of_buffers


_LIVE: weakref.WeakKeyDictionary[AbsentClasses, None] = weakref.WeakKeyDictionary()


def make_absent(
    tensors: Iterable[torch.Tensor], placeholders: Iterable[torch.Tensor], classes: Iterable[type[torch.Tensor]]
) -> None:
    """Let go of the tensors' bytes: they answer metadata, and load on any other use."""
    for tensor, placeholder, cls in zip(tensors, placeholders, classes, strict=True):
        # Data first: once the class is switched, setting `.data` would itself be a use.
        tensor.data = placeholder
        tensor.__class__ = cls


def make_present(
    tensors: Iterable[torch.Tensor], data: Iterable[torch.Tensor], classes: Iterable[type[torch.Tensor]]
) -> None:
    """Point each tensor at its data; it is a plain `Parameter` or `Tensor`, as `classes` say, again."""
    for tensor, view, cls in zip(tensors, data, classes, strict=True):
        # Class first: the setter would otherwise go through `__torch_function__`.
        tensor.__class__ = cls
        tensor.data = view


def switch(tensors: Iterable[torch.Tensor], classes: Iterable[type[torch.Tensor]]) -> None:
    """Only the classes: what the tensors point at stays."""
    for tensor, cls in zip(tensors, classes, strict=True):
        tensor.__class__ = cls


def is_absent(tensor: torch.Tensor) -> bool:
    """Whether looking at the tensor's bytes loads them, or is at least noticed."""
    return issubclass(type(tensor), _Absent)


def at_home(tensor: torch.Tensor) -> torch.Tensor:
    """A streamed tensor's twin over its bytes at home, for code that only reads; any other tensor itself.

    One that is present has a twin as well: another thread may be in the middle of a call, after which its slot holds
    another unit.
    """
    for reference in _LIVE.keyrefs():  # one list: other threads begin and end meanwhile
        classes = reference()
        found = classes.stand_in(tensor) if classes is not None and id(tensor) in classes.records else None
        if found is not None:
            return found
    return tensor


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
    _classes: ClassVar[AbsentClasses]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with without_subclasses():
                return func(*args, **kwargs)
        if func in _LAYOUT:
            record = _record_of(args[0])
            if record is not None:
                with without_subclasses():
                    size, strides, dtype = args[0].size(), args[0].stride(), args[0].dtype
                    # Over its one NaN it has none; over what `set_` has given it, which asks no class, those of that.
                    strides = strides if any(strides) else record.strides
                    twin = torch.empty_strided(size, strides, dtype=dtype, device="meta")
                return func(twin, *args[1:], **kwargs)
        with reading((args, kwargs)):
            return func(*args, **kwargs)

    # Both would keep the absent class in the copy, since they ask for `type(self)` before they look at the bytes.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with reading(self):
            return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with reading(self):
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


def _record_of(tensor: torch.Tensor) -> AbsentRecord | None:
    """The record of an absent tensor; None of one whose streaming has ended, or that torch made of one."""
    classes: AbsentClasses | None = getattr(type(tensor), "_classes", None)
    return None if classes is None else classes.records.get(id(tensor))


def reading(used: Any) -> AbstractContextManager[object]:
    """Load the units of all absent tensors in `used`, together, so that none evicts another; nobody else does, either,
    before the `with` block is left."""
    units: dict[AbsentClasses, set[int]] = {}
    for leaf in tree_leaves(used):
        if isinstance(leaf, _Absent):
            record = _record_of(leaf)  # type: ignore[arg-type]  # the classes are tensors', their mixin is not
            if record is not None:
                units.setdefault(leaf._classes, set()).add(record.unit)
    with contextlib.ExitStack() as entered:
        for classes in sorted(units, key=lambda c: c.number):  # two threads wait for two streamers in the same order
            entered.enter_context(classes.reading(sorted(units[classes])))
        return entered.pop_all()


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
