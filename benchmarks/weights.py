"""Random weights that the measurements of one case share: drawn once, kept in files, given to each process' modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

# Reading into fresh memory touches its pages, which runs at 2 GB/s on one thread and at 5.5 on four.
_NUM_THREADS = 8
_PIECE_BYTES = 2**26


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
        save_file(tensors, folder / f"{name}.safetensors")
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
        found = load_file(folder / f"{name}.safetensors")
        targets = {key: tensor for key, tensor in _named(module).items() if key in found}
        if not is_mapped:
            copies = {key: torch.empty_like(tensor) for key, tensor in found.items()}
            _copy([(copies[key], tensor) for key, tensor in found.items()])
            found = copies
        for key, tensor in targets.items():
            assert (tensor.shape, tensor.dtype) == (found[key].shape, found[key].dtype), key
            tensor.data = found[key]


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones under each of their names."""
    kept = module.state_dict(keep_vars=True)
    return {key: tensor for key, tensor in kept.items() if isinstance(tensor, torch.Tensor)}


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    pieces = []
    for target, source in pairs:
        to, of = (t.view(-1).view(torch.uint8) if t.numel() else t for t in (target, source))
        pieces += [(to[i : i + _PIECE_BYTES], of[i : i + _PIECE_BYTES]) for i in range(0, to.numel(), _PIECE_BYTES)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(lambda piece: piece[0].copy_(piece[1]), pieces))
