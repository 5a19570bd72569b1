"""Whole pipelines at their true size with random weights, and the arguments of one call at the benchmark's resolution.

Embeddings have as many rows as the true vocabularies, of which the local tokenizers use the first few hundred.
"""

from typing import Any

import torch
from torch import nn

from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.full_size.building import build_in, fill
from layerstream.standins.repository.full_size.denoisers import build_denoiser
from layerstream.standins.repository.full_size.models import PIPELINE_SPECS, spec_of
from layerstream.standins.repository.full_size.prompts import NEGATIVE_PROMPT, PROMPT
from layerstream.standins.repository.full_size.specs import PipelineSpec, Scale
from layerstream.standins.weights import fill_normal_

PIPELINES: tuple[str, ...] = tuple(PIPELINE_SPECS)
_STD = 0.02
# With few channels, the usual 0.02 would let the text fade below the rounding of the image.
_TINY_STD, _TINY_VAE_STD = 0.2, 0.06


def build_pipeline(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    scale: Scale = "full",
    fill_device: torch.device | str | None = None,
) -> Any:
    """Return the pipeline `name` in host memory, in evaluation mode, gradients and progress bar off.

    Args:
        name: One of `PIPELINES`.
        dtype: Of parameters and of buffers in the state dict.
        seed: Of the weights; their bits also depend on `fill_device`. Every part draws from a seed of its own.
        scale: "full" is the true size (16 to 69 GB in bf16); "tiny" the same classes with a few small blocks.
        fill_device: "cuda" draws the pool of random values there, which gives a larger pool in less time.

    Raises:
        ValueError: No pipeline has this name.
        ImportError: The installed diffusers or transformers has no such class.
    """
    spec = _spec(name)
    pipeline_class = getattr(diffusers, spec.class_name)
    denoiser = build_denoiser(name, dtype=dtype, seed=1000 * seed, fill_device=fill_device, scale=scale)
    if scale == "tiny":
        fill_normal_(denoiser, std=_TINY_STD, seed=1000 * seed, pool_device=fill_device)
    parts = build_in(dtype, lambda: spec.parts(scale))
    modules = {key: part for key, part in parts.items() if isinstance(part, nn.Module)}
    for index, (key, module) in enumerate(modules.items(), start=1):
        std = _STD if scale == "full" else _TINY_VAE_STD if key == "vae" else _TINY_STD
        fill(module, dtype=dtype, std=std, seed=1000 * seed + index, pool_device=fill_device)
    pipe = pipeline_class(transformer=denoiser, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_call(name: str, scale: Scale = "full") -> dict[str, Any]:
    """Return the keyword arguments of one call of `build_pipeline(name, scale=scale)`, all but the generator.

    With guidance: "sd35m" runs both halves as one batch, the others run the denoiser twice per step. The text takes 77
    and 256 tokens in "sd35m", 256 in "ovis", 512 in "longcat" and "wan22", in both scales: the pipelines pad to that.
    In true size, the language model of "glm" generates 64 tokens, and so does that of "longcat" if it is called with
    `enable_prompt_rewrite=True`; their `most_new_tokens` says so.

    Returns:
        The arguments; the call's `images` are then [1, 3, height, width] in the dtype of the weights, values in 0..1.
        For "wan22" its `frames` are [1, frames, 3, height, width].
    """
    spec = _spec(name)
    height, width = spec.size[scale]
    shared = {
        "prompt": PROMPT + spec.suffix,
        "negative_prompt": NEGATIVE_PROMPT,
        "height": height,
        "width": width,
    }
    call = {key: value for key, value in shared.items() if key not in spec.without}
    call |= {**spec.call, "output_type": "pt"}
    if spec.num_frames is not None:
        call["num_frames"] = spec.num_frames[scale]
    if scale == "tiny":
        call["num_inference_steps"] = 4
    return call


def run_pipeline(pipe: Any, name: str, *, scale: Scale = "full", seed: int = 0, **overrides: Any) -> torch.Tensor:
    """Return the images or frames of one call.

    Args:
        pipe: What `build_pipeline(name, scale=scale)` returned, perhaps moved or streamed since.
        name: Which pipeline.
        scale: Of the arguments.
        seed: Of the generator (always on the CPU).
        **overrides: Arguments that replace or join those of `pipeline_call`.
    """
    call = {**pipeline_call(name, scale), "generator": torch.Generator("cpu").manual_seed(seed), **overrides}
    output = pipe(**call)
    made: torch.Tensor = output.frames if hasattr(output, "frames") else output.images
    return made


def _spec(name: str) -> PipelineSpec:
    return spec_of(PIPELINE_SPECS, name, "pipeline")
