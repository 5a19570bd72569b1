"""Random stacks, sizes, dtypes, slots, budgets and call orders: always equal, always restored."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from unittest import mock

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.model import units
from tests.fakes import assert_equal, assert_restored, describe, twin

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class Piece(nn.Module):
    """A block of random tensors, all of which reach the output."""

    def __init__(
        self, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], make: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__()
        for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            tensor = make(shape).to(dtype)
            if number % 3 == 1 and tensor.ndim == 2:
                tensor = tensor.t().contiguous().t()
            if number % 4 == 3:
                self.register_buffer(f"b{number}", tensor)
            else:
                self.register_parameter(f"p{number}", nn.Parameter(tensor))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        for tensor in [*self.parameters(), *self.buffers()]:
            x = (
                x * 0.5 + tensor.to(x.dtype).sum() * 0.1 + tensor.numel() + tensor.stride(0)
                if tensor.ndim
                else x + tensor
            )
        return x


class Random(nn.Module):
    def __init__(self, pieces: list[Piece], second: list[Piece], order: list[tuple[int, int]]) -> None:
        super().__init__()
        self.first, self.second = nn.ModuleList(pieces), nn.ModuleList(second)
        self.between = nn.Parameter(torch.tensor([0.25]))
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for which, number in self.order:
            stack = (self.first, self.second)[which]
            if len(stack):
                x = stack[number % len(stack)](x) * self.between
        return x


shapes = st.lists(
    st.sampled_from([(), (1,), (7,), (3, 5), (16, 16), (0, 4), (2, 3, 4), (130, 67), (600, 500)]),
    min_size=1,
    max_size=5,
)


@st.composite
def models(draw: st.DrawFn) -> Random:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def stack(least: int) -> list[Piece]:
        pieces = []
        for _ in range(draw(st.integers(least, 5))):
            wanted = draw(shapes)
            dtypes = [draw(st.sampled_from(DTYPES)) for _ in wanted]
            pieces.append(Piece(wanted, dtypes, make))
        return pieces

    first, second = stack(2), stack(0)
    if draw(st.booleans()):  # tied across blocks
        first[0].tied = first[-1].tied = nn.Parameter(make((9,)))
    order = draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=12))
    return Random(first, second, order)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    model=models(),
    copies=st.sampled_from(["at_once", "late", "random"]),
    seed=st.integers(0, 100),
    slots=st.integers(2, 5),
    share=st.floats(0.0, 1.2),
    other_order=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=8),
    refuses_pinning=st.booleans(),
    piece_bytes=st.sampled_from([2**40, 300_000, 2_000]),
)
def test_any_model_any_budget_any_order(
    model: Random,
    copies: str,
    seed: int,
    slots: int,
    share: float,
    other_order: list[tuple[int, int]],
    refuses_pinning: bool,
    piece_bytes: int,
) -> None:
    resident = twin(model)
    before, usual = describe(model), model.order
    device = SimulatedDevice(copies=copies, is_poisoned=True, seed=seed, refuses_pinning=refuses_pinning)  # type: ignore[arg-type]
    total = sum(-(-t.numel() * t.element_size() // 256) * 256 for t in [*model.parameters(), *model.buffers()])
    orders = (usual, usual, other_order, usual, other_order)

    def x(order: list[tuple[int, int]]) -> torch.Tensor:
        # What is called with the same shapes is expected to take the same memory.
        return torch.ones(3 if order is usual else 4)

    with warnings.catch_warnings(), torch.no_grad(), mock.patch.object(units, "PIECE_BYTES", piece_bytes):
        warnings.simplefilter("ignore", layerstream.LayerstreamWarning)
        probe = SimulatedDevice()
        with layerstream.offload(twin(model), vram_budget="min", device=probe) as streamer, probe.accounting():
            copied = streamer._pipe
            for order in orders:
                copied.order = order
                copied(x(order))
            least = streamer.stats().peak_reserved_bytes
        streamer = layerstream.offload(model, vram_budget=least + 2**13 + int(share * total), device=device)
        streamer._num_slots = slots
        streamer.start()
    with contextlib.closing(streamer), device.checking(), torch.no_grad():
        for order in orders:
            model.order = resident.order = order
            assert_equal([model(x(order))], [resident(x(order))])
        model.order = usual
        assert streamer.stats().peak_reserved_bytes <= streamer.stats().budget_bytes
    assert_restored(model, before, changed=["steps"])
    for a, b in zip(model.modules(), resident.modules(), strict=True):
        if isinstance(a, Piece):
            assert int(a.steps) == int(b.steps)
    assert device.buffer_bytes == 0
    assert not device.registered
