"""Tiny image pipelines of one text encoder and a transformer: AuraFlow, PixArt-Sigma, Sana, Lumina-Image 2."""

from typing import Any

from layerstream.standins.components import flow_scheduler, image_vae, t5_encoder
from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.components import gemma2_encoder
from layerstream.standins.repository.tiny.recipes import BLOCKS, ENCODER_LAYERS, HIDDEN, Recipe
from layerstream.standins.repository.tokenizers import letter_tokenizer
from layerstream.standins.tokenizers import t5_tokenizer


def _aura_flow() -> dict[str, Any]:
    return {
        "transformer": diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=BLOCKS,
            num_single_dit_layers=BLOCKS,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=HIDDEN,
            caption_projection_dim=16,
            pos_embed_max_size=16,
        ),
        "scheduler": flow_scheduler(shift=1.73),
        "vae": image_vae(widths=(8, 8, 16), latent=4),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS, per_layer_bias=True),
        "tokenizer": t5_tokenizer(),
    }


def _pixart() -> dict[str, Any]:
    return {
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=BLOCKS,
            attention_head_dim=8,
            num_attention_heads=4,
            cross_attention_dim=32,
            caption_channels=HIDDEN,
            use_additional_conditions=False,
        ),
        # Not the DPMSolverMultistepScheduler of the real ones here and below: numpy 2 warns of what that does.
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False
        ),
        "vae": image_vae(widths=(8, 8, 16), latent=4),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": t5_tokenizer(),
    }


def _sana() -> dict[str, Any]:
    kinds, widths, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), (8, 8, 16), ((), (), (5,))
    return {
        "transformer": diffusers.SanaTransformer2DModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            num_layers=BLOCKS,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=HIDDEN,
        ),
        "scheduler": flow_scheduler(),
        "vae": diffusers.AutoencoderDC(
            latent_channels=8,
            attention_head_dim=8,
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            scaling_factor=0.41407,
        ),
        "text_encoder": gemma2_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": letter_tokenizer("GemmaTokenizerFast", start="<bos>", end="<eos>"),
    }


def _lumina2() -> dict[str, Any]:
    return {
        "transformer": diffusers.Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=16,
            hidden_size=32,
            num_layers=BLOCKS,
            num_refiner_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(128, 16, 16),
            cap_feat_dim=HIDDEN,
        ),
        "scheduler": flow_scheduler(shift=6.0),
        "vae": image_vae(widths=(8, 8, 8, 16)),  # the pipeline takes 8 pixels per latent for granted
        # One more: the pipeline takes the states before the last layer.
        "text_encoder": gemma2_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS + 1),
        "tokenizer": letter_tokenizer("GemmaTokenizerFast", start="<bos>", end="<eos>"),
    }


# Sizes are as asked for, and captions stay as they are: cleaning them wants two more packages.
_AS_IS = {"use_resolution_binning": False, "clean_caption": False}
TRANSFORMER_RECIPES = {
    "aura_flow": Recipe("AuraFlowPipeline", _aura_flow, {"guidance_scale": 3.5}),
    "pixart": Recipe("PixArtSigmaPipeline", _pixart, {"guidance_scale": 4.5, "max_sequence_length": 32, **_AS_IS}),
    # Its own instruction would be a thousand letters.
    "sana": Recipe(
        "SanaPipeline",
        _sana,
        {
            "guidance_scale": 4.5,
            "max_sequence_length": 32,
            "complex_human_instruction": ["Enhance.", "User Prompt: "],
            **_AS_IS,
        },
    ),
    "lumina2": Recipe(
        "Lumina2Pipeline", _lumina2, {"guidance_scale": 4.0, "system_prompt": "Draw.", "max_sequence_length": 64}
    ),
}
