"""`layerstream.plan`: what would happen, said before anything moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layerstream
from layerstream.blocks import Placement
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary, assert_restored, describe, run, toy


def test_nothing_moves_and_everything_is_told() -> None:
    pipe = build_tiny("sd3")
    parts = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    before = {name: describe(m) for name, m in parts.items()}
    device = adversary()
    least = layerstream.plan(pipe, vram_budget="min", device=device)
    plan = layerstream.plan(pipe, vram_budget=2 * least.needed_bytes, device=device, reserve="16KiB")
    assert not device.operations
    for name, m in parts.items():
        assert_restored(m, before[name])
    text = str(plan)
    for said in (*parts, "encoder.block", "transformer_blocks", "2 x ", "predicted peak", "16.0 KiB beside them"):
        assert said in text
    assert {u.component for u in plan.units} == set(parts)
    assert sum(u.num_bytes for u in plan.units) >= sum(p.nbytes for m in parts.values() for p in m.parameters())
    assert plan.least_bytes <= plan.peak_bytes <= plan.budget_bytes
    assert "KiB" in str(least)
    assert least.peak_bytes == least.least_bytes


def test_more_budget_keeps_more_and_the_least_is_what_offload_takes() -> None:
    pipe = build_tiny("sd3")
    device = adversary()
    least = layerstream.plan(pipe, vram_budget="min", device=device).least_bytes
    kept = []
    for budget in (least + 2**14, 2 * least, 4 * least, 2**30):
        plan = layerstream.plan(pipe, vram_budget=budget, device=device, reserve=2**12)
        kept.append(sum(plan.placement(u.index) is not Placement.STREAMED for u in plan.units))
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] == len(plan.units)
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer:
        run_tiny(pipe, "sd3")
        assert streamer.stats().peak_device_bytes == least


def test_a_pipeline_on_the_meta_device() -> None:
    """Too large for this machine, it can still be looked at."""
    model = toy()
    wanted = str(layerstream.plan(model, vram_budget="64KiB", device="cpu"))
    assert str(layerstream.plan(toy().to("meta"), vram_budget="64KiB", device="cpu")) == wanted
    with torch.device("meta"):
        huge = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2**15, 2**15) for _ in range(50))})
    plan = layerstream.plan(huge, vram_budget="24GiB", device="cpu", reserve="1GiB")
    assert sum(u.num_bytes for u in plan.units) > 200 * 2**30
    assert 20 * 2**30 < plan.peak_bytes <= 24 * 2**30


def test_what_streams_gives_the_plan_with_what_was_measured() -> None:
    model, device = toy(), adversary()
    with layerstream.offload(model, vram_budget="200KiB", device=device) as streamer, device.accounting():
        assert "not measured yet" in str(layerstream.plan(model))
        for _ in range(3):
            run(model)
        assert layerstream.plan(model) is streamer.plan
        assert "beside them =" in str(layerstream.plan(model))
        assert str(streamer).endswith(str(streamer.plan))


@pytest.mark.parametrize(
    ("budget", "reserve", "match"),
    [
        ("1KiB", 0, r"2 slot\(s\) for `Toy\.blocks\.\d`"),
        ("64KiB", "1GiB", "activations and other tensors"),
        ("64 elephants", 0, "not a size"),
    ],
)
def test_what_cannot_be(budget: str, reserve: int | str, match: str) -> None:
    with pytest.raises(layerstream.BudgetError, match=match):
        layerstream.plan(toy(), vram_budget=budget, device="cpu", reserve=reserve)
