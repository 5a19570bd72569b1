"""Packed units that stay on the device: equal, restored, never stale, whatever is edited or fails meanwhile."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.simulated import RaceError, SimulatedDevice
from layerstream.engine.streamer import Streamer
from layerstream.errors import BudgetError
from layerstream.host.home import PackedHome
from layerstream.standins import build_tiny, run_tiny
from layerstream.transfer import wires
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import StreamedUnit
from tests.fakes import Sized, adversary, assert_equal, assert_restored, describe, each_fault, run, toy, twin
from tests.packing_fakes import packs_anything
from tests.test_packing import EDITS, Pipe, engine_of
from tests.test_trace import spans

__all__ = ["packs_anything"]

pytestmark = pytest.mark.usefixtures("packs_anything")

ALL = 46_000  # a budget in which all six blocks of the toy stay packed
SOME = 60_000  # in which three of them do


def transfer_of(streaming: layerstream.LayerStreamer) -> TransferEngine:
    return engine_of(streaming)._transfer


def staying(streaming: layerstream.LayerStreamer) -> list[StreamedUnit]:
    return transfer_of(streaming).with_own_wire


def settle(pipe: Pipe, resident: Pipe, streaming: layerstream.LayerStreamer, least: int = 1) -> None:
    """Run until units stay on the device packed, so many at least."""
    for _ in range(8):
        assert_equal(pipe(), resident())
    assert len(staying(streaming)) >= least
    assert all(isinstance(unit.home, PackedHome) for unit in staying(streaming))


@contextlib.contextmanager
def streamed(budget: int, device: SimulatedDevice) -> Iterator[tuple[Pipe, Pipe, layerstream.LayerStreamer]]:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget=budget, device=device, packing="ahead") as streaming:
        settle(pipe, resident, streaming, 6 if budget == ALL else 3)
        yield pipe, resident, streaming
    for name, value in resident.model.state_dict().items():
        assert torch.equal(pipe.model.state_dict()[name], value), name
    assert_equal(pipe(), resident())
    assert not device.registered
    assert device.buffer_bytes == 0


# ---- what comes of it


@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
@pytest.mark.parametrize("budget", [ALL, SOME])
def test_equal_and_restored(budget: int, copies: Any) -> None:
    device = adversary(copies=copies)
    model = toy()
    before = describe(model)
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget=budget, device=device, packing="ahead") as streaming, device.checking():
        settle(pipe, resident, streaming, 3)
        earlier = streaming.stats()
        assert_equal(pipe(), resident())
        stats = streaming.stats()
        loads, copied = stats.num_loads - earlier.num_loads, stats.loaded_bytes - earlier.loaded_bytes
        assert (stats.num_own_wires, copied) == (len(staying(streaming)), 0)
        assert stats.num_loads_without_copy - earlier.num_loads_without_copy == loads > 0
        assert stats.num_resident_packed_blocks == stats.num_own_wires
        assert stats.num_resident_packed_blocks + stats.num_resident_blocks + stats.num_streamed_blocks == 6
        report = str(streaming.report())
        assert f"{stats.num_own_wires} of them at most stayed on the device packed" in report
        assert f"{stats.num_own_wires} resident packed" in repr(streaming)
        assert stats.peak_device_bytes <= budget
    assert_restored(model, before)
    assert not device.registered
    assert device.buffer_bytes == 0
    assert_equal(pipe(), resident())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "ovis", "lumina2"])
def test_pipelines(name: str) -> None:
    """Under budgets between the least and all, of which some have units stay packed."""
    pipe: Any = build_tiny(name)
    expected = [run_tiny(pipe, name, seed=seed) for seed in range(2)]
    most, device = 0, adversary()
    with layerstream.offload(pipe, vram_budget=2**30, device=device, packing="ahead") as streaming, device.checking():
        for _ in range(4):
            run_tiny(pipe, name, seed=0)
        least = streaming.report().least_bytes
        weights = sum(unit.num_bytes for unit in streaming.plan.units)
    assert least is not None
    for part in (1, 2, 4):
        device = adversary(copies="random")
        budget = least + part * weights // 8
        with layerstream.offload(pipe, vram_budget=budget, device=device, packing="ahead") as streaming:
            with device.checking():
                for seed in (0, 1, 0, 1, 0, 1):
                    assert torch.equal(run_tiny(pipe, name, seed=seed), expected[seed])
            most = max(most, streaming.stats().num_own_wires)
        assert not device.registered
        assert device.buffer_bytes == 0
    assert torch.equal(run_tiny(pipe, name, seed=1), expected[1])
    assert most, "no budget had any stay"


def test_passes_take_as_long_as_predicted() -> None:
    rng = random.Random(2)
    num_staying = 0
    for _ in range(15):
        count, size = rng.randint(6, 16), 256 * rng.randint(16, 40)
        # Decoding that takes next to nothing: the simulated one takes its time beside compute, not from it.
        device = SimulatedDevice(link_gb_per_s=1e-3, decode_gb_per_s=1e6)
        ms = [size / 4000 * rng.uniform(0.1, 0.9) for _ in range(count)]
        pipe = {"net": Sized(device, [size] * count, ms=ms)}
        x, times = torch.zeros(1, 8), []
        budget = int(size * (4 + rng.uniform(0, 0.5) * (count - 4)))
        with torch.no_grad(), layerstream.offload(pipe, vram_budget=budget, device=device, packing="ahead") as streamer:
            for _ in range(24):
                begin = device.time_ms
                pipe["net"](x)
                times.append(device.time_ms - begin)
            phase = streamer.plan.phase_of("net")
            assert len(staying(streamer)) == len(phase.packed)
        assert phase.prediction is not None
        num_staying += bool(phase.packed)
        assert sum(times[12:]) / 12 == pytest.approx(phase.prediction.ms_per_pass, rel=0.01), (size, ms, budget)
    assert num_staying >= 8


def test_a_trace_shows_decoding_and_no_copy(tmp_path: Any) -> None:
    path = tmp_path / "calls.json"
    with streamed(ALL, adversary(copies="at_once")) as (pipe, _, streaming):
        with streaming.trace(path):
            pipe()
        rows = spans(path)
        assert len(rows["decodes"]) >= 18
        assert not rows.get("loads")


def test_other_phases_take_the_room_and_give_it_back() -> None:
    """A decode that has no room beside them: what stayed is dropped, and copied once in the next call."""
    device = SimulatedDevice(link_gb_per_s=1e-3)
    net = Sized(device, [8192] * 8, ms=[0.5] * 8)
    vae = Sized(device, [], takes=lambda x: int(x))
    pipe = {"net": net, "vae": vae}
    x = torch.zeros(1, 8)
    with (
        torch.no_grad(),
        layerstream.offload(pipe, vram_budget=48_000, device=device, packing="ahead") as streaming,
        device.accounting(),
    ):
        counts = []
        for number in range(10):
            for _ in range(6):
                net(x)
            during = len(staying(streaming))
            vae(torch.tensor(40_000))
            counts.append((during, len(staying(streaming))))
            if number == 8:
                before = streaming.stats().loaded_bytes
        assert counts[-1][0] > counts[-1][1]
        # Once a call: what stays packed, and what is resident again.
        assert streaming.stats().loaded_bytes - before <= 8 * 8192 // 4 * 6
    assert device.buffer_bytes == 0


# ---- never stale


def _merged(model: nn.Module) -> None:
    """As LoRA weights are merged, outside of what is counted."""
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        weight = block.up.weight
        low, high = (
            torch.randn(2, weight.shape[1], generator=generator),
            torch.randn(weight.shape[0], 2, generator=generator),
        )
        weight.data += high @ low


def _by_numpy(model: nn.Module) -> None:
    model.blocks[0].scale.detach().numpy()[:3] = 4.0


@pytest.mark.parametrize("budget", [ALL, SOME])
@pytest.mark.parametrize("edit", [*EDITS, _merged, _by_numpy])
def test_edits_take_effect(edit: Callable[[nn.Module], None], budget: int) -> None:
    device = adversary()
    with streamed(budget, device) as (pipe, resident, streaming):
        for _ in range(2):
            edit(pipe.model)
            edit(resident.model)
            with device.checking():
                for _ in range(6):
                    assert_equal(pipe(), resident())
        assert streaming.stats().num_own_wires


def test_an_entry_of_a_state_dict_that_is_written_to_later() -> None:
    with streamed(ALL, adversary()) as (pipe, resident, _):
        kept = [each.model.state_dict()["blocks.3.up.weight"] for each in (pipe, resident)]
        for value in (0.25, 0.5):
            for entry in kept:
                entry[1] = value
            for _ in range(4):
                assert_equal(pipe(), resident())


def test_a_hook_that_writes_in_the_middle_of_a_pass() -> None:
    def write(module: nn.Module, *_: Any) -> None:
        module.weight.mul_(1.5)

    with streamed(ALL, adversary()) as (pipe, resident, _):
        for number in range(2):
            handles = [each.model.blocks[number].norm.register_forward_hook(write) for each in (pipe, resident)]
            assert_equal(pipe(2), resident(2))
            for handle in handles:
                handle.remove()
            for _ in range(4):
                assert_equal(pipe(), resident())


def test_changes_in_a_pause() -> None:
    with streamed(ALL, adversary()) as (pipe, resident, streaming):
        with streaming.paused():
            assert not staying(streaming)
            for each in (pipe.model, resident.model):
                each.blocks[2].load_state_dict(each.blocks[1].state_dict())
        settle(pipe, resident, streaming, 6)


@pytest.mark.parametrize("looks", [pickle.dumps, lambda m: m.blocks[2].scale.data, lambda m: m.state_dict()])
def test_what_is_made_raw_stays_no_longer(looks: Callable[[nn.Module], Any]) -> None:
    with streamed(ALL, adversary()) as (pipe, resident, streaming):
        held = looks(pipe.model)
        of = transfer_of(streaming)._own_wires.of
        homes = {unit.home for unit in engine_of(streaming)._units.values()}
        assert set(of) <= homes, "none belongs to a home that a unit had before"
        assert_equal(pipe(), resident())
        del held
        settle(pipe, resident, streaming, len(staying(streaming)))


def test_no_kept_bytes_outlive_their_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever drops them or does not: a unit that was written to is decoded from what it has now."""

    def drop(self: TransferEngine, home: Any) -> None:
        if any(unit.home is home for unit in self._units.values()):
            self._own_wires.drop(home)

    monkeypatch.setattr(TransferEngine, "drop_own_wire", drop)
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget=SOME, device=adversary(), packing="ahead") as streaming:
        settle(pipe, resident, streaming, 3)
        name = staying(streaming)[0].spec.block_name.removeprefix("model.")
        for number in range(3):  # of one unit: what is not dropped takes of the budget
            for each in (pipe, resident):
                each.model.get_submodule(name).up.weight.data[0] = 0.5 + number
            for _ in range(4):
                assert_equal(pipe(), resident())


