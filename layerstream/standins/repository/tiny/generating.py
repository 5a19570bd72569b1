"""Tiny pipelines in which a language model generates before the denoiser runs: GLM-Image and AudioLDM 2."""

from typing import Any

import torch

from layerstream.standins.components import flow_scheduler, image_vae, t5_encoder
from layerstream.standins.libraries import diffusers, transformers
from layerstream.standins.repository.tiny.recipes import BLOCKS, ENCODER_LAYERS, HIDDEN, Recipe, pil_picture
from layerstream.standins.repository.tokenizers import (
    BYTE_VOCAB_SIZE,
    GLM_CODES,
    GLM_VOCAB_SIZE,
    ROBERTA_VOCAB_SIZE,
    glm_ids,
    glm_processor,
    roberta_tokenizer,
)
from layerstream.standins.tokenizers import t5_tokenizer


def _glm_vision_language(*, patch: int = 8, model_class: Any = None) -> Any:
    """Return a GlmImageForConditionalGeneration that generates image codes only, never an end token.

    The trained one ends by itself where its image is full. Random weights would end anywhere, so that the end token is
    outside of what the head knows.

    Args:
        patch: of the vision tower, in pixels.
        model_class: a subclass to make instead.
    """
    ids = glm_ids()
    width = 2 * HIDDEN // 2
    text = {
        "vocab_size": GLM_VOCAB_SIZE,
        "vision_vocab_size": GLM_CODES,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": ENCODER_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "pad_token_id": ids["pad"],
        "eos_token_id": ids["image_end"],
    }
    vision = {
        "depth": ENCODER_LAYERS,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 32,
        "image_size": 64,
        "patch_size": patch,
    }
    codes = {"embed_dim": 8, "num_embeddings": GLM_CODES, "latent_channels": 16}
    config = transformers.GlmImageConfig(
        text_config=text,
        vision_config=vision,
        vq_config=codes,
        image_token_id=ids["image"],
        image_start_token_id=ids["image_start"],
        image_end_token_id=ids["image_end"],
    )
    return (model_class or transformers.GlmImageForConditionalGeneration)(config)


def _glm_that_takes_features_whole() -> Any:
    """Return a subclass whose `get_image_tokens` takes the features of all images as one tensor.

    GlmImagePipeline of diffusers 0.42 passes them so, and transformers 5.23 wants a list: with those two as they are,
    no image can be edited.
    """
    base = transformers.GlmImageForConditionalGeneration

    def get_image_tokens(self: Any, hidden_states: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        try:
            codes: torch.Tensor = base.get_image_tokens(self, hidden_states.chunk(len(image_grid_thw)), image_grid_thw)
        except AttributeError:  # transformers 5.17 takes them as they are, and has no `shape` of a tuple
            codes = base.get_image_tokens(self, hidden_states, image_grid_thw)
        return codes

    return type(base.__name__, (base,), {"__module__": base.__module__, "get_image_tokens": get_image_tokens})


def _glm_image() -> dict[str, Any]:
    return {
        "transformer": diffusers.GlmImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=BLOCKS,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=HIDDEN,
            time_embed_dim=32,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=GLM_CODES,
        ),
        "scheduler": flow_scheduler(by_size=True),
        # 8 pixels per latent: a code stands for 32 pixels, and two by two patches of the denoiser for a code.
        "vae": image_vae(widths=(8, 8, 8, 16), latents_mean=[0.0] * 16, latents_std=[1.0] * 16),
        "vision_language_encoder": _glm_vision_language(),
        "processor": glm_processor(),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS, vocab_size=BYTE_VOCAB_SIZE),
        "tokenizer": transformers.ByT5Tokenizer(),
    }


def _glm_image_edit() -> dict[str, Any]:
    # A code stands for 32 pixels only where a patch is half as wide: the pipeline doubles the codes of an image.
    return {
        **_glm_image(),
        "vision_language_encoder": _glm_vision_language(patch=16, model_class=_glm_that_takes_features_whole()),
        "processor": glm_processor(patch=16),
    }


def _clap() -> Any:
    """Return a ClapModel: a RoBERTa-like text tower and a Swin-like audio tower, which a call does not run."""
    text = {
        "vocab_size": ROBERTA_VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": 2,
        "num_hidden_layers": ENCODER_LAYERS,
        "max_position_embeddings": 64,
    }
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "patch_embeds_hidden_size": 8,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    return transformers.ClapModel(transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=HIDDEN))


def _audioldm2() -> dict[str, Any]:
    # Each level attends to itself, to what the language model generated and to the T5 states.
    attended = (None, HIDDEN, HIDDEN)
    return {
        "unet": diffusers.AudioLDM2UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=(attended, attended, attended),
        ),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.0015,
            beta_end=0.0195,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        "vae": image_vae(widths=(8, 8, 16), latent=4, in_channels=1, out_channels=1),
        "text_encoder": _clap(),
        "tokenizer": roberta_tokenizer(max_length=48),
        "text_encoder_2": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer_2": t5_tokenizer(max_length=48),
        "projection_model": diffusers.AudioLDM2ProjectionModel(
            text_encoder_dim=HIDDEN, text_encoder_1_dim=HIDDEN, langauge_model_dim=HIDDEN
        ),
        "language_model": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=64,
                n_embd=HIDDEN,
                n_head=2,
                n_layer=ENCODER_LAYERS,
                n_positions=128,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "feature_extractor": transformers.ClapFeatureExtractor(),
        "vocoder": transformers.SpeechT5HifiGan(
            transformers.SpeechT5HifiGanConfig(
                model_in_dim=16,
                upsample_initial_channel=16,
                upsample_rates=[4, 4],
                upsample_kernel_sizes=[8, 8],
                resblock_kernel_sizes=[3, 7],
                resblock_dilation_sizes=[[1, 3], [1, 3]],
                normalize_before=False,
            )
        ),
    }


GENERATING_RECIPES = {
    # The text encoder reads only what stands in quotation marks.
    "glm_image": Recipe(
        "GlmImagePipeline",
        _glm_image,
        {"prompt": "a red fox, 'snow' written above", "guidance_scale": 2.5, "height": 64, "width": 64},
        without=("negative_prompt",),
    ),
    # Its image is shown to the vision tower, whose codes go before what is generated, and to the VAE; the denoiser then
    # writes keys and values of it once, which the passes with a prompt read.
    "glm_image_edit": Recipe(
        "GlmImagePipeline",
        _glm_image_edit,
        {"prompt": "a red fox, 'snow' written above", "guidance_scale": 2.5, "height": 96, "width": 96},
        inputs=lambda: {"image": [pil_picture(height=64, width=64)]},
        without=("negative_prompt",),
    ),
    # 16 samples per column of 16 mel bins, 32 columns.
    "audioldm2": Recipe(
        "AudioLDM2Pipeline",
        _audioldm2,
        {"guidance_scale": 3.5, "audio_length_in_s": 0.032, "max_new_tokens": 8},
        without=("height", "width"),
    ),
}
