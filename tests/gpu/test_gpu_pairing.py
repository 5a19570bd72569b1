"""Two passes of a step side by side on a real GPU: each compared with the resident pipeline, call after call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import layerstream
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import assert_equal, twin
from tests.gpu.test_gpu_families import memory_comes_back
from tests.test_pairing import (
    EDITS,
    Guided,
    Pipe,
    Skips,
    Switches,
    guided,
    no_thread_stays,
    paired,
    pairs_at_once,
    restores,
)

__all__ = ["memory_comes_back", "no_thread_stays", "pairs_at_once"]  # fixtures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.usefixtures("pairs_at_once"),  # models this small are bound by the host
]
DEVICE = "cuda"
# Which pipelines call their denoiser twice a step.
TWO_PASSES = (
    "flux", "ovis", "longcat", "qwen_image", "qwen_image_edit", "flux_controlnet", "flux2_klein", "wan22", "wan_vace",
    "hunyuan_video", "kandinsky5", "cosmos", "lumina2",
)  # fmt: skip


@pytest.mark.parametrize("name", TWO_PASSES)
def test_families(name: str) -> None:
    pipe: Any = build_tiny(name).to(DEVICE)
    expected = [run_tiny(pipe, name, seed=seed, num_inference_steps=12) for seed in range(3)]
    pipe.to("cpu")
    with layerstream.offload(pipe, vram_budget="min", device=DEVICE, pairing="auto") as streamer:
        for seed in (0, 1, 2, 0):
            assert torch.equal(run_tiny(pipe, name, seed=seed, num_inference_steps=12), expected[seed])
        stats = streamer.stats()
    assert stats.num_paired_passes >= 12, str(streamer.report())
    assert stats.num_discarded_passes <= 4


@pytest.mark.parametrize("cls", [Guided, Skips, Switches])
def test_models(cls: type[Guided]) -> None:
    torch.manual_seed(0)
    assert paired(cls().eval(), calls=5, on=DEVICE)[0].num_paired_passes > 0


@pytest.mark.parametrize("change", EDITS)
def test_whatever_a_pipeline_does_between(change: Callable[[Pipe], None]) -> None:
    stats, _ = paired(guided(), change, calls=5, restores=restores(change), on=DEVICE)
    assert stats.num_paired_passes > 0


def test_wide_blocks_for_many_steps() -> None:
    """Blocks whose copies take as long as their compute: races would show."""
    torch.manual_seed(0)
    model = Guided(num_blocks=8, width=512, hidden=[4096] * 8).eval()
    resident = Pipe(twin(model).to(DEVICE), DEVICE)
    expected = [resident(seed, steps=40) for seed in range(3)]
    pipe = Pipe(model, DEVICE)
    with layerstream.offload(pipe, vram_budget="min", device=DEVICE, pairing="auto") as streamer:
        assert_equal([pipe(seed, steps=40) for seed in range(3)], expected)
        assert streamer.stats().num_paired_passes > 80
