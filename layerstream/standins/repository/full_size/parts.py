"""What several models at true size share: their VAE, what their denoisers are given, and small sizes."""

from typing import Any

import torch

from layerstream.standins.components import image_vae
from layerstream.standins.repository.full_size.specs import Pass, Scale

TINY_VOCAB_SIZE = 1024
TINY_FLUX_LIKE = {
    "num_layers": 4,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


def vae(scale: Scale, **options: Any) -> Any:
    """Return an AutoencoderKL that halves the size three times, in full size 83.8 M."""
    if scale == "tiny":
        return image_vae(widths=(8, 8, 8, 16), **options)
    return image_vae(widths=(128, 256, 512, 512), layers=2, groups=32, **options)


def flux_like_inputs(given: Pass, *, kind: int, start: int) -> dict[str, Any]:
    """Return the arguments of a denoiser of Flux's family.

    Args:
        given: the sizes.
        kind: marks image tokens in their positions.
        start: row and column of the first image token.

    Returns:
        A batch of 1: hidden_states [1, h * w, 64], encoder_hidden_states [1, text, joint], timestep [1], img_ids
        [h * w, 3], txt_ids [text, 3] (float32, as the pipelines pass them) and return_dict.
    """
    text_positions, image_positions = _positions(given, kind=kind, start=start)
    return {
        "hidden_states": given.normal(1, given.height * given.width, given.config.in_channels),
        "encoder_hidden_states": given.normal(1, given.text, given.config.joint_attention_dim),
        "timestep": torch.full((1,), 0.5, device=given.device, dtype=given.dtype),
        "txt_ids": text_positions.to(given.device),
        "img_ids": image_positions.to(given.device),
        "return_dict": False,
    }


def _positions(given: Pass, *, kind: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (text, 3) and (height * width, 3) positions in (kind, row, column)."""
    words = torch.zeros(given.text, 3)
    words[:, 1:] = torch.arange(given.text)[:, None]
    pixels = torch.full((given.height, given.width, 3), float(kind))
    pixels[..., 1] = start + torch.arange(given.height)[:, None]
    pixels[..., 2] = start + torch.arange(given.width)[None, :]
    return words, pixels.reshape(given.height * given.width, 3)
