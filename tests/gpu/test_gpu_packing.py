"""Packed units on a real GPU, of all families: each compared with the resident pipeline, call after call."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream import codec
from layerstream.engine import packing
from layerstream.standins import TINY_PIPELINES, build_tiny, run_tiny
from tests.fakes import assert_equal, assert_restored, describe, twin
from tests.gpu.test_gpu_families import memory_comes_back
from tests.test_pairing import Guided, Pipe, pairs_at_once

__all__ = ["memory_comes_back", "pairs_at_once"]  # fixtures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning"),
]
DEVICE = "cuda"
MODES = ("ahead", "auto")


@pytest.fixture(autouse=True)
def packs_the_tiniest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of any size are packed, also those that gain nothing, as fast as it can be done."""
    monkeypatch.setattr(packing, "LEAST_BYTES", 1)
    monkeypatch.setattr(codec, "LEAST_GAIN", -1.0)
    monkeypatch.setattr(packing, "_MOST_TIME_SHARE", 1e9)


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_families(name: str) -> None:
    try:
        pipe: Any = build_tiny(name, dtype=torch.bfloat16).to(DEVICE)
    except ImportError as exc:
        pytest.skip(str(exc))
    expected = [run_tiny(pipe, name, seed=seed) for seed in range(2)]
    pipe.to("cpu")
    with layerstream.offload(pipe, vram_budget="min", device=DEVICE, packing="ahead") as streamer:
        for seed in (0, 1, 0):
            assert torch.equal(run_tiny(pipe, name, seed=seed), expected[seed])
        assert streamer.stats().num_packing_mismatches == 0
    pipe.to(DEVICE)
    assert torch.equal(run_tiny(pipe, name, seed=1), expected[1])


def wide(num_blocks: int = 8, width: int = 1024) -> Guided:
    torch.manual_seed(0)
    return Guided(num_blocks=num_blocks, width=width, hidden=[4 * width] * num_blocks).eval().to(torch.bfloat16)


def calls(pipe: Pipe, count: int) -> list[torch.Tensor]:
    return [pipe(seed, steps=20) for seed in range(count)]


class BFloat16Pipe(Pipe):
    """Latents, times and texts of the model's own dtype."""

    @torch.no_grad()
    def __call__(self, seed: int = 0, steps: int = 20, lengths: tuple[int, int] = (3, 5)) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        like = {"dtype": torch.bfloat16, "device": self.device}
        texts = [torch.randn(length, 4, generator=generator).to(**like) for length in lengths]
        x = torch.randn(2, 4, generator=generator).to(**like)
        for step in range(steps):
            time = torch.tensor(1.0 - step / steps).expand(2).to(**like)
            one, two = [self.model(x, time, text=each)[0] for each in texts]
            x = x - 0.1 * (one + two) / one.abs().max()
        return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", ["min", 220, "auto"])
def test_blocks_of_bfloat16_for_many_steps(mode: str, budget: str | int) -> None:
    """Copies that take as long as compute, and decoding beside both: races would show.

    Args:
        budget: of MiB beside what others hold.
    """
    model = wide()
    resident = BFloat16Pipe(twin(model).to(DEVICE), DEVICE)
    expected, before = calls(resident, 4), describe(model)
    del resident
    gc.collect()
    pipe = BFloat16Pipe(model, DEVICE)
    within = torch.cuda.memory_allocated() + (budget << 20) if isinstance(budget, int) else budget
    with layerstream.offload(pipe, vram_budget=within, device=DEVICE, packing=mode) as streamer:
        assert_equal(calls(pipe, 4), expected)
        assert_equal(calls(pipe, 4), expected)
        stats = streamer.stats()
        if budget == "min" or mode == "ahead":
            assert stats.num_packed_units >= 8, str(streamer.report())
            assert 0.64 < stats.packed_bytes / stats.unpacked_bytes < 0.72
    assert_restored(model, before)


@pytest.mark.usefixtures("pairs_at_once")
def test_packed_and_paired() -> None:
    model = wide()
    resident = BFloat16Pipe(twin(model).to(DEVICE), DEVICE)
    expected, pipe = calls(resident, 4), BFloat16Pipe(model, DEVICE)
    with layerstream.offload(pipe, vram_budget="min", device=DEVICE, packing="ahead", pairing="auto") as streamer:
        assert_equal(calls(pipe, 4), expected)
        assert streamer.stats().num_paired_passes > 20, str(streamer.report())


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[2].scale.add_(1)


def _by_data(model: nn.Module) -> None:
    model.blocks[1].up.weight.data[0] = 0.5


def _loaded(model: nn.Module) -> None:
    model.load_state_dict(
        {name: value * 1.25 for name, value in model.state_dict().items() if "up" in name}, strict=False
    )


@pytest.mark.parametrize("edit", [_in_place, _by_data, _loaded])
@pytest.mark.parametrize("mode", MODES)
def test_edits(edit: Callable[[nn.Module], None], mode: str) -> None:
    model = wide(4, 512)
    resident = BFloat16Pipe(twin(model).to(DEVICE), DEVICE)
    pipe = BFloat16Pipe(model, DEVICE)
    with layerstream.offload(pipe, vram_budget="min", device=DEVICE, packing=mode):
        for number in range(3):
            if number:
                edit(model)
                edit(resident.model)
            assert_equal(calls(pipe, 2), calls(resident, 2))
    for name, value in resident.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.cpu()), name
