"""Autoregressive models: entered by methods of their parts, token by token, with parts that run never or often."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.blocks import UnitSpec
from layerstream.device.simulated import SimulatedDevice
from layerstream.hooks import compiled
from layerstream.model.adapters import registry
from layerstream.planning.costs import uses_per_pass
from layerstream.planning.order import OrderLearner
from layerstream.planning.phases import READ, Key, PhaseTracker
from tests.fakes import adversary, assert_restored, describe
from tests.token_loops import TokenPipeline, token_pipeline

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
KIB = 2**10


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return token_pipeline().generate_image(PROMPT)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of the process may have compiled something, and then blocks keep their hooks."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    monkeypatch.setattr(compiled, "is_in_use", lambda: False)


def streamed(pipe: Any, budget: Any = "auto") -> layerstream.LayerStreamer:
    return layerstream.offload(pipe, vram_budget=budget, device=adversary())


# ---- bits


@pytest.mark.parametrize("budget", ["min", 330 * KIB, "auto"])
def test_a_plain_pipeline_is_equal_and_restored(expected: torch.Tensor, budget: Any) -> None:
    pipe = token_pipeline()
    parts = [pipe.model, pipe.vae]
    before = [describe(part) for part in parts]
    names = dict(vars(pipe))
    with streamed(pipe, budget) as streamer:
        for _ in range(3):
            assert torch.equal(pipe.generate_image(PROMPT), expected)
        with pytest.raises(KeyError):
            pipe.generate_image(PROMPT, stops_at=4)
        assert torch.equal(pipe.generate_image(PROMPT), expected)
        assert layerstream.active(pipe) is streamer
    for part, was in zip(parts, before, strict=True):
        assert_restored(part, was)
    assert vars(pipe) == names
    assert torch.equal(pipe.generate_image(PROMPT), expected)
    assert "generate_image" not in vars(type(pipe).generate_image)


@pytest.mark.parametrize("where", ["layers.2.mix", "head.net.blocks.1.up", "head.net.exit", "image_in", "image_out"])
@pytest.mark.parametrize("budget", ["min", 330 * KIB])
def test_an_exception_anywhere_in_a_token(expected: torch.Tensor, where: str, budget: Any) -> None:
    pipe = token_pipeline()
    before = describe(pipe.model)
    left = 6

    def stop(*args: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyError(where)

    with streamed(pipe, budget):
        handle = pipe.model.get_submodule(where).register_forward_pre_hook(stop)
        for wanted in (6, 9):
            left = wanted
            with pytest.raises(KeyError, match=where):
                pipe.generate_image(PROMPT)
        handle.remove()
        for _ in range(2):
            assert torch.equal(pipe.generate_image(PROMPT), expected)
    assert_restored(pipe.model, before)


def test_what_the_pipeline_remembers_is_put_right_and_back() -> None:
    pipe = token_pipeline()
    seen: list[Any] = []
    pipe.model.norm.register_forward_pre_hook(lambda module, args: seen.append((pipe.device, pipe.remembered)))
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device):
        pipe.generate_image(PROMPT)
        assert set(seen) == {(device.torch_device, str(device.torch_device))}
    assert (pipe.device, pipe.remembered) == (torch.device("cpu"), "cpu")


def test_devices_of_a_pipeline_are_replaced_by_name_and_kind() -> None:
    from layerstream.model.remembered import RememberedDevices

    class Pipe:
        pass

    pipe: Any = Pipe()
    pipe.device, pipe.target_device, pipe.mode, pipe.elsewhere = torch.device("cpu"), "cpu", "cpu", torch.device("meta")
    pipe.kept_device = "none such"
    before = dict(vars(pipe))
    changed = RememberedDevices(pipe, {torch.device("cpu")}, torch.device("cuda:1"))
    assert (pipe.device, pipe.target_device) == (torch.device("cuda:1"), "cuda:1")
    assert (pipe.mode, pipe.elsewhere, pipe.kept_device) == ("cpu", torch.device("meta"), "none such")
    pipe.target_device = "cuda:0"  # by somebody else, and stays
    changed.restore()
    assert vars(pipe) == before | {"target_device": "cuda:0"}


def test_another_call_of_a_plain_pipeline_waits(expected: torch.Tensor) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pipe = token_pipeline()
    with streamed(pipe), ThreadPoolExecutor(3) as pool:
        made = [pool.submit(pipe.generate_image, PROMPT) for _ in range(3)]
        assert all(torch.equal(each.result(60), expected) for each in made)


# ---- how much is loaded


def loads(streamer: layerstream.LayerStreamer, pipe: TokenPipeline, calls: int) -> list[int]:
    counts = [streamer.stats().num_loads]
    for _ in range(calls):
        pipe.generate_image(PROMPT, num_tokens=25)
        counts.append(streamer.stats().num_loads)
    return [after - before for before, after in pairwise(counts)]


@pytest.mark.parametrize("form", ["pipeline", "dict", "model"])
def test_where_everything_fits_it_settles(form: str) -> None:
    """The number of loads does not grow with the number of tokens: a few times all units, and then none."""
    pipe = token_pipeline()
    streamed_form: Any = {"pipeline": pipe, "dict": {"model": pipe.model, "vae": pipe.vae}, "model": pipe.model}[form]
    with streamed(streamed_form) as streamer:
        num_units = len(streamer.plan.units)
        first, second, third, fourth, fifth = loads(streamer, pipe, 5)
        assert first <= 10 * num_units
        assert second + third + fourth <= 6 * num_units
        assert fifth == 0


def test_what_runs_often_stays_and_what_runs_seldom_is_loaded_when_it_is_needed() -> None:
    pipe = token_pipeline()
    budget = 330 * KIB
    with streamed(pipe, budget) as streamer:
        first, *_, last = loads(streamer, pipe, 5)
        # Six layers a token, of which most stay; the blocks of the head, five times a token, always.
        assert last <= 25 * 2 + 10 < first
        plan = streamer.plan
        resident = plan.phase_of("model").resident
        head = {u.index for u in plan.units if "head.net.blocks" in u.name}
        assert head
        assert head <= resident
        assert not {u.index for u in plan.units if "lm_head" in u.name} & resident
        assert streamer.stats().peak_reserved_bytes <= budget


def test_uses_per_pass_go_by_where_most_bytes_are() -> None:
    sizes = {"embed": 900, "lm_head": 900, "layer 0": 500, "layer 1": 500, "head 0": 10, "head 1": 10}
    units = [
        UnitSpec(index=i, name=name, component="m", stack=name.split()[0], num_bytes=size, is_repeated=True)
        for i, (name, size) in enumerate(sizes.items())
    ]
    counts = {0: 1, 2: 40, 3: 41, 4: 40 * 28, 5: 40 * 28}
    assert uses_per_pass(units, counts) == {0: 0, 1: 0, 4: 16, 5: 16}
    assert uses_per_pass(units, dict.fromkeys(range(6), 20)) == {}
    assert uses_per_pass(units, {i: count // 10 for i, count in counts.items()}) is None, "too few passes to tell"
    assert uses_per_pass(units, {}) is None
    assert uses_per_pass([], counts) is None


def test_the_learner_counts_uses() -> None:
    order = OrderLearner([([0, 1, 2], True)])
    for unit in [0, 1, 1, 0, 1, 1]:
        order.observe(unit)
    assert order.uses() == {0: 2, 1: 4}
    assert order.num_uses == 6
    order.leave_out([1])
    order.observe(0)
    assert order.num_uses == 0, "what is used untold cannot be compared"
    assert order.predict(2) == [0, 2] or order.predict(2) == [0, 0]
    order.take_in([1])
    for unit in [0, 1, 1]:
        order.observe(unit)
    assert order.uses() == {0: 1, 1: 2}


@pytest.mark.parametrize("budget", [330 * KIB, "auto"])
def test_blocks_that_stay_have_no_hooks_until_they_go(expected: torch.Tensor, budget: Any) -> None:
    pipe = token_pipeline()
    layers = list(pipe.model.layers)
    with streamed(pipe, budget) as streamer:
        for _ in range(4):
            assert torch.equal(pipe.generate_image(PROMPT), expected)
        hooked = [bool(layer._forward_pre_hooks) for layer in layers]
        assert budget != "auto" or not any(hooked), "behind one that streams a hook tells that its slot is free"
        head = [bool(block._forward_pre_hooks) for block in pipe.model.head.net.blocks]
        assert not any(head[1:])
        seen: list[int] = []
        handle = layers[0].register_forward_pre_hook(lambda module, args: seen.append(1))
        with streamer.paused():
            assert not any(len(layer._forward_pre_hooks) > (layer is layers[0]) for layer in layers)
        assert all(layer._forward_pre_hooks for layer in layers), "what was laid out anew is watched again"
        assert next(reversed(layers[0]._forward_pre_hooks.values())) is not None
        assert torch.equal(pipe.generate_image(PROMPT), expected)
        assert seen
        handle.remove()
        for _ in range(4):
            assert torch.equal(pipe.generate_image(PROMPT), expected)
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_an_edit_of_a_block_without_hooks_takes_effect() -> None:
    pipe, other = token_pipeline(), token_pipeline()
    with streamed(pipe):
        for _ in range(4):
            pipe.generate_image(PROMPT)
        assert not pipe.model.layers[1]._forward_pre_hooks
        for each in (pipe, other):
            each.model.layers[1].mix.weight.data.mul_(2)
            each.model.head.net.blocks[0].up.weight.data[0] = 0.5
        wanted = other.generate_image(PROMPT)
        for _ in range(3):
            assert torch.equal(pipe.generate_image(PROMPT), wanted)
    assert torch.equal(pipe.generate_image(PROMPT), wanted)


def test_a_block_without_hooks_called_by_itself() -> None:
    pipe = token_pipeline()
    x, mask = torch.ones(1, 1, 32), torch.ones(1, 1)
    with torch.no_grad():
        wanted = pipe.model.layers[2](x, mask, [None] * 6, 2)[0]
    with streamed(pipe):
        for _ in range(4):
            pipe.generate_image(PROMPT)
        with torch.no_grad():
            assert torch.equal(pipe.model.layers[2](x, mask, [None] * 6, 2)[0], wanted)
        pipe.generate_image(PROMPT)


def test_a_slow_loop_is_told_once_with_what_would_help(caplog: pytest.LogCaptureFixture) -> None:
    """On a device with a clock of its own, where copies take longer than compute."""
    pipe = token_pipeline(vocabulary=100)
    device = SimulatedDevice(link_gb_per_s=1e-4)
    offloaded = layerstream.offload(pipe, vram_budget=150 * KIB, device=device)
    with caplog.at_level(logging.WARNING, "layerstream"), offloaded as streamer:
        for _ in range(3):
            pipe.generate_image(PROMPT, num_tokens=25)
        report = streamer.report()
    (told,) = [r.message for r in caplog.records if "runs once for each token" in r.message]
    assert "`model` runs once for each token, and loads" in told
    assert "A budget of" in told
    model = next(phase for phase in report.phases if phase.name == "model")
    assert 60 <= model.num_tokens <= 75
    assert f"{model.num_tokens} tokens" in str(report)
    plan = streamer.plan
    looped = sum(u.num_bytes for u in plan.units if u.component == "model" and "embed" not in u.name)
    assert plan.bytes_without_streaming("model") >= max(looped - 100 * 32 * 4, plan.needed_bytes)


# ---- phases


def key(entry: str, *shape: int) -> Key:
    return Key("model", entry, ((torch.float32, shape),) if shape else ())


def test_a_weight_that_is_read_first_does_not_keep_the_phase_unknown() -> None:
    tracker = PhaseTracker([("model", True)])
    tracker.enter(key(READ))
    assert [p.reserve_bytes for p in tracker.phases(0)] == [None]
    for _ in range(2):
        tracker.enter(key("forward", 1, 8)).measured(100)
    assert [p.reserve_bytes for p in tracker.phases(0)] == [100]
    tracker.enter(key(READ))
    assert [p.reserve_bytes for p in tracker.phases(0)] == [100]


def test_tokens_are_one_key_before_any_of_them_is_measured() -> None:
    tracker = PhaseTracker([("model", True)])
    tracker.enter(key("forward", 2, 500)).measured(1000)  # the prompt, measured once of twice
    first = tracker.enter(key("forward", 1, 100))
    assert [p.reserve_bytes for p in tracker.phases(0)] == [None]
    first.measured(10)
    second = tracker.enter(key("forward", 1, 101))
    assert second is first
    second.measured(12)
    assert tracker.enter(key("forward", 1, 102)).is_measured
    # What the prompt took is the most that is known, although it is to be measured again.
    assert [p.reserve_bytes for p in tracker.phases(0)] == [1000]


def test_what_runs_many_times_in_a_row_is_found_to_be_repeated() -> None:
    tracker = PhaseTracker([("lm", False), ("vae", False)])
    for number in range(9):
        assert not tracker.is_repeated("lm"), number
        tracker.enter(Key("lm", "", ((torch.float32, (1, 100 + number)),)))
    assert tracker.is_repeated("lm")
    assert not tracker.is_repeated("vae")
    assert tracker.successor([("lm", False), ("vae", False)], changed=["vae"]).is_repeated("lm")
    assert not tracker.successor([("lm", False), ("vae", False)], changed=["lm"]).is_repeated("lm")


@pytest.mark.parametrize("is_call", [True, False])
def test_components_that_alternate_within_a_call_share_a_phase(is_call: bool) -> None:
    tracker = PhaseTracker([("lm", False), ("head", False), ("vae", False)])
    tracker.begin_use(is_call)
    found = []
    for number in range(4):
        for name in ("lm", "head"):
            tracker.enter(Key(name, "", ((torch.float32, (1, 50 + number)),)))
            found.append(tracker.partners())
    assert [f for f in found if f] == ([("lm", "head")] if is_call else [])


def test_calls_that_follow_each_other_do_not_make_partners() -> None:
    tracker = PhaseTracker([("text_encoder", False), ("vae", False)])
    for _ in range(8):
        tracker.begin_use(True)
        for name in ("text_encoder", "vae"):
            tracker.enter(Key(name, "", ()))
            assert tracker.partners() is None


# ---- entrances


def test_methods_that_call_blocks_are_found_and_watched(caplog: pytest.LogCaptureFixture) -> None:
    pipe = token_pipeline()
    with caplog.at_level(logging.DEBUG, "layerstream"), streamed(pipe):
        pipe.generate_image(PROMPT)
        pipe.generate_image(PROMPT)
        assert {name for name in ("forward", "generate_image") if name in vars(pipe.model)} == {"forward"}
        assert "sample" in vars(pipe.model.head)
    found = [r.args[1] for r in caplog.records if "is entered by" in r.message and r.args]
    assert sorted(map(str, found)) == ["forward", "head.sample", "image_in.forward", "image_out.forward"]
    assert "forward" not in vars(pipe.model)
    assert "sample" not in vars(pipe.model.head)


def test_dotted_entry_points_of_an_adapter(expected: torch.Tensor) -> None:
    class Named(type(token_pipeline().model)):  # type: ignore[misc]
        pass

    pipe = token_pipeline()
    pipe.model.__class__ = Named
    layerstream.register_adapter(
        Named, layerstream.Adapter(stacks=["layers", "head.net.blocks"], entry_points=["forward", "head.sample"])
    )
    with streamed(pipe, "min"):
        assert torch.equal(pipe.generate_image(PROMPT), expected)
        assert "sample" in vars(pipe.model.head)
    layerstream.register_adapter(Named, layerstream.Adapter(stacks=["layers"], entry_points=["head.draw"]))
    with pytest.raises(layerstream.AdapterError, match=r"has no method head\.draw to enter by"):
        streamed(pipe, "min").start()
    layerstream.register_adapter(Named, layerstream.Adapter(stacks=["layers"], entry_points=["had.sample"]))
    with pytest.raises(layerstream.AdapterError, match=r"has no method had\.sample to enter by"):
        streamed(pipe, "min").start()


# ---- containers


class Container(nn.Module):
    """Never called itself; its methods call its children."""

    def __init__(self, pipe: TokenPipeline, has_more: bool) -> None:
        super().__init__()
        self.model, self.vae = pipe.model, pipe.vae
        self.config = object()
        if has_more:
            self.scale = nn.Parameter(torch.tensor(1.0))

    def generate(self, prompt: list[int]) -> torch.Tensor:
        pipe = TokenPipeline(self.model, self.vae)
        with torch.no_grad():
            return pipe.generate_image(prompt) * getattr(self, "scale", 1.0)


@pytest.mark.parametrize("has_more", [False, True])
@pytest.mark.parametrize("form", ["alone", "in a dict"])
@pytest.mark.parametrize("budget", ["min", 330 * KIB, "auto"])
def test_a_container_is_taken_apart(expected: torch.Tensor, has_more: bool, form: str, budget: Any) -> None:
    container = Container(token_pipeline(), has_more)
    before = describe(container)
    prefix = "" if form == "alone" else "all."
    with streamed(container if form == "alone" else {"all": container}, budget) as streamer:
        assert layerstream.active(container) is streamer
        names = {unit.component for unit in streamer.plan.units}
        more = {"Container" if form == "alone" else "all"} if has_more else set()
        assert names == {f"{prefix}model", f"{prefix}vae"} | more
        for _ in range(3):
            assert torch.equal(container.generate(PROMPT), expected)
        with pytest.raises(layerstream.MovedWhileStreamingError):
            container.to("meta")
        state = container.state_dict()
        assert set(state) == {name for name, _ in [*container.named_parameters(), *container.named_buffers()]}
        assert torch.equal(container.generate(PROMPT), expected)
    assert_restored(container, before)
    assert torch.equal(container.generate(PROMPT), expected)


def test_a_container_names_its_parts() -> None:
    class Apart(Container):
        pass

    container = Apart(token_pipeline(), has_more=False)
    layerstream.register_adapter(Apart, layerstream.Adapter(parts=["model", "vea"]))
    with pytest.raises(layerstream.AdapterError, match="part `vea` does not exist in `Apart`. .* model, vae"):
        streamed(container).start()
    layerstream.register_adapter(Apart, layerstream.Adapter(parts=["model"]))
    with streamed(container) as streamer:
        assert {unit.component for unit in streamer.plan.units} == {"model", "Apart"}


def test_an_object_without_modules_is_refused_by_what_it_has() -> None:
    class Empty:
        def __init__(self) -> None:
            self.tokenizer = 3

    with pytest.raises(layerstream.PipelineError, match=r"Empty has no modules \(it holds 'tokenizer': int\)"):
        streamed(Empty()).start()
