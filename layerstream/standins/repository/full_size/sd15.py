"""Stable Diffusion 1.5: a U-Net of 0.86 B at 512 x 512. Its blocks are small and many, so the host bounds a pass.

There is no pipeline of it here: the denoiser is what it is measured for.
"""

from typing import Any

import torch

from layerstream.standins.repository.full_size.specs import DenoiserSpec, Pass


def _inputs(given: Pass) -> dict[str, Any]:
    """Return one half of guidance: sample [1, 4, h, w], encoder_hidden_states [1, text, cross], timestep [] and
    return_dict."""
    config = given.config
    return {
        "sample": given.normal(1, config.in_channels, given.height, given.width),
        "encoder_hidden_states": given.normal(1, given.text, config.cross_attention_dim),
        "timestep": torch.tensor(500, device=given.device),
        "return_dict": False,
    }


DENOISER = DenoiserSpec(
    class_name="UNet2DConditionModel",
    options={
        "full": {
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 2,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "tiny": {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        },
    },
    grid={"full": (64, 64), "tiny": (8, 8)},  # of latents: there are no patches
    text_tokens={"full": 77, "tiny": 7},
    inputs=_inputs,
)
