"""What a call is given and returns, as leaves that can be copied, compared byte by byte, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MOST_BYTES = 64 * 2**20  # of the tensors of one call; more is not copied each step
_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OF_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Path = tuple[object, ...]  # from the arguments to a leaf


class UnknownValueError(Exception):
    """Something is given of which nobody can say whether it is as it was: a cache, a generator, a callable."""


@dataclass(frozen=True)
class Given:
    """The arguments of a call: its leaves, and where they belong.

    Attributes:
        leaves: tensors and plain values by their paths, in order.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: Mapping[Path, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """As they are; nothing is copied.

        Raises:
            UnknownValueError: something is neither a plain tensor nor a plain value, or the tensors are large.
        """
        leaves = dict(_leaves((args, kwargs), ()))
        tensors = tensors_of(leaves)
        if sum(t.numel() * t.element_size() for t in tensors) > MOST_BYTES:
            raise UnknownValueError(f"tensors of more than {MOST_BYTES >> 20} MiB")
        if len({t.untyped_storage().data_ptr() for t in tensors if t.numel()}) < sum(t.numel() > 0 for t in tensors):
            raise UnknownValueError("tensors that share their memory")
        outlined_args, outlined_kwargs = _outlined((args, kwargs), ())
        return cls(outlined_args, outlined_kwargs, leaves)

    def copied(self) -> Given:
        """The same with copies of all tensors."""
        return self.with_leaves(self.leaves)

    def with_leaves(self, leaves: Mapping[Path, Any]) -> Given:
        """The same arguments, of copies of these leaves."""
        return Given(self.args, self.kwargs, {path: copy_of(leaf) for path, leaf in leaves.items()})

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call with."""
        args, kwargs = _filled((self.args, self.kwargs), self.leaves)
        return args, kwargs

    @property
    def form(self) -> tuple[object, ...]:
        """What calls that are of one kind have in common: of plain values all but what a time or a scale is."""
        return tuple((path, *_form_of(leaf)) for path, leaf in self.leaves.items())


def tensors_of(leaves: Mapping[Path, Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves.values() if isinstance(leaf, torch.Tensor)]


def leaves_of_output(output: Any) -> dict[Path, Any]:
    """Of what a forward returns; diffusers' outputs are mappings.

    Raises:
        UnknownValueError: something is neither a plain tensor nor a plain value.
    """
    return dict(_leaves(output, ()))


def copy_of(leaf: Any) -> Any:
    """A copy of a tensor, in the same strides; plain values as they are."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    source = _unexpanded(leaf)
    copy = torch.empty_strided(source.shape, source.stride(), dtype=leaf.dtype, device=leaf.device)
    return copy.copy_(source).expand(leaf.shape)


def put_back(pairs: Sequence[tuple[Any, Any]]) -> bool:
    """Give tensors the bytes of their copies where they have others by now; returns whether any had. Waits for the
    device."""
    written = [pair for pair, is_same in zip(pairs, same(pairs), strict=True) if not is_same]
    for leaf, copy in written:
        if isinstance(leaf, torch.Tensor) and leaf.shape == copy.shape:
            _unexpanded(leaf).copy_(_unexpanded(copy))
    return bool(written)


def same(pairs: Sequence[tuple[Any, Any]]) -> list[bool]:
    """Of each pair whether both are the same: type, and value, or dtype, shape, strides, device and bytes. Waits for
    the device once, unless nothing has to be read."""
    answers = [_may_be_same(a, b) for a, b in pairs]
    by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for number, (a, b) in enumerate(pairs):
        if answers[number] and isinstance(a, torch.Tensor) and a is not b and a.numel():
            differs = (_bits(a) != _bits(b)).any()
            by_device.setdefault(a.device, []).append((number, differs))
    for found in by_device.values():
        for (number, _), differs in zip(found, torch.stack([d for _, d in found]).tolist(), strict=True):
            answers[number] = not differs
    return answers


# ---- inside


def _form_of(leaf: Any) -> tuple[object, ...]:
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, tuple(leaf.shape)
    return (type(leaf),) if isinstance(leaf, float | complex) else (type(leaf), leaf)


def _unexpanded(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements, each once."""
    source = tensor.detach()
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.size(dim) > 1:
            source = source.narrow(dim, 0, 1)
    return source


def _may_be_same(a: Any, b: Any) -> bool:
    """Whether only their bytes can tell them apart, or nothing."""
    if type(a) is not type(b):
        return False
    if not isinstance(a, torch.Tensor):
        return bool(a == b) and (not isinstance(a, float | complex) or repr(a) == repr(b))  # 0.0 is not -0.0
    return (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes as numbers that are equal only where these are: NaN is no number, and 0.0 is -0.0."""
    if tensor.element_size() > 8:
        return torch.view_as_real(tensor).view(torch.int64)
    return tensor.view(_OF_BITS[tensor.element_size()])


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if type(value) is torch.Tensor:
        is_plain = value.layout is torch.strided and not (value.is_quantized or value.is_conj() or value.is_neg())
        if not is_plain or value.requires_grad or value.device.type == "meta" or vars(value):
            raise UnknownValueError("a tensor that requires grad, or is no plain one")
        yield path, value
    elif type(value) in _PLAIN:
        yield path, value
    elif type(value) in (tuple, list) or isinstance(value, dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        yield (*path, "of"), f"{type(value).__name__} of {len(value)}"
        for key, each in items:
            yield from _leaves(each, (*path, key))
    else:
        raise UnknownValueError(f"a {type(value).__name__}")


def _mapped(value: Any, path: Path, leaf: Callable[[Any, Path], Any]) -> Any:
    if type(value) is tuple:
        return tuple(_mapped(each, (*path, key), leaf) for key, each in enumerate(value))
    if type(value) is list:
        return [_mapped(each, (*path, key), leaf) for key, each in enumerate(value)]
    if type(value) is dict:
        return {key: _mapped(each, (*path, key), leaf) for key, each in value.items()}
    if isinstance(value, dict):
        raise UnknownValueError(f"a {type(value).__name__}")
    return leaf(value, path)


def _outlined(value: Any, path: Path) -> Any:
    """The containers, with the path of each leaf in its place."""
    return _mapped(value, path, lambda leaf, at: _At(at))


def _filled(value: Any, leaves: Mapping[Path, Any]) -> Any:
    return _mapped(value, (), lambda at, path: leaves[at.path])


@dataclass(frozen=True)
class _At:
    path: Path
