"""`layerstream.plan`: what would happen, said before anything moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layerstream
from layerstream.blocks import Placement
from layerstream.device.simulated import SimulatedDevice
from layerstream.errors import ArgumentError
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import Sized, adversary, assert_restored, describe, run, toy


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
    for said in (
        *parts,
        "encoder.block",
        "transformer_blocks",
        "2 x ",
        "predicted peak",
        "16.0 KiB assumed beside them",
    ):
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


def test_what_streams_is_planned_for_other_arguments_with_what_was_measured() -> None:
    """Each argument alone, and both; nothing of it changes how it streams."""
    device = SimulatedDevice(memory_bytes=2**20, link_gb_per_s=5e-4)
    model = Sized(device, [2**10] * 8, takes=lambda x: 3_000)
    with layerstream.offload(model, vram_budget=10_000, device=device), device.accounting(), torch.no_grad():
        for _ in range(8):
            model(torch.zeros(1, 8))
        present = layerstream.plan(model)
        phase = present.phases[0]
        assert present.costs is not None
        assert phase.prediction is not None
        assert phase.phase.reserve_bytes is not None
        assert 3_000 <= phase.phase.reserve_bytes < 6_000

        more = layerstream.plan(model, vram_budget="11KiB")
        assert (more.budget_bytes, more.costs) == (11 * 2**10, present.costs)
        assert more.phases[0].phase == phase.phase
        assert len(more.phases[0].resident) > len(phase.resident)
        assert more.phases[0].prediction.ms_per_pass < phase.prediction.ms_per_pass

        larger = layerstream.plan(model, reserve=phase.phase.reserve_bytes + 2**10)
        assert (larger.budget_bytes, larger.costs) == (present.budget_bytes, present.costs)
        assert len(larger.phases[0].resident) < len(phase.resident)
        assert "KiB assumed beside them" in str(larger)

        both = layerstream.plan(model, vram_budget="50%", reserve="16K")
        assert (both.budget_bytes, both.phases[0].phase.reserve_bytes) == (2**19, 2**14)
        assert layerstream.plan(model, vram_budget="min").budget_bytes is None
        with pytest.raises(layerstream.BudgetError, match="vram_budget 1.0 KiB is too small"):
            layerstream.plan(model, vram_budget="1KiB")
        with pytest.raises(layerstream.BudgetError, match=r"activations \(1.0 GiB, assumed\)"):
            layerstream.plan(model, reserve="1GiB")
        assert layerstream.plan(model) is present


def test_auto_is_what_would_be_free_without_the_budget_that_holds_now() -> None:
    model, device = toy(), adversary(memory_bytes=2**30)
    before = layerstream.plan(model, vram_budget="auto", device=device).budget_bytes
    with layerstream.offload(model, vram_budget="200KiB", device=device):
        assert layerstream.plan(model, vram_budget="auto").budget_bytes == before
        assert layerstream.plan(model).budget_bytes == 200 * 2**10


def test_another_device_has_its_own_memory_and_no_times_yet() -> None:
    model, device = toy(), adversary(memory_bytes=2**20)
    with layerstream.offload(model, vram_budget="200KiB", device=device) as streamer:
        other = adversary(memory_bytes=2**25)
        other.torch_device = torch.device("cuda:1")
        plan = layerstream.plan(model, device=other, vram_budget="50%")
        assert plan.budget_bytes == 2**24
        assert plan.costs is None
        with pytest.raises(layerstream.BudgetError, match="vram_budget 0 B is too small"):
            layerstream.plan(model, device=other)  # "auto" leaves 256 MiB free, of 32
        assert layerstream.plan(model, device="cpu", vram_budget="50%").budget_bytes == 2**19, "where it streams"
        assert layerstream.plan(model, device="cpu").budget_bytes == 200 * 2**10
        assert [u.name for u in plan.units] == [u.name for u in streamer.plan.units]


def test_nothing_is_said_to_be_measured_before_anything_ran() -> None:
    for reserve in (None, 0):
        with pytest.raises(layerstream.BudgetError, match=r"need .* before activations\. Raise") as told:
            layerstream.plan(toy(), vram_budget="1KiB", device="cpu", reserve=reserve)
        assert "measured" not in str(told.value)
    with pytest.raises(layerstream.BudgetError, match=r"and activations \(8.0 KiB, assumed\) need .* KiB\. Raise"):
        layerstream.plan(toy(), vram_budget="20KiB", device="cpu", reserve="8KiB")
    assert "beside them" not in str(layerstream.plan(toy(), vram_budget="1MiB", device="cpu"))


def test_without_a_limit_no_budget_is_made_up() -> None:
    model = toy()
    assert str(layerstream.plan(model, device="cpu")).startswith("no memory limit, least ")
    with layerstream.offload(model, device="cpu") as streamer:
        run(model)
        for text in (str(streamer), repr(streamer), str(streamer.report()), repr(layerstream.plan(model))):
            assert "no memory limit" in text
            assert "TiB" not in text


@pytest.mark.parametrize(
    ("budget", "reserve", "match"),
    [
        ("1KiB", 0, r"2 slot\(s\) for `Toy\.blocks\.\d`"),
        ("64KiB", "1GiB", r"activations \(1.0 GiB, assumed\)"),
        ("64 elephants", 0, "vram_budget '64 elephants' is not a size"),
        ("64KiB", "50%", "reserve '50%' is not a size"),
        ("64KiB", "auto", "reserve 'auto' is not a size"),
        ("64KiB", -1, "reserve -1 is negative"),
    ],
)
def test_what_cannot_be(budget: str, reserve: int | str, match: str) -> None:
    with pytest.raises(layerstream.BudgetError, match=match):
        layerstream.plan(toy(), vram_budget=budget, device="cpu", reserve=reserve)


def test_two_passes_of_a_denoiser_have_room_beside_each_other() -> None:
    """The reserve of the phase in which passes may be paired counts twice, that of others once."""
    pipe = {"text_encoder": toy(), "transformer": toy()}
    found = {
        pairing: layerstream.plan(pipe, vram_budget="1MiB", device="cpu", reserve="16KiB", pairing=pairing)
        for pairing in ("off", "auto")
    }
    reserves = {name: [p.phase.reserve_bytes for p in plan.phases] for name, plan in found.items()}
    repeated = [p.phase.is_repeated for p in found["off"].phases]
    assert True in repeated
    assert reserves["off"] == [2**14] * len(repeated)
    assert reserves["auto"] == [2**14 * (2 if each else 1) for each in repeated]
    with pytest.raises(ArgumentError, match='"auto" nor "off"|pairing must be'):
        layerstream.plan(pipe, pairing="both")
