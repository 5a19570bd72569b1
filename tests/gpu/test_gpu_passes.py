"""Passes that are replayed, homes that are exchanged, and lanes side by side, on a real GPU."""

from __future__ import annotations

import contextlib
import contextvars
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.engine.replay import Replay
from tests.fakes import OneModel, assert_equal, assert_restored, describe, elsewhere
from tests.gpu.test_gpu import memory_comes_back, resident, stack, wide_input
from tests.test_two_lanes import Turns

__all__ = ["memory_comes_back"]  # a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
DEVICE = "cuda"
PASSES = 12


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Blocks that were entered by replay."""
    entered: list[nn.Module] = []
    enter = Replay.enter

    def noted(replay: Replay, step: Any) -> bool:
        is_done = enter(replay, step)
        if is_done:
            entered.append(step.block)
        return is_done

    monkeypatch.setattr(Replay, "enter", noted)
    return entered


def num_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("share", [None, 0.4, 0.7])
def test_replayed_passes_are_equal(share: float | None, replayed: list[nn.Module]) -> None:
    model, x = stack(), wide_input()
    expected = resident(model, x)
    before = describe(model)
    budget: int | str = "min" if share is None else int(share * num_bytes(model)) + 2**28
    with layerstream.offload(model, vram_budget=budget, device=DEVICE), torch.no_grad():
        for _ in range(PASSES):
            assert_equal([model(x)], expected)
        if share is None:
            assert len(replayed) >= 3 * len(model.blocks)
            del replayed[:]
            with torch.inference_mode():
                assert_equal([model(x)], expected)
            assert replayed, "in inference mode as well"
    assert_restored(model, before)


def test_another_stream_in_the_middle_of_a_replay(replayed: list[nn.Module]) -> None:
    model, x = stack(), wide_input()
    expected = resident(model, x)
    other = torch.cuda.Stream()
    with layerstream.offload(model, vram_budget="min", device=DEVICE), torch.no_grad():
        for _ in range(PASSES):
            model(x)
        for _ in range(3):
            hidden = x
            for number, block in enumerate(model.blocks):
                if number % 3 == 1:
                    other.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(other):
                        hidden = block(hidden)
                    torch.cuda.current_stream().wait_stream(other)
                else:
                    hidden = block(hidden)
            assert_equal([model.head(hidden)], expected)
            assert_equal([model(x)], expected)


def test_homes_are_exchanged_while_it_streams() -> None:
    model, x = stack(), wide_input()
    expected = resident(model, x)
    before = describe(model)
    with layerstream.offload(model, vram_budget="min", device=DEVICE) as streaming, torch.no_grad():
        engine = streaming._streamer
        assert engine is not None
        for _ in range(3):
            assert_equal([model(x)], expected)
        old = [unit.home for unit in engine._units.values()]
        for index in list(engine._units):
            engine.homes.exchanges.ask(index, elsewhere)
        for _ in range(len(old) + 4):
            assert_equal([model(x)], expected)
        assert not engine.homes.exchanges.num_wanted
        assert not any(home.locks for home in old)
        for _ in range(4):
            assert_equal([model(x)], expected)
    assert_restored(model, before)


class Pipe(OneModel):
    def __call__(self, engine: Any, turns: Turns, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        results: dict[int, Any] = {}

        def run(number: int) -> None:
            beside = engine._lanes.beside() if number else contextlib.nullcontext()
            with beside, torch.no_grad():
                turns.begin(number)
                try:
                    results[number] = self.model(inputs[number])
                except BaseException as error:
                    results[number] = error
                finally:
                    turns.end()

        thread = threading.Thread(target=contextvars.copy_context().run, args=(run, 1))
        thread.start()
        run(0)
        thread.join(60)
        for result in results.values():
            if isinstance(result, BaseException):
                raise result
        return [results[0], results[1]]


def test_two_lanes_over_one_set_of_units() -> None:
    model = stack()
    inputs = [wide_input(), wide_input() * 2]
    expected = resident(model, *inputs)
    pipe, turns = Pipe(model), Turns()
    handles = [block.register_forward_hook(turns.hand_over) for block in model.blocks]
    with layerstream.offload(pipe, vram_budget="min", device=DEVICE) as streaming:
        for _ in range(4):
            turns.restart()
            assert_equal(pipe(streaming._streamer, turns, inputs), expected)
    for handle in handles:
        handle.remove()


def test_a_trace_has_the_times_of_the_device(tmp_path: Path) -> None:
    model, x = stack(), wide_input()
    path = tmp_path / "call.json"
    with layerstream.offload(model, vram_budget="min", device=DEVICE) as streaming, torch.no_grad():
        for _ in range(3):
            model(x)
        with streaming.trace(path):
            for _ in range(2):
                model(x)
        model(x)
    events = json.loads(path.read_text())["traceEvents"]
    rows = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    blocks = [event for event in spans if event["tid"] == rows["blocks"]]
    assert len(blocks) == 2 * len(model.blocks)
    assert all(event["dur"] > 0 for event in blocks)
    loads = [event for event in spans if event["tid"] == rows["loads"]]
    assert loads
    assert all(1 < event["args"]["GB/s"] < 200 for event in loads)


def test_the_report_says_what_copies() -> None:
    model, x = stack(num_blocks=4), wide_input()
    with layerstream.offload(model, vram_budget="min", device=DEVICE) as streaming, torch.no_grad():
        model(x)
        assert "over the bus by cudaMemcpyBatchAsync" in str(streaming.report())
