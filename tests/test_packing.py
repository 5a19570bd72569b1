"""Units whose bytes at home are packed: equal, restored, whatever is edited, fails or interrupts meanwhile."""

from __future__ import annotations

import contextlib
import gc
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import layerstream
from layerstream.device.simulated import RaceError, SimulatedDevice
from layerstream.engine import packing
from layerstream.engine.streamer import Streamer
from layerstream.errors import ArgumentError, BudgetError
from layerstream.host.home import PackedHome, RawHome
from layerstream.host.pages_ahead import PagesAhead
from layerstream.standins import build_tiny, run_tiny
from layerstream.transfer import wires
from tests.fakes import (
    OneModel,
    Sized,
    adversary,
    assert_equal,
    assert_restored,
    describe,
    each_fault,
    elsewhere,
    run,
    toy,
    twin,
)
from tests.packing_fakes import packs_anything
from tests.test_replay import Net, function_calls
from tests.test_trace import spans

__all__ = ["packs_anything"]

MODES = ("ahead", "auto")


class Layers(nn.Module):
    """A stack of linear layers."""

    def __init__(self, num_blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Pipe(OneModel):
    """A call of several passes."""

    def __call__(self, passes: int = 4) -> list[torch.Tensor]:
        with torch.no_grad():
            return run(self.model, passes)


def engine_of(streaming: layerstream.LayerStreamer) -> Streamer:
    engine = streaming._streamer
    assert engine is not None
    return engine


def num_packed(streaming: layerstream.LayerStreamer) -> int:
    return sum(isinstance(unit.home, PackedHome) for unit in engine_of(streaming)._units.values())


def settle(pipe: Pipe, resident: Pipe, streaming: layerstream.LayerStreamer) -> None:
    """Run until the units that are to be packed are."""
    for _ in range(6):
        assert_equal(pipe(), resident())
    assert num_packed(streaming) >= 1


# ---- whatever packs


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
@pytest.mark.parametrize("budget", ["min", 46_000, 60_000, "auto"])
def test_equal_and_restored(budget: int | str, copies: Any, mode: str) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before, device = describe(model), adversary(copies=copies)
    with layerstream.offload(pipe, vram_budget=budget, device=device, packing=mode) as streaming, device.checking():
        for _ in range(6):
            assert_equal(pipe(), resident())
        if mode == "ahead" or budget == "min":
            assert num_packed(streaming) == 6
            assert streaming.stats().num_packed_units == 6
            assert streaming.stats().packed_bytes < streaming.stats().unpacked_bytes / 3
    assert_restored(model, before)
    assert not device.registered
    assert device.buffer_bytes == 0
    assert_equal(pipe(), resident())


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sd3", "flux", "ovis", "longcat", "wan22", "kandinsky5", "hunyuan_video", "lumina2"])
def test_pipelines(name: str, mode: str) -> None:
    pipe: Any = build_tiny(name)
    expected = [run_tiny(pipe, name, seed=seed) for seed in range(2)]
    device = adversary(copies="random")
    with layerstream.offload(pipe, vram_budget="min", device=device, packing=mode) as streaming, device.checking():
        for seed in (0, 1, 0, 1):
            assert torch.equal(run_tiny(pipe, name, seed=seed), expected[seed])
        assert streaming.stats().num_packed_units > 0
    assert torch.equal(run_tiny(pipe, name, seed=1), expected[1])
    assert not device.registered


def test_the_codec_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of bfloat16 in two thirds, by the codec that is shipped."""
    monkeypatch.setattr(packing, "_MOST_TIME_SHARE", 1e9)

    torch.manual_seed(0)
    model, x = Layers(4, 1024).to(torch.bfloat16), torch.randn(2, 1024, dtype=torch.bfloat16)
    for block in model.blocks:
        nn.init.normal_(block.weight, std=0.02)
    before = describe(model)
    with torch.no_grad():  # a graph would hold the weights
        expected = model(x)
    for mode in MODES:
        device = adversary()
        with torch.no_grad(), layerstream.offload(model, vram_budget="min", device=device, packing=mode) as streaming:
            for _ in range(16):
                assert torch.equal(model(x), expected)
            stats = streaming.stats()
            assert stats.num_packed_units == 4
            assert 0.66 < stats.packed_bytes / stats.unpacked_bytes < 0.69
            assert "4 blocks, or pieces of them, are packed" in str(streaming.report())
        assert_restored(model, before)


def test_what_gains_too_little_stays_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of float32 have 24 bits of noise."""
    monkeypatch.setattr(packing, "LEAST_BYTES", 1)
    model, x = Layers(4, 64), torch.randn(1, 64)
    with torch.no_grad():
        expected = model(x)
        with layerstream.offload(model, vram_budget="min", device=adversary(), packing="ahead") as streaming:
            assert torch.equal(model(x), expected)
            assert num_packed(streaming) == 0
            assert "packing gains less than 10%" in str(streaming.report())


# ---- host memory


@pytest.mark.usefixtures("packs_anything")
def test_raw_bytes_are_let_go() -> None:
    model = Layers(3, 1024)
    storages = [StorageWeakRef(block.weight.data.untyped_storage()) for block in model.blocks]
    device = adversary()
    with layerstream.offload(model, vram_budget="min", device=device, packing="ahead") as streaming:
        engine_of(streaming).homes.exchanges.release()
        gc.collect()
        assert all(storage.expired() for storage in storages)
        assert sum(device.registered.values()) < model.blocks[0].weight.nbytes
        assert streaming.stats().pinned_bytes == streaming.stats().packed_bytes


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("looks", [lambda m: pickle.dumps(m), lambda m: m.blocks[2].scale + 0])
def test_what_is_looked_at_is_raw_and_packed_again(looks: Callable[[nn.Module], Any]) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device, packing="ahead") as streaming:
        settle(pipe, resident, streaming)
        held = looks(model)
        assert_equal(pipe(), resident())
        del held
        gc.collect()
        settle(pipe, resident, streaming)
        assert num_packed(streaming) == 6


