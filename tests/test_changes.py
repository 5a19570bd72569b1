"""Changing a pipeline while it streams leaves the images and weights that the same calls leave on a resident twin."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.standins import build_tiny, run_tiny
from layerstream.weights.absent import is_absent
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, twin


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}


def denoiser(pipe: Any) -> Any:
    return pipe.components.get("transformer") or pipe.components["unet"]


def image(pipe: Any, name: str = "sd3", **overrides: Any) -> torch.Tensor:
    return run_tiny(pipe, name, num_inference_steps=2 if name == "sd3" else 1, **overrides)


def tensors(pipe: Any) -> dict[str, torch.Tensor]:
    """All weights by name; a tied one under each of its names."""
    found: dict[str, torch.Tensor] = {}
    for component, module in modules(pipe).items():
        for kind in (module.named_parameters, module.named_buffers):
            found |= {f"{component}.{name}": t for name, t in kind(remove_duplicate=False)}
    return found


def kinds(pipe: Any) -> dict[str, Any]:
    """What can be asked of the weights without loading them."""
    return {n: (t.dtype, t.device, t.shape, t.requires_grad) for n, t in tensors(pipe).items()}


def as_bytes(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def values(module: nn.Module) -> dict[str, bytes]:
    return {name: as_bytes(t) for name, t in module.state_dict().items()}


def left(pipe: Any) -> dict[str, Any]:
    """Everything in which a pipeline can be compared with its twin: weights, hooks and the instances' names."""
    found: dict[str, Any] = {"": set(vars(pipe))}
    for name, t in tensors(pipe).items():
        found[name] = (type(t), t.dtype, t.device, t.stride(), t.requires_grad, as_bytes(t))
    for component, module in modules(pipe).items():
        for path, m in module.named_modules():
            hooks = [len(getattr(m, kind)) for kind in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks")]
            found[f"{component}.{path} instance"] = (type(m), m.training, set(vars(m)), hooks)
    return found


def assert_same(now: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(now) == list(wanted)
    for name, value in wanted.items():
        assert now[name] == value, name


@functools.cache
def middle(name: str) -> int:
    """A budget under which some of the denoiser's blocks stay and others stream."""

    def run_under(budget: int | str) -> layerstream.LayerStreamer:
        pipe, device = build_tiny(name), adversary()
        with layerstream.offload(pipe, vram_budget=budget, device=device) as streamer, device.checking():
            for _ in range(2):
                image(pipe, name)
        return streamer

    num_bytes = sum(t.nbytes for t in tensors(build_tiny(name)).values())
    limit = int(run_under("min").stats().peak_reserved_bytes + 0.05 * num_bytes) + 2**15
    plan, component = run_under(limit).plan, "unet" if name == "sd15" else "transformer"
    blocks = {unit.index for unit in plan.units if unit.component == component and unit.is_block}
    assert 0 < len(blocks & plan.phase_of(component).resident) < len(blocks)
    return limit


# ---- saving and copying


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_save_pretrained_writes_the_same_bytes(tmp_path: Path) -> None:
    pipe, device = build_tiny("sd3"), adversary()
    expected = image(pipe)
    pipe.save_pretrained(tmp_path / "resident")
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        assert torch.equal(image(pipe), expected)
        loads = streamer.stats().num_loads
        pipe.save_pretrained(tmp_path / "streamed")
        pipe.transformer.save_pretrained(tmp_path / "component")
        with streamer.paused():
            pipe.save_pretrained(tmp_path / "paused")
        assert streamer.stats().num_loads == loads
        assert torch.equal(image(pipe), expected)
    wanted = files(tmp_path / "resident")
    assert sum(name.endswith(".safetensors") for name in wanted) == 5
    for streamed in ("streamed", "paused"):
        assert_same(files(tmp_path / streamed), wanted)
    assert_same(files(tmp_path / "component"), files(tmp_path / "resident" / "transformer"))


def test_state_dict_between_calls_is_of_the_weights_at_home() -> None:
    pipe, device = build_tiny("sd3"), adversary()
    expected = image(pipe)
    wanted = values(pipe.transformer)
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        image(pipe)
        loads = streamer.stats().num_loads
        state = pipe.transformer.state_dict()
        assert streamer.stats().num_loads == loads
        assert streamer.stats().num_touch_loads == 0
        assert {type(t) for t in state.values()} == {torch.Tensor}
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
        for _ in range(2):
            assert torch.equal(image(pipe), expected)
            assert_same({name: as_bytes(t) for name, t in state.items()}, wanted)
    assert_same({name: as_bytes(t) for name, t in state.items()}, wanted)


def test_state_dict_inside_a_call() -> None:
    pipe, device = build_tiny("sd3"), adversary()
    expected = image(pipe)
    wanted = values(pipe.transformer)
    states: list[dict[str, torch.Tensor]] = []
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        block = pipe.transformer.transformer_blocks[1]
        handle = block.register_forward_hook(lambda *_: states.append(pipe.transformer.state_dict()))
        assert torch.equal(image(pipe), expected)
        handle.remove()
        assert torch.equal(image(pipe), expected)
        assert len(states) == 2
        for state in states:  # kept beyond the call; nobody sees another block's bytes in it
            assert_same({name: as_bytes(t) for name, t in state.items()}, wanted)


def saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)  # which pickles it
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", ["transformer", "vae", "transformer.transformer_blocks.1"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved])
def test_copies_are_plain_and_right(duplicate: Callable[[nn.Module], nn.Module], path: str) -> None:
    pipe = build_tiny("sd3")
    expected = image(pipe)
    *owners, last = path.split(".")
    owner = functools.reduce(getattr, owners, pipe)
    wanted = values(getattr(owner, last))
    with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streamer:
        image(pipe)
        made = [duplicate(getattr(owner, last))]
        with streamer.paused():
            made.append(duplicate(getattr(owner, last)))
        assert torch.equal(image(pipe), expected)
    for copied in [*made, *map(saved, made)]:  # a copy can be saved, too
        assert {type(t) for t in copied.parameters()} == {nn.Parameter}
        assert {type(t) for t in copied.buffers()} <= {torch.Tensor}
        assert_same(values(copied), wanted)
        setattr(owner, last, copied)
        assert torch.equal(image(pipe), expected)
        assert {p.dtype for p in copied.to(torch.float64).parameters()} == {torch.float64}


# ---- the pause itself


def test_inside_a_pause_weights_are_at_home_and_nothing_is_hooked() -> None:
    pipe, device = build_tiny("sd3"), adversary()
    expected = image(pipe)
    before = {name: describe(m) for name, m in modules(pipe).items()}
    with layerstream.offload(pipe, vram_budget="auto", device=device) as streamer, device.checking():
        assert torch.equal(image(pipe), expected)
        loads = streamer.stats().num_loads
        with streamer.paused():
            for name, module in modules(pipe).items():
                now = describe(module)
                for key, was in before[name].items():  # of an instance: its names, and its hooks
                    assert now[key][1:] == was[1:] if key.endswith("instance") else now[key][0] == was[0], key
                    assert key.endswith("instance") or as_bytes(now[key][1]) == as_bytes(was[1]), key
            assert device.buffer_bytes == 0
            assert not device.registered
            assert torch.equal(image(pipe), expected)
            assert streamer.stats().num_loads == loads
        assert torch.equal(image(pipe), expected)
        assert streamer.stats().num_loads > loads
    for name, module in modules(pipe).items():
        assert_restored(module, before[name])


def test_only_the_outermost_pause_resumes() -> None:
    model, device = toy(), adversary()
    expected = run(twin(model))
    streamer = layerstream.offload(model, vram_budget="min", device=device)
    with streamer.paused():  # not active: nothing to pause
        assert_equal(run(model), expected)
    with streamer, device.checking():
        with streamer.paused():
            for _ in range(2):
                with streamer.paused():
                    model.state_dict()
                assert not any(is_absent(p) for p in model.parameters())
                assert device.buffer_bytes == 0
        assert any(is_absent(p) for p in model.parameters())
        assert_equal(run(model), expected)
    with streamer.paused():
        assert_equal(run(model), expected)


EDITS: dict[str, Callable[[Any], object]] = {
    "in place": lambda m: m.blocks[2].up.weight.requires_grad_(False).mul_(2),
    "in place, base": lambda m: m.head.weight.requires_grad_(False).mul_(2),
    "other data": lambda m: setattr(m.blocks[2].up.weight, "data", m.blocks[2].up.weight.data * 2),
    "in its data": lambda m: m.blocks[2].up.weight.data.mul_(2),
    "in its state_dict": lambda m: m.state_dict()["blocks.2.up.weight"].mul_(2),
    "a buffer": lambda m: m.blocks[2].mask.logical_not_(),
    "a block's state": lambda m: m.blocks[2].load_state_dict(toy(5).blocks[2].state_dict()),
    "a new parameter": lambda m: setattr(m.blocks[2], "scale", nn.Parameter(torch.ones(16))),
    "a new layer": lambda m: setattr(m.blocks[2], "up", copy.deepcopy(toy(5).blocks[2].up)),
    "a new block": lambda m: m.blocks.__setitem__(3, toy(5).blocks[3]),
    "a block less": lambda m: (m.blocks.__delitem__(3), m.order.remove(5)),
    "no stack": lambda m: setattr(m, "blocks", nn.Sequential(*[nn.Identity() for _ in m.blocks])),
}


@pytest.mark.parametrize("budget", ["min", "auto"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_inside_a_pause(edit: Callable[[Any], object], budget: str) -> None:
    model, other = toy(), toy()
    edit(other)
    assert not torch.equal(run(other)[0], run(model)[0])
    device = adversary()
    with layerstream.offload(model, vram_budget=budget, device=device) as streamer, device.checking():
        run(model)
        with streamer.paused():
            edit(model)
        assert_equal(run(model), run(other))
    assert_equal(run(model), run(other))
    assert_same(values(model), values(other))
    assert not any(m._forward_pre_hooks or m._forward_hooks or "_apply" in vars(m) for m in model.modules())


@pytest.mark.parametrize("budget", ["min", "auto"])
# What changes modules needs a pause, and so does what torch cannot see: its version counters know nothing of writes
# through `.data`, numpy or a dict that was kept (docs/faq.md).
@pytest.mark.parametrize(
    "name", [n for n in EDITS if not n.startswith(("a new", "a block less", "no stack", "in its"))]
)
def test_edits_between_calls_without_a_pause(name: str, budget: str) -> None:
    model, other = toy(), toy()
    EDITS[name](other)
    with layerstream.offload(model, vram_budget=budget, device=adversary()):
        run(model)
        EDITS[name](model)
        assert_equal(run(model), run(other))
    assert_equal(run(model), run(other))


def test_components_replaced_inside_a_pause() -> None:
    pipe, other, device = build_tiny("sd3"), build_tiny("sd3", seed=3), adversary()
    old, new, encoder = pipe.transformer, other.transformer, pipe.text_encoder_3
    expected = image(pipe)
    wanted = build_tiny("sd3")
    wanted.transformer, wanted.text_encoder_3 = build_tiny("sd3", seed=3).transformer, None
    image(other)  # transformers keeps notes on its modules from the first call on
    before = {m: describe(m) for m in (old, new, encoder)}
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        assert torch.equal(image(pipe), expected)
        with streamer.paused():
            pipe.transformer, pipe.text_encoder_3 = new, None
        assert_restored(old, before[old])
        assert_restored(encoder, before[encoder])
        assert torch.equal(image(pipe), image(wanted))
        assert any(is_absent(p) for p in new.parameters())
        with streamer.paused():
            pipe.transformer, pipe.text_encoder_3 = old, encoder
        assert torch.equal(image(pipe), expected)
    for module, was in before.items():
        assert_restored(module, was)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_inside_a_pause_resumes(error: BaseException) -> None:
    model, device = toy(), adversary()
    expected = run(twin(model))
    before = describe(model)
    with layerstream.offload(model, vram_budget="min", device=device) as streamer, device.checking():
        run(model)
        with pytest.raises(type(error)) as caught, streamer.paused():
            raise error
        assert caught.value is error
        loads = streamer.stats().num_loads
        assert_equal(run(model), expected)
        assert streamer.stats().num_loads > loads
    assert_restored(model, before)
    with pytest.raises(type(error)), layerstream.offload(model, device=device) as streamer, streamer.paused():
        raise error
    assert not streamer.is_active
    assert_restored(model, before)


@pytest.mark.parametrize(
    "path",
    [
        "transformer.transformer_blocks.1",
        "transformer.proj_out",
        "text_encoder.text_model.encoder.layers.0",
        "vae.decoder",  # entered by `vae.decode`, which is no forward
    ],
)
def test_pausing_inside_a_call_is_refused(path: str) -> None:
    pipe, device = build_tiny("sd3"), adversary()
    expected, before, state = image(pipe), left(pipe), pipe.vae.state_dict()
    module = functools.reduce(getattr, path.split("."), pipe)

    def change(*args: object) -> None:
        with pytest.raises(layerstream.StreamerStateError, match="in the middle of"):
            pipe.vae.load_state_dict(state)
        with streamer.paused():
            raise AssertionError("not refused")

    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        handle = module.register_forward_pre_hook(change)
        with pytest.raises(layerstream.StreamerStateError, match="in the middle of"):
            image(pipe)
        handle.remove()
        assert streamer.stats().num_relaid == 0
        assert torch.equal(image(pipe), expected)
    assert_same(left(pipe), before)


def test_pausing_while_another_thread_runs_is_refused() -> None:
    model = toy()
    expected = run(twin(model), 1)
    runs, goes_on = threading.Event(), threading.Event()
    found: list[list[torch.Tensor]] = []

    def stop(*args: object) -> None:
        runs.set()
        goes_on.wait(10)

    with layerstream.offload(model, vram_budget="min", device=adversary(), call_timeout=0) as streamer:
        handle = model.blocks[2].up.register_forward_hook(stop)
        thread = threading.Thread(target=lambda: found.append(run(model, 1)))
        thread.start()
        assert runs.wait(10)
        try:
            with pytest.raises(layerstream.ConcurrentUseError), streamer.paused():
                raise AssertionError("not refused")
        finally:
            goes_on.set()
            thread.join()
        handle.remove()
        assert_equal(found[0], expected)
        assert_equal(run(model, 1), expected)


@pytest.mark.parametrize("path", ["transformer.transformer_blocks.1", "vae"])
def test_a_change_that_does_not_fit_the_budget_ends_streaming(path: str) -> None:
    pipe, wanted = build_tiny("sd3"), build_tiny("sd3")
    expected = image(pipe)
    assert torch.equal(image(wanted), expected)
    large = nn.Linear(1000, 1000)
    device = adversary()
    with layerstream.offload(pipe, vram_budget=middle("sd3"), device=device) as streamer, device.checking():
        assert torch.equal(image(pipe), expected)
        with pytest.raises(layerstream.BudgetError, match="Raise vram_budget to at least"), streamer.paused():
            functools.reduce(getattr, path.split("."), pipe).extra = large
        assert not streamer.is_active
        functools.reduce(getattr, path.split("."), wanted).extra = large
        assert_same(left(pipe), left(wanted))
        assert device.buffer_bytes == 0
        assert not device.registered
        assert torch.equal(image(pipe), expected)  # resident again
    streamer = layerstream.offload(pipe, vram_budget="min", device=device)
    with streamer:
        assert torch.equal(image(pipe), expected)


def test_closing_inside_a_pause() -> None:
    model, device = toy(), adversary()
    expected, before = run(twin(model)), describe(model)
    streamer = layerstream.offload(model, vram_budget="min", device=device).start()
    run(model)
    with streamer.paused():
        streamer.close()
        assert not streamer.is_active
    assert not streamer.is_active
    assert_restored(model, before)
    assert device.buffer_bytes == 0
    assert not device.registered
    assert_equal(run(model), expected)


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_device_that_fails_around_a_pause(error: BaseException) -> None:
    """Whichever operation fails, the model streams afterwards, or all of it is given back."""
    model = toy(num_blocks=3)
    expected, before = run(twin(model)), describe(model)
    for operation in itertools.count():
        device = adversary()
        with layerstream.offload(model, vram_budget="min", device=device) as streamer:
            run(model)
            device.fail_at(operation, error)
            has_failed = True
            with warnings.catch_warnings(record=True) as said, contextlib.suppress(type(error)):
                warnings.simplefilter("always")
                with streamer.paused():
                    pass
                has_failed = bool(said)
            device.fail_at(10**9, error)
            loads = streamer.stats().num_loads
            assert_equal(run(model), expected)
            assert streamer.is_active == (streamer.stats().num_loads > loads), operation
            if not streamer.is_active:
                assert_restored(model, before)
        assert_restored(model, before)
        assert device.buffer_bytes == 0, operation
        assert not device.registered, operation
        if not has_failed:
            break
    assert operation >= 3
