"""Other offloaders that are switched on while a pipeline streams are refused by name, before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from torch import nn

import layerstream
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary, assert_restored, describe, toy

CPU = torch.device("cpu")
GROUPS: dict[str, Any] = {"onload_device": CPU, "offload_type": "leaf_level"}

SWITCHES: dict[str, Callable[[Any], object]] = {
    "enable_model_cpu_offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "enable_sequential_cpu_offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "enable_group_offload": lambda pipe: pipe.enable_group_offload(**GROUPS),
    "of a component": lambda pipe: pipe.transformer.enable_group_offload(**GROUPS),
    "apply_group_offloading": lambda pipe: apply_group_offloading(pipe.text_encoder, **GROUPS),
    "of a part": lambda pipe: apply_group_offloading(pipe.vae.decoder, **GROUPS),
    "cpu_offload": lambda pipe: accelerate.cpu_offload(pipe.transformer, execution_device=CPU),
    "cpu_offload_with_hook": lambda pipe: accelerate.cpu_offload_with_hook(pipe.vae, execution_device=CPU),
    "of another pipeline": lambda pipe: type(pipe)(**pipe.components).enable_model_cpu_offload(device="cpu"),
    "of another class": lambda pipe: diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(
        pipe
    ).enable_sequential_cpu_offload(device="cpu"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_refused_by_name(name: str) -> None:
    pipe = build_tiny("sd3")
    expected = run_tiny(pipe, "sd3")
    modules = {key: m for key, m in pipe.components.items() if isinstance(m, nn.Module)}
    before = {key: describe(module) for key, module in modules.items()}
    with layerstream.offload(pipe, vram_budget="min", device=adversary()) as streamer:
        run_tiny(pipe, "sd3")
        with pytest.raises(layerstream.AlreadyOffloadedError, match="would offload what layerstream streams") as error:
            SWITCHES[name](pipe)
        assert error.value.streamer is streamer
        assert str(error.value).startswith(
            ("StableDiffusion3", "SD3Transformer2DModel", "diffusers' ", "accelerate's ")
        )
        assert torch.equal(run_tiny(pipe, "sd3"), expected)
    for key, module in modules.items():
        assert_restored(module, before[key])
    assert torch.equal(run_tiny(pipe, "sd3"), expected)


def test_what_is_not_streamed_may_be_offloaded_as_ever() -> None:
    pipe, other = build_tiny("sd3"), build_tiny("sd15")
    expected = run_tiny(other, "sd15")
    with layerstream.offload(pipe, vram_budget="min", device=adversary()):
        add_hook_to_module(other.unet, AlignDevicesHook(execution_device=CPU))
        apply_group_offloading(other.vae, **GROUPS)
        assert torch.equal(run_tiny(other, "sd15"), expected)


def test_inside_a_pause_it_is_the_next_entering_that_refuses() -> None:
    model = toy()
    streamer = layerstream.offload(model, vram_budget="min", device=adversary()).start()
    with streamer.paused():
        handle = model.register_forward_pre_hook(lambda *args: None)
    handle.remove()
    streamer.close()
