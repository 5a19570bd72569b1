"""The true-size pipelines: their parts have the true sizes; in the tiny scale they run, repeat and hear the prompt."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from layerstream.standins import PIPELINES, build_pipeline, pipeline_call, run_pipeline
from layerstream.standins.weights import unfilled

pytest.importorskip("diffusers", reason="the stand-ins are diffusers pipelines")
pytest.importorskip("transformers", reason="the text encoders of the stand-ins are transformers models")

# Millions of parameters of the published models.
TRUE_SIZES = {
    "sd35m": {"transformer": 2243, "text_encoder": 124, "text_encoder_2": 695, "text_encoder_3": 4762, "vae": 83.8},
    "ovis": {"transformer": 7370, "text_encoder": 1721, "vae": 83.8},
    "longcat": {"transformer": 6271, "text_encoder": 8292, "vae": 83.8},
    "glm": {"transformer": 6927, "vision_language_encoder": 10114, "text_encoder": 218, "vae": 83.8},
    "qwen": {"transformer": 20430, "text_encoder": 8292, "vae": 126.9},
    "wan22": {"transformer": 14288, "transformer_2": 14288, "text_encoder": 5681, "vae": 126.9},
}
# Of those that pad their text.
TEXT_TOKENS = {"sd35m": 77 + 256, "ovis": 256, "longcat": 512, "wan22": 512}
SHAPES = {"wan22": (1, 5, 3)}
FLOAT32_ISLANDS = {"wan22": ("transformer", "transformer_2")}


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
    return run_pipeline(pipe, name, scale="tiny", **{"num_inference_steps": 2, **changes})


def on_meta(name: str) -> Any:
    try:
        with torch.device("meta"), unfilled():  # there are no values to fill there
            return build_pipeline(name)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", PIPELINES)
def test_parts_have_the_true_sizes(name: str) -> None:
    modules = modules_of(on_meta(name))
    millions = {key: sum(p.numel() for p in module.parameters()) / 1e6 for key, module in modules.items()}
    assert millions == pytest.approx(TRUE_SIZES[name], rel=0.01)
    for key, module in modules.items():
        islands = {torch.float32} if key in FLOAT32_ISLANDS.get(name, ()) else set()
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16, *islands}
        assert {p.device.type for p in module.parameters()} == {"meta"}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_image_is_finite_and_repeats(name: str) -> None:
    call = pipeline_call(name, "tiny")
    images = run(tiny(name), name)
    assert images.shape == (*SHAPES.get(name, (1, 3)), call["height"], call["width"])
    assert images.dtype == torch.bfloat16
    assert images.isfinite().all()
    assert ((images <= 0) | (images >= 1)).float().mean() < 0.2
    assert torch.equal(run(tiny(name), name), images)
    assert torch.equal(run(tiny_or_skip(name), name), images)
    assert not torch.equal(run(tiny_or_skip(name, seed=1), name), images)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("argument", ["prompt", "negative_prompt"])
def test_each_prompt_matters(name: str, argument: str) -> None:
    if argument not in pipeline_call(name, "tiny"):
        pytest.skip("without it")
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


@pytest.mark.parametrize("name", TEXT_TOKENS)
def test_the_denoiser_sees_the_true_number_of_text_tokens(name: str) -> None:
    pipe = tiny(name)
    lengths = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    run(pipe, name)
    handle.remove()
    assert set(lengths) == {TEXT_TOKENS[name]}
    # Of two steps: one batch, or a pass for each half. With two denoisers this one has the first step.
    assert len(lengths) == (2 if name in ("sd35m", "wan22") else 4)


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_are_not_cut_short(name: str) -> None:
    pipe = tiny(name)
    call = pipeline_call(name)
    for key, tokenizer in pipe.components.items():
        if key.startswith("tokenizer") and name != "glm":  # whose tokenizer has a token for each byte
            most = min(tokenizer.model_max_length, 128)  # of CLIP 77
            assert 40 < len(tokenizer(call["prompt"]).input_ids) < most, key
            assert 8 < len(tokenizer(call["negative_prompt"]).input_ids) < most, key


def test_calls_are_those_of_the_benchmark() -> None:
    calls = {name: pipeline_call(name) for name in PIPELINES}
    sizes = {name: (call["width"], call["height"], call["num_inference_steps"]) for name, call in calls.items()}
    assert sizes == {
        "sd35m": (1024, 1024, 28),
        "ovis": (1024, 1024, 50),
        "longcat": (1344, 768, 50),
        "glm": (1024, 1024, 50),
        "qwen": (1328, 1328, 50),
        "wan22": (832, 480, 40),
    }
    assert all(call.get("guidance_scale", call.get("true_cfg_scale")) > 1 for call in calls.values())
    assert all(call["output_type"] == "pt" for call in calls.values())
    assert calls["longcat"]["enable_prompt_rewrite"] is False
    assert calls["wan22"]["num_frames"] == 81


def layer_widths(pipe: Any, name: str, encoder: str, **changes: Any) -> list[int]:
    """How many tokens the first layer of the language model was given, call by call."""
    widths: list[int] = []
    layer = getattr(pipe, encoder).model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    run(pipe, name, **changes)
    handle.remove()
    return widths


def test_longcat_rewrites_its_prompt_in_so_many_tokens() -> None:
    pipe = tiny("longcat")
    assert layer_widths(pipe, "longcat", "text_encoder").count(1) == 0
    assert layer_widths(pipe, "longcat", "text_encoder", enable_prompt_rewrite=True).count(1) == 7
    assert not torch.equal(run(pipe, "longcat"), run(pipe, "longcat", enable_prompt_rewrite=True))
    assert on_meta("longcat").text_encoder.most_new_tokens == 64


def test_glm_generates_so_many_tokens() -> None:
    pipe = tiny("glm")
    assert layer_widths(pipe, "glm", "vision_language_encoder").count(1) == 2 * 2 + 6 * 6
    assert on_meta("glm").vision_language_encoder.most_new_tokens == 64
    images = run(pipe, "glm")
    pipe = tiny_or_skip("glm", seed=0)
    pipe.vision_language_encoder.most_new_tokens = 5
    # The end token is above what the tiny head knows, so that it cannot be kept from ending.
    pipe.vision_language_encoder.generation_config.eos_token_id = None
    assert layer_widths(pipe, "glm", "vision_language_encoder").count(1) == 4
    assert not torch.equal(run(pipe, "glm"), images)


def test_wan_takes_turns_at_the_boundary() -> None:
    pipe = tiny("wan22")
    called: list[str] = []
    handles = [
        getattr(pipe, key).register_forward_pre_hook(lambda module, args, key=key: called.append(key))
        for key in ("transformer", "transformer_2")
    ]
    run(pipe, "wan22", num_inference_steps=4)
    for handle in handles:
        handle.remove()
    first = called.count("transformer")
    assert called == ["transformer"] * first + ["transformer_2"] * (8 - first)
    assert 0 < first < 8


@pytest.mark.parametrize("function", [build_pipeline, pipeline_call])
def test_an_unknown_name_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="no pipeline is named 'sdxl'; choose one of sd35m, ovis, longcat"):
        function("sdxl")
