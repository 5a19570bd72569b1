"""Wan2.2-T2V-A14B: two denoisers of 14.3 B, one for the noisy steps and one for the rest, and UMT5-XXL; 832 x 480."""

from collections.abc import Mapping
from typing import Any

import torch

from layerstream.standins.libraries import diffusers, transformers
from layerstream.standins.repository.components import video_vae_options
from layerstream.standins.repository.full_size.parts import TINY_VOCAB_SIZE
from layerstream.standins.repository.full_size.prompts import know_words
from layerstream.standins.repository.full_size.specs import DenoiserSpec, Pass, PipelineSpec, Scale
from layerstream.standins.tokenizers import t5_tokenizer

_FRAMES: Mapping[Scale, int] = {"full": 81, "tiny": 5}
_OPTIONS: dict[Scale, dict[str, Any]] = {
    "full": {},  # the defaults of the class are the real sizes
    "tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
        "rope_max_seq_len": 32,
    },
}


def _inputs(given: Pass) -> dict[str, Any]:
    """Return a batch of 1: hidden_states [1, 16, frames, 2 h, 2 w], encoder_hidden_states [1, text, width of it],
    timestep [1] and return_dict."""
    return {
        "hidden_states": given.normal(1, given.config.in_channels, given.frames, 2 * given.height, 2 * given.width),
        "encoder_hidden_states": given.normal(1, given.text, given.config.text_dim),
        "timestep": torch.full((1,), 900, device=given.device),
        "return_dict": False,
    }


def _parts(scale: Scale) -> dict[str, Any]:
    return {
        "transformer_2": diffusers.WanTransformer3DModel(**_OPTIONS[scale]),
        "boundary_ratio": 0.875,
        "scheduler": _scheduler(),
        "vae": diffusers.AutoencoderKLWan(**({} if scale == "full" else video_vae_options(width=8))),
        "text_encoder": _umt5_xxl(scale),
        "tokenizer": know_words(t5_tokenizer()),
    }


def _scheduler() -> Any:
    with torch.device("cpu"):  # where it keeps its sigmas, also when all else is built on the meta device
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )


def _umt5_xxl(scale: Scale) -> Any:
    """Return a UMT5EncoderModel, in full size of 5.681 B."""
    full = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    tiny = {"vocab_size": TINY_VOCAB_SIZE, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
    options = full if scale == "full" else tiny
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**options, feed_forward_proj="gated-gelu"))


DENOISER = DenoiserSpec(
    class_name="WanTransformer3DModel",
    options=_OPTIONS,
    grid={"full": (30, 52), "tiny": (2, 2)},
    text_tokens={"full": 512, "tiny": 7},
    inputs=_inputs,
    frames={"full": 21, "tiny": 2},  # of latents: one, and one for each four more of the video
)
PIPELINE = PipelineSpec(
    class_name="WanPipeline",
    parts=_parts,
    call={"num_inference_steps": 40, "guidance_scale": 4.0},
    size={"full": (480, 832), "tiny": (32, 32)},
    num_frames=_FRAMES,
)
