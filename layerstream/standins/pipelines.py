"""Whole pipelines at their true size with random weights, and the arguments of one call at the benchmark's resolution.

The denoisers are those of `full_size`, and its [Note: memory] holds for the other parts too. Embeddings have as many
rows as the true vocabularies, of which the local tokenizers use the first few hundred.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from layerstream.standins.components import flow_scheduler, image_vae
from layerstream.standins.full_size import Scale, build_denoiser
from layerstream.standins.libraries import diffusers, transformers
from layerstream.standins.tokenizers import (
    CLIP_END_ID,
    CLIP_START_ID,
    clip_tokenizer,
    qwen_tokenizer,
    qwen_vl_processor,
    t5_tokenizer,
)
from layerstream.standins.weights import cast_floating_, default_dtype, fill_normal_, skip_init

PROMPT = (
    "A weathered wooden fishing boat rests on a quiet beach at dawn, its red paint peeling, nets and glass floats "
    "piled on the deck. Behind it, low mist drifts over a calm grey sea and a distant lighthouse still shines. Soft "
    "warm light from the left, long shadows in the wet sand, gulls in the sky, wide angle photograph, fine detail."
)
NEGATIVE_PROMPT = "blurry, low quality, distorted, watermark, text, oversaturated colours"
# What the pipelines wrap around a prompt, as far as it consists of words.
_TEMPLATES = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the "
    "objects and background: ",
    "system user assistant As an image captioning expert, generate a descriptive text prompt based on an image "
    "content, suitable for input to a text-to-image model.",
)
_STD = 0.02
# With few channels, the usual 0.02 would let the text fade below the rounding of the image.
_TINY_STD, _TINY_VAE_STD = 0.2, 0.06
_TINY_VOCAB_SIZE = 1024


@dataclass(frozen=True)
class _Pipeline:
    """A class of diffusers, what makes its parts except the denoiser, and the arguments of its call."""

    class_name: str
    parts: Callable[[Scale], dict[str, Any]]
    call: Mapping[str, Any]
    size: Mapping[Scale, tuple[int, int]]  # height, width of the image


def build_pipeline(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    scale: Scale = "full",
    fill_device: torch.device | str | None = None,
) -> Any:
    """Return the pipeline `name` in host memory, in evaluation mode, gradients and progress bar off.

    Args:
        name: One of `PIPELINES`.
        dtype: Of parameters and of buffers in the state dict.
        seed: Of the weights; their bits also depend on `fill_device`. Every part draws from a seed of its own.
        scale: "full" is the true size (16 to 30 GB in bf16); "tiny" the same classes with a few small blocks.
        fill_device: "cuda" draws the pool of random values there, which gives a larger pool in less time.

    Raises:
        ValueError: No pipeline has this name.
        ImportError: The installed diffusers or transformers has no such class.
    """
    spec = _spec(name)
    # Before the default dtype changes: a library may compute constants while it is imported.
    pipeline_class = getattr(diffusers, spec.class_name)
    denoiser = build_denoiser(name, dtype=dtype, seed=1000 * seed, fill_device=fill_device, scale=scale)
    if scale == "tiny":
        fill_normal_(denoiser, std=_TINY_STD, seed=1000 * seed, pool_device=fill_device)
    with default_dtype(dtype), skip_init():
        parts = spec.parts(scale)
    modules = {key: part for key, part in parts.items() if isinstance(part, nn.Module)}
    for index, (key, module) in enumerate(modules.items(), start=1):
        std = _STD if scale == "full" else _TINY_VAE_STD if key == "vae" else _TINY_STD
        cast_floating_(module, dtype)
        fill_normal_(module, std=std, seed=1000 * seed + index, pool_device=fill_device)
        module.eval().requires_grad_(False)
    pipe = pipeline_class(transformer=denoiser, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_call(name: str, scale: Scale = "full") -> dict[str, Any]:
    """Return the keyword arguments of one call of `build_pipeline(name, scale=scale)`, all but the generator.

    With guidance: "sd35m" runs both halves as one batch, the others run the denoiser twice per step. The text takes 77
    and 256 tokens in "sd35m", 256 in "ovis", 512 in "longcat", in both scales: the pipelines pad to that.

    Returns:
        The arguments; the call's `images` are then [1, 3, height, width] in the dtype of the weights, values in 0..1.
    """
    spec = _spec(name)
    height, width = spec.size[scale]
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "height": height, "width": width}
    call |= {**spec.call, "output_type": "pt"}
    if scale == "tiny":
        call["num_inference_steps"] = 4
    return call


def _spec(name: str) -> _Pipeline:
    if name not in _PIPELINES:
        raise ValueError(f"no pipeline is named {name!r}; choose one of {', '.join(PIPELINES)}")
    return _PIPELINES[name]


def _sd35m(scale: Scale) -> dict[str, Any]:
    full = scale == "full"
    # In the tiny denoiser both CLIP states side by side are as wide as one of T5.
    small = {"hidden": 16, "layers": 3, "heads": 2, "projection": 32}
    clip_l = {"hidden": 768, "layers": 12, "heads": 12, "projection": 768} if full else small
    clip_g = {"hidden": 1280, "layers": 32, "heads": 20, "projection": 1280} if full else small
    return {
        "scheduler": flow_scheduler(),
        "vae": _vae(scale),
        "text_encoder": _clip(scale, **clip_l, hidden_act="quick_gelu"),
        "tokenizer": _know_words(clip_tokenizer()),
        "text_encoder_2": _clip(scale, **clip_g, hidden_act="gelu"),
        "tokenizer_2": _know_words(clip_tokenizer()),
        "text_encoder_3": _t5_xxl(scale),
        "tokenizer_3": _know_words(t5_tokenizer()),
    }


def _ovis(scale: Scale) -> dict[str, Any]:
    return {
        "scheduler": flow_scheduler(by_size=True),
        "vae": _vae(scale),
        "text_encoder": _qwen3(scale),
        "tokenizer": _know_words(qwen_tokenizer()),
    }


def _longcat(scale: Scale) -> dict[str, Any]:
    tokenizer = _know_words(qwen_tokenizer())
    return {
        "scheduler": flow_scheduler(by_size=True),
        "vae": _vae(scale),
        "text_encoder": _qwen25_vl(scale),
        "tokenizer": tokenizer,
        "text_processor": qwen_vl_processor(tokenizer),
    }


def _know_words(tokenizer: Any) -> Any:
    """Make a token of each word in our texts, so that they take about as many tokens as with a true vocabulary."""
    from tokenizers import AddedToken

    words = set(re.findall(r"\w+", " ".join([PROMPT, NEGATIVE_PROMPT, *_TEMPLATES])))
    if type(tokenizer).__name__.startswith("Qwen"):  # whose tokens include the space before a word
        words |= {" " + word for word in words}
    # As they are written: CLIP writes in lower case, and which of two words alike there is meant would be chance.
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in sorted(words)])
    return tokenizer


def _vae(scale: Scale) -> Any:
    """Return an AutoencoderKL that halves the size three times, in full size 83.8 M."""
    if scale == "tiny":
        return image_vae(widths=(8, 8, 8, 16))
    return image_vae(widths=(128, 256, 512, 512), layers=2, groups=32)


def _clip(scale: Scale, *, hidden: int, layers: int, heads: int, projection: int, hidden_act: str) -> Any:
    """Return a CLIPTextModelWithProjection: CLIP-L 0.124 B, CLIP-G 0.695 B."""
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=49408 if scale == "full" else _TINY_VOCAB_SIZE,
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
    tiny = {"vocab_size": _TINY_VOCAB_SIZE, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
    options = full if scale == "full" else tiny
    return transformers.T5EncoderModel(transformers.T5Config(**options, feed_forward_proj="gated-gelu"))


def _qwen3(scale: Scale) -> Any:
    """Return a Qwen3Model, in full size the 1.721 B of Qwen3-1.7B without a head."""
    full = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    tiny = {
        "vocab_size": _TINY_VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    options = full if scale == "full" else tiny
    rotary = {"max_position_embeddings": 40960, "rope_theta": 1000000.0}
    return transformers.Qwen3Model(transformers.Qwen3Config(**options, **rotary))


def _qwen25_vl(scale: Scale) -> Any:
    """Return a Qwen2_5_VLForConditionalGeneration, in full size the 8.292 B of the 7B model with vision and head."""
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
        "vocab_size": _TINY_VOCAB_SIZE,
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
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **special)
    )


_PIPELINES: Mapping[str, _Pipeline] = MappingProxyType(
    {
        "sd35m": _Pipeline(
            class_name="StableDiffusion3Pipeline",
            parts=_sd35m,
            call={"num_inference_steps": 28, "guidance_scale": 4.5, "max_sequence_length": 256},
            size={"full": (1024, 1024), "tiny": (64, 64)},
        ),
        "ovis": _Pipeline(
            class_name="OvisImagePipeline",
            parts=_ovis,
            call={"num_inference_steps": 50, "guidance_scale": 5.0, "max_sequence_length": 256},
            size={"full": (1024, 1024), "tiny": (64, 64)},
        ),
        "longcat": _Pipeline(
            class_name="LongCatImagePipeline",
            parts=_longcat,
            # Rewriting would first generate up to 512 tokens of a new prompt, each a pass of the whole text encoder.
            call={"num_inference_steps": 50, "guidance_scale": 4.5, "enable_prompt_rewrite": False},
            size={"full": (768, 1344), "tiny": (64, 96)},
        ),
    }
)
PIPELINES: tuple[str, ...] = tuple(_PIPELINES)
