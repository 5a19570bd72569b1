"""Denoisers at their true size with random weights, and the inputs of one pass at the benchmark's resolution.

[Note: memory] A denoiser is built directly in its dtype and without initialisation, so that no page of it is touched
before it is filled: the peak is its weights and one pool of random values (8 MB, or 256 MB when drawn on CUDA).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from layerstream.standins.libraries import diffusers
from layerstream.standins.weights import cast_floating_, default_dtype, fill_normal_, skip_init

Scale = Literal["full", "tiny"]


@dataclass(frozen=True)
class _Denoiser:
    """A class of diffusers with its options and the sizes of its inputs, each by scale."""

    class_name: str
    options: Mapping[Scale, Mapping[str, Any]]
    grid: Mapping[Scale, tuple[int, int]]  # height, width of the latent image in patches
    text_tokens: Mapping[Scale, int]


def _by_scale(full: Any, tiny: Any) -> Mapping[Scale, Any]:
    return MappingProxyType({"full": full, "tiny": tiny})


_TINY_FLUX_LIKE = {
    "num_layers": 4,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
_DENOISERS = {
    # Stable Diffusion 3.5 medium, 2.24 B: 1024 x 1024, 77 CLIP and 256 T5 tokens.
    "sd35m": _Denoiser(
        class_name="SD3Transformer2DModel",
        options=_by_scale(
            full={
                "sample_size": 128,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
            tiny={
                "sample_size": 16,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 6,
                "attention_head_dim": 8,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 64,
                "pos_embed_max_size": 16,
                "dual_attention_layers": (0, 1, 2),
                "qk_norm": "rms_norm",
            },
        ),
        grid=_by_scale(full=(64, 64), tiny=(4, 4)),
        text_tokens=_by_scale(full=333, tiny=7),
    ),
    # Ovis-Image-7B, 7.37 B: 1024 x 1024. The defaults of the class are the real sizes.
    "ovis": _Denoiser(
        class_name="OvisImageTransformer2DModel",
        options=_by_scale(full={}, tiny=_TINY_FLUX_LIKE),
        grid=_by_scale(full=(64, 64), tiny=(4, 4)),
        text_tokens=_by_scale(full=256, tiny=7),
    ),
    # LongCat-Image, 6.27 B: 1344 x 768. The defaults of the class are the 11.9 B of Flux.
    "longcat": _Denoiser(
        class_name="LongCatImageTransformer2DModel",
        options=_by_scale(
            full={"num_layers": 10, "num_single_layers": 20}, tiny={**_TINY_FLUX_LIKE, "pooled_projection_dim": 32}
        ),
        grid=_by_scale(full=(48, 84), tiny=(4, 6)),
        text_tokens=_by_scale(full=512, tiny=7),
    ),
}
DENOISERS: tuple[str, ...] = tuple(_DENOISERS)


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
        scale: "full" is the true size (4.5 to 14.7 GB in bf16); "tiny" the same class with a few small blocks.

    Raises:
        ValueError: No denoiser has this name.
        ImportError: The installed diffusers has no such class.
    """
    spec = _spec(name)
    # Before the default dtype changes: a library may compute constants while it is imported.
    denoiser_class = getattr(diffusers, spec.class_name)
    with default_dtype(dtype), skip_init():
        model: nn.Module = denoiser_class(**spec.options[scale])
    # The parameters have the dtype already, the table of positions has not (0.9 GB in float32): cast before the weights
    # take memory.
    cast_floating_(model, dtype)
    fill_normal_(model, seed=seed, pool_device=fill_device)
    return model.eval().requires_grad_(False)


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
        dtype: Of latents, text and timestep; positions are float32, as the pipelines pass them.
        seed: Of the values. Two seeds give the two passes of guidance.
        scale: The one given to `build_denoiser`.

    Returns:
        For "sd35m" a batch of 2 (both halves of guidance): hidden_states [2, 16, 2 h, 2 w], encoder_hidden_states
        [2, text, joint], pooled_projections [2, pooled]. For the others a batch of 1: hidden_states [1, h * w, 64],
        encoder_hidden_states [1, text, joint], img_ids [h * w, 3], txt_ids [text, 3]. Also timestep and return_dict.
    """
    spec = _spec(name)
    height, width = spec.grid[scale]
    text = spec.text_tokens[scale]
    config: Any = model.config
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    if name == "sd35m":
        return {
            # Guidance gives both halves of the batch the same latents.
            "hidden_states": normal(1, config.in_channels, 2 * height, 2 * width).repeat(2, 1, 1, 1),
            "encoder_hidden_states": normal(2, text, config.joint_attention_dim),
            "pooled_projections": normal(2, config.pooled_projection_dim),
            "timestep": torch.full((2,), 500.0, device=device),
            "return_dict": False,
        }
    text_positions, image_positions = _positions(name, text=text, height=height, width=width)
    return {
        "hidden_states": normal(1, height * width, config.in_channels),
        "encoder_hidden_states": normal(1, text, config.joint_attention_dim),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "txt_ids": text_positions.to(device),
        "img_ids": image_positions.to(device),
        "return_dict": False,
    }


def _spec(name: str) -> _Denoiser:
    if name not in _DENOISERS:
        raise ValueError(f"no denoiser is named {name!r}; choose one of {', '.join(DENOISERS)}")
    return _DENOISERS[name]


def _positions(name: str, *, text: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (text, 3) and (height * width, 3) positions in (kind, row, column), as the pipeline `name` makes them."""
    # LongCat marks image tokens by kind 1 and starts them behind the longest text.
    kind, start = (1, text) if name == "longcat" else (0, 0)
    words = torch.zeros(text, 3)
    words[:, 1:] = torch.arange(text)[:, None]
    pixels = torch.full((height, width, 3), float(kind))
    pixels[..., 1] = start + torch.arange(height)[:, None]
    pixels[..., 2] = start + torch.arange(width)[None, :]
    return words, pixels.reshape(height * width, 3)