def test_a_unit_that_is_looked_at_again_and_again_stays_raw(
    packs_anything: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_MOST_UNPACKED", 2)
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), packing="ahead") as streaming:
        for _ in range(4):
            settle(pipe, resident, streaming)
            with torch.no_grad():
                for each in (model, resident.model):
                    each.blocks[1].scale.mul_(1.5)
        assert num_packed(streaming) == 5
        assert "1 of what was to be: it is looked at again and again" in str(streaming.report())


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("mode", MODES)
def test_pages_for_the_next_unit_are_there_before_its_turn(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    right = PagesAhead.prepare

    def prepare(self: PagesAhead, num_bytes: int) -> None:
        prepared.append(num_bytes)
        right(self, num_bytes)

    monkeypatch.setattr(PagesAhead, "prepare", prepare)
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), packing=mode) as streaming:
        settle(pipe, resident, streaming)
        assert num_packed(streaming) == 6
        assert len(prepared) == 5, "all but the first"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layerstream-pages")]


@pytest.mark.usefixtures("packs_anything")
def test_weights_that_somebody_holds_stay_raw() -> None:
    model = toy()
    kept = model.blocks[3].up.weight.data[:2]
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), packing="ahead") as streaming:
        assert_equal(pipe(), resident())
        assert num_packed(streaming) == 5
        kept[0] = 0.25
        resident.model.blocks[3].up.weight.data[0] = 0.25
        assert_equal(pipe(), resident())


@pytest.mark.usefixtures("packs_anything")
def test_a_forward_that_writes_to_its_unit() -> None:
    model = toy(writes_buffer=True)
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), packing="ahead"):
        for _ in range(5):
            assert_equal(pipe(), resident())
    assert [float(b.count) for b in model.blocks] == [float(b.count) for b in resident.model.blocks]


# ---- edits


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[2].scale.add_(1)


def _by_data(model: nn.Module) -> None:
    model.blocks[4].up.weight.data[0] = 0.5


def _other_data(model: nn.Module) -> None:
    model.blocks[1].norm.weight.data = torch.full((16,), 0.75)


def _an_entry(model: nn.Module) -> None:
    model.state_dict()["blocks.0.scale"].mul_(2)


def _loaded(model: nn.Module) -> None:
    model.load_state_dict(
        {name: value * 1.25 for name, value in model.state_dict().items() if value.is_floating_point()}, strict=False
    )


def _cast_there_and_back(model: nn.Module) -> None:
    model.blocks[5].double().to(torch.float32)
    model.blocks[5].down.to(torch.bfloat16)


