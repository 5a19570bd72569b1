"""Several callers of one streamed pipeline: each call runs to its end, the others wait, closing waits for calls."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from torch import nn

import layerstream
from layerstream.pipeline.owners import ACTIVE, owners_of
from layerstream.standins import build_tiny, run_tiny
from layerstream.weights.absent import at_home, is_absent
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, toy_input, twin

TIMEOUT_S = 60
Submit = Callable[..., Future[Any]]


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return image(build_tiny("sd3"))


@pytest.fixture
def submit() -> Iterator[Submit]:
    with ThreadPoolExecutor(4, thread_name_prefix="other") as pool:
        yield pool.submit


def image(pipe: Any, **kwargs: Any) -> torch.Tensor:
    return run_tiny(pipe, "sd3", **kwargs)


class Between:
    """A callback between two passes that says that it is there and goes on when it is told to."""

    def __init__(self, at: int = 1) -> None:
        self.at, self.is_there, self.go_on = at, threading.Event(), threading.Event()

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == self.at:
            self.is_there.set()
            assert self.go_on.wait(TIMEOUT_S)
        return kwargs


class Stop:
    """A hook that waits in the middle of a forward, once."""

    def __init__(self, module: nn.Module) -> None:
        self.is_there, self.go_on = threading.Event(), threading.Event()
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: object) -> None:
        if not self.is_there.is_set():
            self.is_there.set()
            assert self.go_on.wait(TIMEOUT_S)

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *exc: object) -> None:
        self.go_on.set()
        self.handle.remove()


class Slow(torch.Tensor):
    """An operand that stops in the middle of an operation with it, when what else the operation reads is loaded."""

    is_there: threading.Event
    go_on: threading.Event

    @classmethod
    def of(cls, like: torch.Tensor) -> Slow:
        made = torch.zeros(like.shape, dtype=like.dtype).as_subclass(cls)
        made.is_there, made.go_on = threading.Event(), threading.Event()
        return made

    def added_to(self, find: Callable[[], torch.Tensor]) -> torch.Tensor:
        return torch.add(find(), self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.add:
            args[1].is_there.set()
            assert args[1].go_on.wait(TIMEOUT_S)
            with torch._C.DisableTorchFunctionSubclass():
                return torch.add(*args).detach().as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


def streamed(pipe: Any, call_timeout: float | None = None) -> layerstream.LayerStreamer:
    return layerstream.offload(pipe, vram_budget="min", device=adversary(), call_timeout=call_timeout)


def waiting(streamer: layerstream.LayerStreamer) -> int:
    assert streamer._streamer is not None
    return len(streamer._streamer.gate._line)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# ---- the second waits


SIBLINGS: dict[str, Callable[[Any], Any]] = {
    "the pipeline": lambda pipe: pipe,
    "a copy": copy.copy,
    "a pipeline of the same components": lambda pipe: type(pipe)(**pipe.components),
    "a pipeline of another class": diffusers.StableDiffusion3Img2ImgPipeline.from_pipe,
}


@pytest.mark.parametrize("when", ["made before", "made while streaming"])
@pytest.mark.parametrize("kind", SIBLINGS)
def test_a_second_call_waits_until_the_first_has_returned(
    submit: Submit, expected: torch.Tensor, kind: str, when: str
) -> None:
    pipe = build_tiny("sd3")
    make = SIBLINGS[kind]
    before = make(pipe)
    between, order = Between(), []

    def first() -> torch.Tensor:
        made = image(pipe, callback_on_step_end=between)
        order.append("first")
        return made

    def second(other: Any) -> torch.Tensor:
        if "another class" in kind:
            start = torch.zeros(1, 3, 32, 32)
            made = other("x", image=start, num_inference_steps=2, strength=1.0, output_type="pt").images
        else:
            made = image(other)
        order.append("second")
        return made

    with streamed(pipe) as streamer:
        other = before if when == "made before" else make(pipe)
        one = submit(first)
        assert between.is_there.wait(TIMEOUT_S)
        two = submit(second, other)
        until(lambda: waiting(streamer) == 1)
        assert order == []
        between.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)
        if "another class" not in kind:
            assert torch.equal(two.result(TIMEOUT_S), expected)
        two.result(TIMEOUT_S)
        assert order == ["first", "second"]
    assert torch.equal(image(pipe), expected)


@pytest.mark.parametrize("call_timeout", [0, 0.05])
def test_after_the_timeout_the_second_is_refused_and_the_first_goes_on(
    submit: Submit, expected: torch.Tensor, call_timeout: float
) -> None:
    pipe = build_tiny("sd3")
    between = Between()
    with streamed(pipe, call_timeout):
        one = submit(lambda: image(pipe, callback_on_step_end=between))
        assert between.is_there.wait(TIMEOUT_S)
        for use in (image, lambda pipe: pipe.vae.decode(torch.zeros(1, 16, 4, 4)), lambda p: p.vae.post_quant_conv):
            if use is not image and getattr(pipe.vae, "post_quant_conv", None) is None:
                continue
            error = submit(use, pipe).exception(TIMEOUT_S)
            assert isinstance(error, layerstream.ConcurrentUseError)
            assert "is in the middle of `StableDiffusion3Pipeline.__call__`" in str(error)
        between.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)
        assert torch.equal(image(pipe), expected)


def test_a_bare_component_and_a_weight_wait_for_the_call_between_whose_passes_they_come(
    submit: Submit, expected: torch.Tensor
) -> None:
    pipe = build_tiny("sd3")
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight.detach().clone()
    between = Between()
    with streamed(pipe) as streamer:
        one = submit(lambda: image(pipe, callback_on_step_end=between))
        assert between.is_there.wait(TIMEOUT_S)
        decoded = submit(lambda: pipe.vae.decode(torch.zeros(1, 16, 4, 4)).sample)
        read = submit(lambda: pipe.transformer.transformer_blocks[0].attn.to_q.weight.clone())
        until(lambda: waiting(streamer) == 2)
        assert not decoded.done()
        assert not read.done()
        between.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)
        assert decoded.result(TIMEOUT_S) is not None
        assert torch.equal(read.result(TIMEOUT_S), weight)


# ---- while one thread is in the middle of reading a weight, nobody takes the weight away


def first_weight(pipe: Any) -> torch.Tensor:
    weight: torch.Tensor = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    return weight


OTHERS: dict[str, Callable[[Any], Any]] = {
    "a call": image,
    "a bare component": lambda pipe: pipe.vae.decode(torch.zeros(1, 16, 4, 4)).sample,
    "another reader": lambda pipe: [weight.sum() for weight in pipe.vae.parameters()],
    "an edit": lambda pipe: pipe.vae.decoder.conv_in.bias.mul_(1),
    "a deep copy": lambda pipe: copy.deepcopy(pipe.text_encoder),
}


@pytest.mark.parametrize("other", OTHERS)
def test_others_wait_for_who_reads_a_weight(submit: Submit, expected: torch.Tensor, other: str) -> None:
    pipe = build_tiny("sd3")
    weight = first_weight(pipe).detach().clone()
    slow = Slow.of(weight)
    with streamed(pipe) as streamer, torch.no_grad():
        read = submit(slow.added_to, lambda: first_weight(pipe))
        assert slow.is_there.wait(TIMEOUT_S)
        theirs = submit(torch.no_grad()(OTHERS[other]), pipe)
        until(lambda: waiting(streamer) == 1)
        slow.go_on.set()
        assert torch.equal(read.result(TIMEOUT_S), weight)
        theirs.result(TIMEOUT_S)
        assert torch.equal(image(pipe), expected)


@pytest.mark.parametrize("other", ["the end of the pause", "another reader"])
def test_a_pause_waits_for_who_reads_a_weight_in_it(submit: Submit, expected: torch.Tensor, other: str) -> None:
    pipe = build_tiny("sd3")
    weight = first_weight(pipe).detach().clone()
    slow = Slow.of(weight)
    in_pause, end = threading.Event(), threading.Event()

    def pause(streamer: Any) -> None:
        with streamer._streamer.paused("vae"):
            in_pause.set()
            assert end.wait(TIMEOUT_S)

    with streamed(pipe) as streamer:
        pausing = submit(pause, streamer)
        assert in_pause.wait(TIMEOUT_S)
        read = submit(slow.added_to, lambda: first_weight(pipe))
        assert slow.is_there.wait(TIMEOUT_S)
        if other == "another reader":
            theirs = submit(lambda: [w.sum() for w in pipe.text_encoder_3.parameters()])
        else:
            end.set()
            theirs = pausing
        time.sleep(0.1)  # it would be through by now
        assert not theirs.done()
        slow.go_on.set()
        assert torch.equal(read.result(TIMEOUT_S), weight)
        theirs.result(TIMEOUT_S)
        end.set()
        pausing.result(TIMEOUT_S)
        assert torch.equal(image(pipe), expected)


def test_a_call_waits_for_who_reads_a_weight_in_a_copy_of_its_context(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    weight = first_weight(pipe).detach().clone()
    slow = Slow.of(weight)
    started: list[Future[Any]] = []

    def start_reading(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            read = contextvars.copy_context().run
            started.append(submit(read, slow.added_to, lambda: first_weight(pipe)))
            assert slow.is_there.wait(TIMEOUT_S)
        return kwargs

    with streamed(pipe):
        made = submit(image, pipe, callback_on_step_end=start_reading)
        assert slow.is_there.wait(TIMEOUT_S)
        time.sleep(0.1)  # it would be in the next pass by now
        slow.go_on.set()
        assert torch.equal(started[0].result(TIMEOUT_S), weight)
        assert torch.equal(made.result(TIMEOUT_S), expected)


def test_a_method_that_ends_waits_for_who_reads_a_weight(submit: Submit, expected: torch.Tensor) -> None:
    """Its end loads what comes next, in the place of what is read."""
    pipe = build_tiny("sd3")
    weight = first_weight(pipe).detach().clone()
    slow = Slow.of(weight)
    started: list[Future[Any]] = []
    done: list[bool] = []

    def start_reading(*args: object) -> None:
        if not started:
            started.append(submit(contextvars.copy_context().run, slow.added_to, lambda: first_weight(pipe)))
            assert slow.is_there.wait(TIMEOUT_S)

    with streamed(pipe), torch.no_grad():
        handle = pipe.vae.decoder.register_forward_hook(start_reading)

        def decode() -> None:
            pipe.vae.decode(torch.zeros(1, 16, 4, 4))
            done.append(slow.go_on.is_set())

        decoding = submit(decode)
        assert slow.is_there.wait(TIMEOUT_S)
        time.sleep(0.1)  # it would have returned by now
        slow.go_on.set()
        assert torch.equal(started[0].result(TIMEOUT_S), weight)
        decoding.result(TIMEOUT_S)
        assert done == [True]
        handle.remove()
        assert torch.equal(image(pipe), expected)


def test_reading_in_a_pause_leaves_what_was_dropped_for_later(submit: Submit, expected: torch.Tensor) -> None:
    """To let go of a component takes a turn, for which the pause's end would be waited for, and that for the reader."""
    pipe = build_tiny("sd3")
    modules = {k: m for k, m in pipe.components.items() if isinstance(m, nn.Module)}
    in_pause, end = threading.Event(), threading.Event()

    def pause(streamer: Any) -> None:
        with streamer._streamer.paused("vae"):
            in_pause.set()
            assert end.wait(TIMEOUT_S)

    with streamed(modules) as streamer:
        del modules["text_encoder_3"]
        pausing = submit(pause, streamer)
        assert in_pause.wait(TIMEOUT_S)
        read = submit(lambda: first_weight(pipe).clone())
        assert torch.isfinite(read.result(TIMEOUT_S)).all()
        end.set()
        pausing.result(TIMEOUT_S)
        assert torch.equal(image(pipe), expected)


