"""Copies by user code while we hold page locks: the driver answers `invalid argument` where one ends behind a lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import layerstream
from layerstream.host import page_locks
from layerstream.host.memory import PageMapping

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

KIB, MIB = 2**10, 2**20
SIZES = [256, 4 * KIB, 300 * KIB, MIB, 3 * MIB, 20 * MIB, 40 * MIB]  # bytes, each with odd ends


@pytest.fixture(autouse=True)
def no_locks_left() -> Iterator[None]:
    yield
    assert not len(page_locks._REAL)


class Weights(nn.Module):
    """A stack of blocks of one weight each, which the forward adds up."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(t) for t in tensors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 + self.weight.double().sum()


def on_a_heap(sizes: list[int], folder: Path) -> list[torch.Tensor]:
    torch.empty(31 * MIB, dtype=torch.uint8).add_(1)  # from now on glibc keeps what is smaller on its heap
    return [torch.randn(size // 4 + 3) for size in sizes]


def in_a_file(sizes: list[int], folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file, save_file

    tensors = {f"{number:03}": torch.randn(size // 4 + 3) for number, size in enumerate(sizes)}
    save_file(tensors, folder / "weights.safetensors")
    return list(load_file(folder / "weights.safetensors").values())


def apart(sizes: list[int], folder: Path) -> list[torch.Tensor]:
    return [PageMapping(s + 12).cut(0, s // 4 * 4 + 12).view(torch.float32).normal_() for s in sizes]


@pytest.mark.parametrize("where", [on_a_heap, in_a_file, apart])
def test_any_copy_by_user_code_works(where: Callable[[list[int], Path], list[torch.Tensor]], tmp_path: Path) -> None:
    sizes = [s for size in SIZES for s in (size, 1200)]  # a stranger behind, and before, each weight
    tensors = where(sizes, tmp_path)
    weights, strangers = tensors[::2], tensors[1::2]
    model = Weights(weights)
    values = [p.detach().clone() for p in model.parameters()]
    x = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        expected = Weights([v.cuda() for v in values])(x.cuda())
    with layerstream.offload(model, vram_budget="min"), torch.no_grad():
        homes = list(model.state_dict().values())
        assert all(home.device.type == "cpu" for home in homes)
        for tensor in [*strangers, *weights, *homes]:
            size = tensor.numel()
            for part in (tensor, tensor[1:], tensor[: size // 2], tensor[size // 2 :], tensor[-1:], tensor[-300:-3]):
                for non_blocking in (False, True):
                    there = part.to("cuda", non_blocking=non_blocking)
                    torch.cuda.synchronize()
                    assert torch.equal(there.cpu(), part)
                part.copy_(there)  # and back
        for home, value in zip(homes, values, strict=True):
            assert torch.equal(home, value)
        for _ in range(2):
            assert torch.equal(model(x.cuda()), expected)
    for parameter, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(parameter, value)
