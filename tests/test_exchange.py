"""Units get other homes in the middle of calls: equal, restored, and every page lock given up when nobody reads."""

from __future__ import annotations

import contextlib
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.engine.streamer import Streamer
from layerstream.host.home import RawHome
from layerstream.host.page_locks import page_locks_of
from layerstream.host.store import HostStore
from layerstream.transfer.unit import StreamedUnit
from tests.fakes import (
    OneModel,
    adversary,
    assert_equal,
    assert_restored,
    describe,
    elsewhere,
    run,
    toy,
    toy_input,
    twin,
)


class Pipe(OneModel):
    """A call of several passes."""

    def __call__(self, passes: int = 4) -> list[torch.Tensor]:
        with torch.no_grad():
            return run(self.model, passes)


def ask_for_all(engine: Streamer, make: Callable[..., Any] = elsewhere) -> None:
    for unit in list(engine._units):
        engine.homes.exchanges.ask(unit, make)


def homes(engine: Streamer) -> dict[int, RawHome]:
    return {index: unit.home for index, unit in engine._units.items()}


@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
@pytest.mark.parametrize("writes_buffer", [False, True])
@pytest.mark.parametrize("budget", ["min", 60_000, "auto"])
def test_every_home_is_exchanged_in_the_middle_of_calls(budget: int | str, writes_buffer: bool, copies: Any) -> None:
    model = toy(writes_buffer=writes_buffer)
    resident, device = Pipe(twin(model)), adversary(copies=copies)
    before = describe(model)
    pipe = Pipe(model)
    with layerstream.offload(pipe, vram_budget=budget, device=device) as streaming, device.checking():
        engine = streaming._streamer
        assert engine is not None
        assert_equal(pipe(), resident())
        old = homes(engine)
        ask_for_all(engine)
        assert_equal(pipe(), resident())
        assert 0 < engine.homes.exchanges.num_wanted < len(old), "one at a time, as passes end"
        assert_equal(pipe(2 * len(old)), resident(2 * len(old)))
        assert not engine.homes.exchanges.num_wanted
        now = homes(engine)
        assert all(now[index] is not home and now[index].is_pinned for index, home in old.items())
        assert [home.locks for home in old.values()] == [[]] * len(old)
        assert len(page_locks_of(device)) == len(now)
        assert_equal(pipe(), resident())
    assert_restored(model, before, changed=["count"])
    if writes_buffer:
        assert [float(b.count) for b in model.blocks] == [float(b.count) for b in resident.model.blocks]
    assert not device.registered
    assert device.buffer_bytes == 0


def test_an_old_home_is_locked_until_its_last_load_is_over() -> None:
    device = adversary()  # copies run as late as is legal
    model = toy()
    with layerstream.offload(model, vram_budget="min", device=device) as streaming, torch.no_grad():
        engine = streaming._streamer
        assert engine is not None
        model(toy_input())
        model(toy_input())
        loaded = next(unit for unit in engine._units.values() if unit.state.name == "LOADED")
        assert not device.is_done(loaded.last_load)
        old = loaded.home
        engine.homes.exchanges.ask(loaded.index, elsewhere)
        engine.homes.exchanges.at_rest()
        assert loaded.home is not old
        engine.homes.exchanges.at_rest()
        assert old.locks, "the device still reads from there"
        device.synchronize()
        engine.homes.exchanges.at_rest()
        assert not old.locks


def test_edits_after_an_exchange_are_kept_and_handed_back() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before = describe(model)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streaming, device.checking():
        engine = streaming._streamer
        assert engine is not None
        pipe()
        ask_for_all(engine)
        pipe(20)
        assert not engine.homes.exchanges.num_wanted
        for each in (model, resident.model):
            with torch.no_grad():
                each.blocks[2].scale.add_(1)
                each.blocks[4].up.weight.data[0] = 0.5
        assert_equal(pipe(), resident())
        state = model.state_dict()
        for name, value in resident.model.state_dict().items():
            assert torch.equal(state[name].to("cpu"), value)
        state["blocks.1.scale"].mul_(2)
        resident.model.blocks[1].scale.data.mul_(2)
        assert_equal(pipe(), resident())
    assert_restored(model, before, changed=["blocks.2.scale", "blocks.4.up.weight", "blocks.1.scale"])
    assert_equal(pipe(), resident())


