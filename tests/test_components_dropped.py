"""Components that a pipeline lets go of, or exchanges, while it streams."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import layerstream
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, twin

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
KEYS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def encoded(pipe: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        made = pipe.encode_prompt("a fox", "a fox", "a fox", negative_prompt="blurry", max_sequence_length=32)
    return dict(zip(KEYS, made, strict=True))


def image(pipe: Any, embeds: dict[str, torch.Tensor]) -> torch.Tensor:
    return run_tiny(pipe, "sd3", prompt=None, negative_prompt=None, **embeds)


DROPS: dict[str, Callable[[Any, str], None]] = {
    "set to None": lambda pipe, name: setattr(pipe, name, None),
    "register_modules": lambda pipe, name: pipe.register_modules(**{name: None}),
}


@pytest.mark.parametrize("how", DROPS)
def test_an_encoder_that_is_dropped_goes_at_once(how: str) -> None:
    resident, pipe = build_tiny("sd3"), build_tiny("sd3")
    expected = image(resident, encoded(resident))
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        embeds = encoded(pipe)
        before, locked = streamer.stats().pinned_bytes, sum(device.registered.values())
        watched = [weakref.ref(getattr(pipe, name)) for name in ENCODERS]
        for name in ENCODERS:
            DROPS[how](pipe, name)
        gc.collect()
        assert all(watch() is None for watch in watched), "nothing of ours holds them"
        assert streamer.stats().pinned_bytes < 0.7 * before
        assert sum(device.registered.values()) < locked
        for _ in range(2):
            assert torch.equal(image(pipe, embeds), expected)
        assert not set(ENCODERS) & {unit.component for unit in streamer.plan.units}
    assert pipe.text_encoder is None
    assert torch.equal(image(pipe, embeds), expected)


@pytest.mark.parametrize("budget", ["min", "auto"])
def test_two_components_that_change_places(budget: str) -> None:
    """After the first of two assignments, one of them stands in the pipeline twice, and the other not at all."""
    pipe, resident = build_tiny("sd3"), build_tiny("sd3")
    expected = run_tiny(resident, "sd3")
    with layerstream.offload(pipe, vram_budget=budget, device=adversary()) as streamer, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for each in (pipe, resident):
                each.text_encoder, each.text_encoder_2 = each.text_encoder_2, each.text_encoder
            assert torch.equal(run_tiny(pipe, "sd3"), run_tiny(resident, "sd3"))
            assert {"text_encoder", "text_encoder_2"} <= {unit.component for unit in streamer.plan.units}
    assert torch.equal(run_tiny(pipe, "sd3"), expected)


def test_a_component_in_the_place_of_another() -> None:
    pipe, resident = build_tiny("sd3"), build_tiny("sd3")
    with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streamer:
        for each in (pipe, resident):
            each.text_encoder = each.text_encoder_2
        expected = run_tiny(resident, "sd3")
        for _ in range(2):
            assert torch.equal(run_tiny(pipe, "sd3"), expected)
        assert streamer.stats().whole_bytes == 0
    assert torch.equal(run_tiny(pipe, "sd3"), expected)


def test_a_component_that_is_dropped_and_comes_back() -> None:
    pipe = build_tiny("sd3")
    expected = run_tiny(pipe, "sd3")
    with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streamer:
        encoder, pipe.text_encoder = pipe.text_encoder, None
        pipe.text_encoder = encoder
        assert torch.equal(run_tiny(pipe, "sd3"), expected)
        assert "text_encoder" in {unit.component for unit in streamer.plan.units}
        before = streamer.stats().num_relaid
        pipe.also_known_as = encoder  # no new component: nothing pauses
        assert streamer.stats().num_relaid == before
    assert torch.equal(run_tiny(pipe, "sd3"), expected)


def test_an_encoder_that_somebody_keeps_is_as_it_was() -> None:
    pipe = build_tiny("sd3")
    encoded(pipe)
    before, encoder = describe(pipe.text_encoder), pipe.text_encoder
    with layerstream.offload(pipe, vram_budget="min", device=adversary()):
        encoded(pipe)
        pipe.text_encoder = None
        assert_restored(encoder, before)
        assert layerstream.active(encoder) is None
        pipe.text_encoder = encoder  # streams again after the next change that pauses
        with layerstream.active(pipe).paused():  # type: ignore[union-attr]
            pass
        assert layerstream.active(encoder) is not None
        encoded(pipe)
    assert_restored(encoder, before)


def test_a_component_that_is_exchanged_streams_in_its_place() -> None:
    pipe, other = build_tiny("sd3"), build_tiny("sd3")
    for parameter in other.transformer.parameters():
        parameter.data.mul_(1.1)
    expected = run_tiny(other, "sd3")
    old, before = pipe.transformer, describe(pipe.transformer)
    with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streamer:
        run_tiny(pipe, "sd3")
        pipe.transformer = other.transformer
        assert_restored(old, before)
        assert torch.equal(run_tiny(pipe, "sd3"), expected)
        assert streamer.stats().num_streamed_blocks > 0
        assert layerstream.active(other.transformer) is streamer
    assert pipe.transformer is other.transformer
    assert torch.equal(run_tiny(pipe, "sd3"), expected)


def test_what_is_set_to_itself_changes_nothing() -> None:
    pipe = build_tiny("sd3")
    with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streamer:
        pipe.transformer = pipe.transformer
        pipe.scheduler = pipe.scheduler
        assert streamer.stats().num_relaid == 0


def test_components_that_share_weights_stay_whole() -> None:
    class Pipe:
        def __init__(self) -> None:
            self.one, self.two = toy(0), toy(1)
            self.two.embed = self.one.embed

        @property
        def components(self) -> dict[str, Any]:
            return {"one": self.one, "two": getattr(self, "two", None)}

    pipe = Pipe()
    expected = run(twin(pipe.two))
    with layerstream.offload(pipe, vram_budget="min", device=adversary()):
        run(pipe.one)
        pipe.one = None  # type: ignore[assignment]
        assert_equal(run(pipe.two), expected)
        del pipe.two  # the last one
        assert not [name for name in vars(pipe) if name == "two"]
        pipe.two = None  # type: ignore[assignment]


@pytest.mark.parametrize("how", ["None", "del", "pop"])
def test_a_component_that_leaves_a_dict_goes_when_the_next_call_begins(how: str) -> None:
    parts: dict[str, Any] = {"one": toy(0), "two": toy(1)}
    expected = run(twin(parts["two"]))
    device = adversary()
    with layerstream.offload(parts, vram_budget="min", device=device) as streamer:
        run(parts["one"])
        run(parts["two"])
        before = streamer.stats().pinned_bytes
        watch = weakref.ref(parts["one"])
        if how == "None":
            parts["one"] = None
        elif how == "del":
            del parts["one"]
        else:
            parts.pop("one")
        assert_equal(run(parts["two"]), expected)
        assert streamer.stats().pinned_bytes < before
        assert {unit.component for unit in streamer.plan.units} == {"two"}
        assert layerstream.active({"two": parts["two"]}) is streamer
        gc.collect()
        assert watch() is None
