"""Two passes of a step of guidance run side by side: equal results, and whatever makes them unlike is noticed."""

from __future__ import annotations

import contextlib
import contextvars
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.engine.lockstep import Lockstep
from layerstream.engine.streamer import Streamer
from tests.fakes import OneModel, Toy, adversary, assert_equal, assert_restored, describe, twin


class Guided(Toy):
    """A denoiser of latents, with a time and a text of any length."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.read = nn.Linear(4, self.embed.out_features)

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
        for number in self.order:
            x = self.blocks[number](x)
        if "yes" in getattr(self, "skips", ()):
            x = -x
        return (self.head(x * getattr(getattr(self, "slotted", None), "factor", 1.0)),)


def guided(seed: int = 0, **kwargs: Any) -> Guided:
    torch.manual_seed(seed)
    return Guided(**kwargs).eval()


def text(seed: int, length: int = 3) -> torch.Tensor:
    return torch.randn(length, 4, generator=torch.Generator().manual_seed(seed))


class Pipe(OneModel):
    """Steps of guidance, in two passes each."""

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        super().__init__(model)
        self.device = device
        self.before_second: Callable[[int], None] = lambda step: None
        self.after_step: Callable[[int], None] = lambda step: None
        self.scale: Callable[[int], float] = lambda step: 3.0
        self.num_answers = 0

    @torch.no_grad()
    def __call__(self, seed: int = 0, steps: int = 16, lengths: tuple[int, int] = (3, 5)) -> torch.Tensor:
        self.texts = [text(10 + seed, lengths[0]).to(self.device), text(20 + seed, lengths[1]).to(self.device)]
        self.latents = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)).to(self.device)
        for step in range(steps):
            time = torch.tensor(1.0 - step / steps).to(self.device).expand(2)
            noise = self.model(self.latents, time, text=self.texts[0])[0]
            scale = self.scale(step)
            if scale > 1:
                self.before_second(step)
                other = self.model(self.latents, time, text=self.texts[1])[0]
                noise = other + scale * (noise - other)
            self.latents = self.latents - 0.1 * noise / noise.abs().max()
            self.after_step(step)
        return self.latents


@pytest.fixture(autouse=True)
def no_thread_stays() -> Any:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layerstream")]


@pytest.fixture
def pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as a second call can be foreseen, whatever it gains: in the fourth step."""
    monkeypatch.setattr(Streamer, "_find_no_gain", lambda self, component, *, is_proven: "")


def compared(model: Guided, calls: int) -> tuple[list[torch.Tensor], Pipe, SimulatedDevice]:
    """What so many calls give resident, and the pipeline and device to compare with that."""
    resident = Pipe(twin(model))
    return [resident(seed) for seed in range(calls)], Pipe(model), adversary()


def paired(
    model: Guided,
    change: Callable[[Pipe], None] = lambda pipe: None,
    *,
    budget: int | str = "min",
    calls: int = 3,
    restores: bool = True,
    on: str = "cpu",
) -> tuple[layerstream.Stats, dict[str, str]]:
    """Run a pipeline resident and streamed, and compare; returns what was counted, and why passes were not paired.

    Args:
        on: "cpu" is the adversarial device.
    """
    resident = Pipe(twin(model).to(on), on)
    change(resident)
    expected = [resident(seed) for seed in range(calls)]
    before = describe(model)
    pipe = Pipe(model, on)
    change(pipe)
    device = adversary() if on == "cpu" else None
    checking = contextlib.nullcontext() if device is None else device.checking()
    with layerstream.offload(pipe, vram_budget=budget, device=device or on, pairing="auto") as streamer, checking:
        results = [pipe(seed) for seed in range(calls)]
        stats, reasons = streamer.stats(), streamer._streamer.pairing.reasons()
    assert_equal(results, expected)
    if restores:
        assert_restored(model, before)
    return stats, reasons


@pytest.mark.parametrize("budget", ["min", 40_000])
def test_second_passes_are_answered(budget: int | str) -> None:
    stats, reasons = paired(guided(), budget=budget)
    assert reasons == {"model": ""}
    assert stats.num_paired_passes >= 12
    assert stats.num_discarded_passes == 0


