"""MammothModa2, tiny and at its true size: a language model of 12.4 B, a tokenizer of 0.7 B, a denoiser of 2.6 B."""

from contextlib import ExitStack
from typing import Any

import torch

from layerstream.standins.libraries import transformers
from layerstream.standins.repository.autoregressive.mammoth.diffusion import decode_diffusion_image
from layerstream.standins.repository.autoregressive.mammoth.model import Mammothmoda2Config, Mammothmoda2Model
from layerstream.standins.repository.autoregressive.mammoth.sampling import Sampling
from layerstream.standins.repository.autoregressive.specs import Making
from layerstream.standins.repository.full_size.building import build_in, fill
from layerstream.standins.repository.full_size.prompts import know_words
from layerstream.standins.repository.full_size.specs import Scale
from layerstream.standins.repository.tokenizers import qwen_tokenizer

IMAGE, VISION_START, VISION_END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"

_TEXT: dict[Scale, dict[str, Any]] = {
    "full": {
        "vocab_size": 151936,
        "gen_vocab_size": 32800,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "moe_type": "ffn-14:36",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    },
    "tiny": {
        "vocab_size": 272,
        "gen_vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "moe_type": "ffn-2:6",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
    },
}
_VISION: dict[Scale, dict[str, Any]] = {
    "full": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    "tiny": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    },
}
_TOKENIZER: dict[Scale, dict[str, Any]] = {
    "full": {
        "width": 1024,
        "heads": 8,
        "ffn": 2816,
        "depth": 24,
        "decoder_depth": 27,
        "patch": 16,
        "num_codes": 32768,
        "code_width": 8,
        "conv_widths": [128, 128, 256, 512, 512],
        "conv_blocks": 2,
        "groups": 32,
    },
    "tiny": {
        "width": 16,
        "heads": 2,
        "ffn": 32,
        "depth": 3,
        "decoder_depth": 3,
        "patch": 16,
        "num_codes": 32,
        "code_width": 8,
        "conv_widths": [8, 8, 8, 8, 8],
        "conv_blocks": 1,
        "groups": 4,
    },
}
_DIT: dict[Scale, dict[str, Any]] = {
    "full": {
        "hidden_size": 2520,
        "num_layers": 16,
        "num_refiner_layers": 2,
        "num_attention_heads": 21,
        "num_kv_heads": 7,
        "multiple_of": 256,
        "text_feat_dim": 4096,
        "qformer": {"heads": 20, "queries": 128, "layers": 2},
    },
    "tiny": {
        "hidden_size": 36,
        "num_layers": 4,
        "num_refiner_layers": 2,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "text_feat_dim": 32,
        "qformer": {"heads": 4, "queries": 8, "layers": 2},
    },
}
_AXES: dict[Scale, list[int]] = {"full": [40, 40, 40], "tiny": [4, 4, 4]}
_VAE_WIDTHS: dict[Scale, tuple[int, ...]] = {"full": (128, 256, 512, 512), "tiny": (8, 8, 8, 16)}
# In the tiny scale the last layer, too: else it would show only where another token is drawn.
_CONDITION_LAYERS: dict[Scale, list[int]] = {"full": [-2, -5, -8, -11, -14, -17], "tiny": [-1, -3]}
_STD = 0.02
# With few channels, the usual 0.02 would let the text fade below the rounding of the image.
_TINY_STD, _TINY_VAE_STD = 0.2, 0.06


def build(making: Making) -> Any:
    """Return a Mammothmoda2Model on the CPU."""
    config = _config(making.scale)
    model = build_in(making.dtype, lambda: Mammothmoda2Model(config))
    for index, (key, child) in enumerate(model.named_children()):
        tiny_std = _TINY_VAE_STD if key == "gen_vae" else _TINY_STD
        fill(
            child,
            dtype=making.dtype,
            std=_STD if making.scale == "full" else tiny_std,
            seed=1000 * making.seed + index,
            pool_device=making.fill_device,
        )
    return model.eval()


