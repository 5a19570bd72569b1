"""Random weights that the measurements of one case share: drawn once, kept in files, given to each process' modules."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

# Reading into fresh memory touches its pages, which runs at 2 GB/s on one thread and at 5.5 on four.
_NUM_THREADS = 8
_PIECE_BYTES = 2**26
# As safetensors calls them.
_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def store(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Write the state dict of every module into a file of its own; tied tensors once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        tensors = {}
        seen: set[int] = set()
        for key, tensor in _named(module).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[key] = tensor.data.contiguous()
        _write(tensors, folder / f"{name}.safetensors")
    (folder / "complete.json").write_text(json.dumps(sorted(modules)))


def is_stored(folder: Path) -> bool:
    return (folder / "complete.json").exists()


def give(modules: Mapping[str, nn.Module], folder: Path, *, is_mapped: bool) -> None:
    """Let the modules' parameters and persistent buffers hold what `store` wrote.

    Args:
        is_mapped: leave the tensors in the mapped file, as loading a checkpoint does; else read them into memory of
            their own, as building or downloading a model does.
    """
    for name, module in modules.items():
        path = folder / f"{name}.safetensors"
        found = load_file(path) if is_mapped else _read(path, _named(module))
        targets = {key: tensor for key, tensor in _named(module).items() if key in found}
        for key, tensor in targets.items():
            assert (tensor.shape, tensor.dtype) == (found[key].shape, found[key].dtype), key
            tensor.data = found[key]


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones under each of their names."""
    kept = module.state_dict(keep_vars=True)
    return {key: tensor for key, tensor in kept.items() if isinstance(tensor, torch.Tensor)}


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A safetensors file, written by several threads: the library's one takes longer than drawing the weights."""
    header, end = {}, 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        places = []
        for key, tensor in tensors.items():
            view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
            places.append((view, 8 + len(text) + header[key]["data_offsets"][0]))
        file.flush()
        _each(places, lambda piece, offset: os.pwrite(file.fileno(), piece, offset))


def _read(path: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, read into memory of their own: mapped pages would count as the process'."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        places = []
        found = {}
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            raw = torch.empty(end - start, dtype=torch.uint8)
            places.append((memoryview(raw.numpy()), 8 + header_bytes + start))
            found[key] = raw.view(like[key].dtype).view(entry["shape"])

        _each(places, lambda piece, offset: os.preadv(file.fileno(), [piece], offset))
    return found


def _each(places: Sequence[tuple[memoryview, int]], move: Callable[[memoryview, int], int]) -> None:
    """Move memory to or from its offsets in a file, in pieces by several threads; one call may move less than asked."""
    pieces = [(view[i : i + _PIECE_BYTES], at + i) for view, at in places for i in range(0, len(view), _PIECE_BYTES)]

    def whole(place: tuple[memoryview, int]) -> None:
        piece, offset = place
        while piece:
            count = move(piece, offset)
            piece, offset = piece[count:], offset + count

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(whole, pieces))
