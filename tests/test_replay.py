"""Passes that are alike are replayed; whatever is out of the ordinary is worked out, with the same result."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device import simulated
from layerstream.device.simulated import SimulatedDevice
from layerstream.engine.replay import Replay
from layerstream.hooks import compiled
from tests.fakes import Toy, adversary, assert_equal, assert_restored, describe, run, toy, toy_input, twin

_SIMULATED = simulated.__path__[0]
_SETTLED = 8  # passes after which the plan stays as it is


class Counting:
    """How many blocks were entered by replay, and how many schedules were begun, since it was last asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._entered = self._begun = 0
        enter, begin = Replay.enter, Replay.begin

        def counted_enter(replay: Replay, step: Any) -> bool:
            is_done = enter(replay, step)
            self._entered += is_done
            return is_done

        def counted_begin(replay: Replay, *args: Any, **kwargs: Any) -> None:
            begin(replay, *args, **kwargs)
            self._begun += replay.bound is not None

        patch.setattr(Replay, "enter", counted_enter)
        patch.setattr(Replay, "begin", counted_begin)

    def entered(self) -> int:
        entered, self._entered = self._entered, 0
        return entered

    def begun(self) -> int:
        begun, self._begun = self._begun, 0
        return begun


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def no_grad_run(model: nn.Module, passes: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return run(model, passes)


@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
@pytest.mark.parametrize("budget", ["min", 40_000, 60_000, "auto"])
@pytest.mark.parametrize("order", [None, [0, 1, 2, 3, 4, 5, 2], [0, 0, 1, 5, 5, 3]])
def test_replayed_passes_are_equal(budget: Any, copies: Any, order: list[int] | None, counting: Counting) -> None:
    model = toy()
    model.order = order or model.order
    resident, device = twin(model), adversary(copies=copies)
    before = describe(model)
    with layerstream.offload(model, vram_budget=budget, device=device) as streaming, device.checking():
        assert_equal(no_grad_run(model, _SETTLED), no_grad_run(resident, _SETTLED))
        counting.entered()
        loads = streaming.stats().num_loads
        assert_equal(no_grad_run(model, 4), no_grad_run(resident, 4))
        if streaming.stats().num_loads > loads:
            assert counting.entered() >= 2 * len(model.order)
        assert streaming.stats().num_demand_loads <= 2 * len(model.order)
    assert_restored(model, before)


def test_counters_and_order_go_on(counting: Counting) -> None:
    """A replayed pass counts as one that is worked out: the same loads, none unforeseen, and the same history."""
    counts = []
    for is_replayed in (True, False):
        model, device = toy(), adversary()
        with (
            layerstream.offload(model, vram_budget="min", device=device) as streaming,
            pytest.MonkeyPatch.context() as patch,
        ):
            if not is_replayed:
                patch.setattr(Replay, "begin", lambda self, *args, **kwargs: None)
            no_grad_run(model, _SETTLED + 6)
            engine = streaming._streamer
            assert engine is not None
            stats = streaming.stats()
            history = list(engine._residency.order._history)
            counts.append((stats.num_loads, stats.loaded_bytes, stats.num_demand_loads, stats.num_stalls, history))
            assert bool(counting.entered()) == is_replayed
    assert counts[0] == counts[1]


# ---- out of the ordinary, in the middle of a pass


def other_stream(model: Toy, device: SimulatedDevice) -> Iterator[None]:
    stream = device.new_stream()
    with device.use_stream(stream):
        yield


def weights_read(model: Toy, device: SimulatedDevice) -> Iterator[None]:
    assert float(model.blocks[0].scale.sum()) == float(model.blocks[0].scale.sum())
    yield


def weights_written(model: Toy, device: SimulatedDevice) -> Iterator[None]:
    model.blocks[1].scale.add_(1)  # the block that has just run
    yield


def pointed_elsewhere(model: Toy, device: SimulatedDevice) -> Iterator[None]:
    model.blocks[1].scale.data = model.blocks[1].scale.data.clone() * 2
    yield


def view_kept(model: Toy, device: SimulatedDevice) -> Iterator[None]:
    kept = model.blocks[1].scale.detach()
    before = kept.clone()
    yield
    assert torch.equal(kept, before)


def grad_mode(model: Toy, device: SimulatedDevice) -> Iterator[None]:
    with torch.enable_grad():
        yield


def inference_mode(model: Toy, device: SimulatedDevice) -> Iterator[None]:
    with torch.inference_mode():
        yield


def another_block(model: Toy, device: SimulatedDevice) -> Iterator[None]:
    model.blocks[5](torch.ones(2, 16))
    yield


def state_read(model: Toy, device: SimulatedDevice) -> Iterator[None]:
    assert len(model.state_dict()) > 0
    yield


OUT_OF_THE_ORDINARY = [
    other_stream,
    weights_read,
    weights_written,
    pointed_elsewhere,
    view_kept,
    grad_mode,
    inference_mode,
    another_block,
    state_read,
]


class Interrupted(Toy):
    """Something happens after its second block, for the rest of the pass."""

    happens: Callable[[Any, Any], Iterator[None]] | None = None
    device: SimulatedDevice | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = self.blocks[1](self.blocks[0](x))
        happening = type(self).happens
        with contextlib.contextmanager(happening)(self, self.device) if happening else contextlib.nullcontext():
            for block in list(self.blocks)[2:]:
                x = block(x)
        return self.head(x)


@pytest.mark.parametrize("budget", ["min", 60_000])
@pytest.mark.parametrize("happens", OUT_OF_THE_ORDINARY)
def test_what_is_out_of_the_ordinary_is_worked_out(
    happens: Any, budget: Any, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Interrupted()
    resident = twin(model)
    before = describe(model)
    model.device = resident.device = device = adversary()
    with layerstream.offload(model, vram_budget=budget, device=device), device.checking():
        assert_equal(no_grad_run(model, _SETTLED), no_grad_run(resident, _SETTLED))
        for _ in range(2):
            counting.entered()
            monkeypatch.setattr(Interrupted, "happens", happens)
            assert_equal(no_grad_run(model, 1), no_grad_run(resident, 1))
            interrupted = counting.entered()
            monkeypatch.setattr(Interrupted, "happens", None)
            assert_equal(no_grad_run(model, 3), no_grad_run(resident, 3))
        if budget == "min":
            assert interrupted <= len(model.blocks)
    del model.device
    assert_restored(model, before, changed=["scale"])


def test_a_graph_made_in_the_middle_of_a_pass_is_refused(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that run under grad mode are worked out, which notes what autograd may have saved."""
    torch.manual_seed(0)
    model = Interrupted()
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        no_grad_run(model, _SETTLED)
        monkeypatch.setattr(Interrupted, "happens", grad_mode)
        with torch.no_grad():
            hidden: list[torch.Tensor] = []
            counting.entered()
            handle = model.blocks[3].register_forward_hook(lambda module, args, output: hidden.append(output))
            model(toy_input())
            handle.remove()
        assert counting.entered() == 2
        assert hidden[0].requires_grad
        with pytest.raises(RuntimeError, match="streamed|modified by an inplace operation"):
            hidden[0].sum().backward()


def test_a_replay_goes_on_after_each_of_them(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Interrupted()
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        no_grad_run(model, _SETTLED)
        monkeypatch.setattr(Interrupted, "happens", another_block)
        no_grad_run(model, 1)
        monkeypatch.setattr(Interrupted, "happens", None)
        no_grad_run(model, 12)  # in which what happened once is expected again, and does not come
        counting.entered()
        no_grad_run(model, 2)
        assert counting.entered() == 2 * len(model.blocks)


def test_an_error_in_a_block_and_an_interrupt(counting: Counting) -> None:
    model = toy()
    resident, device = twin(model), adversary()
    before = describe(model)
    for error in (RuntimeError("of the block"), KeyboardInterrupt()):
        with layerstream.offload(model, vram_budget="min", device=device), device.checking():
            assert_equal(no_grad_run(model, _SETTLED), no_grad_run(resident, _SETTLED))

            def fail(*args: Any, error: BaseException = error) -> None:
                raise error

            handle = model.blocks[3].up.register_forward_pre_hook(fail)
            counting.entered()
            with pytest.raises(type(error)):
                no_grad_run(model, 1)
            assert counting.entered()
            handle.remove()
            assert_equal(no_grad_run(model, 5), no_grad_run(resident, 5))
            counting.entered()
            assert_equal(no_grad_run(model, 1), no_grad_run(resident, 1))
            assert counting.entered() == len(model.blocks)
        assert_restored(model, before)


def test_an_interrupt_between_two_blocks_ends_the_replay(counting: Counting) -> None:
    """Hooks are skipped then, and nobody tells of the end. A block that is called by itself next is its own call."""

    class Stopped(Toy):
        stops = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for number, block in enumerate(self.blocks):
                x = block(x)
                if self.stops and number == 2:
                    raise KeyboardInterrupt
            return self.head(x)

    torch.manual_seed(0)
    model = Stopped()
    resident = twin(model)
    with layerstream.offload(model, vram_budget="min", device=adversary()), torch.no_grad():
        entries = [each.state_dict()["blocks.3.scale"] for each in (model, resident)]
        no_grad_run(model, _SETTLED + 4)
        assert counting.entered()
        model.stops = True
        with pytest.raises(KeyboardInterrupt):
            model(toy_input())
        assert counting.entered() == 3
        model.stops = False
        for entry in entries:
            entry.mul_(3)
        x = torch.ones(2, 16)
        for _ in range(2):
            assert torch.equal(model.blocks[3](x), resident.blocks[3](x))
        assert not counting.entered()
        assert_equal(no_grad_run(model, 8), no_grad_run(resident, 8))


def test_edits_between_passes_are_seen(counting: Counting) -> None:
    model = toy()
    resident = twin(model)
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        assert_equal(no_grad_run(model, _SETTLED), no_grad_run(resident, _SETTLED))
        for number in range(len(model.blocks)):
            for each in (model, resident):
                each.blocks[number].scale.data.mul_(2)
            assert_equal(no_grad_run(model, 3), no_grad_run(resident, 3))
        other = nn.Linear(16, 32)
        for each in (model, resident):
            with torch.no_grad():
                each.blocks[3].up.weight.set_(other.weight.clone())
        assert_equal(no_grad_run(model, 3), no_grad_run(resident, 3))


def test_a_pass_in_another_thread(counting: Counting) -> None:
    model = toy()
    resident = twin(model)
    found: list[list[torch.Tensor]] = []
    with layerstream.offload(model, vram_budget="min", device=adversary()):
        no_grad_run(model, _SETTLED)
        no_grad_run(resident, _SETTLED)
        thread = threading.Thread(target=lambda: found.append(no_grad_run(model, 3)))
        thread.start()
        thread.join()
        assert_equal(found[0], no_grad_run(resident, 3))
        assert_equal(no_grad_run(model, 3), no_grad_run(resident, 3))


class Decoder(Toy):
    """Entered by a method, as autoencoders are."""

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


def test_a_component_that_is_entered_by_a_method_from_several_threads(counting: Counting) -> None:
    torch.manual_seed(0)
    model = Decoder()
    resident = twin(model)
    found: list[torch.Tensor] = []

    def calls(passes: int) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.extend(model.decode(toy_input()) for _ in range(passes))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = resident.decode(toy_input())
    with layerstream.offload({"vae": model}, vram_budget="min", device=adversary()) as streaming:
        calls(_SETTLED + 2)
        for _ in range(3):
            counting.entered()
            thread = threading.Thread(target=calls, args=(4,))
            thread.start()
            thread.join()
            assert counting.entered()
            calls(2)
            engine = streaming._streamer
            assert engine is not None
            assert not engine._lanes.main.running
    assert_equal(found, [expected] * len(found))


def test_the_last_pass_of_a_loop_is_its_own_schedule(counting: Counting) -> None:
    """What follows a loop is loaded at its end, and the loop's first blocks in its middle."""

    class Pipe:
        def __init__(self) -> None:
            self.encoder, self.denoiser = toy(1, num_blocks=4), toy(2, num_blocks=6)

        @property
        def components(self) -> dict[str, nn.Module]:
            return {"encoder": self.encoder, "denoiser": self.denoiser}

        def __call__(self) -> torch.Tensor:
            with torch.no_grad():
                x = self.encoder(toy_input())
                for _ in range(5):
                    x = self.denoiser(x)
            return x

    loads = []
    for is_replayed in (True, False):
        pipe = Pipe()
        expected = pipe()
        with (
            layerstream.offload(pipe, vram_budget="min", device=adversary()) as streaming,
            pytest.MonkeyPatch.context() as patch,
        ):
            if not is_replayed:
                patch.setattr(Replay, "begin", lambda self, *args, **kwargs: None)
            for _ in range(8):
                assert torch.equal(pipe(), expected)
                stats = streaming.stats()
                loads.append((stats.num_loads, stats.num_demand_loads))
            assert bool(counting.entered()) == is_replayed
    assert loads[:8] == loads[8:]


# ---- what it is for


class Plain(nn.Module):
    """A block of 16 tensors whose forward does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Net(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Plain() for _ in range(num_blocks)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def function_calls(call: Callable[[], object]) -> Counter[str]:
    """Calls of Python and C functions, those of torch's hooks included; what the device does counts as one call each,
    since a simulated one does other things than a GPU."""
    calls: Counter[str] = Counter()
    depth = 0

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal depth
        is_device = frame.f_code.co_filename.startswith(_SIMULATED)
        if event == "call":
            depth += depth > 0 or is_device
            if depth <= 1:
                calls[frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name] += 1
        elif event == "return":
            depth -= depth > 0
        elif event == "c_call" and not depth:
            calls[getattr(arg, "__qualname__", str(arg))] += 1

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(("budget", "most"), [("min", 90), (2**24, 30)])
def test_function_calls_of_a_block(budget: int | str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """251 for a block that streams before there was replay, and 38 for one that stays."""
    monkeypatch.setattr(compiled, "is_in_use", lambda: False)  # as in a process of its own: blocks that stay are left
    counts = []
    for num_blocks in (12, 24):
        net, x = Net(num_blocks), torch.ones(1)
        with layerstream.offload(net, vram_budget=budget, device=SimulatedDevice()), torch.no_grad():
            for _ in range(_SETTLED + 4):
                net(x)
            counts.append(function_calls(lambda net=net, x=x: net(x)))  # type: ignore[misc]
    each = {name: (counts[1][name] - counts[0][name]) / 12 for name in counts[1]}
    told = {name: round(count, 2) for name, count in sorted(each.items(), key=lambda item: -item[1]) if count}
    assert sum(each.values()) <= most, told
    assert sum(counts[1].values()) / 24 <= most + 10, "with what a pass costs once"