def run(
    model: Any,
    *,
    prompt: str,
    negative_prompt: str,
    seed: int,
    ar_height: int,
    ar_width: int,
    cfg_scale: float = 7.0,
    temperature: float = 1.0,
    top_k: int = 2048,
    top_p: float = 1.0,
    image: torch.Tensor | None = None,
    **diffusion: Any,
) -> torch.Tensor:
    """Return the image of one call: the sketch, then the denoiser; under inference mode, bfloat16 under autocast, too.

    Args:
        model: what `build` returned.
        prompt: of text.
        negative_prompt: for the denoiser.
        seed: of torch's generators, which draw tokens, and of one on the CPU that draws latents.
        ar_height: rows of the sketch.
        ar_width: tokens of a row, and one more that ends it.
        cfg_scale: see `Sampling`, with the three after it.
        image: one to edit [1, 3, height, width] in -1..1, sides multiples of 32.
        **diffusion: see `decode_diffusion_image`.
    """
    tokenizer = know_words(qwen_tokenizer()) if model.config.scale == "full" else qwen_tokenizer()
    shown = {} if image is None else _shown(image, model.config.llm_config.vision_config)
    edits: dict[str, Any] = {} if image is None else {"gen_pixel_values": image}
    seen = "" if image is None else VISION_START + IMAGE * (shown["pixel_values"].shape[0] // 4) + VISION_END
    ids = _ids(tokenizer, seen + prompt)
    torch.manual_seed(seed)
    with ExitStack() as around:
        around.enter_context(torch.inference_mode())
        dtype = model.gen_transformer.dtype
        if dtype == torch.bfloat16:
            around.enter_context(torch.autocast(next(model.parameters()).device.type, dtype))
        written = model.generate(
            ids,
            torch.ones_like(ids),
            ar_height=ar_height,
            ar_width=ar_width,
            sampling=Sampling(cfg_scale, temperature, top_k, top_p),
            **edits,
            **shown,
        )
        return decode_diffusion_image(
            model=model,
            input_ids=written.input_ids,
            attention_mask=written.attention_mask,
            negative_ids=_ids(tokenizer, negative_prompt),
            ref_images=None if image is None else [image],
            generator=torch.Generator("cpu").manual_seed(seed),
            shown=shown,
            **diffusion,
        )


def _config(scale: Scale) -> Any:
    text = {
        **_TEXT[scale],
        "gen_vocab_start_index": _TEXT[scale]["vocab_size"],
        "max_position_embeddings": 262144 if scale == "full" else 4096,
        "pad_token_id": 256,
    }
    special = {
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "image_token_id": 262,
        "video_token_id": 263,
    }
    llm = transformers.Qwen3VLConfig(text_config=text, vision_config=_VISION[scale], **special)
    vae_widths = _VAE_WIDTHS[scale]
    levels = len(vae_widths)
    return Mammothmoda2Config(
        scale=scale,
        llm_config=llm,
        gen_vocab_start_index=text["gen_vocab_start_index"],
        gen_condition_layers=_CONDITION_LAYERS[scale],
        gen_tokenizer_config=_TOKENIZER[scale],
        gen_vae_config={
            "latent_channels": 4,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(vae_widths),
            "layers_per_block": 2 if scale == "full" else 1,
            "norm_num_groups": 32 if scale == "full" else 4,
            "scaling_factor": 0.13025,
        },
        gen_dit_config={**_DIT[scale], "patch_size": 2, "in_channels": 4},
        gen_axes_dim_rope=_AXES[scale],
        gen_axes_lens=[10000, 1664, 1664] if scale == "full" else [1024, 1024, 1024],
    )


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    message = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids: torch.Tensor = tokenizer(chat, return_tensors="pt", add_special_tokens=False).input_ids
    return ids


def _shown(image: torch.Tensor, vision: Any) -> dict[str, torch.Tensor]:
    """Return what the vision tower is given of an image: patches in groups of 2 x 2, each of two equal frames."""
    patch = vision.patch_size
    channels, height, width = image.shape[1:]
    rows, columns = height // (2 * patch), width // (2 * patch)
    parts = image[0].reshape(channels, rows, 2, patch, columns, 2, patch).permute(1, 4, 2, 5, 0, 3, 6)
    frames = parts[..., None, :, :].expand(*parts.shape[:-2], 2, patch, patch)
    return {
        "pixel_values": frames.reshape(4 * rows * columns, -1).contiguous(),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }
