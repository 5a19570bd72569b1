"""One call at a time: refused while another thread is really in a call, not after one was interrupted."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from layerstream import offload
from layerstream.engine.lane import Lane
from layerstream.errors import ConcurrentUseError
from tests.fakes import adversary, toy, toy_input

TIMEOUT_S = 30


class Leaf(nn.Module):
    """Runs what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.action: Callable[[], object] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.action()
        return x


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Leaf() for _ in range(3))
        self.action: Callable[[], object] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.action()
        for block in self.blocks:
            x = block(x)
        return x


class Watched:
    """A root whose hooks tell a `Lane`, as the streamer's do."""

    def __init__(self) -> None:
        self.calls = Lane()
        self.root = Root()
        self.seen: list[list[bool]] = []
        for module in (self.root, *self.root.blocks):
            is_root = module is self.root
            module.register_forward_pre_hook(functools.partial(self._enter, is_root=is_root))
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: object, *, is_root: bool) -> None:
        self.calls.is_outermost(module)
        self.calls.enter(module, is_root=is_root)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self.calls.leave(module)

    def __call__(self) -> None:
        self.root(torch.zeros(1))

    def running(self) -> list[nn.Module]:
        return [m for m in (self.root, *self.root.blocks) if self.calls.is_running(m)]


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def other_thread() -> Iterator[Callable[[Callable[[], Any]], Future[Any]]]:
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        yield pool.submit


def interrupt() -> None:
    raise KeyboardInterrupt


# ---- what is running


def test_modules_are_running_while_they_run(watched: Watched) -> None:
    seen: list[list[nn.Module]] = []
    for leaf in watched.root.blocks:
        leaf.action = lambda: seen.append(watched.running())
    assert watched.calls.is_idle
    watched()
    assert seen == [[watched.root, b] for b in watched.root.blocks]
    assert watched.calls.is_idle
    assert watched.running() == []


def test_leave_says_whether_it_was_running(watched: Watched) -> None:
    calls, (first, second, third) = watched.calls, watched.root.blocks
    said: list[bool] = []
    assert not calls.leave(first)
    second.action = lambda: said.extend(
        [calls.leave(first), calls.leave(third), calls.leave(second), calls.leave(second)]
    )
    watched()
    assert said == [False, False, True, False]
    assert calls.is_idle


def test_leaving_a_root_ends_what_ran_inside_it(watched: Watched) -> None:
    left: list[bool] = []
    watched.root.blocks[0].action = lambda: left.extend([watched.calls.leave(watched.root), watched.calls.is_idle])
    watched()
    assert left == [True, True]
    assert watched.calls.is_idle


def test_an_exception_leaves_nothing_behind(watched: Watched) -> None:
    def fail() -> None:
        raise ValueError("of the block")

    watched.root.blocks[1].action = fail
    with pytest.raises(ValueError, match="of the block"):
        watched()
    assert watched.calls.is_idle


def test_a_root_inside_a_root_and_a_block_inside_a_block(watched: Watched) -> None:
    """A ControlNet that a denoiser calls; a block that calls another."""
    inner = Watched()
    inner.calls = watched.calls
    seen: list[bool] = []

    def nested() -> None:
        inner()
        watched.root.blocks[2](torch.zeros(1))
        seen.extend([watched.calls.is_running(watched.root), watched.calls.is_running(watched.root.blocks[1])])

    watched.root.blocks[1].action = nested
    watched()
    assert seen == [True, True]
    assert watched.calls.is_idle


def test_a_module_that_calls_itself(watched: Watched) -> None:
    depth: list[int] = []

    def again() -> None:
        if len(depth) < 3:
            depth.append(len(depth))
            watched()
            assert watched.calls.is_running(watched.root), "the outer call still runs"

    watched.root.action = again
    watched()
    assert depth == [0, 1, 2]
    assert watched.calls.is_idle


# ---- threads


@pytest.mark.parametrize("where", ["root", "block"])
def test_another_thread_in_a_call_is_refused_by_name(watched: Watched, where: str) -> None:
    is_inside, may_go = threading.Barrier(2, timeout=TIMEOUT_S), threading.Barrier(2, timeout=TIMEOUT_S)

    def stop() -> None:
        is_inside.wait()
        may_go.wait()

    module = watched.root if where == "root" else watched.root.blocks[1]
    module.action = stop
    caller = threading.Thread(target=watched, name="caller")
    caller.start()
    try:
        is_inside.wait()
        module.action = lambda: None
        here = threading.current_thread().name
        message = (
            f"thread {here!r} uses a streamed pipeline while thread 'caller' is in the middle of a call. "
            "Both are part of one use, so neither waits for the other: let one thread of it call components."
        )
        for use in (watched, watched.calls.check_thread, lambda: watched.root.blocks[0](torch.zeros(1))):
            with pytest.raises(ConcurrentUseError) as error:
                use()
            assert str(error.value) == message
        assert watched.calls.is_running(watched.root), "the refused call has not disturbed the other"
        assert not watched.calls.leave(watched.root), "only the thread that entered leaves"
    finally:
        may_go.wait()
        caller.join(TIMEOUT_S)
    assert watched.calls.is_idle
    watched()