@pytest.mark.usefixtures("pairs_at_once")
def test_a_denoiser_by_itself() -> None:
    """No pipeline's call is around its passes: each is a use of its own, and our note of that is no reason."""
    model, pipe = guided(), Pipe(twin(guided()))
    expected, given = [pipe(0, steps=8), pipe(1, steps=8)], Pipe(model)
    with layerstream.offload(model, vram_budget="min", device=adversary(), pairing="auto") as streamer:
        assert_equal([given(0, steps=8), given(1, steps=8)], expected)
        stats = streamer.stats()
    assert stats.num_paired_passes >= 8
    assert stats.num_discarded_passes <= 1


@pytest.mark.usefixtures("pairs_at_once")
def test_the_fourth_step_is_the_first_that_is_paired() -> None:
    """Two steps agree on where the second call's arguments come from; the third is run once more; then all are paired,
    and in later calls of the pipeline all but the first."""
    model, device = guided(), adversary()
    pipe = Pipe(model)
    with layerstream.offload(pipe, vram_budget="min", device=device, pairing="auto") as streamer:
        counts = []
        for seed in range(3):
            pipe(seed, steps=10)
            counts.append(streamer.stats().num_paired_passes)
    assert counts == [7, 7 + 9, 7 + 9 + 9]
    assert streamer.stats().num_discarded_passes == 0


def test_one_load_serves_both() -> None:
    """Loads of a call in which all steps but the first two are paired, beside one in which none is."""
    loads = {}
    for pairing in ("off", "auto"):
        pipe, device = Pipe(guided()), adversary()
        with layerstream.offload(pipe, vram_budget="min", device=device, pairing=pairing) as streamer:
            for seed in range(3):
                pipe(seed, steps=20)
            before = streamer.stats().num_loads
            pipe(3, steps=20)
            loads[pairing] = streamer.stats().num_loads - before
    assert loads["off"] == 20 * 2 * 6
    assert loads["auto"] <= 22 * 6


def edit_texts(pipe: Pipe) -> None:
    def edit(step: int) -> None:
        if step % 6 == 5:
            pipe.texts[1] = pipe.texts[1] + 1

    pipe.after_step = edit