EDITS = [_in_place, _by_data, _other_data, _an_entry, _loaded, _cast_there_and_back]


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", ["min", 60_000])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_take_effect_and_stay(edit: Callable[[nn.Module], None], budget: int | str, mode: str) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device = adversary()
    with layerstream.offload(pipe, vram_budget=budget, device=device, packing=mode):
        for number in range(3):
            if number:
                edit(model)
                edit(resident.model)
            with device.checking():  # what edits make of weights on the host is no device memory
                for _ in range(4):
                    assert_equal(pipe(), resident())
    for name, value in resident.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert_equal(pipe(), resident())
    assert not device.registered


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("mode", MODES)
def test_a_pause_brings_all_home_and_packs_it_again(mode: str) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device, packing=mode) as streaming:
        settle(pipe, resident, streaming)
        with streaming.paused():
            assert not device.registered
            for each in (model, resident.model):
                each.blocks[0].scale.data.zero_()
        settle(pipe, resident, streaming)
        assert num_packed(streaming) == 6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [1024, 64])
@pytest.mark.parametrize("num_given", [1, 4])
def test_a_state_dict_that_is_dropped_costs_no_packing(
    num_given: int, width: int, mode: str, packs_anything: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entries are memory at home, raw: what somebody has is packed again once nobody has it."""
    monkeypatch.setattr(packing, "_MOST_UNPACKED", 2)
    model, x = Layers(4, width), torch.randn(1, width)
    resident = twin(model)
    with torch.no_grad(), layerstream.offload(model, vram_budget="min", device=adversary(), packing=mode) as streaming:

        def calls() -> None:
            for _ in range(8):
                assert torch.equal(model(x), resident(x))

        calls()
        most = num_packed(streaming)
        assert most >= 3
        given = [each.state_dict() for _ in range(num_given) for each in (model, resident)]
        calls()
        assert num_packed(streaming) == 0
        assert "of what was to be: somebody else has its memory" in str(streaming.report())
        for each in given:
            each["blocks.2.weight"].mul_(0.5)
        calls()
        given.clear()
        del each
        gc.collect()
        calls()
        calls()
        assert num_packed(streaming) >= most


@pytest.mark.parametrize("mode", MODES)
def test_pauses_are_no_touches(mode: str, packs_anything: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_MOST_UNPACKED", 2)
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), packing=mode) as streaming:
        for _ in range(4):
            settle(pipe, resident, streaming)
            with streaming.paused():
                pass
        settle(pipe, resident, streaming)
        assert num_packed(streaming) == 6


# ---- what goes wrong


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), KeyboardInterrupt()])
def test_a_fault_at_any_operation(error: BaseException, mode: str) -> None:
    """Of entering, packing, streaming, looking and leaving: what was to be done may fail; all is given back."""
    for _, device in each_fault(adversary, error, every=2):
        model = toy(num_blocks=3)
        resident, pipe = Pipe(twin(model)), Pipe(model)
        before = describe(model)
        with (
            contextlib.suppress(type(error), Warning),
            layerstream.offload(pipe, vram_budget="min", device=device, packing=mode),
        ):
            for _ in range(3):
                with contextlib.suppress(type(error)):
                    assert_equal(pipe(2), resident(2))
            pickle.dumps(model)
            model.state_dict()
            with contextlib.suppress(type(error)):
                assert_equal(pipe(2), resident(2))
        assert_restored(model, before)
        assert not device.registered
        assert_equal(pipe(2), resident(2))


@pytest.mark.usefixtures("packs_anything")
def test_a_device_that_decodes_no_more_gives_weights_back() -> None:
    """They are decoded on the host."""

    def fail(*args: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before, device = describe(model), adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device, packing="ahead") as streaming:
        assert_equal(pipe(), resident())
        assert num_packed(streaming) == 6
        device.allocate = fail  # type: ignore[method-assign]
    assert_restored(model, before)
    assert_equal(pipe(), resident())


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("mode", MODES)
def test_a_unit_that_does_not_come_back_as_it_was_stays_raw(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before, device = describe(model), adversary()
    right, count = device.pack, 0

    def wrong(*args: Any) -> Any:
        nonlocal count
        count += 1
        wire, layout = right(*args)
        if count == 3:
            wire[8] ^= 1
        return wire, layout

    device.pack = wrong  # type: ignore[method-assign]
    with (
        pytest.warns(UserWarning, match="does not come back as it was"),
        layerstream.offload(pipe, vram_budget="min", device=device, packing=mode) as streaming,
    ):
        settle(pipe, resident, streaming)
        stats = streaming.stats()
        assert (stats.num_packed_units, stats.num_packing_mismatches) == (5, 1)
    assert_restored(model, before)


@pytest.mark.parametrize("mode", MODES)
def test_without_kernels_weights_stay_raw_and_it_is_said_once(
    packs_anything: None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device = adversary()
    device.why_not_packed = lambda: "packed weights need Triton"  # type: ignore[method-assign]
    with (
        pytest.warns(UserWarning, match="weights are not packed: packed weights need Triton") as said,
        layerstream.offload(pipe, vram_budget="min", device=device, packing=mode) as streaming,
    ):
        for _ in range(6):
            assert_equal(pipe(), resident())
        assert num_packed(streaming) == 0
        assert "not packed: packed weights need Triton" in str(streaming.report())
    assert len(said) == 1


def test_memory_that_is_refused_leaves_the_unit_raw(packs_anything: None) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device = adversary()

    def refuse(*args: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    device.pack = refuse  # type: ignore[method-assign]
    with layerstream.offload(pipe, vram_budget=60_000, device=device, packing="ahead") as streaming:
        assert_equal(pipe(), resident())
        assert "there is no room to pack it" in str(streaming.report())


@pytest.mark.usefixtures("packs_anything")
def test_a_budget_without_room_for_wire_buffers_packs_nothing() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with pytest.raises(BudgetError) as raised, layerstream.offload(pipe, vram_budget=1000, device=SimulatedDevice()):
        pass
    least = raised.value.least_bytes
    assert least is not None
    for mode in MODES:
        with layerstream.offload(pipe, vram_budget=least + 2048, device=adversary(), packing=mode) as streaming:
            for _ in range(5):
                assert_equal(pipe(), resident())
            assert num_packed(streaming) == 0
    with layerstream.offload(pipe, vram_budget=least + 2048, device=adversary(), packing="ahead") as streaming:
        assert "the budget has no room for wire buffers" in str(streaming.report())


@pytest.mark.usefixtures("packs_anything")
def test_a_call_that_leaves_no_room_for_wire_buffers_makes_all_raw() -> None:
    """Activations are not known before they have been there: packing is no reason to refuse a call."""
    device = SimulatedDevice()
    model = Sized(device, [8192] * 6, takes=lambda x: int(x))
    with (
        torch.no_grad(),
        layerstream.offload(model, vram_budget=60_000, device=device, packing="ahead") as streaming,
        device.accounting(),
    ):
        for _ in range(4):
            model(torch.tensor(1000))
        assert num_packed(streaming) == 6
        with pytest.raises(torch.OutOfMemoryError):
            model(torch.tensor(41_000))
        for _ in range(4):
            model(torch.tensor(41_000))
        assert num_packed(streaming) == 0
        assert "the budget has no room for wire buffers" in str(streaming.report())
        model(torch.tensor(1000))
    assert not device.registered


@pytest.mark.usefixtures("packs_anything")
def test_what_making_a_unit_raw_takes_is_no_reserve() -> None:
    """A hook writes to a weight while the first passes are measured: its unit is made raw in the middle of one."""

    def write(module: nn.Module, *_: Any) -> None:
        module.weight.mul_(1.5)

    reserves = {}
    for mode in ("off", "ahead"):
        model, device = toy(), adversary()
        with layerstream.offload(model, vram_budget=60_000, device=device, packing=mode) as streaming, torch.no_grad():
            for number in range(8):
                handle = model.blocks[0].norm.register_forward_hook(write if number == 1 else lambda *_: None)
                run(model, 1)
                handle.remove()
            reserves[mode] = [phase.phase.reserve_bytes for phase in streaming.plan.phases]
    assert reserves["ahead"] == reserves["off"]


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.filterwarnings("ignore:module forward hook")
def test_a_copy_into_a_wire_buffer_that_is_still_decoded_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated device sees the race that a missing wait would be."""
    monkeypatch.setattr(wires.Wire, "free", property(lambda wire: wire.first, lambda wire, event: None), raising=False)
    monkeypatch.setattr(
        wires.Wire,
        "__init__",
        lambda wire, buffer, stream, free: wire.__dict__.update(buffer=buffer, stream=stream, first=free),
    )
    model = toy()
    device = adversary()
    with pytest.raises(RaceError), layerstream.offload(Pipe(model), vram_budget="min", device=device, packing="ahead"):
        Pipe(model)()


@pytest.mark.parametrize("value", ["on", None, True, 1])
def test_values_of_packing(value: Any) -> None:
    for entry in (layerstream.offload, layerstream.plan):
        with pytest.raises(ArgumentError, match='packing must be "auto", "ahead" or "off"'):
            entry(toy(), packing=value)


# ---- plans and speed


def test_a_plan_with_packed_blocks_counts_wire_buffers() -> None:
    model = Layers(8, 1024).to(torch.bfloat16)
    raw = layerstream.plan(model, vram_budget="min", device="cpu")
    packed = layerstream.plan(model, vram_budget="min", device="cpu", packing="ahead")
    (phase,) = packed.phases
    assert phase.wires[0] == 2
    assert packed.least_bytes == raw.least_bytes + sum([phase.wires[1]] * 2) + 2 * (-phase.wires[1] % 256)


@pytest.mark.usefixtures("packs_anything")
def test_a_trace_shows_decoding_behind_its_copy(tmp_path: Path) -> None:
    device = SimulatedDevice(decode_gb_per_s=50.0)
    model = Sized(device, [2**20] * 6)
    path = tmp_path / "calls.json"
    with torch.no_grad(), layerstream.offload(model, vram_budget="min", device=device, packing="ahead") as streaming:
        for _ in range(6):
            model(torch.zeros(1))
        with streaming.trace(path):
            for _ in range(3):
                model(torch.zeros(1))
    rows = spans(path)
    assert len(rows["decodes"]) == len(rows["loads"]) >= 18
    for load, decode in zip(rows["loads"], rows["decodes"], strict=True):
        assert load["name"] == decode["name"]
        assert decode["ts"] >= load["ts"] + load["dur"] - 1e-6
        assert decode["args"]["GB/s"] == pytest.approx(50, rel=0.01)
        assert load["args"]["bytes"] < decode["args"]["bytes"] / 3


@pytest.mark.usefixtures("packs_anything")
def test_function_calls_of_a_packed_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settled passes are replayed, and a load that is decoded costs a few calls more than one that is copied."""
    counts = []
    for num_blocks in (12, 24):
        net, x = Net(num_blocks), torch.ones(1)
        device = SimulatedDevice()
        with layerstream.offload(net, vram_budget="min", device=device, packing="ahead"), torch.no_grad():
            for _ in range(12):
                net(x)
            counts.append(function_calls(lambda net=net, x=x: net(x)))  # type: ignore[misc]
    each = {name: (counts[1][name] - counts[0][name]) / 12 for name in counts[1]}
    assert sum(each.values()) <= 110, {name: round(count, 2) for name, count in each.items() if count}


def test_packed_blocks_take_less_of_the_bus(packs_anything: None) -> None:
    model = toy()
    pipe, loaded = Pipe(model), {}
    for mode in ("off", "ahead"):
        with layerstream.offload(pipe, vram_budget="min", device=SimulatedDevice(), packing=mode) as streaming:
            pipe(8)
            loaded[mode] = streaming.stats().loaded_bytes
            kinds = {type(u.home) for u in engine_of(streaming)._units.values() if u.spec.is_block}
            assert kinds == ({PackedHome} if mode == "ahead" else {RawHome})
    assert loaded["ahead"] < 0.5 * loaded["off"]


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("budget", ["min", 80_000, 2**24])
def test_views_that_are_kept_after_many_homes(budget: int | str, is_packed: bool) -> None:
    """Who looks at a slot is counted, and what loads it is among those. With another home it goes."""
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    mode = "ahead" if is_packed else "off"
    with layerstream.offload(pipe, vram_budget=budget, device=adversary(), packing=mode) as streaming:
        engine = engine_of(streaming)
        for number in range(6):
            for index in engine._units if not is_packed else ():
                engine.homes.exchanges.ask(index, elsewhere)
            assert_equal(pipe(8), resident(8))
            kept = [each.blocks[n].up.weight.data for each in (model, resident.model) for n in (0, 2, 5)]
            with streaming.paused() if number % 2 else contextlib.nullcontext():
                for view in kept:
                    view.add_(0.25)
            assert_equal(pipe(2), resident(2))
