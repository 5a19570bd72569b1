"""Stable Diffusion 3.5 medium: a denoiser of 2.24 B, two CLIP encoders and T5 XXL, 1024 x 1024."""

from typing import Any

import torch

from layerstream.standins.components import flow_scheduler
from layerstream.standins.libraries import transformers
from layerstream.standins.repository.full_size.parts import TINY_VOCAB_SIZE, vae
from layerstream.standins.repository.full_size.prompts import know_words
from layerstream.standins.repository.full_size.specs import DenoiserSpec, Pass, PipelineSpec, Scale
from layerstream.standins.tokenizers import CLIP_END_ID, CLIP_START_ID, clip_tokenizer, t5_tokenizer


def _inputs(given: Pass) -> dict[str, Any]:
    """Return a batch of 2, both halves of guidance: hidden_states [2, 16, 2 h, 2 w], encoder_hidden_states
    [2, text, joint], pooled_projections [2, pooled], timestep [2] and return_dict."""
    config = given.config
    return {
        # Guidance gives both halves of the batch the same latents.
        "hidden_states": given.normal(1, config.in_channels, 2 * given.height, 2 * given.width).repeat(2, 1, 1, 1),
        "encoder_hidden_states": given.normal(2, given.text, config.joint_attention_dim),
        "pooled_projections": given.normal(2, config.pooled_projection_dim),
        "timestep": torch.full((2,), 500.0, device=given.device),
        "return_dict": False,
    }


def _parts(scale: Scale) -> dict[str, Any]:
    full = scale == "full"
    # In the tiny denoiser both CLIP states side by side are as wide as one of T5.
    small = {"hidden": 16, "layers": 3, "heads": 2, "projection": 32}
    clip_l = {"hidden": 768, "layers": 12, "heads": 12, "projection": 768} if full else small
    clip_g = {"hidden": 1280, "layers": 32, "heads": 20, "projection": 1280} if full else small
    return {
        "scheduler": flow_scheduler(),
        "vae": vae(scale),
        "text_encoder": _clip(scale, **clip_l, hidden_act="quick_gelu"),
        "tokenizer": know_words(clip_tokenizer()),
        "text_encoder_2": _clip(scale, **clip_g, hidden_act="gelu"),
        "tokenizer_2": know_words(clip_tokenizer()),
        "text_encoder_3": _t5_xxl(scale),
        "tokenizer_3": know_words(t5_tokenizer()),
    }


def _clip(scale: Scale, *, hidden: int, layers: int, heads: int, projection: int, hidden_act: str) -> Any:
    """Return a CLIPTextModelWithProjection: CLIP-L 0.124 B, CLIP-G 0.695 B."""
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=49408 if scale == "full" else TINY_VOCAB_SIZE,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            projection_dim=projection,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=hidden_act,
            bos_token_id=CLIP_START_ID,
            eos_token_id=CLIP_END_ID,
            pad_token_id=CLIP_END_ID,
        )
    )


def _t5_xxl(scale: Scale) -> Any:
    """Return a T5EncoderModel, in full size the 4.762 B of T5 v1.1 XXL."""
    full = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    tiny = {"vocab_size": TINY_VOCAB_SIZE, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
    options = full if scale == "full" else tiny
    return transformers.T5EncoderModel(transformers.T5Config(**options, feed_forward_proj="gated-gelu"))


DENOISER = DenoiserSpec(
    class_name="SD3Transformer2DModel",
    options={
        "full": {
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
        "tiny": {
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
    },
    grid={"full": (64, 64), "tiny": (4, 4)},
    text_tokens={"full": 333, "tiny": 7},  # 77 of CLIP and 256 of T5
    inputs=_inputs,
)
PIPELINE = PipelineSpec(
    class_name="StableDiffusion3Pipeline",
    parts=_parts,
    call={"num_inference_steps": 28, "guidance_scale": 4.5, "max_sequence_length": 256},
    size={"full": (1024, 1024), "tiny": (64, 64)},
)
