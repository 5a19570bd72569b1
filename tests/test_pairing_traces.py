"""Passes that leave traces where others do not look: in their arguments, tensors, classes, closures and globals.

From the first call on, or late. Each is paired until it shows, or never, and equal to the resident pipeline always.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import layerstream
from layerstream.engine.lockstep import Lockstep
from layerstream.engine.streamer import Streamer
from tests.fakes import adversary
from tests.test_pairing import Guided, Pipe, Stepping, guided

pytestmark = pytest.mark.usefixtures("pairs_at_once")


@pytest.fixture
def pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streamer, "_find_no_gain", lambda self, component, *, is_proven: "")


COUNTS = {"passes": 0}  # of a global that forwards use


def fresh() -> None:
    COUNTS["passes"] = 0
    CountsInItsClass.seen.clear()
    Counting.count = 0


def compared(
    make: Callable[[], nn.Module],
    kind: type[Pipe] = Pipe,
    calls: int = 3,
    change: Callable[[Pipe], None] = lambda p: None,
) -> layerstream.Stats:
    """Run it resident, and then, made anew, streamed in pairs; raise if they differ."""

    def pipe() -> Pipe:
        torch.manual_seed(0)
        fresh()
        made = kind(make().eval())
        change(made)
        torch.manual_seed(1)
        return made

    with torch.random.fork_rng():
        resident = pipe()
        expected = [resident(seed) for seed in range(calls)]
        streamed, device = pipe(), adversary()
        with (
            layerstream.offload(streamed, vram_budget="min", device=device, pairing="auto") as streaming,
            device.checking(),
        ):
            found = [streamed(seed) for seed in range(calls)]
            stats = streaming.stats()
    assert [torch.equal(a, b) for a, b in zip(expected, found, strict=True)] == [True] * calls
    return stats


# ---- in what they are given


class WritesItsTextLate(Guided):
    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        out = super().forward(latents, time, text)
        if time[0] < 0.4:
            text.mul_(1.01)
        return out


class WritesItsTextPastTheVersion(Guided):
    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        out = super().forward(latents, time, text)
        if time[0] < 0.4:
            text.data.mul_(1.01)
        return out


class DrawsIntoItsLatentsLate(Guided):
    """What is found out too late is mended by running again, from the latents as they came."""

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = super().forward(latents, time, text)[0]
        if time[0] < 0.2:
            latents.add_(0.1)
            x = x + 0.01 * torch.randn(x.shape) + latents
        return (x,)


class KeepsWhatItWritesLate(Guided):
    last: torch.Tensor | None = None

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = super().forward(latents, time, text)[0]
        if time[0] < 0.3:
            latents.mul_(1.1)
            before, self.last = self.last, x + latents
            x = x + latents if before is None else 0.5 * (x + before)
        return (x,)


# ---- in tensors that are no weights


class KeepsAMean(Guided):
    """A running mean in a plain tensor, from a time on."""

    since = 2.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean = torch.zeros(2, 4)

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = super().forward(latents, time, text)[0]
        if time[0] < self.since:
            x = x + 0.1 * self.mean
            self.write(x)
        return (x,)

    def write(self, x: torch.Tensor) -> None:
        self.mean.copy_(x)


class KeepsAMeanLate(KeepsAMean):
    since = 0.4


class KeepsAMeanPastTheVersion(KeepsAMean):
    def write(self, x: torch.Tensor) -> None:
        self.mean.data.copy_(x)


class ScalesByATensor(Guided):
    """Set before the blocks, and put back after them, from a time on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain = torch.ones(())

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        if time[0] < 0.5:
            self.gain.fill_(float(text[0, 0]))
        x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
        for number in self.order:
            x = self.blocks[number](x) * self.gain
        if time[0] < 0.5:
            self.gain.fill_(1.0)
        return (self.head(x),)


class CountsInABuffer(Guided):
    since = 2.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = super().forward(latents, time, text)[0]
        if time[0] < self.since:
            self.count()
        return (x * (1 + 0.01 * self.passes),)

    def count(self) -> None:
        self.passes.data.add_(1)


class CountsInABufferLate(CountsInABuffer):
    since = 0.4

    def count(self) -> None:
        self.passes.add_(1)


# ---- in classes and globals


class CountsInItsClass(Guided):
    seen: ClassVar[list[int]] = []

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        self.seen.append(1)
        return (super().forward(latents, time, text)[0] * (1 + 0.01 * len(self.seen)),)


class Counting:
    """An attention processor, say."""

    count = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        Counting.count += 1
        return x * (1 + 0.01 * Counting.count)


class HasOneThatCounts(Guided):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.processor = Counting()

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.processor(super().forward(latents, time, text)[0]),)


class CountsInAGlobal(Guided):
    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        counted()
        return (super().forward(latents, time, text)[0] * (1 + 0.01 * COUNTS["passes"]),)


def counted() -> None:
    COUNTS["passes"] += 1


class CountsInBytes(Guided):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.passes = bytearray(1)

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        self.passes[0] += 1
        return (super().forward(latents, time, text)[0] * (1 + 0.01 * self.passes[0]),)


@pytest.mark.parametrize(
    ("cls", "shows_late"),
    [
        (WritesItsTextLate, True),
        (WritesItsTextPastTheVersion, True),
        (DrawsIntoItsLatentsLate, True),
        (KeepsWhatItWritesLate, True),
        (KeepsAMean, False),
        (KeepsAMeanLate, True),
        (KeepsAMeanPastTheVersion, False),
        (ScalesByATensor, True),
        (CountsInABuffer, False),
        (CountsInABufferLate, True),
        (CountsInItsClass, False),
        (HasOneThatCounts, False),
        (CountsInAGlobal, False),
        (CountsInBytes, False),
    ],
)
def test_forwards(cls: type[Guided], shows_late: bool) -> None:
    stats = compared(cls)
    assert (stats.num_paired_passes > 0) is shows_late


