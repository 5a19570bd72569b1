"""The line of callers: one at a time, in order, and nobody's use is touched by another's."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from layerstream.engine import gate as gates
from layerstream.engine.gate import Gate
from layerstream.errors import ConcurrentUseError

TIMEOUT_S = 30
Submit = Callable[..., Future[Any]]


@pytest.fixture
def submit() -> Iterator[Submit]:
    """Runs functions in threads of their own."""
    with ThreadPoolExecutor(8, thread_name_prefix="other") as pool:
        yield pool.submit


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def in_line(gate: Gate) -> int:
    return len(gate._line)


def test_the_thread_that_began_a_use_comes_in_again(submit: Submit) -> None:
    gate = Gate()
    with gate.entered("a call"):
        assert gate.is_inside
        assert gate.is_inside_call
        assert gate.enter("a component", is_over=lambda: False) is None
        with gate.entered("a call inside"):
            assert gate.is_inside
        assert gate.is_inside, "the use is its that began it"
        assert not submit(lambda: gate.is_inside).result(TIMEOUT_S)
    assert not gate.is_inside
    assert gate.running is None


def test_others_wait_in_the_order_they_came(submit: Submit) -> None:
    gate, order = Gate(), []

    def use(number: int) -> None:
        with gate.entered(f"use {number}"):
            order.append(number)

    with gate.entered("the first"):
        futures = []
        for number in range(5):
            futures.append(submit(use, number))
            until(lambda: in_line(gate) == len(futures))
        assert order == []
    for future in futures:
        future.result(TIMEOUT_S)
    assert order == list(range(5))


def test_a_newcomer_does_not_overtake_those_in_line(submit: Submit) -> None:
    gate, order = Gate(), []
    with gate.entered("the first"):
        waiting = submit(lambda: _note(gate, order, "waiting"))
        until(lambda: in_line(gate) == 1)
    _note(gate, order, "newcomer")
    waiting.result(TIMEOUT_S)
    assert order == ["waiting", "newcomer"]


def _note(gate: Gate, order: list[str], name: str) -> None:
    with gate.entered(name):
        order.append(name)


@pytest.mark.parametrize("timeout_s", [0, 0.05])
def test_a_timeout_is_an_error_of_who_waits(submit: Submit, timeout_s: float) -> None:
    gate = Gate(timeout_s)
    with gate.entered("`Pipe.__call__`"):
        error = submit(lambda: gate.enter("`vae`")).exception(TIMEOUT_S)
        assert gate.is_inside, "the running use is not touched"
    assert isinstance(error, ConcurrentUseError)
    assert str(error).startswith("thread 'other_0' cannot begin `vae`")
    assert "thread 'MainThread' is in the middle of `Pipe.__call__`" in str(error)
    assert ("after waiting 0." in str(error)) is ("(call_timeout=0.05)" in str(error)) is (timeout_s > 0)
    assert "One call at a time: raise call_timeout" in str(error)
    assert in_line(gate) == 0
    with gate.entered("the next"):
        pass


def test_whoever_runs_in_a_copy_of_the_context_is_inside(submit: Submit) -> None:
    """As `asyncio.to_thread` runs what it is given."""
    gate = Gate(0)
    with gate.entered("a call"):
        context = contextvars.copy_context()
        assert submit(context.run, lambda: gate.enter("a component")).result(TIMEOUT_S) is None
        assert submit(lambda: gate.is_inside).result(TIMEOUT_S) is False
    assert not submit(context.run, lambda: gate.is_inside).result(TIMEOUT_S), "that use is over"
    with gate.entered("another call"):
        assert not submit(context.run, lambda: gate.is_inside).result(TIMEOUT_S), "and this is not the one"


def test_uses_that_ended_without_a_word_are_found_out(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_LOOK_S", 0.01)
    gate, is_over = Gate(), threading.Event()
    interrupted = threading.Thread(target=lambda: gate.enter("a forward that is interrupted", is_over=is_over.is_set))
    interrupted.start()
    interrupted.join()
    waiting = submit(lambda: gate.enter("the next"))
    until(lambda: in_line(gate) == 1)
    time.sleep(0.05)
    assert not waiting.done()
    is_over.set()
    assert waiting.result(TIMEOUT_S) is gate.running


def test_what_was_interrupted_does_not_let_its_thread_in(submit: Submit) -> None:
    """It would be inside by a use that anybody else may end."""
    gate, is_over = Gate(0), threading.Event()
    left_behind = gate.enter("a forward", is_over=is_over.is_set)
    is_over.set()
    with gate.entered("a call"):
        assert gate.running is not left_behind
        assert isinstance(submit(lambda: gate.enter("another")).exception(TIMEOUT_S), ConcurrentUseError)


def test_a_ticket_ends_only_its_own_use(submit: Submit) -> None:
    gate = Gate()
    first = gate.enter("first")
    gate.leave(first)
    second = gate.enter("second")
    gate.leave(first)
    gate.leave(None)
    assert gate.running is second
    gate.leave(second)
    assert gate.running is None


# ---- what waits until nobody is inside


def test_work_is_done_at_once_where_nobody_is_inside(submit: Submit) -> None:
    gate = Gate()
    done: list[str] = []

    def work() -> None:
        waiting.append(submit(_note, gate, done, "too early"))
        until(lambda: in_line(gate) == 1)
        done.append("work")

    waiting: list[Future[Any]] = []
    assert gate.when_free(work)
    waiting[0].result(TIMEOUT_S)
    assert done == ["work", "too early"]
    assert not gate.is_closing


def test_work_is_put_off_until_the_running_call_ends_and_comes_before_those_in_line(submit: Submit) -> None:
    gate, order = Gate(), []
    begun, go_on = threading.Event(), threading.Event()

    def first() -> None:
        with gate.entered("a call"):
            begun.set()
            go_on.wait(TIMEOUT_S)
            order.append("first")

    running = submit(first)
    assert begun.wait(TIMEOUT_S)
    second = submit(_note, gate, order, "second")
    until(lambda: in_line(gate) == 1)
    assert not gate.when_free(lambda: order.append("work"))
    assert gate.is_closing
    go_on.set()
    running.result(TIMEOUT_S)
    second.result(TIMEOUT_S)
    assert order == ["first", "work", "second"]


def test_work_waits_for_a_forward(submit: Submit) -> None:
    """What ends in a hook cannot do the work: hooks would come off under it."""
    gate, order = Gate(), []
    begun, go_on = threading.Event(), threading.Event()

    def forward() -> None:
        ticket = gate.enter("a forward", is_over=lambda: False)
        begun.set()
        go_on.wait(TIMEOUT_S)
        order.append("forward")
        gate.leave(ticket)

    running = submit(forward)
    assert begun.wait(TIMEOUT_S)
    work = submit(gate.when_free, lambda: order.append("work"))
    time.sleep(0.02)
    assert order == []
    go_on.set()
    running.result(TIMEOUT_S)
    assert work.result(TIMEOUT_S) is True
    assert order == ["forward", "work"]


def test_work_that_fails_leaves_the_gate_open() -> None:
    gate = Gate(0)

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gate.when_free(fail)
    with gate.entered("the next"):
        pass
    with pytest.raises(KeyboardInterrupt), gate.entered("a call"):
        gate._at_end = fail
    with gate.entered("the next"):
        pass


def test_reading_waits_for_a_call_and_not_for_a_pause(submit: Submit) -> None:
    gate = Gate(0)

    def read() -> bool:
        with gate.reading():
            return True

    with gate.entered("a pause", is_pause=True):
        assert submit(read).result(TIMEOUT_S)
    with gate.entered("a call"):
        assert isinstance(submit(read).exception(TIMEOUT_S), ConcurrentUseError)
        assert read()
    assert submit(read).result(TIMEOUT_S)


def test_who_waits_is_told_in_the_log(submit: Submit, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    with caplog.at_level(logging.INFO, "layerstream"), gate.entered("`Pipe.__call__`"):
        waiting = submit(lambda: _note(gate, [], "x"))
        until(lambda: bool(caplog.records))
    waiting.result(TIMEOUT_S)
    (record,) = caplog.records
    assert record.name == "layerstream.gate"
    assert record.getMessage() == "thread 'other_0' waits: thread 'MainThread' is in the middle of `Pipe.__call__`"
