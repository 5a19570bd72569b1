"""Two threads of which exactly one runs, however they end."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from layerstream.engine.lockstep import Lockstep


@pytest.fixture
def lockstep() -> Iterator[Lockstep]:
    made = Lockstep(limit_s=5.0)
    yield made
    made.close()
    assert not any(thread.name == "layerstream second lane" for thread in threading.enumerate())


class Alone:
    """Fails where two run at once."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.order: list[str] = []

    def work(self, who: str, seconds: float = 0.0) -> None:
        self.running.append(who)
        time.sleep(seconds)
        assert self.running == [who]
        self.order.append(who)
        self.running.remove(who)


def test_ten_thousand_hand_overs(lockstep: Lockstep) -> None:
    alone, draw = Alone(), random.Random(0)
    for _ in range(100):
        counts = draw.randrange(100), draw.randrange(100)
        delays = iter([draw.random() * 1e-4 if draw.random() < 0.05 else 0.0 for _ in range(sum(counts) + 2)])

        def second(num: int = counts[1], delays: Iterator[float] = delays) -> int:
            for _ in range(num):
                alone.work("second", next(delays))
                lockstep.second_hands_over()
            return num

        lockstep.prepare(second, lambda: True)
        for _ in range(counts[0]):
            alone.work("first", next(delays))
            lockstep.first_hands_over()
        assert lockstep.finish() == (counts[1], None)
        assert not lockstep.is_on
    assert len(alone.order) > 8000


def test_they_take_turns_block_by_block(lockstep: Lockstep) -> None:
    alone = Alone()

    def second() -> str:
        for _ in range(3):
            alone.work("second")
            lockstep.second_hands_over()
        return "done"

    lockstep.prepare(second, lambda: True)
    for _ in range(2):
        alone.work("first")
        lockstep.first_hands_over()
    assert alone.order == ["first", "second"] * 2
    assert lockstep.finish() == ("done", None)
    assert alone.order == ["first", "second"] * 2 + ["second"]


def test_no_second_where_it_may_not_begin(lockstep: Lockstep) -> None:
    lockstep.prepare(lambda: pytest.fail("it runs"), lambda: False)
    lockstep.first_hands_over()
    assert lockstep.finish() == (None, None)
    assert not lockstep.has_begun


def test_an_error_of_the_second_is_told(lockstep: Lockstep) -> None:
    lockstep.prepare(lambda: 1 // 0, lambda: True)
    output, error = lockstep.finish()
    assert output is None
    assert isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_an_abandoned_one_runs_no_more(lockstep: Lockstep, num_blocks: int) -> None:
    ran: list[int] = []

    def second() -> None:
        try:
            for number in range(10):
                ran.append(number)
                lockstep.second_hands_over()
        except Exception:
            ran.append(-1)  # a model's own handler must not keep it alive

    lockstep.prepare(second, lambda: True)
    for _ in range(num_blocks):
        lockstep.first_hands_over()
    lockstep.abandon()
    assert ran == list(range(num_blocks))
    lockstep.prepare(lambda: "another", lambda: True)
    assert lockstep.finish() == ("another", None)


def test_one_that_does_not_come_back_is_lost() -> None:
    lockstep, gate = Lockstep(limit_s=0.05), threading.Event()
    lockstep.prepare(lambda: gate.wait(10), lambda: True)
    lockstep.first_hands_over()
    assert lockstep.is_lost
    assert lockstep.finish() == (None, None)
    gate.set()
    lockstep.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer signals")
@pytest.mark.parametrize("after_s", [0.001, 0.01, 0.03])
def test_an_interrupt_while_the_second_runs(lockstep: Lockstep, after_s: float) -> None:
    """The first has its error only once the second has come to its next hand-over, and ended there."""
    ran: list[str] = []

    def second() -> None:
        for _ in range(100):
            time.sleep(0.02)
            ran.append("block")
            lockstep.second_hands_over()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        lockstep.prepare(second, lambda: True)
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, after_s)
            while True:
                lockstep.first_hands_over()
        lockstep.abandon()
        seen = len(ran)
        time.sleep(0.1)
        assert len(ran) == seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    lockstep.prepare(lambda: "another", lambda: True)
    assert lockstep.finish() == ("another", None)
