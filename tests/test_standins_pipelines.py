"""The true-size pipelines: their parts have the true sizes; in the tiny scale they run, repeat and hear the prompt."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from layerstream.standins import PIPELINES, build_pipeline, pipeline_call
from layerstream.standins.weights import unfilled

pytest.importorskip("diffusers", reason="the stand-ins are diffusers pipelines")
pytest.importorskip("transformers", reason="the text encoders of the stand-ins are transformers models")

# Millions of parameters of the published models.
TRUE_SIZES = {
    "sd35m": {"transformer": 2243, "text_encoder": 124, "text_encoder_2": 695, "text_encoder_3": 4762, "vae": 83.8},
    "ovis": {"transformer": 7370, "text_encoder": 1721, "vae": 83.8},
    "longcat": {"transformer": 6271, "text_encoder": 8292, "vae": 83.8},
}
TEXT_TOKENS = {"sd35m": 77 + 256, "ovis": 256, "longcat": 512}


@cache
def tiny(name: str) -> Any:
    """Build each tiny pipeline once for the tests that only call it."""
    return tiny_or_skip(name)


def tiny_or_skip(name: str, **options: Any) -> Any:
    try:
        return build_pipeline(name, scale="tiny", **options)
    except ImportError as error:
        pytest.skip(str(error))


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def run(pipe: Any, name: str, **changes: Any) -> torch.Tensor:
    call = {**pipeline_call(name, "tiny"), "num_inference_steps": 2, **changes}
    images: torch.Tensor = pipe(**call, generator=torch.Generator("cpu").manual_seed(0)).images
    return images


@pytest.mark.parametrize("name", PIPELINES)
def test_parts_have_the_true_sizes(name: str) -> None:
    try:
        with torch.device("meta"), unfilled():  # there are no values to fill there
            modules = modules_of(build_pipeline(name))
    except ImportError as error:
        pytest.skip(str(error))
    millions = {key: sum(p.numel() for p in module.parameters()) / 1e6 for key, module in modules.items()}
    assert millions == pytest.approx(TRUE_SIZES[name], rel=0.01)
    for module in modules.values():
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert {p.device.type for p in module.parameters()} == {"meta"}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_image_is_finite_and_repeats(name: str) -> None:
    call = pipeline_call(name, "tiny")
    images = run(tiny(name), name)
    assert images.shape == (1, 3, call["height"], call["width"])
    assert images.dtype == torch.bfloat16
    assert images.isfinite().all()
    assert ((images <= 0) | (images >= 1)).float().mean() < 0.2
    assert torch.equal(run(tiny(name), name), images)
    assert torch.equal(run(tiny_or_skip(name), name), images)
    assert not torch.equal(run(tiny_or_skip(name, seed=1), name), images)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("argument", ["prompt", "negative_prompt"])
def test_each_prompt_matters(name: str, argument: str) -> None:
    difference = run(tiny(name), name).float() - run(tiny(name), name, **{argument: "a red fox"}).float()
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("name", PIPELINES)
def test_every_part_matters(name: str) -> None:
    pipe = tiny_or_skip(name)
    images = run(pipe, name)
    for key, module in modules_of(pipe).items():
        # Not the encoder of a VAE, and not the vision tower of a text encoder: nothing is shown to them.
        root = module.decoder if key == "vae" else module
        stacks = [m for n, m in root.named_modules() if isinstance(m, nn.ModuleList) and "visual" not in n]
        weight = next(p for p in stacks[0].parameters() if p.ndim >= 2)
        before = weight.clone()
        weight.mul_(-1)
        assert not torch.equal(run(pipe, name), images), key
        weight.copy_(before)
    assert torch.equal(run(pipe, name), images)


@pytest.mark.parametrize("name", PIPELINES)
def test_state_is_that_of_a_loaded_pipeline(name: str) -> None:
    pipe = tiny(name)
    for module in modules_of(pipe).values():
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
        for key, buffer in module.named_buffers():
            if key.endswith("inv_freq"):  # of rotary embeddings: as computed, in full precision
                assert buffer.dtype == torch.float32
                assert buffer.flatten()[0] == 1
    assert pipe._progress_bar_config == {"disable": True}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_denoiser_sees_the_true_number_of_text_tokens(name: str) -> None:
    pipe = tiny(name)
    lengths = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    run(pipe, name)
    handle.remove()
    assert set(lengths) == {TEXT_TOKENS[name]}
    assert len(lengths) == (2 if name == "sd35m" else 4)  # of two steps: one batch, or a pass for each half


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_are_not_cut_short(name: str) -> None:
    pipe = tiny(name)
    call = pipeline_call(name)
    for key, tokenizer in pipe.components.items():
        if key.startswith("tokenizer"):
            most = min(tokenizer.model_max_length, 128)  # of CLIP 77
            assert 40 < len(tokenizer(call["prompt"]).input_ids) < most, key
            assert 8 < len(tokenizer(call["negative_prompt"]).input_ids) < most, key


def test_calls_are_those_of_the_benchmark() -> None:
    calls = {name: pipeline_call(name) for name in PIPELINES}
    sizes = {name: (call["width"], call["height"], call["num_inference_steps"]) for name, call in calls.items()}
    assert sizes == {"sd35m": (1024, 1024, 28), "ovis": (1024, 1024, 50), "longcat": (1344, 768, 50)}
    assert all(call["guidance_scale"] > 1 and call["output_type"] == "pt" for call in calls.values())
    assert calls["longcat"]["enable_prompt_rewrite"] is False


@pytest.mark.parametrize("function", [build_pipeline, pipeline_call])
def test_an_unknown_name_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="no pipeline is named 'sdxl'; choose one of sd35m, ovis, longcat"):
        function("sdxl")
