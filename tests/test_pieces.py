"""Blocks that are cut into pieces: equal whatever of them streams, all present while the block runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.blocks import Placement, UnitSpec
from layerstream.device.simulated import SimulatedDevice
from layerstream.model import units
from layerstream.planning.costs import Costs
from layerstream.planning.phase_plan import Phase
from layerstream.planning.plan import make_plan
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary, assert_restored, describe, toy, toy_input

PIECE_BYTES = 4_000


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "PIECE_BYTES", PIECE_BYTES)


def engine_of(streamer: layerstream.LayerStreamer) -> Any:
    assert streamer._streamer is not None
    return streamer._streamer


@pytest.mark.parametrize("name", ["sd3", "flux", "wan22", "sdxl_img2img"])
@pytest.mark.parametrize("share", [0.3, 0.7, None])
def test_a_pipeline_is_equal_whatever_of_its_blocks_streams(
    name: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build_tiny(name)
    monkeypatch.setattr(units, "PIECE_BYTES", 2**40)
    largest = max(u.num_bytes for u in layerstream.plan(pipe, vram_budget="min", device="cpu").units if u.is_block)
    monkeypatch.setattr(units, "PIECE_BYTES", largest // 3)
    expected = run_tiny(pipe, name)
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    before = {n: describe(m) for n, m in modules.items()}
    total = sum(p.numel() * p.element_size() for m in modules.values() for p in m.parameters())
    probe = SimulatedDevice()
    with layerstream.offload(pipe, vram_budget="min", device=probe) as streamer, probe.accounting():
        run_tiny(pipe, name)
        least = streamer.stats().peak_reserved_bytes
    device = adversary()
    budget: int | str = "min" if share is None else least + 2**12 + int(share * total)
    with layerstream.offload(pipe, vram_budget=budget, device=device) as streamer, device.checking():
        for _ in range(4):
            assert torch.equal(run_tiny(pipe, name), expected)
        specs = [u.spec for u in engine_of(streamer)._units.values()]
        assert any(spec.block is not None for spec in specs), "some block is cut"
        assert streamer.stats().num_loads > 0
    for n, m in modules.items():
        assert_restored(m, before[n])


def test_a_part_of_a_block_may_stay() -> None:
    model = toy()
    with torch.no_grad():
        expected = [model(toy_input(seed)) for seed in (1, 2)]
    device = adversary()
    least = layerstream.plan(model, vram_budget="min", device=device).least_bytes
    mixed = []
    for extra in range(0, 40_000, 2_048):
        with (
            layerstream.offload(model, vram_budget=least + 2**13 + extra, device=device) as streamer,
            device.checking(),
            torch.no_grad(),
        ):
            for _ in range(4):
                for seed, wanted in zip((1, 2), expected, strict=True):
                    assert torch.equal(model(toy_input(seed)), wanted)
            placements: dict[str, set[Placement]] = {}
            for unit in streamer.plan.units:
                if unit.is_block:
                    placements.setdefault(unit.block_name, set()).add(streamer.plan.placement(unit.index))
            mixed.append(sum(len(found) > 1 for found in placements.values()))
            streamed = sum(Placement.STREAMED in found for found in placements.values())
            stats = streamer.stats()
            assert (stats.num_streamed_blocks, stats.num_resident_blocks) == (streamed, len(placements) - streamed)
            assert ("partly streamed" in str(streamer.plan)) == (mixed[-1] > 0)
    assert max(mixed) > 0


def test_looking_at_one_weight_binds_its_piece_alone() -> None:
    model = toy()
    with layerstream.offload(model, vram_budget="min", device="cpu") as streamer:
        engine = engine_of(streamer)
        cut = next(u for u in engine._units.values() if u.spec.block is not None)
        siblings = [u for u in engine._units.values() if u.spec.block == cut.spec.block and u is not cut]
        assert not cut.is_present
        assert torch.isfinite(cut.binding.tensors[-1].tensor.double()).all()
        assert cut.is_present
        assert siblings
        assert not any(u.is_present for u in siblings)


def test_what_is_kept_of_a_piece_keeps_its_bytes() -> None:
    model = toy()
    kept: list[torch.Tensor] = []
    block = model.blocks[0]
    weights = [p.clone() for p in block.parameters()]
    handle = block.register_forward_hook(lambda m, a, o: kept.extend(p.detach() for p in m.parameters()))
    device = adversary()
    with layerstream.offload(model, vram_budget="min", device=device), torch.no_grad():
        for _ in range(3):
            model(toy_input())
        for number, tensor in enumerate(kept):
            assert torch.equal(tensor, weights[number % len(weights)])
    handle.remove()


# ---- the plan


def spec(index: int, num_bytes: int, block: str | None) -> UnitSpec:
    return UnitSpec(index, f"net.{index}", "net", "blocks", num_bytes, is_repeated=True, block=block)


def test_all_pieces_of_a_block_and_one_more_have_slots() -> None:
    found = [spec(n, 100, f"b{n // 3}") for n in range(12)]
    plan = make_plan(found, [Phase(("net",), True, 0)], None)
    assert (plan.phases[0].num_slots, plan.needed_bytes) == (4, 400)
    whole = [spec(n, 300, None) for n in range(4)]
    assert make_plan(whole, [Phase(("net",), True, 0)], None).needed_bytes == 600


def test_slots_shrink_to_what_streams_of_each_block() -> None:
    """Half of each block hides behind its compute: two slots of a half, and no block is large any more."""
    found = [spec(n, 100, f"b{n // 2}") for n in range(16)]
    costs = Costs(1e-6, dict.fromkeys(range(16), 60.0))
    plan = make_plan(found, [Phase(("net",), True, 0)], 1_000, costs=costs)
    prediction = plan.phases[0].prediction
    assert prediction is not None
    assert prediction.ms_per_pass == pytest.approx(16 * 60.0)
    assert plan.phases[0].num_slots == 2
    whole = [spec(n, 200, None) for n in range(8)]
    costs = Costs(1e-6, dict.fromkeys(range(8), 120.0))
    slower = make_plan(whole, [Phase(("net",), True, 0)], 1_000, costs=costs).phases[0].prediction
    assert slower is not None
    assert slower.ms_per_pass == pytest.approx(1_000), "a slot of a whole block is a block less that stays"
