"""Times of blocks are read when the device has passed them, however far ahead of it the host is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.planning.phases import CallKind, Key
from layerstream.transfer.timing import PassTimer
from tests.fakes import assert_equal, run, toy, toy_input, twin


class Behind(SimulatedDevice):
    """The host is ahead: marks are numbers in the order they were made, and the device has passed those below one."""

    def __init__(self, passed: float = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.passed = passed
        self.num_marks = self.num_looks = 0

    def mark(self, stream: Any) -> float:
        self.num_marks += 1
        return float(self.num_marks)

    def elapsed_ms(self, start: Any, end: Any) -> float | None:
        self.num_looks += 1
        return float(end - start) if end <= self.passed else None


def reserve() -> CallKind:
    return CallKind(Key("net", "", ()))


def timed_pass(timer: PassTimer, owner: CallKind, *blocks: tuple[int, ...]) -> None:
    timer.begin(owner)
    for units in blocks:
        timer.enter_block(units)
        timer.leave_block(units)
    timer.end()


def test_passes_are_taken_once_in_order_as_the_device_gets_through() -> None:
    device = Behind()
    timer, first, second = PassTimer(device), reserve(), reserve()
    timed_pass(timer, first, (0,), (1, 2))
    timed_pass(timer, second, (0,))
    for passed in (0, 3):
        device.passed = passed
        assert not timer.is_ready
        assert list(timer.take()) == []
    device.passed = 5
    assert timer.is_ready
    assert list(timer.take()) == [(first, {(0,): 1.0, (1, 2): 1.0})]
    assert not timer.is_ready, "the second is on its way"
    device.passed = 6
    assert list(timer.take()) == [(second, {(0,): 1.0})]
    assert list(timer.take()) == []


def test_nothing_is_marked_between_timed_passes() -> None:
    device = Behind(passed=100)
    timer = PassTimer(device)
    timed_pass(timer, reserve(), (0,))
    marked = device.num_marks
    timer.enter_block((0,))
    timer.leave_block((0,))
    assert device.num_marks == marked
    timer.begin(reserve())
    timer.leave_block((7,))  # it was entered before the pass began
    assert device.num_marks == marked


def test_of_a_block_that_runs_twice_the_longest_counts() -> None:
    device = Behind(passed=100)
    timer, owner = PassTimer(device), reserve()
    timer.begin(owner)
    for inner in ((), ((1,),)):
        timer.enter_block((0,))
        for units in inner:
            timer.enter_block(units)
            timer.leave_block(units)
        timer.leave_block((0,))
    timer.end()
    assert list(timer.take()) == [(owner, {(0,): 3.0, (1,): 1.0})]


def test_what_is_dropped_is_told_once() -> None:
    device = Behind()
    timer, first, second = PassTimer(device), reserve(), reserve()
    timed_pass(timer, first, (0,))
    timer.begin(second)
    assert timer.drop() == [first, second]
    device.passed = 100
    assert (timer.drop(), list(timer.take())) == ([], [])


def test_a_host_that_is_ahead_times_as_many_passes_as_are_needed() -> None:
    """It timed every pass until the device caught up, looked at all their marks each time, and never learned."""
    model = toy()
    expected = [output for count in (15, 5, 10) for output in run(twin(model), passes=count)]
    device = Behind(is_poisoned=True, copies="late")
    with layerstream.offload(model, vram_budget="min", device=device) as streamer, device.checking():
        outputs = run(model, passes=15)
        assert device.num_marks == 3 * 2 * len(model.order)
        assert streamer.plan.costs is None
        before = device.num_looks
        outputs += run(model, passes=5)
        assert device.num_looks == before + 5, "one look a pass at what the device has passed"
        device.passed = torch.inf
        outputs += run(model, passes=10)
        assert streamer.plan.phase_of("Toy").prediction is not None
        assert device.num_marks == 3 * 2 * len(model.order)
    assert_equal(outputs, expected)


def test_times_that_a_pause_loses_are_measured_again() -> None:
    model = toy()
    device = Behind()
    with torch.no_grad(), layerstream.offload(model, vram_budget="min", device=device) as streamer:
        for _ in range(8):
            model(toy_input())
        with streamer.paused():
            pass
        device.passed = torch.inf
        for _ in range(8):
            model(toy_input())
        assert streamer.plan.phase_of("Toy").prediction is not None


def test_reading_weights_is_no_pass() -> None:
    """It would count as one in which no block took any time."""
    model, other = toy(), nn.Linear(4, 4)
    device = Behind(passed=torch.inf)
    with torch.no_grad(), layerstream.offload({"a": model, "b": other}, vram_budget="min", device=device) as streamer:
        for num_reads in (0, 0, 4, 0, 0, 0, 0):
            for block in model.blocks[:num_reads]:
                run(other, passes=5)  # no short turns: those would make one phase of both
                block.up.weight.sum()  # begins the phase of `a`
            model(toy_input())
        assert streamer.plan.phase_of("a").prediction is not None
