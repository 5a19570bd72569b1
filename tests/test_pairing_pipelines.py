"""Pairing in pipelines of diffusers whose users do more than call them: LoRA, callbacks, step caches, other sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from diffusers import FirstBlockCacheConfig

import layerstream
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary
from tests.test_pairing import no_thread_stays, pairs_at_once

__all__ = ["no_thread_stays", "pairs_at_once"]  # fixtures

pytestmark = [
    pytest.mark.usefixtures("pairs_at_once"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]
STEPS = 8

Use = Callable[[Any], list[torch.Tensor]]  # of a pipeline: the images of its calls


def image(pipe: Any, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    made: torch.Tensor = run_tiny(pipe, "flux", seed=seed, num_inference_steps=STEPS, **kwargs)
    return made


def compared(use: Use, prepare: Callable[[Any], None] = lambda pipe: None) -> layerstream.Stats:
    """The same calls of a resident and of a streamed pipeline; returns what the latter counted."""
    resident, pipe = build_tiny("flux"), build_tiny("flux")
    prepare(resident)
    prepare(pipe)
    expected = use(resident)
    with layerstream.offload(pipe, vram_budget="min", device=adversary(), pairing="auto") as streamer:
        found = use(pipe)
        stats = streamer.stats()
    assert [torch.equal(a, b) for a, b in zip(expected, found, strict=True)] == [True] * len(expected)
    return stats


def add_loras(pipe: Any) -> None:
    """Two adapters, of which both are on."""
    for number, name in enumerate(("a", "b")):
        options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": ["to_q", "to_v"]}
        pipe.transformer.add_adapter(peft.LoraConfig(**options), adapter_name=name)
        generator = torch.Generator().manual_seed(number)
        for key, weight in pipe.transformer.named_parameters():
            if f".{name}." in key:
                weight.data = 0.2 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    pipe.transformer.set_adapters(["a", "b"])


def at_step(step: int, do: Callable[[Any], Any]) -> Callable[..., dict[str, Any]]:
    """A callback that does something after one step."""

    def called(pipe: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if number == step:
            do(pipe)
        return {}

    return called


def test_a_scale_of_lora_that_is_passed() -> None:
    """The forward sets it before its first block and takes it back at its end: the two passes would share it."""
    loras: dict[str, Any] = {"joint_attention_kwargs": {"scale": 0.7}}
    stats = compared(lambda pipe: [image(pipe, 0, **loras), image(pipe, 1, **loras), image(pipe, 2)], add_loras)
    assert stats.num_discarded_passes <= 2


def test_lora_weights_that_stay_as_they_are_pair() -> None:
    stats = compared(lambda pipe: [image(pipe, seed) for seed in range(3)], add_loras)
    assert stats.num_paired_passes >= STEPS
    assert stats.num_discarded_passes == 0


def test_adapters_that_are_set_in_the_middle_of_a_call() -> None:
    change = at_step(4, lambda pipe: pipe.transformer.set_adapters(["b"], [0.5]))

    def use(pipe: Any) -> list[torch.Tensor]:
        return [image(pipe, 0), image(pipe, 1, callback_on_step_end=change), image(pipe, 2), image(pipe, 3)]

    assert compared(use, add_loras).num_paired_passes > 0


def test_an_adapter_for_each_pass() -> None:
    """What a pipeline does that has another LoRA for the negative prompt."""

    def use(pipe: Any) -> list[torch.Tensor]:
        forward, turn = pipe.transformer.forward, iter(range(10**6))

        def before(module: Any, args: Any) -> None:
            module.set_adapters(["a"] if next(turn) % 2 == 0 else ["b"])

        handle = pipe.transformer.register_forward_pre_hook(before)
        try:
            return [image(pipe, seed) for seed in range(3)]
        finally:
            handle.remove()
            assert pipe.transformer.forward == forward

    assert compared(use, add_loras).num_paired_passes == 0


def test_callbacks_that_change_latents_and_texts() -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            tensors["latents"] = tensors["latents"] * 1.25
        if step == 5:
            tensors["prompt_embeds"] = tensors["prompt_embeds"] + 0.5
        return tensors

    inputs: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}

    def use(pipe: Any) -> list[torch.Tensor]:
        return [image(pipe, seed, callback_on_step_end=callback, **inputs) for seed in range(3)]

    assert compared(use).num_paired_passes > 0


def test_guidance_that_is_switched_off_in_the_middle() -> None:
    def use(pipe: Any) -> list[torch.Tensor]:
        off = at_step(4, lambda pipe: setattr(pipe, "_guidance_scale", 0.0))
        return [
            image(pipe, 0),
            image(pipe, 1, true_cfg_scale=1.0),
            image(pipe, 2),
            image(pipe, 3, callback_on_step_end=off),
        ]

    assert compared(use).num_paired_passes > 0


def test_batches_that_change() -> None:
    def use(pipe: Any) -> list[torch.Tensor]:
        return [image(pipe, number, num_images_per_prompt=number) for number in (1, 2, 1, 3)]

    assert compared(use).num_paired_passes > 0


@pytest.mark.parametrize("is_inside", [False, True])
def test_step_caches(is_inside: bool) -> None:
    """Whether a block runs depends on what it gave in the step before: a memory that two passes would share."""

    def enable(pipe: Any) -> None:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))

    def use(pipe: Any) -> list[torch.Tensor]:
        if is_inside:
            enable(pipe)
        return [image(pipe, seed) for seed in range(3)]

    assert compared(use, lambda pipe: None if is_inside else enable(pipe)).num_paired_passes == 0
