"""Ovis-Image-7B: a denoiser of 7.37 B and Qwen3-1.7B, 1024 x 1024."""

from functools import partial
from typing import Any

from layerstream.standins.components import flow_scheduler
from layerstream.standins.libraries import transformers
from layerstream.standins.repository.full_size.parts import TINY_FLUX_LIKE, TINY_VOCAB_SIZE, flux_like_inputs, vae
from layerstream.standins.repository.full_size.prompts import know_words
from layerstream.standins.repository.full_size.specs import DenoiserSpec, PipelineSpec, Scale
from layerstream.standins.repository.tokenizers import qwen_tokenizer


def _parts(scale: Scale) -> dict[str, Any]:
    return {
        "scheduler": flow_scheduler(by_size=True),
        "vae": vae(scale),
        "text_encoder": _qwen3(scale),
        "tokenizer": know_words(qwen_tokenizer()),
    }


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
        "vocab_size": TINY_VOCAB_SIZE,
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


DENOISER = DenoiserSpec(
    class_name="OvisImageTransformer2DModel",
    options={"full": {}, "tiny": TINY_FLUX_LIKE},  # the defaults of the class are the real sizes
    grid={"full": (64, 64), "tiny": (4, 4)},
    text_tokens={"full": 256, "tiny": 7},
    inputs=partial(flux_like_inputs, kind=0, start=0),
)
PIPELINE = PipelineSpec(
    class_name="OvisImagePipeline",
    parts=_parts,
    call={"num_inference_steps": 50, "guidance_scale": 5.0, "max_sequence_length": 256},
    size={"full": (1024, 1024), "tiny": (64, 64)},
)