# ---- what goes wrong


@pytest.mark.filterwarnings("ignore:module forward hook")
def test_decoding_that_does_not_wait_for_its_copy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated device sees the race that a missing wait would be."""

    class Hasty(wires.OwnWire):
        @property
        def filled(self) -> Any:  # type: ignore[override]
            return self.__dict__.get("early")

        @filled.setter
        def filled(self, event: Any) -> None:
            self.__dict__["early"] = event and self.free

    monkeypatch.setattr(wires, "OwnWire", Hasty)
    model, device = toy(), adversary()
    pipe = Pipe(model)
    with (
        pytest.raises(RaceError),
        layerstream.offload(pipe, vram_budget=ALL, device=device, packing="ahead"),
        device.checking(),
    ):
        for _ in range(8):
            pipe()


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), KeyboardInterrupt()])
def test_a_fault_at_any_operation(error: BaseException) -> None:
    most = 0
    for _, device in each_fault(adversary, error, every=2):
        model = toy(num_blocks=4)
        resident, pipe = Pipe(twin(model)), Pipe(model)
        before = describe(model)
        engine: Streamer | None = None
        with (
            # What a fault has left on the device is missing in the budget.
            contextlib.suppress(type(error), BudgetError, Warning),
            layerstream.offload(pipe, vram_budget=40_000, device=device, packing="ahead") as streaming,
        ):
            engine = engine_of(streaming)
            for _ in range(4):
                with contextlib.suppress(type(error)):
                    assert_equal(pipe(2), resident(2))
            pickle.dumps(model)
            model.state_dict()
            for _ in range(2):
                with contextlib.suppress(type(error)):
                    assert_equal(pipe(2), resident(2))
        if engine is not None:
            most = max(most, engine.stats.num_own_wires)
        assert_restored(model, before)
        assert not device.registered
        assert_equal(pipe(2), resident(2))
    assert most


@pytest.mark.parametrize("num_granted", [0, 1, 2])
def test_memory_that_is_refused_has_fewer_stay(num_granted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right, given = wires.OwnWires.give, 0

    def give(self: wires.OwnWires, home: Any) -> None:
        nonlocal given
        if given >= num_granted:
            raise torch.OutOfMemoryError("none left")
        right(self, home)
        given += 1

    monkeypatch.setattr(wires.OwnWires, "give", give)
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget=SOME, device=adversary(), packing="ahead") as streaming:
        for _ in range(8):
            assert_equal(pipe(), resident())
        assert len(staying(streaming)) <= num_granted
        assert streaming.stats().num_own_wires == num_granted


def test_memory_that_is_refused_to_others_is_what_stays_packed() -> None:
    """An allocation that cannot be done without gets it, and nothing is said of the budget."""
    device = adversary()
    with streamed(ALL, device) as (pipe, resident, streaming):
        right, refused = device.allocate, 0

        def allocate(num_bytes: int) -> Any:
            nonlocal refused
            if staying(streaming):
                refused += 1
                raise torch.OutOfMemoryError("none left")
            return right(num_bytes)

        device.allocate = allocate  # type: ignore[method-assign]
        residency = engine_of(streaming)._residency
        unit = next(u for u in engine_of(streaming)._units.values() if u.slot is None and u.spec.is_block)
        slot = residency.allocating(lambda: transfer_of(streaming).add_extra(unit))
        device.allocate = right  # type: ignore[method-assign]
        assert refused == 1
        assert slot.buffer.numel() >= unit.home.device_bytes
        assert not staying(streaming)
        for _ in range(3):
            assert_equal(pipe(), resident())


def test_units_used_together_take_the_room_of_what_stays_packed() -> None:
    """A slot beyond the plan is paid for by what is got back by one copy."""
    with streamed(ALL, adversary()) as (pipe, resident, _):
        for each in (pipe, resident):
            stacked = torch.stack([block.scale for block in each.model.blocks[:4]])
            assert stacked.shape == (4, 16)
        for _ in range(4):
            assert_equal(run(pipe.model, 4), run(resident.model, 4))


def test_auto_packs_what_is_resident_in_order_to_keep_more_of_it() -> None:
    device = SimulatedDevice(link_gb_per_s=1e-3, decode_gb_per_s=1.0)
    net = Sized(device, [8192] * 12, ms=[1.0] * 12, takes=lambda x: 40_000)
    x = torch.zeros(1)
    with (
        torch.no_grad(),
        device.accounting(),
        layerstream.offload(net, vram_budget=90_000, device=device, packing="auto") as streaming,
    ):
        for _ in range(30):
            net(x)
        assert streaming.stats().num_packed_units == 12
        assert len(staying(streaming)) >= 3
        begin = device.time_ms
        net(x)
        assert device.time_ms - begin == pytest.approx(12.0)
        assert streaming.stats().peak_reserved_bytes <= 90_000
