"""Other GPUs that carry a share of loads over their own links: equal, restored, faster by the simulated clock."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.errors import ArgumentError, StoreError
from layerstream.standins import build_tiny, run_tiny
from layerstream.transfer import helper, route
from tests.fakes import Sized, adversary, assert_equal, assert_restored, describe, each_fault, toy, twin
from tests.packing_fakes import packs_anything
from tests.test_packing import EDITS, Pipe, engine_of
from tests.test_store import other

__all__ = ["packs_anything"]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny units are cut in many parts, and buffers are few."""
    for module in (helper, route):
        monkeypatch.setattr(module, "LINK_PART_BYTES", 1024)
    monkeypatch.setattr(helper, "_NUM_BUFFERS", 2)


@pytest.mark.parametrize("num_helpers", [1, 3])
@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
@pytest.mark.parametrize("budget", ["min", 46_000, "auto"])
def test_equal_and_restored(budget: int | str, copies: Any, num_helpers: int) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before, device = describe(model), adversary(copies=copies)
    helpers = [other(copies=copies, seed=number) for number in range(num_helpers)]
    with layerstream.offload(pipe, vram_budget=budget, device=device, links=helpers), device.checking():
        for _ in range(4):
            assert_equal(pipe(), resident())
        assert all(each.buffer_bytes == 2048 for each in helpers)
        assert all(each.num_copied_pieces > 3 for each in helpers)
    assert_restored(model, before)
    assert not device.buffer_bytes
    assert not any(each.buffer_bytes for each in helpers)
    assert_equal(pipe(), resident())


@pytest.mark.parametrize("name", ["sd3", "longcat", "wan22", "kandinsky5"])
def test_pipelines(name: str) -> None:
    pipe: Any = build_tiny(name)
    expected = [run_tiny(pipe, name, seed=seed) for seed in range(2)]
    device = adversary(copies="random")
    with (
        layerstream.offload(pipe, vram_budget="min", device=device, links=other(copies="random")),
        device.checking(),
    ):
        for seed in (0, 1, 0):
            assert torch.equal(run_tiny(pipe, name, seed=seed), expected[seed])
    assert torch.equal(run_tiny(pipe, name, seed=1), expected[1])


@pytest.mark.usefixtures("packs_anything")
def test_packed_bytes_come_over_them_too() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    carrier = other(copies="random")
    options: dict[str, Any] = {"device": adversary(copies="random"), "links": carrier, "packing": "ahead"}
    with layerstream.offload(pipe, vram_budget="min", **options) as streaming:
        for _ in range(4):
            assert_equal(pipe(), resident())
        assert streaming.stats().num_packed_units == 6
    assert carrier.num_copied_pieces


@pytest.mark.parametrize("edit", EDITS)
def test_edits_take_effect_and_stay(edit: Any) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), links=other()) as streaming:
        for _ in range(2):
            assert_equal(pipe(), resident())
            edit(model)
            edit(resident.model)
        with streaming.paused():
            pass
        assert_equal(pipe(), resident())
    for name, value in resident.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(("num_helpers", "least"), [(1, 1.85), (3, 3.2)])
