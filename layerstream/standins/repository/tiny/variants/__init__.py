"""Further pipeline classes, built of the parts of the tiny pipelines: what the sweep of tests/test_variants.py runs.

A new class is a `Variant` in the file of its family: parts that a family shares, the class, the arguments of its calls.
"""

from typing import Any

import torch

from layerstream.standins.repository.tiny.variants import (
    flux,
    images,
    others,
    pixels,
    priors,
    sound,
    stable_diffusion,
    stable_diffusion_xl,
    unet_video,
    video,
)
from layerstream.standins.repository.tiny.variants.not_swept import NOT_SWEPT
from layerstream.standins.repository.tiny.variants.variant import Variant, build, run

__all__ = ["NOT_SWEPT", "VARIANTS", "build_variant", "run_variant"]

_FAMILIES = (stable_diffusion, stable_diffusion_xl, unet_video, pixels, priors, flux, images, video, sound, others)
RECIPES_OF_VARIANTS: dict[str, Variant] = {each.class_name: each for family in _FAMILIES for each in family.VARIANTS}
VARIANTS: tuple[str, ...] = tuple(RECIPES_OF_VARIANTS)


def build_variant(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny pipeline of the class `name` (one of `VARIANTS`), as `build_tiny` does."""
    return build(RECIPES_OF_VARIANTS[name], seed=seed, dtype=dtype)


def run_variant(pipe: Any, name: str, *, seed: int = 0) -> list[torch.Tensor]:
    """Call what `build_variant(name)` returned once; all tensors of what it returns, in float32 and in order."""
    return run(pipe, RECIPES_OF_VARIANTS[name], seed=seed)
