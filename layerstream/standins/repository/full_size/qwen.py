"""Qwen-Image: a denoiser of 20.4 B and Qwen2.5-VL-7B, 1328 x 1328."""

from typing import Any

import torch

from layerstream.standins.components import flow_scheduler
from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.components import video_vae_options
from layerstream.standins.repository.full_size.longcat import qwen25_vl
from layerstream.standins.repository.full_size.prompts import know_words
from layerstream.standins.repository.full_size.specs import DenoiserSpec, Pass, PipelineSpec, Scale
from layerstream.standins.repository.tokenizers import qwen_tokenizer


def _inputs(given: Pass) -> dict[str, Any]:
    """Return a batch of 1: hidden_states [1, h * w, 64], encoder_hidden_states [1, text, joint] and its mask, timestep
    [1], img_shapes and return_dict."""
    return {
        "hidden_states": given.normal(1, given.height * given.width, given.config.in_channels),
        "encoder_hidden_states": given.normal(1, given.text, given.config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, given.text, dtype=torch.int64, device=given.device),
        "timestep": torch.full((1,), 0.5, device=given.device, dtype=given.dtype),
        "img_shapes": [[(1, given.height, given.width)]],
        "return_dict": False,
    }


def _parts(scale: Scale) -> dict[str, Any]:
    # The defaults of the VAE are the real sizes.
    return {
        "scheduler": flow_scheduler(by_size=True),
        "vae": diffusers.AutoencoderKLQwenImage(**({} if scale == "full" else video_vae_options(width=8))),
        "text_encoder": qwen25_vl(scale),
        "tokenizer": know_words(qwen_tokenizer()),
    }


DENOISER = DenoiserSpec(
    class_name="QwenImageTransformer2DModel",
    options={
        "full": {},  # the defaults of the class are the real sizes
        "tiny": {
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
    },
    grid={"full": (83, 83), "tiny": (4, 4)},
    text_tokens={"full": 80, "tiny": 7},
    inputs=_inputs,
)
PIPELINE = PipelineSpec(
    class_name="QwenImagePipeline",
    parts=_parts,
    call={"num_inference_steps": 50, "true_cfg_scale": 4.0},
    size={"full": (1328, 1328), "tiny": (64, 64)},
)