def test_links_add_up(num_helpers: int, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the simulated clock: blocks of 1 MiB in parts of 32 KiB over links of 1 GB/s, a seventh of the way between."""
    for module in (helper, route):
        monkeypatch.setattr(module, "LINK_PART_BYTES", 2**15)
    monkeypatch.setattr(helper, "_NUM_BUFFERS", 6)
    speeds = []
    for helpers in ([], [other(link_gb_per_s=1.0) for _ in range(num_helpers)]):
        device = adversary(link_gb_per_s=1.0, peer_gb_per_s=7.0)
        pipe = Pipe(Sized(device, [2**20] * 6, ms=[0.01] * 6))
        with layerstream.offload(pipe, vram_budget="min", device=device, links=helpers or None) as streaming:
            for _ in range(3):
                pipe()
            started = device.time_ms
            pipe()
            speeds.append(4 * 6 * 2**20 / (device.time_ms - started) / 1e6)
            told = engine_of(streaming).links[""]
            assert told == pytest.approx(speeds[-1], rel=0.12)
    assert speeds[1] / speeds[0] > least, speeds


@pytest.mark.parametrize("is_helper", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), KeyboardInterrupt()])
def test_a_fault_at_any_operation(error: BaseException, is_helper: bool) -> None:
    for operation, faulty in each_fault(other if is_helper else adversary, error, every=3):
        device, carrier = (adversary(), faulty) if is_helper else (faulty, other())
        model = toy(num_blocks=3)
        resident, pipe = Pipe(twin(model)), Pipe(model)
        before = describe(model)
        with (
            contextlib.suppress(type(error), Warning),
            layerstream.offload(pipe, vram_budget="min", device=device, links=carrier),
        ):
            for _ in range(3):
                with contextlib.suppress(type(error)):
                    assert_equal(pipe(2), resident(2))
        assert_restored(model, before)
        assert not device.registered
        assert not carrier.buffer_bytes, operation
        assert_equal(pipe(2), resident(2))


def test_both_gpus_are_waited_for_where_a_load_fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says then when the buffers may be written to anew."""
    device, carrier = adversary(copies="late"), other(copies="late")
    one = helper.Helper(carrier, device)
    one.open()
    by_links = route.CopyByLinks(device, [one])
    right = device.copy_beside

    def fail(copies: Any, after: Any) -> Any:
        right(copies, after)
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(device, "copy_beside", fail)
    target, source = device.allocate(1024), torch.full((1024,), 7, dtype=torch.uint8)
    issue = functools.partial(one.copy, target, source)
    with pytest.raises(RuntimeError, match="launch failure"):
        by_links._issue(device.prepare([]), [issue], [])
    assert device.operations[-1] == carrier.operations[-1] == "synchronize"
    assert target.unique().tolist() == [7]
    monkeypatch.undo()
    by_links.close()


def test_a_buffer_that_is_filled_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = helper.Helper.copy

    def forgetful(self: helper.Helper, *args: Any) -> Any:
        self._free = [self.device.record(self.device.compute_stream())] * 2
        return right(self, *args)

    monkeypatch.setattr(helper.Helper, "copy", forgetful)
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with (
        pytest.raises((AssertionError, IndexError)),
        layerstream.offload(
            pipe, vram_budget="min", device=adversary(copies="late"), links=adversary(name="other", copies="at_once")
        ),
    ):
        for _ in range(4):
            assert_equal(pipe(), resident())


def test_a_gpu_out_of_reach_is_not_used() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    carrier = other()
    with (
        pytest.warns(UserWarning, match="its link to the host is of no use"),
        layerstream.offload(pipe, vram_budget="min", device=adversary(reaches_peers=False), links=carrier),
    ):
        assert_equal(pipe(), resident())
    assert not carrier.num_copied_pieces


def test_of_two_gpus_one_is_used() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    peer, far = adversary(name="peer"), adversary(name="far")
    device = adversary(reaches_peers={"peer"})
    with (
        pytest.warns(UserWarning, match="far cannot be reached from simulated directly"),
        layerstream.offload(pipe, vram_budget="min", device=device, links=[peer, far]),
        device.checking(),
    ):
        for _ in range(3):
            assert_equal(pipe(), resident())
        assert peer.buffer_bytes == 2048
    assert peer.num_copied_pieces
    assert not far.num_operations


def test_links_that_mean_nothing() -> None:
    device, carrier = adversary(), other()
    for links in (device, [carrier, carrier], "cpu", [carrier, "cpu"]):
        with (
            pytest.raises(ArgumentError, match="links names"),
            layerstream.offload(toy(), vram_budget="min", device=device, links=links),  # type: ignore[arg-type]
        ):
            pass
    with pytest.raises(ArgumentError, match='links must be a GPU such as "cuda:1", or a list of some, not 1.5'):
        layerstream.offload(toy(), links=1.5)  # type: ignore[arg-type]


def test_a_gpu_without_room_changes_nothing() -> None:
    model = toy()
    before = describe(model)
    with (
        pytest.raises(StoreError, match="full has no room for what comes over its link: 2.0 KiB, of which"),
        layerstream.offload(
            model, vram_budget="min", device=adversary(), links=SimulatedDevice(name="full", memory_bytes=1500)
        ),
    ):
        pass
    assert_restored(model, before)
    assert layerstream.active(model) is None
