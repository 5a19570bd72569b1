"""Parts of the stand-ins: text encoders, VAE and scheduler from configs, with random weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerstream.standins.libraries import diffusers, transformers
from layerstream.standins.tokenizers import CLIP_END_ID, CLIP_START_ID, CLIP_VOCAB_SIZE, T5_VOCAB_SIZE
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


def flow_scheduler(*, shift: float = 3.0, by_size: bool = False) -> Any:
    """Return a FlowMatchEulerDiscreteScheduler; `by_size`: the pipeline passes a shift that depends on the image."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=by_size)
