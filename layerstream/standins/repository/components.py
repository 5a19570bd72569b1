"""Parts that only stand-ins of the repository have: decoder-only and vision-language text encoders, video VAEs."""

from typing import Any

from layerstream.standins.libraries import transformers
from layerstream.standins.repository.tokenizers import (
    LETTER_END_ID,
    LETTER_PAD_ID,
    LETTER_START_ID,
    LETTER_VOCAB_SIZE,
    QWEN_VOCAB_SIZE,
)


def _letter_decoder_options(*, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": LETTER_VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": hidden // 2,
        "max_position_embeddings": 1024,
        "pad_token_id": LETTER_PAD_ID,
        "bos_token_id": LETTER_START_ID,
        "eos_token_id": LETTER_END_ID,
    }


def gemma2_encoder(*, hidden: int, layers: int) -> Any:
    """Return a Gemma2Model: four norms per layer, soft-capped scores, a sliding window in every other layer."""
    options = _letter_decoder_options(hidden=hidden, layers=layers)
    return transformers.Gemma2Model(
        transformers.Gemma2Config(**options, query_pre_attn_scalar=hidden // 2, sliding_window=16)
    )


def llama_encoder(*, hidden: int, layers: int) -> Any:
    """Return a LlamaModel."""
    return transformers.LlamaModel(transformers.LlamaConfig(**_letter_decoder_options(hidden=hidden, layers=layers)))


def smol_lm3(*, hidden: int, layers: int) -> Any:
    """Return a SmolLM3ForCausalLM: every other layer has no rotary positions."""
    options = _letter_decoder_options(hidden=hidden, layers=layers)
    del options["head_dim"]  # it has no such field: a head is its part of `hidden`
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**options, no_rope_layer_interval=2))


def qwen3_encoder(*, hidden: int, layers: int, with_head: bool = False) -> Any:
    """Return a Qwen3Model: grouped attention of two heads on one, a norm on queries and keys.

    With `with_head` it is a Qwen3ForCausalLM whose head is tied to its embedding, as in the small real ones.
    """
    config = transformers.Qwen3Config(
        vocab_size=QWEN_VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=hidden // 2,
        max_position_embeddings=4096,
        tie_word_embeddings=with_head,
    )
    return transformers.Qwen3ForCausalLM(config) if with_head else transformers.Qwen3Model(config)


def qwen25_vl_encoder(*, hidden: int, layers: int, vision_layers: int) -> Any:
    """Return a Qwen2_5_VLForConditionalGeneration with its vision tower and head, as image pipelines carry it."""
    head = hidden // 2
    # The ids follow the order of the special tokens in `tokenizers.QWEN_SPECIAL`.
    special = {
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "image_token_id": 262,
        "video_token_id": 263,
    }
    text = {
        "vocab_size": QWEN_VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8192,
        # A quarter of the rotary half for time, the rest for height and width, as in the real model.
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": _three_parts(head // 2)},
        **special,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [vision_layers - 1],
    }
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **special)
    )


def qwen3_vl_encoder(*, hidden: int, layers: int, vision_layers: int) -> Any:
    """Return a Qwen3VLModel: its vision tower hands features to the first layers of the text, and it has no head."""
    head = hidden // 2
    text = {
        "vocab_size": QWEN_VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head,
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": _three_parts(head // 2)},
        "pad_token_id": 256,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=259,
        vision_end_token_id=260,
        image_token_id=262,
        video_token_id=263,
    )
    return transformers.Qwen3VLModel(config)


def _three_parts(half: int) -> list[int]:
    first = max(1, half // 4)
    second = (half - first) // 2
    return [first, second, half - first - second]


def video_vae_options(*, width: int) -> dict[str, Any]:
    """Return the options of a small AutoencoderKLWan or AutoencoderKLQwenImage (8 times in space, 4 in time)."""
    return {
        "base_dim": width,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
    }
