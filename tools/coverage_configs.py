"""Configs for `tools.coverage` of classes that have no defaults, or whose defaults do not build."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def _pair_of(name: str) -> Callable[[Any], Any]:
    """Two of a class of diffusers in one, as its pipelines take several."""
    return lambda cls: cls([getattr(importlib.import_module("diffusers"), name)() for _ in range(2)])


def _vae_of_hunyuan_image(cls: Any) -> Any:
    return cls(
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=(128, 256, 512, 512, 1024, 1024),
        layers_per_block=2,
        spatial_compression_ratio=32,
        sample_size=384,
    )


def _notes_encoder(cls: Any) -> Any:
    return cls(
        max_length=2048,
        vocab_size=1536,
        d_model=768,
        dropout_rate=0.1,
        num_layers=12,
        num_heads=12,
        d_kv=64,
        d_ff=2048,
        feed_forward_proj="gated-gelu",
    )


def _sound_encoder(cls: Any) -> Any:
    return cls(
        input_dims=128,
        targets_context_length=256,
        d_model=768,
        dropout_rate=0.1,
        num_layers=12,
        num_heads=12,
        d_kv=64,
        d_ff=2048,
        feed_forward_proj="gated-gelu",
    )


# By class name, what builds a module of the class.
CONFIGS: dict[str, Callable[[Any], Any]] = {
    "AutoencoderKLHunyuanImage": _vae_of_hunyuan_image,
    "ChatGLMModel": lambda cls: cls(cls.config_class(original_rope=True, rmsnorm=True)),
    "DreamLiteTransformer2DModel": lambda cls: cls(in_channels=1408),
    "FluxMultiControlNetModel": _pair_of("FluxControlNetModel"),
    "HunyuanDiT2DControlNetModel": lambda cls: cls(in_channels=4, patch_size=2),
    "HunyuanDiT2DModel": lambda cls: cls(in_channels=4, patch_size=2),
    "HunyuanDiT2DMultiControlNetModel": lambda cls: cls(
        [
            importlib.import_module("diffusers").HunyuanDiT2DControlNetModel(in_channels=4, patch_size=2)
            for _ in range(2)
        ]
    ),
    "LearnedClassifierFreeSamplingEmbeddings": lambda cls: cls(learnable=True, hidden_size=512, length=77),
    "MultiAdapter": _pair_of("T2IAdapter"),
    "MultiControlNetModel": _pair_of("ControlNetModel"),
    "MultiControlNetUnionModel": lambda cls: cls(
        [importlib.import_module("diffusers").ControlNetUnionModel(addition_time_embed_dim=256) for _ in range(2)]
    ),
    "OmniGenTransformer2DModel": lambda cls: cls(
        rope_scaling={"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "su"}
    ),
    "QwenImageMultiControlNetModel": _pair_of("QwenImageControlNetModel"),
    "SD3MultiControlNetModel": _pair_of("SD3ControlNetModel"),
    "SpectrogramContEncoder": _sound_encoder,
    "SpectrogramNotesEncoder": _notes_encoder,
    "StableAudioProjectionModel": lambda cls: cls(
        text_encoder_dim=768, conditioning_dim=768, min_value=0, max_value=512
    ),
    "T5Gemma2Encoder": lambda cls: cls(importlib.import_module("transformers").T5Gemma2Config().encoder),
    "T5GemmaEncoder": lambda cls: cls(importlib.import_module("transformers").T5GemmaConfig().encoder),
    "T5GemmaEncoderModel": lambda cls: cls(
        importlib.import_module("transformers").T5GemmaConfig(is_encoder_decoder=False)
    ),
    "UTransformer2DModel": lambda cls: cls(in_channels=4, patch_size=2, sample_size=64),
    "UniDiffuserModel": lambda cls: cls(
        in_channels=4, out_channels=4, patch_size=2, sample_size=64, num_layers=30, text_dim=64
    ),
    "UniDiffuserTextDecoder": lambda cls: cls(prefix_length=77, prefix_inner_dim=768),
}
# Classes that are not built, and why.
CANNOT: dict[str, str] = {
    "RFD4ProteinaAutoencoder": "its constructor wants tables of the atoms of amino acids",
}