def test_who_needs_two_streamers_waits_for_them_in_one_order(submit: Submit) -> None:
    """Calls and readers alike, or each would have what the other waits for."""
    first, second = toy(), toy(seed=1)
    with streamed(first) as one, streamed(second) as two:
        assert owners_of([second, first]) == owners_of([first, second]) == [one, two]
        classes = [type(model.head.weight)._classes for model in (first, second)]  # type: ignore[attr-defined]
        assert [c.number for c in classes] == [one.number, two.number]
        assert one.number < two.number


@pytest.mark.parametrize("where", ["between passes", "in a forward"])
def test_a_state_dict_waits_for_the_call(submit: Submit, expected: torch.Tensor, where: str) -> None:
    pipe = build_tiny("sd3")
    wanted = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    between = Between()
    with streamed(pipe) as streamer, Stop(pipe.transformer.transformer_blocks[1].attn) as stop:
        if where == "between passes":
            stop.go_on.set()
            one = submit(lambda: image(pipe, callback_on_step_end=between))
            assert between.is_there.wait(TIMEOUT_S)
        else:
            between.go_on.set()
            one = submit(image, pipe)
            assert stop.is_there.wait(TIMEOUT_S)
        read = submit(lambda: {name: t.clone() for name, t in pipe.transformer.state_dict().items()})
        until(lambda: waiting(streamer) == 1)
        between.go_on.set()
        stop.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)
        found = read.result(TIMEOUT_S)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("path", ["transformer_blocks.1.attn", "proj_out", "pos_embed"])
