"""Toy models with every shape of weight that real ones have, and a snapshot to compare before and after."""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from layerstream.device.simulated import SimulatedDevice
from layerstream.host.home import RawHome, Segment
from layerstream.host.memory import PageMapping, fill
from layerstream.host.page_locks import page_locks_of
from layerstream.host.store import HostStore
from layerstream.testing import assert_restored, describe, harsh_device
from layerstream.transfer.unit import StreamedUnit

__all__ = [
    "Block",
    "OneModel",
    "Sized",
    "SizedBlock",
    "Toy",
    "adversary",
    "assert_equal",
    "assert_restored",
    "describe",
    "elsewhere",
    "run",
    "toy",
    "toy_input",
    "twin",
]


class Block(nn.Module):
    """Linear layers, a bare parameter, a 0-dim and a zero-size one, mixed dtypes, odd strides, a written buffer."""

    def __init__(self, width: int, *, hidden: int | None = None, writes_buffer: bool = False) -> None:
        super().__init__()
        hidden = hidden or 2 * width
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width).to(torch.bfloat16)
        self.scale = nn.Parameter(torch.randn(width))
        self.gain = nn.Parameter(torch.tensor(1.25))
        self.empty = nn.Parameter(torch.empty(0, width))
        self.transposed = nn.Parameter(torch.randn(hidden, width).t())
        self.conv = nn.Conv2d(width, 2, 3, padding=1).to(memory_format=torch.channels_last)
        self.register_buffer("index", torch.arange(width - 1, -1, -1))
        self.register_buffer("mask", torch.rand(width) > 0.2, persistent=False)
        self.register_buffer("count", torch.zeros(()))
        self.writes_buffer = writes_buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.writes_buffer:
            self.count += 1
            x = x + self.count
        h = torch.relu(self.up(self.norm(x)))
        y = self.down(h.to(torch.bfloat16)).to(x.dtype) + h @ self.transposed.t()
        y = y[..., self.index] * self.mask * self.scale * self.gain + self.empty.sum()
        image = y[..., None, None].expand(*y.shape, 3, 3)
        return x + y + self.conv(image).mean((-1, -2)).repeat(1, y.shape[-1] // 2)


class Toy(nn.Module):
    """An embedding, a stack and a head. `order` says which blocks a forward runs."""

    def __init__(
        self, num_blocks: int = 6, width: int = 16, *, hidden: Sequence[int] | None = None, writes_buffer: bool = False
    ) -> None:
        super().__init__()
        sizes = hidden or [2 * width] * num_blocks
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width, hidden=h, writes_buffer=writes_buffer) for h in sizes)
        self.head = nn.Linear(width, 4)
        self.order: list[int] = list(range(len(sizes)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for number in self.order:
            x = self.blocks[number](x)
        return self.head(x)


def toy(seed: int = 0, **kwargs: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**kwargs).eval()


def toy_input(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def adversary(**kwargs: Any) -> SimulatedDevice:
    """The harshest device: copies as late as is legal, slots poisoned until then, and told apart from the host."""
    return harsh_device(**kwargs)


def each_fault(
    make: Callable[[], SimulatedDevice], error: BaseException, *, every: int = 1
) -> Iterator[tuple[int, SimulatedDevice]]:
    """New devices, of each of which another operation fails, with its number, until none is reached any more."""
    operation = 0
    while True:
        device = make()
        device.fail_at(operation, error)
        yield operation, device
        if device.num_operations < operation:
            return
        operation += every


def passes_in_a_child(step: Callable[[], object]) -> bool:
    """Run a step in a process that is forked from here, and ends without running anything else."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            step()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def run(
    module: nn.Module, passes: int = 3, make_input: Callable[[int], torch.Tensor] = toy_input
) -> list[torch.Tensor]:
    with torch.no_grad():
        return [module(make_input(n)) for n in range(passes)]


def assert_equal(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(outputs) == len(expected)
    for number, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert not torch.isnan(b).any()
        assert torch.equal(a, b), f"output {number} differs"


class SizedBlock(nn.Module):
    def __init__(self, device: SimulatedDevice, num_bytes: int, ms: float, num_tensors: int = 1) -> None:
        super().__init__()
        ends = [num_bytes * n // num_tensors // 256 * 64 for n in range(num_tensors + 1)]
        self.weights = nn.ParameterList(torch.zeros(end - start) for start, end in pairwise(ends))
        self.device = device
        self.ms = ms

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.device.compute(self.ms)
        return x


class Sized(nn.Module):
    """Blocks of so many bytes that take so much simulated time and memory, so that numbers come out even.

    Args:
        sizes: bytes of each block, multiples of 256; outside of its blocks it has 256 bytes.
        ms: of each block's compute.
        takes: bytes that a pass has on the device beside the weights, by its input; seen under `device.accounting()`.
        num_tensors: of each block.
    """

    def __init__(
        self,
        device: SimulatedDevice,
        sizes: Sequence[int],
        *,
        ms: Sequence[float] | None = None,
        takes: Callable[[torch.Tensor], int] = lambda x: 0,
        num_tensors: int = 1,
    ) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(64))
        self.blocks = nn.ModuleList(
            SizedBlock(device, size, time, num_tensors)
            for size, time in zip(sizes, ms or [1.0] * len(sizes), strict=True)
        )
        self.takes = takes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scratch = torch.empty(self.takes(x), dtype=torch.uint8)
        for block in self.blocks:
            x = block(x)
        del scratch
        return x


class OneModel:
    """A pipeline with one component."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"model": self.model}


def elsewhere(store: HostStore, unit: StreamedUnit) -> RawHome | None:
    """A copy of a unit's home in a page mapping of its own, page-locked; None where that is refused."""
    device, home = store._device, unit.home
    pages = PageMapping(home.device_bytes)
    fill([(pages.cut(offset, source.numel()), source) for source, offset, _ in home.ranges])
    (lock,) = page_locks_of(device).acquire(device, [pages.range])
    if lock is None:
        return None
    buffer = pages.cut(0, home.device_bytes)
    return RawHome(
        device,
        home.offsets,
        home.device_bytes,
        ranges=[(buffer, 0, pages.range)],
        locks=[lock],
        segments=[Segment(buffer, 0, is_pinned=True)],
    )
