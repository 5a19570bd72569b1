"""A Stable Diffusion 3 stand-in of about 300 MB: large enough to see blocks stream, small enough for any machine."""

from typing import Any

import torch

from layerstream.standins.components import clip_text_encoder, finish, flow_scheduler, image_vae, t5_encoder
from layerstream.standins.libraries import diffusers
from layerstream.standins.tokenizers import clip_tokenizer, t5_tokenizer
from layerstream.standins.weights import skip_init

DENOISER_BLOCKS = 14
DENOISER_WIDTH = 256
T5_BLOCKS = 10
T5_WIDTH = 512
CLIP_WIDTH = 256
# Wide enough for a signal through every part; trained models of this width have about the same.
DEMO_STD = 0.04

# Arguments of one call: 6 steps at 128 x 128 with guidance, both halves of which are one batch.
DEMO_CALL: dict[str, Any] = {
    "prompt": "a lighthouse above a stormy sea, oil on canvas",
    "negative_prompt": "blurry",
    "height": 128,
    "width": 128,
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "max_sequence_length": 64,
}


def build_demo(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a StableDiffusion3Pipeline on the CPU with random weights, progress bar off.

    In float32 the weights take about 300 MB: 14 denoiser blocks of 8 to 13 MB, 10 T5 blocks of 10 MB, two CLIP
    encoders, a VAE. Lower precisions take half.

    Args:
        dtype: Of all weights.
        seed: Of the weights.
    """
    with skip_init():
        parts: dict[str, Any] = {
            "transformer": diffusers.SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=DENOISER_BLOCKS,
                num_attention_heads=DENOISER_WIDTH // 64,
                attention_head_dim=64,
                joint_attention_dim=T5_WIDTH,
                caption_projection_dim=DENOISER_WIDTH,
                pooled_projection_dim=2 * CLIP_WIDTH,
                pos_embed_max_size=32,
                dual_attention_layers=tuple(range(DENOISER_BLOCKS // 2)),
                qk_norm="rms_norm",
            ),
            "scheduler": flow_scheduler(),
            "vae": image_vae(widths=(16, 32, 64, 64), groups=8),
            "text_encoder": clip_text_encoder(hidden=CLIP_WIDTH, layers=6, projected=True),
            "tokenizer": clip_tokenizer(),
            "text_encoder_2": clip_text_encoder(hidden=CLIP_WIDTH, layers=8, projected=True, hidden_act="gelu"),
            "tokenizer_2": clip_tokenizer(),
            "text_encoder_3": t5_encoder(hidden=T5_WIDTH, ffn=2 * T5_WIDTH, layers=T5_BLOCKS),
            "tokenizer_3": t5_tokenizer(),
        }
    for index, part in enumerate(parts.values()):
        if isinstance(part, torch.nn.Module):
            finish(part, dtype=dtype, seed=1000 * seed + index, std=DEMO_STD)
    pipe = diffusers.StableDiffusion3Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
