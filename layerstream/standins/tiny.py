"""Tiny stand-ins of real diffusers pipelines: every class, block stack and call path, in a few hundred kilobytes.

The weights are larger than in a trained model (`TINY_STD`): with few channels and the usual 0.02, the signal of a text
encoder would fade below the rounding of the output, and a test that compares outputs would miss a wrong weight there.
"""

from collections.abc import Callable
from typing import Any

import torch

from layerstream.standins.components import (
    clip_text_encoder,
    finish,
    flow_scheduler,
    image_vae,
    qwen3_encoder,
    qwen25_vl_encoder,
    t5_encoder,
    video_vae_options,
)
from layerstream.standins.libraries import Library, diffusers
from layerstream.standins.tokenizers import clip_tokenizer, qwen_tokenizer, qwen_vl_processor, t5_tokenizer
from layerstream.standins.weights import skip_init

TINY_STD = 0.2
VAE_STD = 0.06  # keeps nearly all values of the image inside the clamp to 0..1
HIDDEN = 32  # of every text encoder
ENCODER_LAYERS = 3
BLOCKS = 4  # of every stack of a denoiser
PROMPT = "a red fox in the snow"
NEGATIVE_PROMPT = "blurry"


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
    if name not in _PIPELINES:
        raise ValueError(f"no tiny pipeline is named {name!r}; choose one of {', '.join(TINY_PIPELINES)}")
    class_name, make_parts = _PIPELINES[name]
    try:
        pipeline_class = getattr(diffusers, class_name)
        with skip_init():
            parts = make_parts()
    except ImportError as error:
        raise ImportError(f"the tiny pipeline {name!r} cannot be built here: {error}", name=error.name) from error
    for index, (key, part) in enumerate(parts.items()):
        if isinstance(part, torch.nn.Module):
            finish(part, dtype=dtype, seed=1000 * seed + index, std=VAE_STD if key == "vae" else TINY_STD)
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
        float32 [1, 3, height, width], for the video pipeline [1, frames, 3, height, width]; values in 0..1.
    """
    call = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE_PROMPT,
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "pt",
        **_CALLS[name],
        **overrides,
    }
    output = pipe(**call)
    images = output.frames if hasattr(output, "frames") else output.images
    return torch.as_tensor(images).float()


def _sd3() -> dict[str, Any]:
    return {
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=BLOCKS,
            num_attention_heads=4,
            attention_head_dim=8,
            joint_attention_dim=2 * HIDDEN,
            caption_projection_dim=32,
            pooled_projection_dim=2 * HIDDEN,
            pos_embed_max_size=16,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        "scheduler": flow_scheduler(),
        "vae": image_vae(widths=(8, 8, 16)),
        "text_encoder": clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=True),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=True, hidden_act="gelu"),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_encoder(hidden=2 * HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer_3": t5_tokenizer(),
    }


def _flux_like_denoiser() -> dict[str, Any]:
    """Return what the denoisers of Flux and its descendants have in common, 16 latent channels as 2 x 2 patches."""
    return {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": BLOCKS,
        "num_single_layers": BLOCKS,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": HIDDEN,
        "axes_dims_rope": (4, 6, 6),
    }


def _flux() -> dict[str, Any]:
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            **_flux_like_denoiser(), pooled_projection_dim=HIDDEN, guidance_embeds=True
        ),
        "scheduler": flow_scheduler(by_size=True),
        "vae": image_vae(widths=(8, 8, 16)),
        "text_encoder": clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=False),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer_2": t5_tokenizer(),
    }


def _ovis() -> dict[str, Any]:
    return {
        "transformer": diffusers.OvisImageTransformer2DModel(**_flux_like_denoiser(), out_channels=64),
        "scheduler": flow_scheduler(by_size=True),
        "vae": image_vae(widths=(8, 8, 16)),
        "text_encoder": qwen3_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": qwen_tokenizer(),
    }


def _longcat() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    return {
        "transformer": diffusers.LongCatImageTransformer2DModel(**_flux_like_denoiser(), pooled_projection_dim=HIDDEN),
        "scheduler": flow_scheduler(by_size=True),
        "vae": image_vae(widths=(8, 8, 16)),
        "text_encoder": qwen25_vl_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, vision_layers=ENCODER_LAYERS),
        "tokenizer": tokenizer,
        "text_processor": qwen_vl_processor(tokenizer),
    }


def _qwen_image() -> dict[str, Any]:
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=BLOCKS,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=HIDDEN,
            axes_dims_rope=(4, 6, 6),
        ),
        "scheduler": flow_scheduler(by_size=True),
        "vae": diffusers.AutoencoderKLQwenImage(**video_vae_options(width=8)),
        "text_encoder": qwen25_vl_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, vision_layers=ENCODER_LAYERS),
        "tokenizer": qwen_tokenizer(),
    }


def _wan22() -> dict[str, Any]:
    try:
        Library("diffusers.pipelines.wan.pipeline_wan").prompt_clean(PROMPT)
    except NameError as error:  # diffusers before 0.36 calls ftfy without having imported it
        raise ImportError("WanPipeline of this diffusers needs the package ftfy", name="ftfy") from error

    def denoiser() -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            in_channels=16,
            out_channels=16,
            num_layers=BLOCKS,
            num_attention_heads=2,
            attention_head_dim=16,
            text_dim=HIDDEN,
            freq_dim=32,
            ffn_dim=64,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    return {
        "transformer": denoiser(),
        "transformer_2": denoiser(),
        "boundary_ratio": 0.875,
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": diffusers.AutoencoderKLWan(**video_vae_options(width=8)),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS, per_layer_bias=True),
        "tokenizer": t5_tokenizer(),
    }


_PIPELINES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "sd3": ("StableDiffusion3Pipeline", _sd3),
    "flux": ("FluxPipeline", _flux),
    "ovis": ("OvisImagePipeline", _ovis),
    "longcat": ("LongCatImagePipeline", _longcat),
    "qwen_image": ("QwenImagePipeline", _qwen_image),
    "wan22": ("WanPipeline", _wan22),
}
TINY_PIPELINES: tuple[str, ...] = tuple(_PIPELINES)
# Guidance is on in each: SD3 batches both halves, the others run the denoiser twice per step.
_CALLS: dict[str, dict[str, Any]] = {
    "sd3": {"guidance_scale": 5.0, "max_sequence_length": 32},
    "flux": {"guidance_scale": 3.5, "true_cfg_scale": 3.0, "max_sequence_length": 32},
    "ovis": {"guidance_scale": 5.0},
    # Rewriting would first generate up to 512 tokens of a new prompt.
    "longcat": {"guidance_scale": 4.5, "enable_prompt_rewrite": False},
    "qwen_image": {"true_cfg_scale": 4.0},
    "wan22": {"guidance_scale": 4.0, "num_frames": 5, "max_sequence_length": 32},
}
