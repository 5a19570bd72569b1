"""Well-known pipelines at their true size on the meta device, where weights take no memory, and what a call runs.

Sizes are those of the published configs; where a class's defaults are the real sizes, nothing is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from layerstream.standins import DENOISERS, build_pipeline, denoiser_inputs
from layerstream.standins.components import image_vae
from layerstream.standins.libraries import diffusers, transformers
from layerstream.standins.weights import cast_floating_, unfilled

Modules = dict[str, nn.Module]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A pipeline and one call of it.

    Attributes:
        size: of what the call makes, in pixels.
        num_steps: what its authors ask for.
        passes_per_step: of each denoiser, on the average, by component; guidance in one batch is one pass.
        build: its modules by component, on the meta device, in the dtypes that a call runs them in.
        inputs: of a pass of each denoiser.
        latents: the shape that its VAE decodes.
        num_tokens: passes of a token loop in a call, by component; each reads all of the component's weights.
    """

    name: str
    size: str
    num_steps: int
    passes_per_step: Mapping[str, float]
    build: Callable[[], Modules]
    inputs: Callable[[nn.Module], Inputs]
    latents: tuple[int, ...]
    num_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_passes(self) -> dict[str, float]:
        """Of each denoiser in a call, by component."""
        return {name: self.num_steps * passes for name, passes in self.passes_per_step.items()}


def models() -> list[Model]:
    """All of them, the smallest denoiser first."""
    once, twice = {"transformer": 1}, {"transformer": 2}  # passes a step
    square = (1, 16, 128, 128)
    size = "1024 x 1024"
    return [
        Model("SD3.5-medium", size, 28, once, lambda: _standin("sd35m"), _like("sd35m"), square),
        Model("SDXL", size, 50, {"unet": 1}, _sdxl, _sdxl_inputs, (1, 4, 128, 128)),
        Model(
            "LongCat-Image", "1344 x 768", 50, twice, lambda: _standin("longcat"), _like("longcat"), (1, 16, 96, 168),
            num_tokens={"text_encoder": 512},
        ),
        Model(
            "GLM-Image", size, 50, twice, _glm, _glm_inputs, square, num_tokens={"vision_language_encoder": 1281},
        ),
        Model("Ovis-Image-7B", size, 50, twice, lambda: _standin("ovis"), _like("ovis"), square),
        Model("SD3.5-large", size, 28, once, _sd35_large, _sd35_inputs, square),
        Model("FLUX.1-dev", size, 28, once, _flux, _flux_inputs, square),
        Model("Qwen-Image", "1328 x 1328", 50, twice, _qwen, _qwen_inputs, (1, 16, 1, 166, 166)),
        Model(  # each of its denoisers runs twice a step in half of the steps
            "Wan2.2-A14B", "832 x 480, 81 frames", 40, {"transformer": 1, "transformer_2": 1}, _wan, _wan_inputs,
            (1, 16, 21, 60, 104),
        ),
    ]  # fmt: skip


# ---- parts


@cache
def _standin(name: str) -> Modules:
    with torch.device("meta"), unfilled():
        pipe = build_pipeline(name)
    return {key: part for key, part in pipe.components.items() if isinstance(part, nn.Module)}


