"""Two passes over one set of units, in two threads that take turns: equal results, and nobody's block is taken away."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.engine.residency import Residency
from layerstream.engine.streamer import Streamer
from layerstream.errors import ConcurrentUseError
from tests.fakes import OneModel, Toy, adversary, assert_equal, assert_restored, describe, toy, toy_input, twin

TIMEOUT_S = 60


class Turns:
    """Two threads of which one runs at any time. They hand over where blocks end, and in the middle of some."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.restart()

    def restart(self) -> None:
        """For another two threads."""
        self._now, self._gone = 0, set[int]()
        self._numbers: dict[int, int] = {}

    def begin(self, number: int) -> None:
        """This thread is number 0, which runs first, or number 1."""
        self._numbers[threading.get_ident()] = number
        self._wait(number)

    def hand_over(self, *args: Any) -> None:
        number = self._numbers.get(threading.get_ident())
        if number is None or self._gone:
            return
        with self._changed:
            self._now = 1 - number
            self._changed.notify_all()
        self._wait(number)

    def end(self) -> None:
        number = self._numbers.pop(threading.get_ident())
        with self._changed:
            self._gone.add(number)
            self._changed.notify_all()

    def _wait(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._now == number or self._gone, TIMEOUT_S), "nobody hands over"


class Pipe(OneModel):
    """Calls its model twice a step, as guidance does: one by one, or side by side."""

    def __init__(self, model: nn.Module, device: SimulatedDevice) -> None:
        super().__init__(model)
        self.device = device
        self.engine: Streamer | None = None

    def __call__(self, turns: Turns | None = None, *, has_one_stream: bool = True) -> list[torch.Tensor]:
        inputs = [toy_input(2), toy_input(3)]
        if turns is None:
            with torch.no_grad():
                return [self.model(x) for x in inputs]
        assert self.engine is not None
        results: dict[int, Any] = {}
        stream = self.device.compute_stream()

        def second() -> None:
            streams = self.device.use_stream(stream, is_ordered=False) if has_one_stream else contextlib.nullcontext()
            with self.engine._lanes.beside(), streams:  # type: ignore[union-attr]
                self._run(turns, 1, inputs[1], results)

        thread = threading.Thread(target=contextvars.copy_context().run, args=(second,))
        thread.start()
        self._run(turns, 0, inputs[0], results)
        thread.join(TIMEOUT_S)
        for number in (0, 1):
            if isinstance(results[number], BaseException):
                raise results[number]
        return [results[0], results[1]]

    def _run(self, turns: Turns, number: int, x: torch.Tensor, results: dict[int, Any]) -> None:
        turns.begin(number)
        try:
            with self.device.checking(), torch.no_grad():
                results[number] = self.model(x)
        except BaseException as error:
            results[number] = error
        finally:
            turns.end()


@contextlib.contextmanager
def side_by_side(
    model: Toy, budget: int | str, hand_over_in: Callable[[nn.Module], list[nn.Module]], patch: pytest.MonkeyPatch
) -> Iterator[tuple[Pipe, Turns]]:
    """A streamed pipeline whose calls hand over after these modules; whoever takes a running block away is caught."""
    device, turns = adversary(), Turns()
    pipe = Pipe(model, device)
    evict = Residency.evict

    def watched(self: Residency, unit: Any) -> Any:
        running = [m for m in unit.called if self._lanes.is_running(m)]
        assert not running, f"{unit!r} is taken away while a lane holds it"
        return evict(self, unit)

    patch.setattr(Residency, "evict", watched)
    with layerstream.offload(pipe, vram_budget=budget, device=device) as streaming:
        pipe.engine = streaming._streamer
        handles = [m.register_forward_hook(turns.hand_over) for m in hand_over_in(model)]
        yield pipe, turns
        for handle in handles:
            handle.remove()


def at_block_ends(model: Any) -> list[nn.Module]:
    return list(model.blocks)


def inside_blocks(model: Any) -> list[nn.Module]:
    return [block.up for block in model.blocks]


@pytest.mark.parametrize("has_one_stream", [True, False])
@pytest.mark.parametrize("hand_over_in", [at_block_ends, inside_blocks])
@pytest.mark.parametrize("budget", ["min", 60_000, "auto"])
def test_two_lanes_over_one_set_of_units(
    budget: int | str, hand_over_in: Any, has_one_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy()
    expected = Pipe(twin(model), adversary())()
    before = describe(model)
    with side_by_side(model, budget, hand_over_in, monkeypatch) as (pipe, turns):
        assert_equal(pipe(), expected)
        for _ in range(3):
            turns.restart()
            assert_equal(pipe(turns, has_one_stream=has_one_stream), expected)
        assert_equal(pipe(), expected)
    assert_restored(model, before)


class Choosing(Toy):
    """Skips other blocks in each thread."""

    def __init__(self) -> None:
        super().__init__()
        del self.order
        self.orders = {threading.get_ident(): [0, 2, 3, 5]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for number in self.orders.get(threading.get_ident(), [1, 2, 4]):
            x = self.blocks[number](x)
        return self.head(x)


@pytest.mark.parametrize("budget", ["min", 60_000])
def test_lanes_may_skip_different_blocks(budget: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Choosing()
    resident = twin(model)
    with torch.no_grad():
        expected = [resident(toy_input(2))]
        resident.orders = {}  # type: ignore[assignment]
        expected.append(resident(toy_input(3)))
    with side_by_side(model, budget, at_block_ends, monkeypatch) as (pipe, turns):
        for _ in range(3):
            turns.restart()
            assert_equal(pipe(turns), expected)


def test_an_error_in_one_lane_leaves_the_other_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    expected = Pipe(twin(model), adversary())()
    before = describe(model)
    main = threading.get_ident()

    def fail(*args: Any) -> None:
        if threading.get_ident() != main:
            raise RuntimeError("of the second lane")

    with side_by_side(model, "min", at_block_ends, monkeypatch) as (pipe, turns):
        handle = model.blocks[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="of the second lane"):
            pipe(turns)
        handle.remove()
        for _ in range(2):
            turns.restart()
            assert_equal(pipe(turns), expected)
        assert_equal(pipe(), expected)
    assert_restored(model, before)


def test_a_second_thread_without_a_lane_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    found: list[BaseException] = []

    def call_in_another_thread(*args: Any) -> None:
        def second() -> None:
            try:
                model(toy_input())
            except ConcurrentUseError as error:
                found.append(error)

        thread = threading.Thread(target=contextvars.copy_context().run, args=(second,))
        thread.start()
        thread.join(TIMEOUT_S)

    with layerstream.offload(model, device=adversary()):
        handle = model.blocks[1].register_forward_hook(call_in_another_thread)
        model(toy_input())
        handle.remove()
    assert len(found) == 1
    assert "in the middle of a call" in str(found[0])