def test_entering_waits_for_a_resident_call_in_another_thread(
    submit: Submit, expected: torch.Tensor, path: str
) -> None:
    """It goes on resident to its next block, and streams from there."""
    pipe = build_tiny("sd3")
    with Stop(pipe.transformer.get_submodule(path)) as stop:
        one = submit(image, pipe)
        assert stop.is_there.wait(TIMEOUT_S)
        entering = submit(streamed(pipe).start)
        time.sleep(0.1)
        assert not entering.done()
        assert not is_absent(pipe.transformer.proj_out.weight)
        stop.go_on.set()
        streamer = entering.result(TIMEOUT_S)
        assert torch.equal(one.result(TIMEOUT_S), expected)
        assert torch.equal(image(pipe), expected)
        streamer.close()
    assert torch.equal(image(pipe), expected)


def test_entering_gives_up_after_the_timeout(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    with Stop(pipe.transformer.transformer_blocks[1].attn) as stop:
        before = describe(pipe.transformer)
        one = submit(image, pipe)
        assert stop.is_there.wait(TIMEOUT_S)
        with pytest.raises(layerstream.ConcurrentUseError, match="is in the middle of a call of this pipeline"):
            streamed(pipe, call_timeout=0.05).start()
        assert_restored(pipe.transformer, before)
        stop.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)