# ---- in what a forward was replaced by


def _in_a_closure(model: Guided) -> None:
    original, passes = model.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return (original(*args, **kwargs)[0] * (1 + 0.01 * passes),)

    model.forward = forward  # type: ignore[method-assign]


def _in_a_global(model: Guided) -> None:
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        COUNTS["passes"] += 1
        return (original(*args, **kwargs)[0] * (1 + 0.01 * COUNTS["passes"]),)

    model.forward = forward  # type: ignore[method-assign]


def _in_an_object(model: Guided) -> None:
    class Around:
        def __init__(self) -> None:
            self.original, self.passes = model.forward, 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.passes += 1
            return (self.original(*args, **kwargs)[0] * (1 + 0.01 * self.passes),)

    model.forward = Around().forward  # type: ignore[method-assign]


def _of_a_block(model: Guided) -> None:
    block: Any = model.blocks[2]
    original, passes = block.forward, [0]

    def forward(x: torch.Tensor) -> Any:
        passes[0] += 1
        return original(x) * (1 + 0.001 * passes[0])

    block.forward = forward


@pytest.mark.parametrize("patch", [_in_a_closure, _in_a_global, _in_an_object, _of_a_block])
def test_forwards_that_were_patched_before(patch: Callable[[Guided], None]) -> None:
    def make() -> Guided:
        model = guided()
        patch(model)
        return model

    assert compared(make).num_paired_passes == 0


# ---- in the middle of a pass, once something else was set


class MiddleIsSwitched(Guided):
    """Where told so it sets itself in its middle, and takes that back at its end."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_switched, self.gain = False, 1.0

    def forward(
        self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor, switched: bool = False
    ) -> tuple[torch.Tensor]:
        x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
        for number in self.order:
            if number == 2 and (self.is_switched or switched):
                self.gain = float(text[0, 0])
            x = self.blocks[number](x) * self.gain
        self.gain = 1.0
        return (self.head(x),)


class SwitchesBetweenCalls(Pipe):
    def __call__(self, seed: int = 0, steps: int = 16, lengths: tuple[int, int] = (3, 5)) -> torch.Tensor:
        self.model.is_switched = seed > 0
        return super().__call__(seed, steps, lengths)


class SwitchesByAnArgument(Stepping):
    def step(self, number: int, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        a, b = self.passes(x, time, switched=self.seed > 0)
        return x - 0.1 * (b + 3 * (a - b)) / a.abs().max()


def test_what_was_proven_of_another_state_is_proven_anew() -> None:
    """Of the first call passes pair, of the others they do not."""
    assert compared(MiddleIsSwitched, SwitchesBetweenCalls, calls=5).num_paired_passes > 0


def test_what_was_proven_of_other_plain_arguments_is_proven_anew() -> None:
    assert compared(MiddleIsSwitched, SwitchesByAnArgument).num_paired_passes > 0


def test_what_is_set_after_a_step() -> None:
    def change(pipe: Pipe) -> None:
        pipe.after_step = lambda step: setattr(pipe.model, "is_switched", step >= 9)

    assert compared(MiddleIsSwitched, change=change).num_paired_passes > 0


class SecondFails(MiddleIsSwitched):
    """What the first has seen of the second is taken back before it fails; the pipeline goes on without."""

    def forward(
        self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor, switched: bool = False
    ) -> tuple[torch.Tensor]:
        try:
            x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
            for number in self.order:
                if number == 2 and time[0] < 0.4:
                    self.gain = float(text[0, 0])
                x = self.blocks[number](x) * self.gain
                if time[0] < 0.4 and number == 3 and len(text) == 5:
                    raise ValueError("not this one")
        finally:
            self.gain = 1.0
        return (self.head(x),)


class GoesOnWithout(Stepping):
    def step(self, number: int, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        (a,) = self.passes(x, time, 1)
        try:
            b = self.model(x, time, text=self.texts[1])[0]
        except ValueError:
            b = torch.zeros(2, 4)
        return x - 0.1 * (b + 3 * (a - b)) / a.abs().max()


def test_a_first_pass_beside_one_that_failed_runs_again() -> None:
    assert compared(SecondFails, GoesOnWithout).num_paired_passes > 0


# ---- memory that is refused


REFUSALS: Any = types.ModuleType("refusals")  # a module, into which nobody looks


class IsRefused(Guided):
    """Writes to its latents in a late step, and is refused memory there."""

    length = at = 0

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        if time[0] < 0.4:
            latents.add_(0.01)
        x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
        for number in self.order:
            x = self.blocks[number](x)
            if number == self.at and time[0] < 0.4 and len(text) == self.length:
                REFUSALS.once()
        return (self.head(x),)


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_memory_that_is_refused_after_arguments_were_written(
    at: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To either pass, at any block: what runs again begins with what was given."""
    refused: list[bool] = []
    locksteps: list[Lockstep] = []
    prepare = Lockstep.prepare

    def prepared(self: Lockstep, *args: Any) -> None:
        locksteps.append(self)
        prepare(self, *args)

    monkeypatch.setattr(Lockstep, "prepare", prepared)

    def refuse_once() -> None:
        if not refused and locksteps and locksteps[-1].is_on:
            refused.append(True)
            raise torch.OutOfMemoryError("refused once")

    monkeypatch.setattr(REFUSALS, "once", refuse_once, raising=False)
    monkeypatch.setattr(IsRefused, "length", length)
    monkeypatch.setattr(IsRefused, "at", at)
    stats = compared(IsRefused)
    assert refused
    assert stats.num_paired_passes > 0
