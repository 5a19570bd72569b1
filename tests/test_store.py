"""Units whose bytes are in another GPU's memory: equal, restored, whatever is edited, fails or interrupts meanwhile."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import layerstream
from layerstream.device.base import Caps
from layerstream.device.simulated import RaceError, SimulatedDevice
from layerstream.engine import storing
from layerstream.errors import (
    ArgumentError,
    BudgetError,
    DeviceError,
    HostMemoryError,
    StoreError,
    WeightsLostError,
)
from layerstream.host.home import PackedHome, RawHome, StoredHome
from layerstream.host.keeper import Keeper
from layerstream.host.pages_ahead import PagesAhead
from layerstream.standins import build_tiny, run_tiny
from layerstream.standins.repository import autoregressive_call, build_autoregressive, run_autoregressive
from layerstream.transfer import route
from layerstream.transfer.route import CopyThroughHost
from tests.fakes import (
    Sized,
    adversary,
    assert_equal,
    assert_restored,
    describe,
    each_fault,
    passes_in_a_child,
    run,
    toy,
    twin,
)
from tests.packing_fakes import packs_anything
from tests.test_packing import EDITS, Layers, Pipe, engine_of

__all__ = ["packs_anything"]

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be reached from")
REACH = [True, False]


def other(**options: Any) -> SimulatedDevice:
    """Another GPU."""
    return adversary(name="other", **options)


def num_stored(streaming: layerstream.LayerStreamer) -> int:
    return sum(unit.home.keeper is not None for unit in engine_of(streaming)._units.values())


def settle(pipe: Pipe, resident: Pipe, streaming: layerstream.LayerStreamer) -> None:
    for _ in range(3):
        assert_equal(pipe(), resident())
    assert num_stored(streaming) >= 1


# ---- whatever is stored


@pytest.mark.parametrize("reaches", REACH)
@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
@pytest.mark.parametrize("budget", ["min", 46_000, 60_000, "auto"])
def test_equal_and_restored(budget: int | str, copies: Any, reaches: bool) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before, device, keeper = describe(model), adversary(copies=copies, reaches_peers=reaches), other(copies=copies)
    with layerstream.offload(pipe, vram_budget=budget, device=device, store=keeper) as streaming, device.checking():
        for _ in range(4):
            assert_equal(pipe(), resident())
        stats = streaming.stats()
        assert num_stored(streaming) == stats.num_stored_units == 7
        assert stats.stored_bytes == keeper.buffer_bytes
        assert stats.pinned_bytes == 0
        assert not device.registered
    assert_restored(model, before)
    assert device.buffer_bytes == keeper.buffer_bytes == 0
    assert_equal(pipe(), resident())


@pytest.mark.filterwarnings("ignore:1 of .* are not in the memory of")  # an embedding of sd3 is tied
@pytest.mark.parametrize("reaches", REACH)
@pytest.mark.parametrize("name", ["sd3", "flux", "ovis", "longcat", "wan22", "kandinsky5", "hunyuan_video", "lumina2"])
def test_pipelines(name: str, reaches: bool) -> None:
    pipe: Any = build_tiny(name)
    expected = [run_tiny(pipe, name, seed=seed) for seed in range(2)]
    device, keeper = adversary(copies="random", reaches_peers=reaches), other(copies="random")
    with layerstream.offload(pipe, vram_budget="min", device=device, store=keeper) as streaming, device.checking():
        for seed in (0, 1, 0):
            assert torch.equal(run_tiny(pipe, name, seed=seed), expected[seed])
        assert streaming.stats().num_stored_units > 0
    assert torch.equal(run_tiny(pipe, name, seed=1), expected[1])
    assert not keeper.buffer_bytes


@pytest.mark.parametrize("name", ["nextstep_b", "mammoth"])
def test_token_loops(name: str) -> None:
    pipe = build_autoregressive(name, scale="tiny", dtype=torch.float32)
    call = autoregressive_call(name, "tiny")
    expected = run_autoregressive(pipe, name, scale="tiny", seed=0, **call)
    device, keeper = adversary(copies="random"), other(copies="random")
    with layerstream.offload(pipe, vram_budget="min", device=device, store=keeper) as streaming, device.checking():
        for _ in range(2):
            assert torch.equal(run_autoregressive(pipe, name, scale="tiny", seed=0, **call), expected)
        assert streaming.stats().num_stored_units >= 12
    assert not keeper.buffer_bytes


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("reaches", REACH)
@pytest.mark.parametrize("copies", ["late", "random"])
def test_packed_homes_live_there_too(copies: Any, reaches: bool) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before, device, keeper = describe(model), adversary(copies=copies, reaches_peers=reaches), other(copies=copies)
    options: dict[str, Any] = {"vram_budget": 80_000, "device": device, "store": keeper, "packing": "ahead"}
    with layerstream.offload(pipe, **options) as streaming, device.checking():
        settle(pipe, resident, streaming)
        homes = [unit.home for unit in engine_of(streaming)._units.values()]
        assert sum(isinstance(home, PackedHome) and home.keeper is not None for home in homes) == 6
        assert sum(isinstance(home, StoredHome) for home in homes) == 1
        assert streaming.stats().stored_bytes < 54_784 / 2
    assert_restored(model, before)
    assert not keeper.buffer_bytes


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize("reaches", REACH)
def test_packed_homes_are_looked_at(reaches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "_MOST_BROUGHT_BACK", 10**9)
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device, keeper = adversary(copies="random", reaches_peers=reaches), other()
    options: dict[str, Any] = {"vram_budget": "min", "device": device, "store": keeper, "packing": "ahead"}
    with layerstream.offload(pipe, **options) as streaming:
        for _ in range(2):
            settle(pipe, resident, streaming)
            pickle.dumps(model)
            for _ in range(4):
                settle(pipe, resident, streaming)
            assert num_stored(streaming) == 7
            for each in (model, resident.model):
                EDITS[0](each)


def test_what_they_had_on_the_host_is_let_go() -> None:
    model = Layers(3, 512)
    storages = [StorageWeakRef(block.weight.data.untyped_storage()) for block in model.blocks]
    with layerstream.offload(model, vram_budget="min", device=adversary(), store=other()) as streaming:
        engine_of(streaming).homes.exchanges.release()
        gc.collect()
        assert all(storage.expired() for storage in storages)


def test_two_gpus_one_after_the_other() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    first, second = adversary(name="first", memory_bytes=30_000), adversary(name="second", copies="random")
    with layerstream.offload(
        pipe, vram_budget="min", device=adversary(copies="random"), store=[first, second], store_budget="100%"
    ) as streaming:
        settle(pipe, resident, streaming)
        assert num_stored(streaming) == 7
        assert 0 < first.buffer_bytes <= 30_000
        assert first.buffer_bytes + second.buffer_bytes == 54_784
        assert set(engine_of(streaming)._ledger.planner.links) == {"first", "second"}
    assert not first.buffer_bytes
    assert not second.buffer_bytes


def test_the_host_takes_the_rest_evenly() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device, keeper = adversary(), other()
    options: dict[str, Any] = {"vram_budget": "min", "device": device, "store_budget": 30_000}
    with layerstream.offload(pipe, store=[keeper, "cpu"], **options) as streaming:
        settle(pipe, resident, streaming)
        stored = [u.spec.name for u in engine_of(streaming)._units.values() if u.home.keeper is not None]
        assert keeper.buffer_bytes <= 30_000
        assert device.registered
        assert "there is no room for it" in str(streaming.report())
        blocks = [int(name.rsplit(".", 1)[-1]) for name in stored if "blocks" in name]
    assert len(blocks) == 3
    assert all(after - before > 1 for before, after in itertools.pairwise(blocks)), blocks


def test_the_other_gpu_is_held_to_its_budget() -> None:
    model = toy()
    pipe, keeper = Pipe(model), other()
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), store=keeper, store_budget=56_000):
        pipe()
        assert keeper.free_bytes() == 56_000 - keeper.buffer_bytes
    assert keeper.free_bytes() > 2**40
    assert isinstance(keeper._memory._caps, Caps)
    assert not keeper._memory._caps._bytes


def test_a_pipeline_that_is_dropped_gives_the_limit_back() -> None:
    keeper = other()
    model = toy()
    streaming = layerstream.offload(model, vram_budget="min", device=adversary(), store=keeper, store_budget=56_000)
    streaming.start()
    assert keeper.free_bytes() < 56_000
    del streaming, model
    gc.collect()
    assert keeper._memory.limit_bytes == keeper.memory_bytes


# ---- plans


def test_plans_know_each_link() -> None:
    """Over a link a hundred times as fast, what the bus bound is bound by compute."""
    found = {}
    for store in (None, other()):
        device = adversary(link_gb_per_s=0.001, peer_gb_per_s=0.1)
        pipe = Pipe(Sized(device, [8192] * 6))
        with layerstream.offload(pipe, vram_budget="min", device=device, store=store) as streaming:
            for _ in range(4):
                pipe()
            prediction = streaming.plan.phases[-1].prediction
            assert prediction is not None
            found[store is None] = prediction
            if store is not None:
                assert "are in another GPU's memory: loads come from other at 0.1 GB/s" in str(streaming.report())
    assert found[True].bound == "bus"
    assert found[False].bound == "compute"
    assert found[False].bus_ms < found[True].bus_ms / 50


def test_the_way_through_the_host_is_measured_as_a_whole() -> None:
    pipe = Pipe(toy())
    device = adversary(reaches_peers=False, link_gb_per_s=2.0)
    with layerstream.offload(pipe, vram_budget="min", device=device, store=other(link_gb_per_s=1.0)) as streaming:
        pipe()
        speed = engine_of(streaming)._ledger.planner.links["other"]
    assert speed == pytest.approx(1.0, rel=0.01), "the slower of the two links"


def test_it_is_said_once_that_copies_go_through_the_host() -> None:
    pipe = Pipe(toy())
    options: dict[str, Any] = {"vram_budget": "min", "store": other(), "device": adversary(reaches_peers=False)}
    with (
        pytest.warns(UserWarning, match=r"cannot be reached from simulated directly: .* at 50\.0 GB/s") as said,
        layerstream.offload(pipe, **options) as streaming,
    ):
        pipe()
        with streaming.paused():
            pass
        pipe()
    assert len(said) == 1


# ---- edits


@pytest.mark.parametrize("budget", ["min", 60_000])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_take_effect_and_stay(edit: Callable[[nn.Module], None], budget: int | str) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device, keeper = adversary(), other()
    with layerstream.offload(pipe, vram_budget=budget, device=device, store=keeper):
        for number in range(3):
            if number:
                edit(model)
                edit(resident.model)
            with device.checking():
                for _ in range(4):
                    assert_equal(pipe(), resident())
    for name, value in resident.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert_equal(pipe(), resident())
    assert not device.registered
    assert not keeper.buffer_bytes


def test_a_forward_that_writes_to_its_unit() -> None:
    model = toy(writes_buffer=True)
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), store=other()):
        for _ in range(5):
            assert_equal(pipe(), resident())
    assert [float(b.count) for b in model.blocks] == [float(b.count) for b in resident.model.blocks]


def test_weights_that_somebody_holds_stay_on_the_host() -> None:
    model = toy()
    kept = model.blocks[3].up.weight.data[:2]
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with (
        pytest.warns(UserWarning, match="blocks, pieces or bases") as said,
        layerstream.offload(pipe, vram_budget="min", device=adversary(), store=other()) as streaming,
    ):
        assert_equal(pipe(), resident())
        with streaming.paused():
            pass
        (told,) = [str(one.message) for one in said]
        assert told == (
            "1 of 7 blocks, pieces or bases, 8.8 KiB, are not in the memory of other and stay on the host (1 of what "
            "was to be: somebody else has its memory). They are loaded from there."
        )
        assert num_stored(streaming) == 6
        assert "1 of what was to be: somebody else has its memory" in str(streaming.report())
        kept[0] = 0.25
        resident.model.blocks[3].up.weight.data[0] = 0.25
        assert_equal(pipe(), resident())


@pytest.mark.parametrize("looks", [lambda m: pickle.dumps(m), lambda m: m.blocks[2].scale + 0])
def test_what_is_looked_at_comes_back_and_goes_again(looks: Callable[[nn.Module], Any]) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), store=other()) as streaming:
        settle(pipe, resident, streaming)
        held = looks(model)
        assert_equal(pipe(), resident())
        del held
        gc.collect()
        settle(pipe, resident, streaming)
        assert num_stored(streaming) == 7


def test_what_is_looked_at_again_and_again_stays() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), store=other()) as streaming:
        for _ in range(3):
            settle(pipe, resident, streaming)
            for each in (model, resident.model):
                EDITS[0](each)
        settle(pipe, resident, streaming)
        assert num_stored(streaming) == 6
        assert "1 of what was to be: it is looked at again and again" in str(streaming.report())


def test_what_somebody_has_an_entry_of_stays_until_a_pause() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), store=other()) as streaming:
        settle(pipe, resident, streaming)
        held = model.state_dict()
        assert_equal(pipe(), resident())
        assert num_stored(streaming) == 0
        held["blocks.0.scale"].mul_(2)
        resident.model.state_dict()["blocks.0.scale"].mul_(2)
        assert_equal(pipe(), resident())
        del held
        gc.collect()
        with streaming.paused():
            pass
        assert num_stored(streaming) == 7
        settle(pipe, resident, streaming)


def test_a_pause_brings_all_home_and_stores_it_again() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device, keeper = adversary(), other()
    with layerstream.offload(pipe, vram_budget="min", device=device, store=keeper) as streaming:
        for number in range(4):
            settle(pipe, resident, streaming)
            with streaming.paused():
                assert not keeper.buffer_bytes
                for each in (model, resident.model):
                    each.blocks[number].scale.data.zero_()
        settle(pipe, resident, streaming)
        assert num_stored(streaming) == 7


@pytest.mark.parametrize("budget", ["min", 80_000, 2**24])
def test_views_that_are_kept(budget: int | str) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget=budget, device=adversary(), store=other()) as streaming:
        kept = []
        for _ in range(3):
            assert_equal(pipe(), resident())
            kept.append((model.blocks[1].scale.detach(), resident.model.blocks[1].scale.detach().clone()))
        for mine, theirs in kept:
            assert torch.equal(mine, theirs)
        assert num_stored(streaming) >= 6


# ---- what goes wrong


@pytest.mark.parametrize("reaches", REACH)
@pytest.mark.parametrize("is_keeper", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), KeyboardInterrupt()])
def test_a_fault_at_any_operation(error: BaseException, is_keeper: bool, reaches: bool) -> None:
    """Of entering, storing, streaming, looking and leaving, on either GPU: all is given back."""
    target = functools.partial(adversary, reaches_peers=reaches)
    for operation, faulty in each_fault(other if is_keeper else target, error):
        device, keeper = (target(), faulty) if is_keeper else (faulty, other())
        model = toy(num_blocks=3)
        resident, pipe = Pipe(twin(model)), Pipe(model)
        before = describe(model)
        with (
            contextlib.suppress(type(error), Warning),
            layerstream.offload(pipe, vram_budget="min", device=device, store=keeper),
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
        assert not device.buffer_bytes, operation
        assert not keeper.buffer_bytes, operation
        assert keeper.free_bytes() > 2**40
        assert_equal(pipe(2), resident(2))


@pytest.mark.filterwarnings("ignore:1 of 7 blocks")  # the one that is held
def test_a_gpu_that_gives_nothing_back() -> None:
    """What it has is lost, and that is said; all else is restored."""
    model = toy()
    kept = model.blocks[3].up.weight.data[:2]
    pipe, keeper, device = Pipe(model), other(), adversary()
    before = describe(model)

    def fail(*args: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with (
        pytest.raises(WeightsLostError, match="weights that were in the memory of other are lost: .*illegal memory"),
        layerstream.offload(pipe, vram_budget="min", device=device, store=keeper),
    ):
        pipe()
        keeper.copy_back = fail  # type: ignore[method-assign]
    assert not device.registered
    assert layerstream.active(pipe) is None
    assert torch.isnan(model.blocks[0].up.weight).all()
    assert torch.equal(model.blocks[3].up.weight[:2], kept)
    assert [type(p) for p in model.parameters()] == [nn.Parameter for _ in model.parameters()]
    assert describe(model).keys() == before.keys()


def test_a_host_without_room_for_the_way_back_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before, keeper = describe(model), other()
    streaming = layerstream.offload(pipe, vram_budget="min", device=adversary(), store=keeper).start()
    with monkeypatch.context() as patched:
        patched.setattr(storing, "available_bytes", lambda: (1000, "said by a test"))
        with pytest.raises(HostMemoryError, match=r"53\.5 KiB of weights are in the memory of other") as raised:
            streaming.close()
    assert (raised.value.needed_bytes, raised.value.available_bytes) == (54_784, 1000)
    assert streaming.is_active
    assert_equal(pipe(), resident())
    streaming.close()
    assert_restored(model, before)


@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_is_refused_on_the_way_back(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: it is asked for again. Twice: what it was for is lost, and all else is restored."""
    model = toy()
    pipe, keeper, device = Pipe(model), other(), adversary()
    before = describe(model)
    streaming = layerstream.offload(pipe, vram_budget="min", device=device, store=keeper).start()
    pipe()
    right, count = PagesAhead.take, 0

    def refuse(self: PagesAhead, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if 4 <= count < 4 + times:
            raise MemoryError("no host memory")
        return right(self, *args, **options)

    monkeypatch.setattr(PagesAhead, "take", refuse)
    is_lost = pytest.raises(WeightsLostError, match=r"weights of .* could not be brought back: MemoryError")
    with contextlib.nullcontext() if times == 1 else is_lost:
        streaming.close()
    assert not streaming.is_active
    assert not keeper.buffer_bytes
    assert not device.buffer_bytes
    if times == 1:
        assert_restored(model, before)
    else:
        lost = [name for name, p in model.named_parameters() if p.numel() and torch.isnan(p).all()]
        assert lost
        assert len({name.split(".")[1] for name in lost}) == 1


def test_a_pickle_while_another_thread_loads_what_it_brings_back() -> None:
    """Only waits are put in: the pickle is about to make a unit raw, while the call prepares its load."""
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    expected = resident(2)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), store=other()) as streaming:
        assert_equal(pipe(2), expected)
        engine = engine_of(streaming)
        inside, past, done = threading.Event(), threading.Event(), threading.Event()
        unit = next(unit for unit in engine._units.values() if "blocks.3" in unit.spec.name)
        stored = unit.home
        right_bring, right_prepare = engine._attached._bring_home, route.Copy.prepare

        def bring(looked_at: Any) -> None:
            right_bring(looked_at)
            if looked_at is unit:
                past.set()
                inside.wait(0.5)

        def prepare(self: route.Copy, home: Any, *args: Any) -> Any:
            if past.is_set() and home is stored:
                inside.set()
                done.wait(0.5)
            return right_prepare(self, home, *args)

        def pickles() -> None:
            pickle.dumps(model.blocks[3])
            done.set()

        for each in engine._units.values():
            engine._transfer.forget_loads(each)
        thread = threading.Thread(target=pickles)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(engine._attached, "_bring_home", bring)
            patched.setattr(route.Copy, "prepare", prepare)
            thread.start()
            assert past.wait(10)
            assert_equal(pipe(2), expected)
            thread.join()
        assert_equal(pipe(2), expected)


