"""Ctrl-C between any two lines of ours: the pipeline is as it was, and the next caller is let in."""

from __future__ import annotations

import contextlib
import gc
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch

import layerstream
from layerstream.comparing import state_differences
from layerstream.device import simulated
from layerstream.interrupts import twice_if_interrupted, undo_all
from layerstream.pipeline.owners import ACTIVE
from tests.fakes import OneModel, adversary, assert_equal, describe, run, toy, twin

_PACKAGE = layerstream.__path__[0]
_SIMULATED = simulated.__path__[0]
_SETTLED = 6  # passes without gradients, after which a plan stays as it is
# Python itself loses a lock when it is interrupted on its way out of a `with` block, or of what amounts to one. At a
# `try:` no interrupt comes, but that of a tracer, which nothing around it catches.
_PYTHONS_OWN = ("with ", "try:", "self._lock.release()")


class Pipe(OneModel):
    def __call__(self) -> list[torch.Tensor]:
        return run(self.model, passes=2)


@contextlib.contextmanager
def another_thread() -> Iterator[None]:
    """Beside a thread that may be in a call, entering takes more steps."""
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class Interrupting:
    """Raises KeyboardInterrupt before line number `at` of all lines of the package that run inside."""

    def __init__(self, at: int) -> None:
        self.at, self.num_lines, self.where = at, 0, ""

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(_PACKAGE) or name.startswith(_SIMULATED):  # a real device has no such lines
            return None
        if event == "line" and not linecache.getline(name, frame.f_lineno).lstrip().startswith(_PYTHONS_OWN):
            self.num_lines += 1
            if self.num_lines == self.at:
                self.where = f"{name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self) -> Interrupting:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *args: object) -> None:
        sys.settrace(self._before)


def use(pipe: Pipe, budget: int | str) -> None:
    with another_thread(), layerstream.offload(pipe, vram_budget=budget, device=adversary()):
        pipe()
        pipe.model.blocks[0].up.weight.data.add_(0)
        pipe()
        with torch.no_grad():  # the last of these are replayed
            run(pipe.model, passes=_SETTLED + 2)


def interrupted_use(at: int, budget: int | str) -> bool:
    """Interrupt a use at line number `at` of it, and look at what is left; False: it was over before. How many lines
    it has depends on how long other threads are waited for."""
    model = toy()
    expected = run(twin(model), passes=2)
    before = describe(model)
    pipe = Pipe(model)
    with Interrupting(at) as interrupting, contextlib.suppress(KeyboardInterrupt):  # finalisers swallow it
        use(pipe, budget)
    if not interrupting.where:
        return False
    gc.collect()
    assert layerstream.active(pipe) is None, interrupting.where
    assert model not in ACTIVE, interrupting.where
    differences = list(state_differences(before, describe(model)))
    assert not differences, (interrupting.where, differences)
    found: list[Any] = []

    def call_elsewhere() -> None:
        try:
            with layerstream.offload(pipe, vram_budget=budget, device=adversary(), call_timeout=5):
                found.append(pipe())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call_elsewhere)
    thread.start()
    thread.join(60)
    assert found, (interrupting.where, "it hangs")
    assert not isinstance(found[0], BaseException), (interrupting.where, found)
    assert_equal(found[0], expected)
    assert_equal(pipe(), expected)
    return True


def lines_of_a_use(budget: int | str) -> int:
    with Interrupting(at=-1) as counting:
        use(Pipe(toy()), budget)
    return counting.num_lines


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("budget", ["min", 60_000])
def test_an_interrupt_at_any_line(budget: int | str) -> None:
    num_lines = lines_of_a_use(budget)
    assert sum(interrupted_use(1 + (number * num_lines) // 16, budget) for number in range(16)) >= 14


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("budget", ["min", 60_000])
def test_interrupts_at_many_lines(budget: int | str) -> None:
    num_lines = lines_of_a_use(budget)
    assert sum(interrupted_use(at, budget) for at in range(7, num_lines, num_lines // 90)) >= 80


def test_what_is_interrupted_is_done_and_the_interrupt_raised() -> None:
    done: list[int] = []

    def step() -> None:
        done.append(len(done))
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        twice_if_interrupted(step)
    assert done == [0, 1]


def test_a_step_that_fails_is_not_run_again() -> None:
    done: list[int] = []

    def step() -> None:
        done.append(len(done))
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        twice_if_interrupted(step)
    assert done == [0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_takes_back_goes_on_where_it_was_kept_from(error: type[BaseException]) -> None:
    """A step that was interrupted is run again; one that fails is not, or all before it would never be."""
    done: list[str] = []

    def kept_from_it_once() -> None:
        done.append("second")
        if done.count("second") == 1:
            raise error

    undo: list[Callable[[], object]] = [lambda: done.append("first"), kept_from_it_once, lambda: done.append("third")]
    with pytest.raises(error):
        undo_all(undo)
    undo_all(undo)
    assert done == ["third", "second", *["second"] * (error is KeyboardInterrupt), "first"]
    assert not undo
