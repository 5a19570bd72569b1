"""Denoisers at their true size with random weights, and the inputs of one pass at the benchmark's resolution."""

from typing import Any

import torch
from torch import nn

from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.full_size.building import build_in, fill
from layerstream.standins.repository.full_size.models import DENOISER_SPECS, spec_of
from layerstream.standins.repository.full_size.specs import DenoiserSpec, Pass, Scale

DENOISERS: tuple[str, ...] = tuple(DENOISER_SPECS)


def build_denoiser(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    fill_device: torch.device | str | None = None,
    scale: Scale = "full",
) -> nn.Module:
    """Return the denoiser `name` in host memory, each parameter a tensor of its own, gradients off.

    Args:
        name: One of `DENOISERS`.
        dtype: Of parameters and of buffers in the state dict.
        seed: Of the weights; their bits also depend on `fill_device`.
        fill_device: "cuda" draws the pool of random values there, which gives a larger pool in less time.
        scale: "full" is the true size (4.5 to 40.9 GB in bf16); "tiny" the same class with a few small blocks.

    Raises:
        ValueError: No denoiser has this name.
        ImportError: The installed diffusers has no such class.
    """
    spec = _spec(name)
    denoiser_class = getattr(diffusers, spec.class_name)
    model: nn.Module = build_in(dtype, lambda: denoiser_class(**spec.options[scale]))
    return fill(model, dtype=dtype, std=0.02, seed=seed, pool_device=fill_device)


def denoiser_inputs(
    name: str,
    model: nn.Module,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
    scale: Scale = "full",
) -> dict[str, Any]:
    """Return the keyword arguments of one pass of `model` at the benchmark's size.

    Values are drawn on the CPU, so that they do not depend on `device`.

    Args:
        name: One of `DENOISERS`.
        model: What `build_denoiser` returned for this name; its config gives the widths.
        device: Where the tensors are put.
        dtype: Of latents, text and timestep.
        seed: Of the values. Two seeds give the two passes of guidance.
        scale: The one given to `build_denoiser`.

    Returns:
        What the model's file says of its inputs: for "sd35m" a batch of 2, both halves of guidance; for the others 1.
    """
    spec = _spec(name)
    height, width = spec.grid[scale]
    config: Any = model.config
    generator = torch.Generator("cpu").manual_seed(seed)
    return spec.inputs(
        Pass(config, height, width, spec.text_tokens[scale], device, dtype, generator, spec.frames[scale])
    )


def _spec(name: str) -> DenoiserSpec:
    return spec_of(DENOISER_SPECS, name, "denoiser")