def test_entering_and_leaving_beside_calls_that_go_on(submit: Submit) -> None:
    model = toy()
    expected = run(twin(model))
    end = threading.Event()

    def call_on() -> int:
        count = 0
        while not end.is_set():
            assert_equal(run(model), expected)
            count += 1
        return count

    calls = submit(call_on)
    for _ in range(40):
        with layerstream.offload(model, vram_budget="min", device=adversary()):
            assert_equal(run(model), expected)
    end.set()
    assert calls.result(TIMEOUT_S) > 0


def test_two_pipelines_called_inside_each_other_in_opposite_order(submit: Submit, expected: torch.Tensor) -> None:
    """Each would wait for the other for ever: one is told so, and the other goes on."""
    pipes = [build_tiny("sd3"), build_tiny("sd3")]
    both = threading.Barrier(2)

    def outer(number: int) -> torch.Tensor:
        def call_other(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                both.wait(TIMEOUT_S)
                assert torch.equal(image(pipes[1 - number]), expected)
            return kwargs

        return image(pipes[number], callback_on_step_end=call_other)

    with streamed(pipes[0]), streamed(pipes[1]):
        calls = [submit(outer, number) for number in (0, 1)]
        errors = [call.exception(TIMEOUT_S) for call in calls]
        (refused,) = [error for error in errors if error is not None]
        assert isinstance(refused, layerstream.ConcurrentUseError)
        assert "Each would wait for the other for ever" in str(refused)
        assert torch.equal(calls[errors.index(None)].result(), expected)
        for pipe in pipes:
            assert torch.equal(image(pipe), expected)


@pytest.mark.parametrize("which", ["the same", "another"])
def test_beginning_inside_a_call_that_is_to_be_closed_is_refused(
    submit: Submit, expected: torch.Tensor, which: str
) -> None:
    pipe = build_tiny("sd3")
    streamer = streamed(pipe).start()

    def close_and_start(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            submit(streamer.close).result(TIMEOUT_S)
            with pytest.raises(layerstream.StreamerStateError, match="at whose end it is to be closed"):
                (streamer if which == "the same" else streamed(pipe)).start()
        return kwargs

    assert torch.equal(image(pipe, callback_on_step_end=close_and_start), expected)
    assert layerstream.active(pipe) is None
    assert torch.equal(image(pipe), expected)


def test_a_deep_copy_waits_for_the_call(submit: Submit, expected: torch.Tensor) -> None:
    """What is present is plain while a call runs, and its slot has another unit's weights a moment later."""
    pipe = build_tiny("sd3")
    block = pipe.transformer.transformer_blocks[1]
    wanted = {name: t.clone() for name, t in block.ff.state_dict().items()}
    with streamed(pipe) as streamer, Stop(block.attn) as stop:
        one = submit(image, pipe)
        assert stop.is_there.wait(TIMEOUT_S)
        assert not is_absent(block.ff.net[2].weight)
        copied = submit(copy.deepcopy, block.ff)
        until(lambda: waiting(streamer) == 1)
        stop.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)
        found = dict(copied.result(TIMEOUT_S).state_dict())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_file_is_made_of_the_weights_at_home_while_a_call_runs(
    submit: Submit, expected: torch.Tensor, tmp_path: Path
) -> None:
    pipe = build_tiny("sd3")
    wanted = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    with streamed(pipe), Stop(pipe.transformer.transformer_blocks[1].attn) as stop:
        one = submit(image, pipe)
        assert stop.is_there.wait(TIMEOUT_S)
        present = pipe.transformer.transformer_blocks[1].attn.to_q.weight
        assert not is_absent(present)
        assert at_home(present).data_ptr() != present.data_ptr(), "its slot may be another unit's at any time"
        parameters = dict(pipe.transformer.named_parameters())
        submit(safetensors.torch.save_file, parameters, tmp_path / "weights").result(TIMEOUT_S)
        stop.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)
    found = safetensors.torch.load_file(tmp_path / "weights")
    assert found.keys() == parameters.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_bare_components_of_one_pipeline_take_turns(submit: Submit) -> None:
    model = toy()
    expected = run(twin(model), 1)
    with streamed(model) as streamer, Stop(model.blocks[2].up) as stop:
        one = submit(run, model, 1)
        assert stop.is_there.wait(TIMEOUT_S)
        two = submit(run, model, 1)
        until(lambda: waiting(streamer) == 1)
        stop.go_on.set()
        assert_equal(one.result(TIMEOUT_S), expected)
        assert_equal(two.result(TIMEOUT_S), expected)