def test_two_threads_pickle_at_once() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    errors: list[BaseException] = []

    def pickles() -> None:
        try:
            for _ in range(20):
                pickle.dumps(model)
        except BaseException as error:
            errors.append(error)

    with layerstream.offload(pipe, vram_budget="min", device=adversary(), store=other()):
        threads = [threading.Thread(target=pickles) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            assert_equal(pipe(), resident())
        for thread in threads:
            thread.join()
    assert not errors


@pytest.mark.parametrize("option", ["store", "links"])
def test_a_pipeline_that_is_dropped_waits_for_what_is_read(option: str) -> None:
    device, keeper = adversary(copies="late"), other()
    model = toy()
    options: dict[str, Any] = {"device": device, option: keeper}
    streaming = layerstream.offload(model, vram_budget="min", **options).start()
    run(model, 1)
    for each in (device, keeper):
        each.operations.clear()
    del streaming, model, options
    gc.collect()
    assert "synchronize" in device.operations
    assert "synchronize" in keeper.operations


@pytest.mark.parametrize("is_dropped", [False, True])
def test_a_forked_child_gives_nothing_up(is_dropped: bool) -> None:
    """The GPUs' memory and limits, and page locks, are its parent's."""
    device, keeper = adversary(), other()
    pipe = Pipe(toy())
    options: dict[str, Any] = {"vram_budget": 60_000, "store": [keeper, "cpu"], "store_budget": 30_000}
    here = [layerstream.offload(pipe, device=device, **options).start()]
    expected = pipe()
    limits = device.free_bytes(), keeper.free_bytes()
    del pipe

    def end() -> None:
        for each in (device, keeper):
            each.operations.clear()
        if not is_dropped:
            here[0].close()
            assert not here[0].is_active
            here[0].close()
        here.clear()
        gc.collect()
        assert not device.operations, device.operations
        assert not keeper.operations, keeper.operations
        assert (device.free_bytes(), keeper.free_bytes()) == limits
        assert device.registered
        assert keeper.buffer_bytes

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert passes_in_a_child(end)
    assert any("are in another GPU's memory, or in memory that ranks share" in str(one.message) for one in said)
    assert_equal(here[0]._pipe(), expected)
    here.pop().close()
    assert not device.registered
    assert not keeper.buffer_bytes


def test_memory_is_given_back_behind_copies_from_it() -> None:
    device, there = adversary(copies="late"), other()
    keeper = Keeper(there, None, device)
    source, target = keeper.take(512), device.allocate(512)
    source.fill_(7)
    device.copy(device.prepare([(target, source)]), [])
    keeper.give(source)
    assert target.unique().tolist() == [7]


def test_memory_is_given_back_although_a_gpu_has_failed() -> None:
    device, there = adversary(copies="late"), other()
    keeper = Keeper(there, None, device)
    source, target = keeper.take(512), device.allocate(512)
    device.copy(device.prepare([(target, source)]), [])
    there.fail_at(1, RuntimeError("CUDA error: unspecified launch failure"))  # its own copies are waited for by then
    with pytest.raises(RuntimeError, match="launch failure"):
        keeper.give(source)
    assert not there.buffer_bytes
    assert device.operations[-1] == "synchronize"


def test_what_is_stored_is_not_read_any_more_where_that_is_interrupted() -> None:
    """Pages that are about to be unlocked."""
    there = other(copies="late")
    keeper = Keeper(there, None, adversary())
    buffer, pages = keeper.take(512), torch.full((512,), 7, dtype=torch.uint8)

    def interrupt(event: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(there, "synchronize_event", interrupt)
        keeper.fill([(buffer, pages)], is_locked=True)
    assert buffer.unique().tolist() == [7]
    keeper.give(buffer)


@pytest.mark.parametrize("reaches", REACH)
def test_leaving_in_another_thread(reaches: bool) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before, keeper = describe(model), other(copies="late")
    device = adversary(copies="late", reaches_peers=reaches)
    streaming = layerstream.offload(pipe, vram_budget="min", device=device, store=keeper).start()
    assert_equal(pipe(), resident())
    thread = threading.Thread(target=streaming.close)
    thread.start()
    thread.join()
    assert_restored(model, before)
    assert not keeper.buffer_bytes
    assert not device.buffer_bytes


def test_a_gpu_that_is_full_by_then_leaves_the_rest_on_the_host() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    keeper = other()
    right, count = keeper.allocate, 0

    def refuse(num_bytes: int) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 3:
            raise torch.OutOfMemoryError("none left")
        return right(num_bytes)

    keeper.allocate = refuse  # type: ignore[method-assign]
    with (
        pytest.warns(UserWarning, match=r"1 of 7 blocks, .* are not in the memory of other .* is no room for it"),
        layerstream.offload(pipe, vram_budget="min", device=adversary(), store=keeper) as streaming,
    ):
        settle(pipe, resident, streaming)
        assert num_stored(streaming) == 6


def test_memory_that_is_given_back_while_it_is_read_is_caught() -> None:
    device, keeper = adversary(copies="late"), other()
    assert device.reaches(keeper)
    source, target = keeper.allocate(512), device.allocate(512)
    device.copy(device.prepare([(target, source)]), [])
    with pytest.raises(RaceError, match="with a copy from it to another device on its way"):
        keeper.free(source)


@pytest.mark.filterwarnings("ignore:module forward hook")
def test_a_buffer_on_the_way_through_the_host_that_is_written_too_early_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By bits: the next part comes to lie over the one before it."""
    right = CopyThroughHost._copy

    def forgetful(self: CopyThroughHost, pairs: Any, after: Any) -> Any:
        self._free = [None] * len(self._free)
        return right(self, pairs, after)

    monkeypatch.setattr(route, "_STAGING_BUFFERS", 1)
    monkeypatch.setattr(CopyThroughHost, "_copy", forgetful)
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device = adversary(copies="late", reaches_peers=False)
    with (
        pytest.raises((AssertionError, RaceError)),
        layerstream.offload(pipe, vram_budget="min", device=device, store=other(copies="at_once")),
    ):
        for _ in range(4):
            assert_equal(pipe(), resident())


# ---- arguments


def test_a_store_without_room_changes_nothing() -> None:
    model = toy()
    before, device, keeper = describe(model), adversary(), other(memory_bytes=20_000)
    with (
        pytest.raises(StoreError, match=r"do not fit in the memory of other: they take 53\.5 KiB") as raised,
        layerstream.offload(model, vram_budget="min", device=device, store=keeper, store_budget="100%"),
    ):
        pass
    assert (raised.value.needed_bytes, raised.value.available_bytes) == (54_784, 20_000)
    assert 'store=["other", "cpu"]' in str(raised.value)
    assert_restored(model, before)
    assert keeper.num_operations == device.num_operations == 0
    assert layerstream.active(model) is None


@pytest.mark.usefixtures("packs_anything")
@pytest.mark.parametrize(("share", "needed"), [(0.25, "at least 14.5 KiB"), (0.1, "14.5 KiB"), (0.25, "")])
def test_packed_weights_are_counted_packed(share: float, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of their bytes is certain; what they take is known once they are packed."""
    monkeypatch.setattr(storing, "_LEAST_PACKED_SHARE", share)
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before, device, keeper = describe(model), adversary(), other(memory_bytes=14_000 if needed else 15_500)
    options: dict[str, Any] = {"vram_budget": 80_000, "device": device, "store": keeper, "store_budget": "100%"}
    refused = pytest.raises(StoreError, match=r"do not fit in the memory of other: they take " + re.escape(needed))
    with (
        refused if needed else contextlib.nullcontext(),
        layerstream.offload(pipe, packing="ahead", **options) as streaming,
    ):
        settle(pipe, resident, streaming)
        assert num_stored(streaming) == 7
    assert_restored(model, before)
    assert not keeper.buffer_bytes
    assert not device.registered


def test_a_gpu_that_does_not_exist_is_told_with_how_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for option in ("store", "links"):
        options: dict[str, Any] = {"device": adversary(), option: "cuda:99"}
        with (
            pytest.raises(DeviceError, match=r'"cuda:99" does not exist: torch sees 2 GPU\(s\), cuda:0 to cuda:1'),
            layerstream.offload(toy(), vram_budget="min", **options),
        ):
            pass


@pytest.mark.parametrize("copies", ["late", "random"])
def test_of_two_gpus_one_is_out_of_reach(copies: Any) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before = describe(model)
    peer = adversary(name="peer", memory_bytes=20_000, copies=copies)
    far = adversary(name="far", memory_bytes=20_000, copies=copies, link_gb_per_s=7.0)
    device = adversary(copies=copies, reaches_peers={"peer"})
    options: dict[str, Any] = {"vram_budget": "min", "device": device, "store_budget": "100%"}
    with (
        pytest.warns(UserWarning, match=r"far cannot be reached .* at 7\.0 GB/s") as said,
        layerstream.offload(pipe, store=[peer, far, "cpu"], **options) as streaming,
        device.checking(),
    ):
        settle(pipe, resident, streaming)
        assert peer.buffer_bytes
        assert far.buffer_bytes
        assert device.registered
        assert set(engine_of(streaming).links) == {"", "peer", "far"}
    assert len(said) == 1
    assert_restored(model, before)
    assert not peer.buffer_bytes
    assert not far.buffer_bytes


def test_stores_that_mean_nothing() -> None:
    device, keeper = adversary(), other()
    model = toy()

    def entering(**options: Any) -> None:
        with layerstream.offload(model, vram_budget="min", device=device, **options):
            pass

    with pytest.raises(ArgumentError, match="is the GPU that the pipeline runs on"):
        entering(store=device)
    with pytest.raises(ArgumentError, match="names other twice"):
        entering(store=[keeper, keeper])
    with pytest.raises(ArgumentError, match='"cpu" comes last'):
        entering(store=["cpu", keeper])
    with pytest.raises(ArgumentError, match="without a store"):
        entering(store_budget="8GiB")
    with pytest.raises(BudgetError, match=r"store_budget .* is more than any device has"):
        entering(store=keeper, store_budget=2**60)
    with pytest.raises(BudgetError, match='store_budget "lots" is not a size|store_budget .lots. is not a size'):
        entering(store=keeper, store_budget="lots")
    with pytest.raises(BudgetError, match='store_budget "min" means nothing'):
        entering(store=keeper, store_budget="min")
    for wrong in ([], 1.5, [None, keeper], {"cuda:1"}):
        with pytest.raises(ArgumentError, match="store must be a GPU"):
            layerstream.offload(model, store=wrong)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="does not exist"):
            entering(store="cuda:1")
    for host in ("cpu", ["cpu"], "cpu:0", torch.device("cpu", 0)):
        entering(store=host)
        assert not keeper.num_operations


def test_decorators_take_a_store() -> None:
    keeper, device = other(), adversary()

    @layerstream.offload(vram_budget="min", device=device, store=keeper, store_budget=60_000)
    def paint(pipe: Pipe) -> int:
        pipe()
        return keeper.buffer_bytes

    assert paint(Pipe(toy())) == 54_784
    assert not keeper.buffer_bytes


def test_raw_homes_are_the_others() -> None:
    with layerstream.offload(toy(), vram_budget="min", device=adversary(), store="cpu") as streaming:
        assert all(isinstance(unit.home, RawHome) for unit in engine_of(streaming)._units.values())
