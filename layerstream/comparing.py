"""Compares what must be equal: outputs bit for bit, and modules before and after. Imports nothing of the package."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def recorded(output: Any) -> Any:
    """An output to compare later ones with: its tensors are copied, so that nothing writes to them meanwhile."""
    return copy.deepcopy(output) if _is_copyable(output) else output


def output_differences(output: Any, expected: Any, path: str = "output") -> Iterator[str]:
    """What differs between two outputs, each with its place in them; none: they are equal to the last bit.

    Tensors, arrays and images are compared by their bytes, with dtype and shape, wherever they are in lists, tuples,
    mappings, dataclasses and objects with attributes.
    """
    if isinstance(expected, torch.Tensor):
        yield from _tensor_differences(output, expected, path)
    elif type(output) is not type(expected):
        yield f"`{path}` is a {type(output).__name__} and was a {type(expected).__name__}"
    elif isinstance(expected, _PLAIN):
        if output != expected and not (output != output and expected != expected):
            yield f"`{path}` is {output!r} and was {expected!r}"
    else:
        children = _children(output, path), _children(expected, path)
        if children[0] is None or children[1] is None:
            return  # nothing is known of it
        if list(children[0]) != list(children[1]):
            yield f"`{path}` has {_named(children[0])} and had {_named(children[1])}"
            return
        for place, value in children[1].items():
            yield from output_differences(children[0][place], value, place)


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of an output that `output_differences` compares."""
    if isinstance(output, torch.Tensor):
        yield output
    elif not isinstance(output, _PLAIN):
        for child in (_children(output, "") or {}).values():
            yield from tensors_in(child)


def describe(module: nn.Module) -> dict[str, Any]:
    """Everything that leaving must restore: objects, values, layout, hooks in their order, and the instance's names."""
    state: dict[str, Any] = {}
    for path, m in module.named_modules():
        for kind in ("_parameters", "_buffers"):
            for name, t in getattr(m, kind).items():
                if t is not None:
                    shapes = [(tuple(part.shape), part.stride()) for part in _parts(t)]
                    meta = (id(t), type(t), t.dtype, t.device, *shapes, t.requires_grad)
                    state[f"{path}.{name}"] = (meta, t.detach().clone())
        names = {k for k in vars(m) if k not in ("_parameters", "_buffers")}
        hooks = [list(getattr(m, h).items()) for h in ("_forward_pre_hooks", "_forward_hooks")]
        state[f"{path} instance"] = (names, hooks, m._compiled_call_impl)
    return state


def state_differences(
    before: Mapping[str, Any], after: Mapping[str, Any], *, changed: Sequence[str] = ()
) -> Iterator[str]:
    """What `describe` saw otherwise the second time.

    Args:
        changed: ends of names of tensors whose values may be others.
    """
    for name in [*before, *(n for n in after if n not in before)]:
        if name not in after:
            yield f"`{name}` is gone"
        elif name not in before:
            yield f"`{name}` is new"
        elif isinstance(before[name][1], torch.Tensor):
            if after[name][0] != before[name][0]:
                yield f"`{name}` is another tensor: {after[name][0][1:]} instead of {before[name][0][1:]}"
            elif not name.endswith(tuple(changed) or ("\0",)) and not same_bytes(after[name][1], before[name][1]):
                yield f"`{name}` has other values"
        elif after[name] != before[name]:
            names = before[name][0] ^ after[name][0]
            yield f"the {name}" + (
                f" has other attributes: {', '.join(sorted(names))}" if names else " has other hooks"
            )


def assert_restored(module: nn.Module, before: Mapping[str, Any], *, changed: Sequence[str] = ()) -> None:
    """`module` is as `describe` saw it, but for the values of tensors whose name ends in one of `changed`."""
    found = list(state_differences(before, describe(module), changed=changed))
    assert not found, "\n".join(found)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape are equal to the last bit, NaN included."""
    return all(torch.equal(_bytes(p), _bytes(q)) for p, q in zip(_parts(a), _parts(b), strict=True))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """What a nested tensor is made of, each with a shape; any other tensor by itself."""
    return tensor.detach().unbind() if tensor.is_nested else (tensor,)


def _tensor_differences(output: Any, expected: torch.Tensor, path: str) -> Iterator[str]:
    if not isinstance(output, torch.Tensor):
        yield f"`{path}` is a {type(output).__name__} and was a tensor"
    elif (output.dtype, output.shape) != (expected.dtype, expected.shape):
        now, was = (f"{t.dtype} {list(t.shape)}" for t in (output, expected))
        yield f"`{path}` is {now} and was {was}"
    elif not same_bytes(output, expected):
        other = output.detach().cpu() != expected.detach().cpu()
        if not other.any():
            yield f"`{path}` differs in the sign of zeros or the bits of NaN"
            return
        yield f"`{path}` differs in {int(other.sum())} of {other.numel()} values{_by(output, expected)}"


def _by(output: torch.Tensor, expected: torch.Tensor) -> str:
    gaps = (output.detach().cpu().to(torch.complex128) - expected.detach().cpu().to(torch.complex128)).abs()
    known = gaps[~gaps.isnan()]
    nans = int(gaps.isnan().sum())
    text = f", by {known.max().item():.3g} at most" if known.numel() else ""
    return text + (f", and {nans} are NaN" if nans else "")


def _children(value: Any, path: str) -> dict[str, Any] | None:
    """What a value consists of, by its place; None: that cannot be told."""
    if isinstance(value, Mapping):
        return {f"{path}[{key!r}]": child for key, child in value.items()}
    if isinstance(value, list | tuple):
        names = getattr(value, "_fields", None)  # of a named tuple
        if names is not None:
            return {f"{path}.{name}": child for name, child in zip(names, value, strict=True)}
        return {f"{path}[{number}]": child for number, child in enumerate(value)}
    if isinstance(value, set | frozenset):
        return {f"{path} sorted": sorted(map(repr, value))}
    if callable(getattr(value, "tobytes", None)):  # an array of numpy, an image of PIL
        about = {name: getattr(value, name) for name in ("shape", "size", "mode") if hasattr(value, name)}
        return {f"{path} form": repr(about), f"{path} bytes": value.tobytes()}
    if is_dataclass(value) and not isinstance(value, type):
        return {f"{path}.{f.name}": getattr(value, f.name) for f in fields(value)}
    if hasattr(value, "__dict__") and not callable(value):
        return {f"{path}.{name}": child for name, child in vars(value).items()}
    return None


def _named(children: Mapping[str, Any]) -> str:
    shown = list(children)[:4]
    return f"{len(children)} parts ({', '.join(shown)}{', ...' if len(children) > len(shown) else ''})"


def _is_copyable(output: Any) -> bool:
    return all(t.is_leaf or not t.requires_grad for t in tensors_in(output))