def test_threads_may_take_turns(watched: Watched, other_thread: Any) -> None:
    for _ in range(3):
        watched()
        other_thread(watched).result(TIMEOUT_S)
        assert watched.calls.is_idle


def test_of_many_threads_at_once_one_gets_in_at_a_time(watched: Watched) -> None:
    num_threads = 6
    start = threading.Barrier(num_threads, timeout=TIMEOUT_S)
    inside, most = [0], [0]
    lock = threading.Lock()  # the streamer's hooks hold one

    def count() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        inside[0] -= 1

    watched.root.blocks[1].action = count
    enter = watched.calls.enter

    def enter_locked(module: nn.Module, *, is_root: bool) -> None:
        with lock:
            enter(module, is_root=is_root)

    watched.calls.enter = enter_locked  # type: ignore[method-assign]

    def attempt() -> str:
        start.wait()
        try:
            watched()
        except ConcurrentUseError:
            return "refused"
        return "done"

    with ThreadPoolExecutor(num_threads) as pool:
        results = [f.result(TIMEOUT_S) for f in [pool.submit(attempt) for _ in range(num_threads)]]
    assert "done" in results
    assert most == [1]
    assert watched.calls.is_idle


# ---- left over from an interrupt, which skips even `always_call` hooks


@pytest.fixture(params=["block", "root"])
def interrupted(request: pytest.FixtureRequest, watched: Watched) -> Callable[[], None]:
    """Run a call into a KeyboardInterrupt, in the thread that calls this."""

    def run() -> None:
        module = watched.root.blocks[1] if request.param == "block" else watched.root
        module.action = interrupt
        with pytest.raises(KeyboardInterrupt):
            watched()
        module.action = lambda: None
        assert watched.calls.running, "torch calls hooks after an interrupt now: Lane can be simpler"

    return run


def test_next_call_of_the_same_thread_works(watched: Watched, interrupted: Callable[[], None]) -> None:
    interrupted()
    seen: list[list[nn.Module]] = []
    watched.root.blocks[0].action = lambda: seen.append(watched.running())
    watched()
    assert seen == [[watched.root, watched.root.blocks[0]]], "the left-overs are forgotten"
    assert watched.calls.is_idle


def test_several_interrupts_in_a_row(watched: Watched, interrupted: Callable[[], None]) -> None:
    for _ in range(3):
        interrupted()
    watched()
    assert watched.calls.is_idle


def test_next_call_of_another_thread_works(
    watched: Watched, interrupted: Callable[[], None], other_thread: Any
) -> None:
    interrupted()
    other_thread(watched).result(TIMEOUT_S)
    assert watched.calls.is_idle


def test_a_call_works_after_a_thread_was_interrupted_and_ended(
    watched: Watched, interrupted: Callable[[], None]
) -> None:
    thread = threading.Thread(target=interrupted)
    thread.start()
    thread.join(TIMEOUT_S)
    watched.calls.check_thread()
    watched()
    assert watched.calls.is_idle


def test_check_thread_forgets_an_interrupted_call_of_another_thread(
    watched: Watched, interrupted: Callable[[], None], other_thread: Any
) -> None:
    interrupted()
    other_thread(watched.calls.check_thread).result(TIMEOUT_S)
    assert watched.calls.is_idle


def test_a_block_called_alone_after_an_interrupt(watched: Watched, interrupted: Callable[[], None]) -> None:
    interrupted()
    seen: list[list[nn.Module]] = []
    block = watched.root.blocks[2]
    block.action = lambda: seen.append(watched.running())
    block(torch.zeros(1))
    assert seen == [[block]], "nothing but the block runs"
    assert watched.calls.is_idle


def test_an_interrupt_caught_inside_a_call_leaves_the_outer_call_running(watched: Watched) -> None:
    """A root catches the interrupt of a block (or of a nested call) and goes on."""
    first, second, _ = watched.root.blocks
    seen: list[list[nn.Module]] = []

    def catch() -> None:
        first.action = interrupt
        with pytest.raises(KeyboardInterrupt):
            first(torch.zeros(1))
        first.action = lambda: None
        second(torch.zeros(1))

    watched.root.action = catch
    second.action = lambda: seen.append(watched.running())
    watched()
    assert seen[0] == [watched.root, second], "the interrupted block is forgotten, the root is not"
    assert watched.calls.is_idle


def test_weights_read_after_an_interrupt_are_read_as_outside_a_call() -> None:
    """Outside a call weights have storages of their own, as a state dict is kept or saved; inside they lie in slots."""
    model = toy()

    def sizes() -> list[int]:
        return [v.untyped_storage().nbytes() for name, v in model.state_dict().items() if name.endswith("up.weight")]

    with offload(model, vram_budget="min", device=adversary()), torch.no_grad():
        model(toy_input())
        before = sizes()
        handle = model.embed.register_forward_hook(lambda *args: interrupt())
        with pytest.raises(KeyboardInterrupt):
            model(toy_input())
        handle.remove()
        assert sizes() == before