@pytest.mark.parametrize("looks", [lambda model: model.state_dict(), lambda model: pickle.loads(pickle.dumps(model))])
def test_what_somebody_has_of_a_home_keeps_it(looks: Callable[[nn.Module], Any]) -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streaming:
        engine = streaming._streamer
        assert engine is not None
        pipe()
        held = looks(model)
        ask_for_all(engine)
        assert_equal(pipe(20), resident(20))
        is_entries = isinstance(held, dict)
        assert (engine.homes.exchanges.num_wanted == len(engine._units)) == is_entries
        del held
        gc.collect()
        assert_equal(pipe(20), resident(20))
        assert not engine.homes.exchanges.num_wanted


@pytest.mark.parametrize("made", ["raises", "refuses"])
def test_a_home_that_cannot_be_made_leaves_the_unit_as_it_is(made: str) -> None:
    def make(store: HostStore, unit: StreamedUnit) -> None:
        if made == "raises":
            raise MemoryError("no host memory left")

    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    before = describe(model)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streaming:
        engine = streaming._streamer
        assert engine is not None
        pipe()
        old = homes(engine)
        ask_for_all(engine, make)
        assert_equal(pipe(20), resident(20))
        assert homes(engine) == old
        assert not engine.homes.exchanges.num_wanted
    assert_restored(model, before)
    assert not device.registered


def test_page_locks_that_are_refused_keep_the_home() -> None:
    model = toy()
    resident, pipe = Pipe(twin(model)), Pipe(model)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streaming:
        engine = streaming._streamer
        assert engine is not None
        pipe()
        old = homes(engine)
        device.register = lambda address, num_bytes: False  # type: ignore[method-assign]
        ask_for_all(engine)
        assert_equal(pipe(20), resident(20))
        assert homes(engine) == old


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), KeyboardInterrupt()])
@pytest.mark.parametrize("budget", ["min", 60_000])
def test_a_fault_at_any_operation_of_exchanges(budget: int | str, error: BaseException) -> None:
    """The call may fail; what is left is right, and all is given back."""
    operation = 0
    while True:
        model = toy(num_blocks=3)
        resident, pipe = Pipe(twin(model)), Pipe(model)
        before = describe(model)
        device = adversary()
        is_over = False
        with (
            contextlib.suppress(type(error)),
            layerstream.offload(pipe, vram_budget=budget, device=device) as streaming,
        ):
            engine = streaming._streamer
            assert engine is not None
            assert_equal(pipe(2), resident(2))
            ask_for_all(engine)
            at_first = device.num_operations
            device.fail_at(operation, error)
            with contextlib.suppress(type(error)):
                assert_equal(pipe(6), resident(6))
            is_over = device.num_operations - at_first < operation
            device.fail_at(10**9, error)
            assert_equal(pipe(2), resident(2))
        assert_restored(model, before)
        assert not device.registered
        assert_equal(pipe(2), resident(2))
        if is_over:
            return
        operation += 3


def test_exchanges_outlive_neither_their_units_nor_the_streamer() -> None:
    model = toy()
    pipe, device = Pipe(model), adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streaming:
        engine = streaming._streamer
        assert engine is not None
        pipe()
        engine.homes.exchanges.ask(max(engine._units) + 1, elsewhere)
        ask_for_all(engine)
        pipe(1)
        with streaming.paused():
            pass
        pipe(1)
    assert not engine.homes.exchanges.num_wanted
    assert not device.registered
