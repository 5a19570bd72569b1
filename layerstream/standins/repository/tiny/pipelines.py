"""Tiny stand-ins of real diffusers pipelines: every class, block stack and call path, in a few hundred kilobytes."""

from typing import Any

import torch

from layerstream.standins.components import finish
from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.tiny.generating import GENERATING_RECIPES
from layerstream.standins.repository.tiny.images import IMAGE_RECIPES
from layerstream.standins.repository.tiny.recipes import NEGATIVE_PROMPT, PROMPT, SIDE, Recipe
from layerstream.standins.repository.tiny.transformers import TRANSFORMER_RECIPES
from layerstream.standins.repository.tiny.unets import UNET_RECIPES
from layerstream.standins.repository.tiny.video import VIDEO_RECIPES
from layerstream.standins.weights import skip_init

RECIPES: dict[str, Recipe] = {
    **IMAGE_RECIPES,
    **VIDEO_RECIPES,
    **UNET_RECIPES,
    **TRANSFORMER_RECIPES,
    **GENERATING_RECIPES,
}
TINY_PIPELINES: tuple[str, ...] = tuple(RECIPES)


def build_tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return the tiny pipeline `name` (one of `TINY_PIPELINES`) on the CPU, in evaluation mode, progress bar off.

    Args:
        name: Which pipeline.
        seed: Of the weights; every part draws from a seed of its own.
        dtype: Of all weights, except those that the class keeps in float32 (Wan's time embedder and norms).

    Raises:
        ValueError: No pipeline has this name.
        ImportError: The installed diffusers or transformers has no such class, or it lacks a package.
    """
    if name not in RECIPES:
        raise ValueError(f"no tiny pipeline is named {name!r}; choose one of {', '.join(TINY_PIPELINES)}")
    recipe = RECIPES[name]
    try:
        pipeline_class = getattr(diffusers, recipe.class_name)
        with skip_init():
            parts = recipe.parts()
    except ImportError as error:
        raise ImportError(f"the tiny pipeline {name!r} cannot be built here: {error}", name=error.name) from error
    for index, (key, part) in enumerate(parts.items()):
        if isinstance(part, torch.nn.Module):
            finish(part, dtype=dtype, seed=1000 * seed + index, std=recipe.std_of(key))
    if recipe.adjust is not None:
        recipe.adjust(parts)
    pipe = pipeline_class(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_tiny(pipe: Any, name: str, *, seed: int = 0, **overrides: Any) -> torch.Tensor:
    """Call `pipe` as its users do, with guidance, 4 steps and a small size.

    Args:
        pipe: What `build_tiny(name)` returned, perhaps moved or streamed since.
        name: Which pipeline, for the arguments that differ.
        seed: Of the generator (always on the CPU) that draws the latents.
        **overrides: Arguments of the call that replace or join the defaults.

    Returns:
        float32 [1, 3, height, width], for the video pipelines [1, frames, 3, height, width]; values in 0..1. For the
        audio pipeline [1, samples].
    """
    recipe = RECIPES[name]
    shared = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE_PROMPT,
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": 4,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "pt",
    }
    taken = {key: value for key, value in shared.items() if key not in recipe.without}
    with recipe.around():
        output = pipe(**{**taken, **recipe.call, **recipe.inputs(), **overrides})
    results = next(getattr(output, key) for key in ("frames", "images", "audios") if hasattr(output, key))
    return torch.as_tensor(results).float()