def test_many_threads_at_once(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    with streamed(pipe):
        images = [submit(image, copy.copy(pipe)) for _ in range(6)]
        assert all(torch.equal(each.result(TIMEOUT_S), expected) for each in images)


def test_the_same_thread_comes_in_again(expected: torch.Tensor) -> None:
    """A callback that decodes a preview, or calls another pipeline."""
    pipe = build_tiny("sd3")
    inside: list[torch.Tensor] = []
    with streamed(pipe, call_timeout=0):

        def preview(other: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            inside.append(other.vae.decode(torch.zeros(1, 16, 4, 4)).sample)
            scheduler = copy.deepcopy(pipe.scheduler)
            again = type(pipe)(**{**pipe.components, "scheduler": scheduler})
            inside.append(image(again))
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(lambda: pipe.vae(torch.zeros(1, 3, 8, 8)),))
            thread.start()
            thread.join()
            return kwargs

        assert torch.equal(image(pipe, callback_on_step_end=preview), expected)
    assert all(torch.equal(each, expected) for each in inside[1::2])


def test_a_call_that_is_interrupted_lets_the_next_one_in(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with streamed(pipe):
        for place in (pipe.transformer, pipe.transformer.transformer_blocks[1], pipe.text_encoder):
            handle = place.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                image(pipe)
            handle.remove()
            assert torch.equal(submit(image, pipe).result(TIMEOUT_S), expected)
    assert torch.equal(image(pipe), expected)


@pytest.mark.parametrize("path", ["", "embed", "blocks.2", "blocks.2.up", "head"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_bare_component_that_is_interrupted_lets_the_next_one_in(submit: Submit, path: str, when: str) -> None:
    """An interrupt skips the hooks that tell its end."""
    model = toy()
    expected = run(twin(model), 1)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with streamed(model):
        module = model.get_submodule(path)
        add = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
        for _ in range(2):
            handle = add(interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(model, 1)
            handle.remove()
            assert_equal(submit(run, model, 1).result(TIMEOUT_S), expected)
            assert_equal(run(model, 1), expected)


@pytest.mark.parametrize("wrong", [-1, float("nan"), "3", True, object()])
def test_bad_timeouts(wrong: Any) -> None:
    with pytest.raises(layerstream.ArgumentError, match="call_timeout must be a number of seconds, or None"):
        layerstream.offload(toy(), call_timeout=wrong)


# ---- decorated functions


def test_overlapping_decorated_calls_share_one_streaming(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    inside, starts = threading.Event(), []
    go_on = threading.Event()

    @layerstream.offload(vram_budget="min", device=adversary())
    def paint(pipe: Any, who: str) -> tuple[torch.Tensor, bool]:
        starts.append((who, layerstream.active(pipe)))
        if who == "first":
            inside.set()
            assert go_on.wait(TIMEOUT_S)
        return image(pipe), pipe.transformer in ACTIVE

    one = submit(paint, pipe, "first")
    assert inside.wait(TIMEOUT_S)
    streamer = layerstream.active(pipe)
    assert streamer is not None
    two = submit(paint, pipe, "second")
    until(lambda: waiting(streamer) == 1)
    assert [who for who, _ in starts] == ["first"], "one use at a time"
    go_on.set()
    for made, is_streamed in (one.result(TIMEOUT_S), two.result(TIMEOUT_S)):
        assert torch.equal(made, expected)
        assert is_streamed
    assert starts[0][1] is starts[1][1] is streamer, "the second did not enter anew"
    assert layerstream.active(pipe) is None
    assert not streamer.is_active


def test_overlapping_calls_of_a_decorated_class(submit: Submit, expected: torch.Tensor) -> None:
    @layerstream.offload(vram_budget="min", device=adversary())
    class Streamed(diffusers.StableDiffusion3Pipeline):
        pass

    call = vars(Streamed)["__call__"]
    pipe = Streamed(**build_tiny("sd3").components)
    images = [submit(image, pipe) for _ in range(4)]
    assert all(torch.equal(each.result(TIMEOUT_S), expected) for each in images)
    assert layerstream.active(pipe) is None
    assert vars(Streamed)["__call__"] is call


def test_decorated_calls_time_out(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    inside, go_on = threading.Event(), threading.Event()

    @layerstream.offload(vram_budget="min", device=adversary(), call_timeout=0.05)
    def paint(pipe: Any, who: str) -> torch.Tensor:
        if who == "first":
            inside.set()
            assert go_on.wait(TIMEOUT_S)
        return image(pipe)

    one = submit(paint, pipe, "first")
    assert inside.wait(TIMEOUT_S)
    assert isinstance(submit(paint, pipe, "second").exception(TIMEOUT_S), layerstream.ConcurrentUseError)
    assert layerstream.active(pipe) is not None
    go_on.set()
    assert torch.equal(one.result(TIMEOUT_S), expected)
    assert layerstream.active(pipe) is None


def test_generators_and_coroutines_stream_while_they_run(expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    decorate = layerstream.offload(vram_budget="min", device=adversary())

    @decorate
    def images(pipe: Any) -> Iterator[torch.Tensor]:
        for _ in range(2):
            yield image(pipe)

    @decorate
    async def one(pipe: Any) -> torch.Tensor:
        await asyncio.sleep(0)
        return await asyncio.to_thread(image, pipe)

    @decorate
    async def several(pipe: Any) -> AsyncIterator[torch.Tensor]:
        try:
            while True:
                sent = yield await asyncio.to_thread(image, pipe)
                if sent == "stop":
                    return
        except ValueError as error:
            yield str(error)  # type: ignore[misc]

    for made in images(pipe):
        assert torch.equal(made, expected)
        assert layerstream.active(pipe) is not None
    assert layerstream.active(pipe) is None

    async def main() -> None:
        assert all(torch.equal(made, expected) for made in await asyncio.gather(one(pipe), one(pipe)))
        assert layerstream.active(pipe) is None
        generator: Any = several(pipe)
        assert torch.equal(await anext(generator), expected)
        assert layerstream.active(pipe) is not None
        assert torch.equal(await generator.asend("go on"), expected)
        with pytest.raises(StopAsyncIteration):
            await generator.asend("stop")
        assert layerstream.active(pipe) is None
        generator = several(pipe)
        await anext(generator)
        assert await generator.athrow(ValueError("of the caller")) == "of the caller"
        await generator.aclose()
        assert layerstream.active(pipe) is None
        async for made in several(pipe):
            assert torch.equal(made, expected)
            break
        await generator.aclose()

    asyncio.run(main())
    gc.collect()
    assert layerstream.active(pipe) is None
    assert torch.equal(image(pipe), expected)


def test_a_decorated_function_inside_an_outer_context_is_a_use(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")

    @layerstream.offload(vram_budget="min")
    def paint(pipe: Any) -> torch.Tensor:
        return image(pipe)

    between = Between()
    with streamed(pipe) as streamer:
        one = submit(lambda: image(pipe, callback_on_step_end=between))
        assert between.is_there.wait(TIMEOUT_S)
        two = submit(paint, pipe)
        until(lambda: waiting(streamer) == 1)
        between.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)
        assert torch.equal(two.result(TIMEOUT_S), expected)
        assert streamer.is_active


# ---- closing


def test_closing_while_a_call_runs_happens_when_it_ends(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    image(pipe)  # transformers keeps notes on its modules from the first call on
    before = {name: describe(m) for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    streamer = streamed(pipe)
    with Stop(pipe.transformer.transformer_blocks[1].attn.to_q) as stop:
        with streamer:
            one = submit(image, pipe)
            assert stop.is_there.wait(TIMEOUT_S)
        assert streamer.is_active, "a call goes on"
        streamer.close()  # again: nothing more to say
        again = submit(streamer.start)
        another = submit(layerstream.offload(pipe, vram_budget="min", device=adversary()).start)
        time.sleep(0.05)
        assert not again.done()
        assert not another.done()
        stop.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)
        # Whichever comes first streams; the other is told so.
        errors = [each.exception(TIMEOUT_S) for each in (again, another)]
    assert sum(error is None for error in errors) == 1
    assert isinstance(errors[0] or errors[1], layerstream.AlreadyOffloadedError)
    running = layerstream.active(pipe)
    assert running is not None
    assert torch.equal(image(pipe), expected)
    running.close()
    for name, was in before.items():
        assert_restored(getattr(pipe, name), was)


def test_a_request_that_timed_out_does_not_leave_the_pipeline_streamed(expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")

    async def request(seconds: float | None) -> torch.Tensor:
        with streamed(pipe):
            return await asyncio.wait_for(asyncio.to_thread(image, pipe), seconds)

    async def server() -> None:
        with Stop(pipe.transformer.transformer_blocks[1]) as stop:
            with pytest.raises(TimeoutError):
                await request(0.2)
            assert layerstream.active(pipe) is not None
        await asyncio.to_thread(until, lambda: layerstream.active(pipe) is None)
        assert stop.is_there.is_set()
        assert torch.equal(await request(None), expected)

    asyncio.run(server())
    assert layerstream.active(pipe) is None
    assert torch.equal(image(pipe), expected)


def test_close_inside_ones_own_call_is_refused(expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    errors: list[layerstream.StreamerStateError] = []
    with streamed(pipe) as streamer:

        def close(*args: Any) -> Any:
            with pytest.raises(
                layerstream.StreamerStateError, match="in the middle of a call of this pipeline"
            ) as error:
                streamer.close()
            errors.append(error.value)
            return args[-1] if isinstance(args[-1], dict) else None

        handle = pipe.transformer.transformer_blocks[0].register_forward_hook(close)
        assert torch.equal(image(pipe, callback_on_step_end=close), expected)
        handle.remove()
        assert len(errors) >= 4
        handle = pipe.vae.decoder.register_forward_hook(close)
        pipe.vae.decode(torch.zeros(1, 16, 4, 4))
        handle.remove()
        assert len(errors) >= 5
        assert streamer.is_active
        assert torch.equal(image(pipe), expected)
    assert not streamer.is_active


def test_close_after_an_interrupt_is_no_close_inside_a_call(expected: torch.Tensor) -> None:
    model = toy()
    before = describe(model)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    streamer = streamed(model).start()
    handle = model.blocks[2].up.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, 1)
    handle.remove()
    streamer.close()
    assert_restored(model, before)


# ---- the cell that was run twice


def test_starting_twice_names_what_gives_the_running_streamer() -> None:
    pipe = build_tiny("sd3")
    assert layerstream.active(pipe) is None
    streamer = streamed(pipe).start()
    for again in (streamer, streamed(pipe), streamed(pipe.vae), streamed({"vae": pipe.vae})):
        with pytest.raises((layerstream.StreamerStateError, layerstream.AlreadyOffloadedError)) as error:
            again.start()
        assert "`layerstream.active(pipe)`" in str(error.value)
    for what in (pipe, copy.copy(pipe), pipe.vae, {"vae": pipe.vae}, pipe.components):
        assert layerstream.active(what) is streamer
    assert layerstream.active(toy()) is None
    layerstream.active(pipe).close()  # type: ignore[union-attr]
    assert layerstream.active(pipe) is None
    with pytest.raises(layerstream.PipelineError, match="cannot stream a int"):
        layerstream.active(3)


# ---- pauses


def test_a_pause_of_one_component_does_not_hold_up_readers_of_others(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight.detach().clone()
    with streamed(pipe) as streamer:
        with streamer.pausing("vae"):
            read = submit(lambda: pipe.transformer.transformer_blocks[0].attn.to_q.weight.clone())
            assert torch.equal(read.result(TIMEOUT_S), weight), "while this thread waits for it"
            waits = submit(image, pipe)
            until(lambda: waiting(streamer) == 1)
        assert torch.equal(waits.result(TIMEOUT_S), expected)
        with streamer.paused():
            read = submit(lambda: pipe.transformer.transformer_blocks[0].attn.to_q.weight.clone())
            assert torch.equal(read.result(TIMEOUT_S), weight)
        assert torch.equal(image(pipe), expected)


def test_a_pause_waits_for_a_call(submit: Submit, expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    between = Between()
    with streamed(pipe) as streamer:
        one = submit(lambda: image(pipe, callback_on_step_end=between))
        assert between.is_there.wait(TIMEOUT_S)

        def change() -> None:
            with streamer.paused():
                pipe.transformer.pos_embed.proj.weight.data.zero_()

        two = submit(change)
        until(lambda: waiting(streamer) == 1)
        between.go_on.set()
        assert torch.equal(one.result(TIMEOUT_S), expected)
        two.result(TIMEOUT_S)
        assert not torch.equal(image(pipe), expected)


# ---- nothing stays


def test_classes_are_as_they_were() -> None:
    """What is watched of pipelines is watched on their classes, and only while something is streamed."""
    from diffusers.hooks.hooks import HookRegistry
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe, other = build_tiny("sd3"), build_tiny("flux")
    classes = [*type(pipe).__mro__, type(other), HookRegistry, DiffusionPipeline]
    before = [dict(vars(cls)) for cls in classes]
    one, two = streamed(pipe).start(), streamed(other).start()
    assert vars(type(pipe))["__call__"] is not before[0]["__call__"]
    assert type(pipe).__call__.__wrapped__ is before[0]["__call__"]
    one.close()
    assert vars(DiffusionPipeline)["register_modules"] is not before[-1]["register_modules"]
    two.close()
    assert [dict(vars(cls)) for cls in classes] == before


def test_a_pipeline_dropped_without_closing_takes_all_of_it_along() -> None:
    device = adversary(memory_bytes=10**9)
    pipe = build_tiny("sd3")
    call = vars(type(pipe))["__call__"]
    layerstream.offload(pipe, vram_budget=10**8, device=device).start()
    assert device.free_bytes() < 10**8 + 1
    image(pipe)
    watch = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert watch() is None
    assert device.free_bytes() > 9 * 10**8, "the limit is off"
    assert not device.registered
    assert vars(diffusers.StableDiffusion3Pipeline)["__call__"] is call
    assert not list(ACTIVE)


def test_a_copy_of_a_pipeline_carries_nothing_of_ours_along(expected: torch.Tensor) -> None:
    pipe = build_tiny("sd3")
    image(pipe)
    names = set(vars(pipe))
    with streamed(pipe):
        other = copy.copy(pipe)
        assert set(vars(pipe)) == set(vars(other)) == names
        other.scheduler = copy.deepcopy(pipe.scheduler)
        assert torch.equal(image(other), expected)
        other.text_encoder_3 = None  # the copy's; the pipeline keeps its own
        assert torch.equal(image(pipe), expected)
        assert layerstream.active(pipe.text_encoder_3) is not None
    assert set(vars(other)) == names


@pytest.mark.parametrize("is_inherited", [False, True])
def test_a_call_of_an_object_that_keeps_its_modules_in_a_dict_alone(is_inherited: bool) -> None:
    """It is one use, not one for each component: other callers wait until it is over. So is one that its class has
    from another."""

    class Keeper:
        def __init__(self) -> None:
            self.components = {"first": toy(1), "second": toy(2)}

        @torch.no_grad()
        def __call__(self) -> torch.Tensor:
            x = toy_input()
            for component in self.components.values():
                x = component(x)
                inside.append(streamer._streamer.gate.is_inside_call)
            return x

    class Heir(Keeper):
        pass

    pipe, inside = Heir() if is_inherited else Keeper(), []
    expected = twin(pipe.components["second"])(twin(pipe.components["first"])(toy_input())).detach()
    with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streamer:
        assert torch.equal(pipe(), expected)
    assert inside == [True, True]
