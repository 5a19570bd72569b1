"""GLM-Image: a language model of 10.1 B writes the image in codes, for a denoiser of 6.93 B; 1024 x 1024."""

from typing import Any

import torch

from layerstream.standins.components import flow_scheduler
from layerstream.standins.libraries import transformers
from layerstream.standins.repository.full_size.generating import limited
from layerstream.standins.repository.full_size.parts import vae
from layerstream.standins.repository.full_size.prompts import know_words
from layerstream.standins.repository.full_size.specs import DenoiserSpec, Pass, PipelineSpec, Scale
from layerstream.standins.repository.tokenizers import (
    BYTE_VOCAB_SIZE,
    GLM_CODES,
    GLM_VOCAB_SIZE,
    glm_ids,
    glm_processor,
)

# Of 1281, a sketch of 16 x 16 and an image of 32 x 32 codes, since each takes a pass of the whole language model.
GENERATED_TOKENS = 64
_CODES = 16384


def _inputs(given: Pass) -> dict[str, Any]:
    """Return a batch of 1: hidden_states [1, 16, 2 h, 2 w], encoder_hidden_states [1, text, width of it], the codes and
    what to drop of them [1, h * w], timestep, target_size and crop_coords, and return_dict."""
    config = given.config
    most = config.prior_vq_quantizer_codebook_size
    codes = torch.randint(most, (1, given.height * given.width), generator=given.generator).to(given.device)
    size = torch.tensor([[16.0 * given.height, 16.0 * given.width]], device=given.device, dtype=given.dtype)
    return {
        "hidden_states": given.normal(1, config.in_channels, 2 * given.height, 2 * given.width),
        "encoder_hidden_states": given.normal(1, given.text, config.text_embed_dim),
        "prior_token_id": codes,
        "prior_token_drop": torch.zeros_like(codes, dtype=torch.bool),
        "timestep": torch.full((1,), 500.0, device=given.device),
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
        "return_dict": False,
    }


def _parts(scale: Scale) -> dict[str, Any]:
    processor = glm_processor(codes=_CODES if scale == "full" else GLM_CODES, patch=16, sketches_small=scale == "tiny")
    if scale == "full":
        know_words(processor.tokenizer)
    return {
        "scheduler": flow_scheduler(by_size=True),
        "vae": vae(scale, latents_mean=[0.0] * 16, latents_std=[1.0] * 16),
        "vision_language_encoder": _vision_language(scale),
        "processor": processor,
        "text_encoder": _byt5_small(scale),
        "tokenizer": transformers.ByT5Tokenizer(),
    }


def _vision_language(scale: Scale) -> Any:
    """Return a GlmImageForConditionalGeneration, in full size of 10.114 B, that generates `GENERATED_TOKENS`."""
    ids = glm_ids(_CODES if scale == "full" else GLM_CODES)
    special = {
        "image_token_id": ids["image"],
        "image_start_token_id": ids["image_start"],
        "image_end_token_id": ids["image_end"],
    }
    text: dict[str, Any] = {"pad_token_id": ids["pad"], "eos_token_id": ids["image_end"]}
    vision: dict[str, Any] = {}
    codes: dict[str, Any] = {}
    if scale == "tiny":
        text |= {
            "vocab_size": GLM_VOCAB_SIZE,
            "vision_vocab_size": GLM_CODES,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        }
        vision = {
            "depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "image_size": 64, "patch_size": 16,
        }  # fmt: skip
        codes = {"embed_dim": 8, "num_embeddings": GLM_CODES, "latent_channels": 16}
    if scale == "full":  # transformers 5.17 has no default for the part of a head that is rotated
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 12, 12],
        }
    # The defaults of the classes are the real sizes.
    config = transformers.GlmImageConfig(text_config=text, vision_config=vision, vq_config=codes, **special)
    model = limited(transformers.GlmImageForConditionalGeneration)(config)
    model.pads_answer = True
    if scale == "full":  # the head of the tiny one knows no end token
        model.most_new_tokens = GENERATED_TOKENS
    return model


def _byt5_small(scale: Scale) -> Any:
    """Return a T5EncoderModel, in full size the 0.218 B of ByT5-small."""
    full = {"d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6}
    tiny = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
    options = full if scale == "full" else tiny
    return transformers.T5EncoderModel(
        transformers.T5Config(**options, vocab_size=BYTE_VOCAB_SIZE, feed_forward_proj="gated-gelu")
    )


DENOISER = DenoiserSpec(
    class_name="GlmImageTransformer2DModel",
    options={
        "full": {"num_layers": 30, "num_attention_heads": 32, "attention_head_dim": 128},
        "tiny": {
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "text_embed_dim": 32,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": GLM_CODES,
        },
    },
    grid={"full": (64, 64), "tiny": (4, 4)},
    text_tokens={"full": 32, "tiny": 7},
    inputs=_inputs,
)
PIPELINE = PipelineSpec(
    class_name="GlmImagePipeline",
    parts=_parts,
    call={"num_inference_steps": 50, "guidance_scale": 1.5},
    size={"full": (1024, 1024), "tiny": (64, 64)},
    # The text encoder reads only what stands in quotation marks.
    suffix=" 'Lighthouse' is written on the hull.",
    without=("negative_prompt",),
)
