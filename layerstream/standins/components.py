"""Parts that several stand-in pipelines share: text encoders, VAEs and schedulers from configs, with random weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerstream.standins.libraries import diffusers, transformers
from layerstream.standins.tokenizers import (
    CLIP_END_ID,
    CLIP_START_ID,
    CLIP_VOCAB_SIZE,
    LETTER_END_ID,
    LETTER_PAD_ID,
    LETTER_START_ID,
    LETTER_VOCAB_SIZE,
    QWEN_VOCAB_SIZE,
    T5_VOCAB_SIZE,
)
from layerstream.standins.weights import cast_floating_, fill_normal_


def finish(module: nn.Module, *, dtype: torch.dtype, seed: int, std: float) -> Any:
    """Give a module built under `skip_init` its weights and the state in which `from_pretrained` returns a model."""
    fill_normal_(module, std=std, seed=seed)
    cast_floating_(module, dtype)
    return module.eval()


def clip_text_encoder(*, hidden: int, layers: int, projected: bool, hidden_act: str = "quick_gelu") -> Any:
    """Return a CLIPTextModel, or with `projected` a CLIPTextModelWithProjection of as many outputs as `hidden`."""
    config = transformers.CLIPTextConfig(
        vocab_size=CLIP_VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        hidden_act=hidden_act,
        bos_token_id=CLIP_START_ID,
        eos_token_id=CLIP_END_ID,
        pad_token_id=CLIP_END_ID,
    )
    return transformers.CLIPTextModelWithProjection(config) if projected else transformers.CLIPTextModel(config)


def t5_encoder(
    *, hidden: int, ffn: int, layers: int, per_layer_bias: bool = False, vocab_size: int = T5_VOCAB_SIZE
) -> Any:
    """Return a T5EncoderModel, or with `per_layer_bias` a UMT5EncoderModel (a position bias in every layer)."""
    heads = max(2, hidden // 64)
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": hidden,
        "d_kv": hidden // heads,
        "d_ff": ffn,
        "num_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 32,
    }
    if per_layer_bias:
        return transformers.UMT5EncoderModel(transformers.UMT5Config(**options))
    return transformers.T5EncoderModel(transformers.T5Config(**options))


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


def image_vae(*, widths: Sequence[int], layers: int = 1, groups: int = 4, latent: int = 16, **options: Any) -> Any:
    """Return an AutoencoderKL of 16 latent channels that halves the size between each two `widths`.

    With 4 latent channels it is that of Stable Diffusion 1 to XL: with quantising convolutions, without a shift. Either
    has force_upcast in its config. `options` are further ones of the class.
    """
    early = latent == 4
    levels = len(widths)
    return diffusers.AutoencoderKL(
        latent_channels=latent,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        norm_num_groups=groups,
        use_quant_conv=early,
        use_post_quant_conv=early,
        shift_factor=None if early else 0.0609,
        scaling_factor=0.18215 if early else 1.5305,
        **options,
    )


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


def flow_scheduler(*, shift: float = 3.0, by_size: bool = False) -> Any:
    """Return a FlowMatchEulerDiscreteScheduler; `by_size`: the pipeline passes a shift that depends on the image."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=by_size)