def _on_meta(make: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    with torch.device("meta"):
        module = make()
    cast_floating_(module, dtype)
    return module.eval().requires_grad_(False)


def _t5_xxl() -> nn.Module:
    return _standin("sd35m")["text_encoder_3"]


def _clip_l() -> nn.Module:
    return _standin("sd35m")["text_encoder"]


def _image_vae() -> nn.Module:
    return _standin("sd35m")["vae"]


def _qwen_vl() -> nn.Module:
    return _standin("longcat")["text_encoder"]


def _latents(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _like(name: str) -> Callable[[nn.Module], Inputs]:
    assert name in DENOISERS
    return lambda model: denoiser_inputs(name, model, device="meta")


# ---- pipelines


def _sd35_large() -> Modules:
    def denoiser() -> nn.Module:
        made: nn.Module = diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=38,
            attention_head_dim=64,
            num_attention_heads=38,
            joint_attention_dim=4096,
            caption_projection_dim=2432,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        )
        return made

    return {**_standin("sd35m"), "transformer": _on_meta(denoiser)}


def _sd35_inputs(model: nn.Module) -> Inputs:
    return {
        "hidden_states": _latents(2, 16, 128, 128),
        "encoder_hidden_states": _latents(2, 333, 4096),
        "pooled_projections": _latents(2, 2048),
        "timestep": _latents(2, dtype=torch.float32),
        "return_dict": False,
    }


def _sdxl() -> Modules:
    def denoiser() -> nn.Module:
        made: nn.Module = diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        return made

    # The pipeline casts it so, and back, in each call: in float16 its decode overflows.
    vae = _on_meta(lambda: image_vae(widths=(128, 256, 512, 512), layers=2, groups=32, latent=4), torch.float32)
    encoders = {"text_encoder": _clip_l(), "text_encoder_2": _standin("sd35m")["text_encoder_2"]}
    return {"vae": vae, **encoders, "unet": _on_meta(denoiser, torch.float16)}


def _sdxl_inputs(model: nn.Module) -> Inputs:
    half = torch.float16
    return {
        "sample": _latents(2, 4, 128, 128, dtype=half),
        "timestep": _latents(1, dtype=torch.float32),
        "encoder_hidden_states": _latents(2, 77, 2048, dtype=half),
        "added_cond_kwargs": {"text_embeds": _latents(2, 1280, dtype=half), "time_ids": _latents(2, 6, dtype=half)},
        "return_dict": False,
    }


def _glm() -> Modules:
    return {
        "vae": _image_vae(),
        "vision_language_encoder": _on_meta(
            lambda: transformers.GlmImageForConditionalGeneration(transformers.GlmImageConfig())
        ),
        "text_encoder": _on_meta(_byt5_small),
        "transformer": _on_meta(
            lambda: diffusers.GlmImageTransformer2DModel(num_layers=30, num_attention_heads=32, attention_head_dim=128)
        ),
    }


def _byt5_small() -> nn.Module:
    options = {"vocab_size": 384, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6}
    made: nn.Module = transformers.T5EncoderModel(transformers.T5Config(**options, feed_forward_proj="gated-gelu"))
    return made


def _glm_inputs(model: nn.Module) -> Inputs:
    return {
        "hidden_states": _latents(1, 16, 128, 128),
        "encoder_hidden_states": _latents(1, 32, 1472),
        "prior_token_id": _latents(1, 4096, dtype=torch.int64),
        "prior_token_drop": _latents(1, 4096, dtype=torch.bool),
        "timestep": _latents(1, dtype=torch.float32),
        "target_size": _latents(1, 2),
        "crop_coords": _latents(1, 2),
        "return_dict": False,
    }


def _flux() -> Modules:
    denoiser = _on_meta(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True))
    return {"vae": _image_vae(), "text_encoder": _clip_l(), "text_encoder_2": _t5_xxl(), "transformer": denoiser}


def _flux_inputs(model: nn.Module) -> Inputs:
    return {
        "hidden_states": _latents(1, 4096, 64),
        "encoder_hidden_states": _latents(1, 512, 4096),
        "pooled_projections": _latents(1, 768),
        "timestep": _latents(1),
        "guidance": _latents(1),
        "img_ids": _latents(4096, 3, dtype=torch.float32),
        "txt_ids": _latents(512, 3, dtype=torch.float32),
        "return_dict": False,
    }


def _qwen() -> Modules:
    return {
        "vae": _on_meta(diffusers.AutoencoderKLQwenImage),
        "text_encoder": _qwen_vl(),
        "transformer": _on_meta(diffusers.QwenImageTransformer2DModel),
    }


def _qwen_inputs(model: nn.Module) -> Inputs:
    return {
        "hidden_states": _latents(1, 83 * 83, 64),
        "encoder_hidden_states": _latents(1, 100, 3584),
        "timestep": _latents(1),
        "img_shapes": [[(1, 83, 83)]],
        "return_dict": False,
    }


def _wan() -> Modules:
    options = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return {
        "vae": _on_meta(diffusers.AutoencoderKLWan),
        "text_encoder": _on_meta(
            lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**options, feed_forward_proj="gated-gelu"))
        ),
        "transformer": _on_meta(diffusers.WanTransformer3DModel),
        "transformer_2": _on_meta(diffusers.WanTransformer3DModel),
    }


def _wan_inputs(model: nn.Module) -> Inputs:
    return {
        "hidden_states": _latents(1, 16, 21, 60, 104),
        "timestep": _latents(1, dtype=torch.int64),
        "encoder_hidden_states": _latents(1, 512, 4096),
        "return_dict": False,
    }