def edit_texts_in_place(pipe: Pipe) -> None:
    pipe.after_step = lambda step: pipe.texts[step // 6 % 2].add_(0.5 if step % 6 == 5 else 0.0)


def edit_latents_between(pipe: Pipe) -> None:
    def edit(step: int) -> None:
        if step % 4 == 3:
            pipe.latents = pipe.latents + 0.25

    pipe.before_second = edit


def edit_latents_in_place_between(pipe: Pipe) -> None:
    def edit(step: int) -> None:
        if step >= 10:
            pipe.latents.data.mul_(1.5)

    pipe.before_second = edit


def no_guidance_for_some_steps(pipe: Pipe) -> None:
    pipe.scale = lambda step: 1.0 if step % 7 == 6 else 3.0


def guidance_of_a_fraction(pipe: Pipe) -> None:
    pipe.scale = lambda step: 3.0 if 2 <= step < 12 else 1.0


def edit_a_weight_between(pipe: Pipe) -> None:
    def edit(step: int) -> None:
        if step >= 10:
            with torch.no_grad():
                pipe.model.blocks[step % 6].scale.add_(0.125)

    pipe.before_second = edit


def edit_a_weight_by_its_data_between(pipe: Pipe) -> None:
    def edit(step: int) -> None:
        if step >= 10:
            weight = pipe.model.blocks[step % 6].scale
            weight.data = weight.data * 1.25

    pipe.before_second = edit


def set_an_attribute_between(pipe: Pipe) -> None:
    def edit(step: int) -> None:
        if step >= 10:
            pipe.model.order = [0, 2, 4] if step % 2 else [1, 3, 5]

    pipe.before_second = edit


def edit_an_attribute_in_place_between(pipe: Pipe) -> None:
    def edit(step: int) -> None:
        if step == 12:
            pipe.model.order.pop()

    pipe.before_second = edit


def hook_between(pipe: Pipe) -> None:
    """As skip-layer guidance does: a block gives back what it is given, in the second pass alone."""
    handles: list[Any] = []

    def hook(step: int) -> None:
        if step >= 10:
            handles.append(pipe.model.blocks[2].register_forward_hook(lambda m, args, out: args[0]))

    def unhook(step: int) -> None:
        while handles:
            handles.pop().remove()

    pipe.before_second, pipe.after_step = hook, unhook


def edit_anything_at_its_time(pipe: Pipe) -> None:
    edit_texts(pipe)
    no_guidance_for_some_steps(pipe)


def change_a_flag_between(pipe: Pipe) -> None:
    def edit(step: int) -> None:
        if step >= 10:
            torch.set_float32_matmul_precision("high" if step % 2 else "highest")

    def end(step: int) -> None:
        if step == 15:  # the next call begins with what this one began with
            torch.set_float32_matmul_precision("highest")

    pipe.before_second, pipe.after_step = edit, end


def exchange_a_key_between(pipe: Pipe) -> None:
    pipe.model.skips = {"no": True}

    def edit(step: int) -> None:
        if step == 10:
            pipe.model.skips.clear()
            pipe.model.skips["yes"] = True

    pipe.before_second = edit


def edit_a_slot_between(pipe: Pipe) -> None:
    pipe.model.slotted = Slotted()

    def edit(step: int) -> None:
        pipe.model.slotted.factor = 1.5 if step >= 10 else 1.0

    pipe.before_second = edit


class Slotted:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0


EDITS = [
    exchange_a_key_between, edit_a_slot_between,
    change_a_flag_between,
    edit_texts, edit_texts_in_place, edit_latents_between, edit_latents_in_place_between, no_guidance_for_some_steps,
    guidance_of_a_fraction, edit_a_weight_between, edit_a_weight_by_its_data_between, set_an_attribute_between,
    edit_an_attribute_in_place_between, hook_between, edit_anything_at_its_time,
]  # fmt: skip


def restores(change: Callable[[Pipe], None]) -> bool:
    """Whether the model is as it was when a pipeline is done that was changed so."""
    return not {"weight", "attribute", "key", "slot"}.intersection(change.__name__.split("_"))


@pytest.mark.usefixtures("pairs_at_once")
@pytest.mark.parametrize("change", EDITS)
def test_whatever_a_pipeline_does_between(change: Callable[[Pipe], None]) -> None:
    stats, _ = paired(
        guided(), change, restores=not {"weight", "attribute", "key", "slot"}.intersection(change.__name__.split("_"))
    )
    assert stats.num_paired_passes > 0, "else nothing was at stake"
    assert stats.num_discarded_passes > 0


# ---- models that keep something, or draw numbers


class SetsItself(Guided):
    """Keeps its text for its blocks, as a prologue does."""

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        self.now = text.mean(0)
        x = self.embed(latents) + time.view(-1, 1)
        for number in self.order:
            x = self.blocks[number](x) + self.read(self.now)
        self.now = None
        return (self.head(x),)


class SetsItselfLate(Guided):
    """The same, from the third block on: nothing shows at the first."""

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.embed(latents) + time.view(-1, 1)
        for number in self.order:
            if number == 2:
                self.now = text.mean(0)
            x = self.blocks[number](x) + (self.read(self.now) if number >= 2 else 0)
        self.now = None
        return (self.head(x),)


class Scales(Guided):
    """As peft's layers do under a scale other than 1: set before the blocks, and put back after them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scaling = {"default": 1.0}

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        self.scaling["default"] *= float(len(text))
        x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
        for number in self.order:
            x = x + self.scaling["default"] * self.blocks[number](x)
        self.scaling["default"] /= float(len(text))
        return (self.head(x),)


class Caches(Guided):
    """What one pass computed serves the next."""

    last: torch.Tensor | None = None

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = super().forward(latents, time, text)[0]
        before, self.last = self.last, x
        return (x if before is None else 0.5 * (x + before),)


class Appends(Guided):
    """An object that is no module keeps a map of each pass."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.processor = Processor()

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        self.processor.maps.append(text.mean())
        return (super().forward(latents, time, text)[0] + torch.stack(self.processor.maps).sum(),)


class Processor:
    def __init__(self) -> None:
        self.maps: list[torch.Tensor] = []


class Draws(Guided):
    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        return super().forward(latents + 0.01 * torch.randn(latents.shape), time, text)


class DrawsLate(Guided):
    """Nothing at first: when the time is near its end."""

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
        for number in self.order:
            x = self.blocks[number](x)
            if time[0] < 0.2:
                x = x + 0.01 * torch.randn(x.shape)
        return (self.head(x),)


class WritesItsInput(Guided):
    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        out = super().forward(latents, time, text)
        text.mul_(1.01)
        return out


class OfItsThread(Guided):
    """Keeps something for each thread, which nobody can see."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.of_thread = Hidden()

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        return (super().forward(latents, time, text)[0] * self.of_thread.factor(),)


class OwnGenerator(Guided):
    """Draws from a generator that nobody else has."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.draw = random.Random(0)

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
        for number in self.order:
            x = self.blocks[number](x) + (self.draw.random() if time[0] < 0.4 else 0)
        return (self.head(x),)


class SetsVariables(Guided):
    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        out = super().forward(latents, time, text)[0] + NUMBER.get()
        NUMBER.set(NUMBER.get() + 1)
        return (out,)


class ReturnsItsInput(Guided):
    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        super().forward(latents, time, text)
        return (latents[:],)


NUMBER: contextvars.ContextVar[int] = contextvars.ContextVar("number", default=0)


class SetsItselfAtLast(Guided):
    """A step cache that begins near the end."""

    last: torch.Tensor | None = None

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = super().forward(latents, time, text)[0]
        if time[0] < 0.3:
            before, self.last = self.last, x
            x = x if before is None else 0.5 * (x + before)
        return (x,)


@pytest.mark.usefixtures("pairs_at_once")
def test_state_that_is_set_late_is_put_back_before_the_first_runs_again() -> None:
    torch.manual_seed(0)
    stats, reasons = paired(SetsItselfAtLast().eval(), restores=False)
    assert stats.num_paired_passes > 0
    assert reasons["model"] == "`SetsItselfAtLast` changes"


class Hidden:
    __slots__ = ("local",)

    def __init__(self) -> None:
        self.local = threading.local()
        self.local.factor = 2.0

    def factor(self) -> float:
        return getattr(self.local, "factor", 1.0)

    def __deepcopy__(self, memo: Any) -> Hidden:
        return Hidden()


class Switches(Guided):
    """Modes of its own, as layers have that are never to run in 16 bits."""

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        with torch.autocast("cpu", enabled=True, dtype=torch.bfloat16):
            x = self.embed(latents)
        with torch.inference_mode():
            y = self.read(text.clone()).mean(0)
        x = x.float() + time.view(-1, 1) + y.clone()
        for number in self.order:
            with torch.no_grad():
                x = self.blocks[number](x)
        return (self.head(x),)


@pytest.mark.usefixtures("pairs_at_once")
@pytest.mark.parametrize(
    "cls",
    [
        SetsItself,
        SetsItselfLate,
        Scales,
        Caches,
        Appends,
        Draws,
        WritesItsInput,
        OfItsThread,
        OwnGenerator,
        SetsVariables,
        ReturnsItsInput,
    ],
)
def test_models_whose_passes_see_each_other_do_not_pair(cls: type[Guided]) -> None:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        stats, reasons = paired_with_seeds(cls().eval())
    assert stats.num_paired_passes == 0
    assert reasons["model"]


def paired_with_seeds(model: Guided) -> tuple[layerstream.Stats, dict[str, str]]:
    def seed(pipe: Pipe) -> None:
        torch.manual_seed(1)
        NUMBER.set(0)

    return paired(model, seed, restores=False)


@pytest.mark.usefixtures("pairs_at_once")
def test_numbers_that_are_drawn_late_are_drawn_as_if_nothing_had_run_beside() -> None:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        stats, reasons = paired_with_seeds(DrawsLate().eval())
    assert stats.num_paired_passes > 0
    assert reasons["model"] == "it draws random numbers"


@pytest.mark.usefixtures("pairs_at_once")
def test_modes_that_a_model_switches_itself() -> None:
    torch.manual_seed(0)
    stats, reasons = paired(Switches().eval())
    assert reasons == {"model": ""}
    assert stats.num_paired_passes >= 12


class Skips(Guided):
    """Runs other blocks for a long text."""

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
        for number in self.order if len(text) < 4 else [0, 1, 3, 5, 5]:
            x = self.blocks[number](x)
        return (self.head(x),)


@pytest.mark.usefixtures("pairs_at_once")
def test_passes_may_run_other_blocks() -> None:
    torch.manual_seed(0)
    stats, _ = paired(Skips().eval())
    assert stats.num_paired_passes > 0


@pytest.mark.usefixtures("pairs_at_once")
def test_dropout_draws() -> None:
    model = guided()
    model.blocks[3].append_dropout = nn.Dropout(0.5)  # type: ignore[assignment]

    class Dropping(Guided):
        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
            return (torch.nn.functional.dropout(super().forward(*args, **kwargs)[0], 0.5, training=True),)

    torch.manual_seed(0)
    with torch.random.fork_rng():
        stats, reasons = paired_with_seeds(Dropping().eval())
    assert stats.num_paired_passes == 0
    assert reasons["model"] == "it draws random numbers"


@pytest.mark.usefixtures("pairs_at_once")
@pytest.mark.parametrize("where", ["root", "block"])
def test_hooks_of_the_user_forbid_it(where: str) -> None:
    counted: list[int] = []

    def change(pipe: Pipe) -> None:
        module = pipe.model if where == "root" else pipe.model.blocks[1]
        module.register_forward_hook(lambda m, args, out: counted.append(1))

    stats, reasons = paired(guided(), change, restores=False)
    assert stats.num_paired_passes == 0
    assert reasons["model"].startswith("a hook on")
    assert len(counted) == 2 * 3 * 16 * 2, "as often as the resident pipeline's"


@pytest.mark.usefixtures("pairs_at_once")
def test_compiled_blocks_are_not_paired() -> None:
    """What is compiled may have buffers of its own for its results, which two passes would share."""

    def change(pipe: Pipe) -> None:
        for block in pipe.model.blocks:
            block.compile(backend="eager")

    stats, reasons = paired(guided(), change, restores=False)
    assert stats.num_paired_passes == 0
    assert reasons["model"] == "`blocks.0` is compiled"


# ---- other ways to call


class Stepping(Pipe):
    """Steps that are not two passes each."""

    num_steps = 16

    @torch.no_grad()
    def __call__(self, seed: int = 0, steps: int | None = None, lengths: tuple[int, int] = (3, 5)) -> torch.Tensor:
        steps = steps or self.num_steps
        self.seed, self.texts = seed, [text(10 + seed, 3), text(20 + seed, 5), text(30 + seed, 4)]
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            x = self.step(step, x, torch.tensor(1.0 - step / steps).expand(2))
        return x

    def step(self, number: int, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The latents after a step."""
        raise AssertionError

    def passes(self, x: torch.Tensor, time: torch.Tensor, count: int = 2, **kwargs: Any) -> list[torch.Tensor]:
        """Of each of the first texts."""
        return [self.model(x, time, text=each, **kwargs)[0] for each in self.texts[:count]]


class ThreePasses(Stepping):
    num_steps = 8

    def step(self, number: int, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        one, two, three = self.passes(x, time, 3)
        return x - 0.1 * (one + 2 * two - three) / one.abs().max()


class OnePass(Pipe):
    @torch.no_grad()
    def __call__(self, seed: int = 0, steps: int = 20, lengths: tuple[int, int] = (3, 5)) -> torch.Tensor:
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            x = x - 0.1 * self.model(x, torch.tensor(1.0 - step / steps).expand(2), text=text(seed))[0]
        return x


class SecondOrder(Stepping):
    """Two evaluations a step, each in two passes."""

    num_steps = 8

    def step(self, number: int, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            noise, other = self.passes(x, time)
            x = x - 0.05 * (other + 3 * (noise - other)) / noise.abs().max()
        return x


class ThreePassesAtFirst(Stepping):
    """The third is left out of steps from a time on, and comes back for the last ones."""

    def step(self, number: int, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        noises = self.passes(x, time, 2 if 6 < number < 12 else 3)
        return x - 0.1 * sum(noises) / noises[0].abs().max()


class CastsLate(Stepping):
    """Autocast is on from a step on, and for single steps before."""

    def step(self, number: int, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=number in (5, 7) or number > 10):
            noises = self.passes(x, time)
        return x - 0.1 * sum(noises) / noises[0].abs().max()


@pytest.mark.usefixtures("pairs_at_once")
@pytest.mark.parametrize(
    ("kind", "is_paired"),
    [
        (ThreePasses, True),
        (ThreePassesAtFirst, True),
        (OnePass, False),
        (SecondOrder, True),
        (CastsLate, True),
    ],
)
def test_other_numbers_of_passes(kind: type[Pipe], is_paired: bool) -> None:
    model = guided()
    expected = [kind(twin(model))(seed) for seed in range(4)]
    pipe, device = kind(model), adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device, pairing="auto") as streamer, device.checking():
        assert_equal([pipe(seed) for seed in range(4)], expected)
        stats = streamer.stats()
    assert (stats.num_paired_passes > 0) is is_paired
    assert stats.num_discarded_passes <= (0 if kind is ThreePasses else 8)


@pytest.mark.usefixtures("pairs_at_once")
def test_sizes_that_change_from_call_to_call() -> None:
    model = guided()
    sizes = [(3, 5), (3, 5), (7, 2), (7, 2), (3, 5), (1, 1)]
    resident = Pipe(twin(model))
    expected = [resident(seed, lengths=lengths) for seed, lengths in enumerate(sizes)]
    pipe, device = Pipe(model), adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device, pairing="auto") as streamer, device.checking():
        assert_equal([pipe(seed, lengths=lengths) for seed, lengths in enumerate(sizes)], expected)
        assert streamer.stats().num_paired_passes > 12


@pytest.mark.usefixtures("pairs_at_once")
def test_two_pipelines_that_share_their_denoiser_take_turns() -> None:
    model = guided()
    resident = [Pipe(twin(model)), Pipe(twin(model))]
    expected = [resident[n % 2](n) for n in range(6)]
    pipes, device = [Pipe(model), Pipe(model)], adversary()
    with layerstream.offload(pipes[0], vram_budget="min", device=device, pairing="auto") as streamer, device.checking():
        assert_equal([pipes[n % 2](n) for n in range(6)], expected)
        assert streamer.stats().num_paired_passes > 0


@pytest.mark.usefixtures("pairs_at_once")
@pytest.mark.parametrize("mode", ["autocast", "dispatch mode", "inference mode", "grad"])
def test_modes_of_the_user(mode: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def entered() -> Any:
        if mode == "autocast":
            return torch.autocast("cpu", dtype=torch.bfloat16)
        if mode == "dispatch mode":
            return FlopCounterMode(display=False)
        return torch.inference_mode() if mode == "inference mode" else torch.enable_grad()

    model = guided()
    resident, pipe, device = Pipe(twin(model)), Pipe(model), adversary()
    if mode == "grad":
        for each in (resident, pipe):
            each.model.requires_grad_(False)
    with entered():
        expected = [resident(seed) for seed in range(3)]
    with layerstream.offload(pipe, vram_budget="min", device=device, pairing="auto") as streamer, entered():
        assert_equal([pipe(seed) for seed in range(3)], expected)
        stats, reasons = streamer.stats(), streamer._streamer.pairing.reasons()
    assert (stats.num_paired_passes > 0) is (mode != "dispatch mode"), reasons


# ---- what goes wrong


class Failing(Guided):
    """Fails in a block of the pass with the long text, or of the other one, from a time on."""

    error: BaseException | None = None
    at, length = 0, 5

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.embed(latents) + time.view(-1, 1) + self.read(text).mean(0)
        for number in self.order:
            x = self.blocks[number](x)
            if self.error is not None and number == self.at and len(text) == self.length and time[0] < 0.4:
                raise self.error
        return (self.head(x),)


@pytest.mark.usefixtures("pairs_at_once")
@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("error", [ValueError("of the model"), KeyboardInterrupt()])
def test_errors_in_either_pass(error: BaseException, at: int, length: int) -> None:
    torch.manual_seed(0)
    model = Failing().eval()
    before = describe(model)
    expected, pipe, device = compared(model, 4)
    with layerstream.offload(pipe, vram_budget="min", device=device, pairing="auto") as streamer, device.checking():
        assert_equal([pipe(seed) for seed in range(2)], expected[:2])
        num_paired = streamer.stats().num_paired_passes
        assert num_paired > 0
        Failing.error, Failing.at, Failing.length = error, at, length
        try:
            with pytest.raises(type(error)):
                pipe(2)
        finally:
            Failing.error = None
        assert_equal([pipe(seed) for seed in (2, 3)], expected[2:])
    assert_restored(model, before)


@pytest.mark.usefixtures("pairs_at_once")
def test_memory_that_is_refused_to_two_passes() -> None:
    """The first runs again, alone; nobody hears of it."""

    class Refused(Failing):
        def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
            if (
                Failing.error is not None
                and len(text) == 5
                and threading.current_thread() is not threading.main_thread()
            ):
                raise torch.OutOfMemoryError("of the second pass")
            return super().forward(latents, time, text)

    torch.manual_seed(0)
    model = Refused().eval()
    expected, pipe, device = compared(model, 4)
    with layerstream.offload(pipe, vram_budget="min", device=device, pairing="auto") as streamer, device.checking():
        assert_equal([pipe(seed) for seed in range(2)], expected[:2])
        assert streamer.stats().num_paired_passes > 0
        Failing.error, Failing.length = RuntimeError(), -1
        try:
            assert_equal([pipe(seed) for seed in (2, 3)], expected[2:])
        finally:
            Failing.error = None
        assert "OutOfMemory" in streamer._streamer.pairing.reasons()["model"]


def test_wrong_values_are_refused() -> None:
    with pytest.raises(layerstream.ArgumentError, match='pairing must be "auto" or "off", not'):
        layerstream.offload(guided(), pairing="on", device="cpu")


def test_off_is_off() -> None:
    pipe, device = Pipe(guided()), SimulatedDevice()
    with layerstream.offload(pipe, vram_budget="min", device=device, pairing="off") as streamer:
        for seed in range(3):
            pipe(seed)
        assert streamer.stats().num_paired_passes == 0
        assert "forward" not in vars(pipe.model)


@pytest.mark.usefixtures("pairs_at_once")
def test_a_budget_without_room_for_two_passes_runs_them_one_by_one() -> None:
    """Under whatever budget does without pairing, pairing raises nothing."""

    class Wide(Guided):
        def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
            kept = torch.zeros(20_000, device=latents.device)
            return (super().forward(latents, time, text)[0] + kept[:1],)

    torch.manual_seed(0)
    model = Wide().eval()
    expected, pipe, device = compared(model, 3)
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        assert_equal([pipe(seed) for seed in range(3)], expected)
        least = streamer.stats().peak_reserved_bytes
    for more in (2**12, 2**14, 2**16):
        device = adversary()
        budget = least + more
        with layerstream.offload(pipe, vram_budget=budget, device=device, pairing="auto") as streamer:
            with device.checking():
                assert_equal([pipe(seed) for seed in range(3)], expected)
            assert streamer.stats().peak_reserved_bytes <= budget


class Locked(Guided):
    """Runs one forward at a time."""

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        with LOCK:
            return super().forward(latents, time, text)


LOCK = threading.Lock()


@pytest.mark.usefixtures("pairs_at_once")
def test_a_second_pass_that_waits_for_the_first_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lockstep.__init__, "__defaults__", (0.2,))
    torch.manual_seed(0)
    model = Locked().eval()
    expected, pipe, device = compared(model, 3)
    with layerstream.offload(pipe, vram_budget="min", device=device, pairing="auto") as streamer, device.checking():
        with pytest.warns(layerstream.LayerstreamWarning, match="did not come back in time"):
            assert_equal([pipe(seed) for seed in range(3)], expected)
        assert streamer.report().pairing == {"model": "the second pass did not come back"}
        with streamer.paused():
            pass
        assert_equal([pipe(seed) for seed in range(3)], expected)
