"""NextStep of both codes, tiny and at its true size: 14.95 B of which the head has 0.16, and a VAE of 0.08."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from layerstream.standins.repository.autoregressive.nextstep import (
    head_a,
    model_a,
    model_b,
    pipeline_a,
    pipeline_b,
    vae_a,
)
from layerstream.standins.repository.autoregressive.nextstep.compiling import Compiler, is_wanted
from layerstream.standins.repository.autoregressive.nextstep.head import SimpleMLPAdaLN
from layerstream.standins.repository.autoregressive.nextstep.tokens import PLACEHOLDER, nextstep_tokenizer
from layerstream.standins.repository.autoregressive.specs import Making
from layerstream.standins.repository.full_size.building import build_in, fill
from layerstream.standins.repository.full_size.prompts import know_words
from layerstream.standins.repository.full_size.specs import Scale

_FULL = {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "latent_channels": 16,
    "latent_patch_size": 2,
    "fm_head_dim": 1536,
    "fm_head_layers": 12,
}
_TINY = {
    **_FULL,
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "fm_head_dim": 32,
    "fm_head_layers": 4,
}
_CH_MULT = (1, 2, 4, 4)
_STD = 0.02
# With few channels, the usual 0.02 would let the text fade below the rounding of the image.
_TINY_STD, _TINY_VAE_STD = 0.2, 0.06


def build_a(making: Making) -> Any:
    """Return a NextStepPipeline of code A on the CPU."""
    classes = classes_a(is_wanted() if making.compiled is None else making.compiled, making.backend)
    tokenizer = _tokenizer(making.scale)
    config = model_a.NextStepConfig(
        **_options(making.scale, tokenizer),
        attention_bias=True,
        theta=1e6,
        gen_positions=1024 if making.scale == "full" else 64,
        use_gen_pos_embed=False,
    )
    width, blocks, groups = (128, 2, 32) if making.scale == "full" else (8, 1, 4)
    vae_options = {"width": width, "ch_mult": _CH_MULT, "blocks": blocks, "latent": 16, "groups": groups}
    model, vae = build_in(making.dtype, lambda: (classes.model(config), classes.vae(**vae_options)))
    return classes.pipeline(**_filled(making, model, vae), tokenizer=tokenizer)


def build_b(making: Making) -> Any:
    """Return a NextStepPipeline of code B on the CPU. Nothing of it is compiled."""
    tokenizer = _tokenizer(making.scale)
    config = model_b.NextStepConfig(**_options(making.scale, tokenizer), rope_theta=1e6)
    width, blocks, groups = (128, 2, 32) if making.scale == "full" else (8, 1, 4)
    vae_options = {
        "down_block_types": ("DownEncoderBlock2D",) * len(_CH_MULT),
        "up_block_types": ("UpDecoderBlock2D",) * len(_CH_MULT),
        "block_out_channels": tuple(width * factor for factor in _CH_MULT),
        "layers_per_block": blocks,
        "norm_num_groups": groups,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    model, vae = build_in(making.dtype, lambda: (model_b.NextStep(config), model_b.AutoencoderKL(**vae_options)))
    parts = _filled(making, model, vae)
    return pipeline_b.NextStepPipeline(**parts, tokenizer=tokenizer, device=parts["model"].device)


def run(pipe: Any, *, prompt: str, seed: int, **call: Any) -> torch.Tensor:
    """Return the images of one call of either pipeline."""
    images: torch.Tensor = pipe.generate_image(prompt, seed=seed, **call)
    return images


@cache
def classes_a(compiled: bool, backend: str) -> SimpleNamespace:
    """Return `model`, `vae` and `pipeline`: the classes of code A, whose functions are compiled when they are made."""
    compiler = Compiler(is_enabled=compiled, backend=backend)
    net = compiler.subclass(SimpleMLPAdaLN, forward={})
    head: Any = compiler.subclass(head_a.FlowMatchingHead, sample={"fullgraph": True, "cudagraphs": True})
    head.net_class = net
    model: Any = compiler.subclass(model_a.NextStep, forward_model={})
    model.head_class = head
    vae: Any = compiler.subclass(vae_a.AutoencoderKL)
    vae.encoder_class = compiler.subclass(vae_a.Encoder, forward={})
    vae.decoder_class = compiler.subclass(vae_a.Decoder, forward={})
    pipeline: Any = compiler.subclass(pipeline_a.NextStepPipeline)
    pipeline.compiler = compiler
    return SimpleNamespace(model=model, vae=vae, pipeline=pipeline)


def _tokenizer(scale: Scale) -> Any:
    tokenizer = nextstep_tokenizer()
    return know_words(tokenizer) if scale == "full" else tokenizer


def _options(scale: Scale, tokenizer: Any) -> dict[str, Any]:
    """Return what the configs of both codes have in common."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "image_placeholder_id": tokenizer.convert_tokens_to_ids(PLACEHOLDER),
    }
    return {**(_FULL if scale == "full" else _TINY), **ids, "tie_word_embeddings": False}


def _filled(making: Making, model: nn.Module, vae: nn.Module) -> dict[str, Any]:
    full = making.scale == "full"
    stds = {"model": _STD if full else _TINY_STD, "vae": _STD if full else _TINY_VAE_STD}
    modules = {"model": model, "vae": vae}
    return {
        key: fill(
            module,
            dtype=making.dtype,
            std=stds[key],
            seed=1000 * making.seed + index,
            pool_device=making.fill_device,
        )
        for index, (key, module) in enumerate(modules.items())
    }
