"""Tiny image pipelines whose denoiser attends to text and image jointly: SD 3, Flux, Qwen-Image and others."""

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch

from layerstream.standins.components import clip_text_encoder, flow_scheduler, image_vae, t5_encoder
from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.components import (
    qwen3_encoder,
    qwen3_vl_encoder,
    qwen25_vl_encoder,
    smol_lm3,
    video_vae_options,
)
from layerstream.standins.repository.tiny.recipes import (
    BLOCKS,
    ENCODER_LAYERS,
    HIDDEN,
    SIDE,
    Recipe,
    picture,
    pil_picture,
    replaced,
)
from layerstream.standins.repository.tokenizers import letter_tokenizer, qwen_tokenizer, qwen_vl_processor
from layerstream.standins.tokenizers import clip_tokenizer, t5_tokenizer


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


def _flux_controlnet() -> dict[str, Any]:
    # Fewer blocks than the denoiser has, as in the real ones: each residual then serves several blocks.
    options = {**_flux_like_denoiser(), "num_layers": 2, "num_single_layers": 2}
    with warnings.catch_warnings():
        # diffusers 0.42 imports its own FluxPosEmbed from where it calls that deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        controlnet = diffusers.FluxControlNetModel(**options, pooled_projection_dim=HIDDEN, guidance_embeds=True)
    return {**_flux(), "controlnet": controlnet}


def _qwen_image_edit() -> dict[str, Any]:
    return {**_qwen_image(), "processor": qwen_vl_processor(qwen_tokenizer(), image_pixels=32 * 32)}


def _flux2_vae() -> Any:
    """Return an AutoencoderKLFlux2, whose batch norm is never called: pipelines read its statistics."""
    widths = (8, 8, 16)
    return diffusers.AutoencoderKLFlux2(
        latent_channels=8,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIDE,
    )


@torch.no_grad()
def _spread_statistics(parts: dict[str, Any]) -> None:
    """Let the statistics of `_flux2_vae` differ by channel: as built they are zeros and ones."""
    norm = parts["vae"].bn
    norm.running_mean.copy_(torch.linspace(-0.3, 0.3, norm.num_features))
    norm.running_var.copy_(torch.linspace(0.5, 1.5, norm.num_features))


def _flux2_klein() -> dict[str, Any]:
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            in_channels=32,
            num_layers=BLOCKS,
            num_single_layers=BLOCKS,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * HIDDEN,  # the states of three layers side by side
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        "scheduler": flow_scheduler(by_size=True),
        "vae": _flux2_vae(),
        "text_encoder": qwen3_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, with_head=True),
        "tokenizer": qwen_tokenizer(),
    }


def _ideogram4() -> dict[str, Any]:
    def denoiser() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=32,
            num_layers=BLOCKS,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=ENCODER_LAYERS * HIDDEN,
            mrope_section=(4, 2, 2),
        )

    return {
        "transformer": denoiser(),
        # The other half of guidance has a network of its own, which sees no text.
        "unconditional_transformer": denoiser(),
        "scheduler": flow_scheduler(shift=1.0),
        "vae": _flux2_vae(),
        "text_encoder": qwen3_vl_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, vision_layers=ENCODER_LAYERS),
        "tokenizer": qwen_tokenizer(),
    }


def _bria_fibo_edit() -> dict[str, Any]:
    return {
        # Every block is given the states of one layer of the text encoder.
        "transformer": diffusers.BriaFiboTransformer2DModel(
            in_channels=16,
            num_layers=BLOCKS,
            num_single_layers=BLOCKS,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * HIDDEN,
            text_encoder_dim=HIDDEN,
            axes_dims_rope=[4, 6, 6],
        ),
        "scheduler": flow_scheduler(by_size=True),
        "vae": diffusers.AutoencoderKLWan(**video_vae_options(width=8)),
        "text_encoder": smol_lm3(hidden=HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": letter_tokenizer("PreTrainedTokenizerFast", start="<s>", end="</s>"),
    }


def _any_prompt() -> AbstractContextManager[None]:
    """Let BriaFiboEditPipeline take a prompt that is no JSON."""
    return replaced(
        "diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit",
        "is_valid_edit_json",
        lambda kept: lambda prompt: True,
    )


def _few_layers() -> AbstractContextManager[None]:
    """Let Ideogram4Pipeline take the states of every layer of a short text encoder: it names 13 of 36 in its source."""
    return replaced(
        "diffusers.pipelines.ideogram4.pipeline_ideogram4",
        "QWEN3_VL_ACTIVATION_LAYERS",
        lambda kept: tuple(range(ENCODER_LAYERS)),
    )


def _small_reference() -> AbstractContextManager[None]:
    """Let QwenImageEditPipeline work on an image of 64 x 64 pixels.

    It would enlarge any image to the area of 1024 x 1024, which stands in its source, and spend its time on those 4096
    tokens.
    """
    return replaced(
        "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit",
        "calculate_dimensions",
        lambda kept: lambda area, ratio: kept(64 * 64, ratio),
    )


# Guidance is on in each: SD3 batches both halves, the others run the denoiser twice per step.
IMAGE_RECIPES = {
    "sd3": Recipe("StableDiffusion3Pipeline", _sd3, {"guidance_scale": 5.0, "max_sequence_length": 32}),
    "flux": Recipe("FluxPipeline", _flux, {"guidance_scale": 3.5, "true_cfg_scale": 3.0, "max_sequence_length": 32}),
    "ovis": Recipe("OvisImagePipeline", _ovis, {"guidance_scale": 5.0}),
    # Rewriting would first generate up to 512 tokens of a new prompt.
    "longcat": Recipe("LongCatImagePipeline", _longcat, {"guidance_scale": 4.5, "enable_prompt_rewrite": False}),
    "qwen_image": Recipe("QwenImagePipeline", _qwen_image, {"true_cfg_scale": 4.0}),
    "flux_controlnet": Recipe(
        "FluxControlNetPipeline",
        _flux_controlnet,
        {"guidance_scale": 3.5, "true_cfg_scale": 3.0, "max_sequence_length": 32},
        inputs=lambda: {"control_image": picture()},
    ),
    "qwen_image_edit": Recipe(
        "QwenImageEditPipeline",
        _qwen_image_edit,
        {"true_cfg_scale": 4.0},
        inputs=lambda: {"image": pil_picture()},
        around=_small_reference,
    ),
    # An image to edit is encoded first, and the statistics of the VAE are read then, too.
    "flux2_klein": Recipe(
        "Flux2KleinPipeline",
        _flux2_klein,
        {"guidance_scale": 4.0, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)},
        inputs=lambda: {"image": pil_picture(height=64, width=64)},  # the least that it takes
        without=("negative_prompt",),
        adjust=_spread_statistics,
    ),
    # Calls the layers of its text encoder one by one, and not the encoder.
    "ideogram4": Recipe(
        "Ideogram4Pipeline",
        _ideogram4,
        {"guidance_scale": 4.0, "guidance_schedule": None, "max_sequence_length": 80},
        without=("negative_prompt",),
        around=_few_layers,
        adjust=_spread_statistics,
    ),
    # Makes tables of positions on the CPU in each call and copies them from there.
    "bria_fibo_edit": Recipe(
        "BriaFiboEditPipeline",
        _bria_fibo_edit,
        {"guidance_scale": 5.0, "max_sequence_length": 128},
        inputs=lambda: {"image": pil_picture(height=64, width=64)},
        around=_any_prompt,
    ),
}
