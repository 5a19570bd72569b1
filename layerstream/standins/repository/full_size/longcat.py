"""LongCat-Image: a denoiser of 6.27 B and Qwen2.5-VL-7B, 1344 x 768."""

from typing import Any

from layerstream.standins.components import flow_scheduler
from layerstream.standins.libraries import Library, transformers
from layerstream.standins.repository.full_size.generating import limited
from layerstream.standins.repository.full_size.parts import TINY_FLUX_LIKE, TINY_VOCAB_SIZE, flux_like_inputs, vae
from layerstream.standins.repository.full_size.prompts import know_words
from layerstream.standins.repository.full_size.specs import DenoiserSpec, Pass, PipelineSpec, Scale
from layerstream.standins.repository.tokenizers import qwen_tokenizer, qwen_vl_processor

# Of up to 512, each a pass of the whole text encoder.
REWRITING_TOKENS = {"full": 64, "tiny": 8}
messages = Library("diffusers.pipelines.longcat_image.system_messages")


def _inputs(given: Pass) -> dict[str, Any]:
    # Image tokens are of kind 1 and start behind the longest text.
    return flux_like_inputs(given, kind=1, start=given.text)


def _parts(scale: Scale) -> dict[str, Any]:
    tokenizer = know_words(qwen_tokenizer())
    if scale == "full":  # what a prompt to rewrite is wrapped in would be a token a letter
        know_words(tokenizer, messages.SYSTEM_PROMPT_EN)
    return {
        "scheduler": flow_scheduler(by_size=True),
        "vae": vae(scale),
        "text_encoder": _rewriting(scale),
        "tokenizer": tokenizer,
        "text_processor": qwen_vl_processor(tokenizer),
    }


def _rewriting(scale: Scale) -> Any:
    """Return the text encoder, which generates `REWRITING_TOKENS` where it is to rewrite the prompt."""
    model = qwen25_vl(scale, limited(transformers.Qwen2_5_VLForConditionalGeneration))
    # On an H100 the fused attention did not repeat a token's states to the bit, resident as streamed.
    model.set_attn_implementation("eager")
    model.most_new_tokens = REWRITING_TOKENS[scale]
    return model


def qwen25_vl(scale: Scale, model_class: Any = None) -> Any:
    """Return a Qwen2_5_VLForConditionalGeneration, in full size the 8.292 B of the 7B model with vision and head.

    Args:
        scale: of all sizes.
        model_class: a subclass to make instead.
    """
    # The special tokens of the local tokenizer, not those of the true one: rewriting a prompt looks for them.
    special = {
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "image_token_id": 262,
        "video_token_id": 263,
    }
    full_text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    }
    tiny_text = {
        "vocab_size": TINY_VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    full_vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    tiny_vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [2],
    }
    text, vision = (full_text, full_vision) if scale == "full" else (tiny_text, tiny_vision)
    text = {**text, "max_position_embeddings": 128000, "rope_theta": 1000000.0, **special}
    model_class = model_class or transformers.Qwen2_5_VLForConditionalGeneration
    return model_class(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **special)
    )


DENOISER = DenoiserSpec(
    class_name="LongCatImageTransformer2DModel",
    # The defaults of the class are the 11.9 B of Flux.
    options={
        "full": {"num_layers": 10, "num_single_layers": 20},
        "tiny": {**TINY_FLUX_LIKE, "pooled_projection_dim": 32},
    },
    grid={"full": (48, 84), "tiny": (4, 6)},
    text_tokens={"full": 512, "tiny": 7},
    inputs=_inputs,
)
PIPELINE = PipelineSpec(
    class_name="LongCatImagePipeline",
    parts=_parts,
    # Rewriting first generates `REWRITING_TOKENS` of a new prompt.
    call={"num_inference_steps": 50, "guidance_scale": 4.5, "enable_prompt_rewrite": False},
    size={"full": (768, 1344), "tiny": (64, 96)},
)
