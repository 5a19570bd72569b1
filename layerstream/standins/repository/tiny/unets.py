"""Tiny pipelines around a convolutional U-Net: Stable Diffusion 1.5 and XL, AnimateDiff, Stable Cascade."""

from typing import Any

import torch

from layerstream.standins.components import clip_text_encoder, image_vae
from layerstream.standins.libraries import Library, diffusers, transformers
from layerstream.standins.repository.tiny.recipes import ENCODER_LAYERS, HIDDEN, Recipe, picture
from layerstream.standins.tokenizers import clip_tokenizer

# As in the real models: attention on all levels but the lowest (or, in XL, the highest).
_SD15_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,  # in diffusers the number of heads
    "cross_attention_dim": HIDDEN,
}


def _sd15() -> dict[str, Any]:
    return {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=16,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            **_SD15_LEVELS,
        ),
        "scheduler": diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        "vae": image_vae(widths=(8, 16), latent=4),  # 2 pixels per latent leave 2 x 2 for the lowest level
        "text_encoder": clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=False),
        "tokenizer": clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sd15_controlnet() -> dict[str, Any]:
    return {
        **_sd15(),
        # The hint is halved between each two widths, as often as the VAE halves the image.
        "controlnet": diffusers.ControlNetModel(conditioning_embedding_out_channels=(8, 16), **_SD15_LEVELS),
    }


def _sd15_ip_adapter() -> dict[str, Any]:
    parts = _sd15()
    unet, side = parts["unet"], 16
    # Shapes of the weights of an IP-Adapter that is loaded: four image tokens, and a key and a value for them in every
    # second attention processor, which are those that attend to the text.
    loaded: dict[str, Any] = {
        "image_proj": {
            "proj.weight": torch.empty(4 * HIDDEN, HIDDEN),
            "proj.bias": torch.empty(4 * HIDDEN),
            "norm.weight": torch.empty(HIDDEN),
            "norm.bias": torch.empty(HIDDEN),
        },
        "ip_adapter": {},
    }
    for number, name in enumerate([n for n in unet.attn_processors if n.endswith("attn2.processor")]):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for what in ("to_k_ip", "to_v_ip"):
            loaded["ip_adapter"][f"{2 * number + 1}.{what}.weight"] = torch.empty(width, HIDDEN)
    unet._load_ip_adapter_weights([loaded], low_cpu_mem_usage=False)
    config = transformers.CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=ENCODER_LAYERS,
        num_attention_heads=2,
        image_size=side,
        patch_size=4,
    )
    return {**parts, "image_encoder": transformers.CLIPVisionModelWithProjection(config)}


# As in the real XL models, but for a level less of attention.
_SDXL_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "cross_attention_dim": 2 * HIDDEN,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + HIDDEN,  # original size, crop and target size, each embedded
}


def _sdxl_parts() -> dict[str, Any]:
    """Return what pipelines of the XL kind have beside their denoisers."""
    return {
        # Not the real one's Euler, which hands torch tensors to numpy in a way that numpy 2 warns of.
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        # Its config says force_upcast, as the real one's: the call casts the VAE to float32 and back.
        "vae": image_vae(widths=(8, 8, 16), latent=4),
        "text_encoder": clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=False),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=True, hidden_act="gelu"),
        "tokenizer_2": clip_tokenizer(),
    }


def _sdxl_img2img() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 2, 3),
        **_SDXL_LEVELS,
    )
    return {"unet": unet, **_sdxl_parts(), "add_watermarker": False}


def _animatediff_sdxl() -> dict[str, Any]:
    # Built with its motion modules at once. From a U-Net without them the pipeline would copy the adapter's into one,
    # which then are the adapter's no more.
    unet = diffusers.UNetMotionModel(
        sample_size=8,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"),
        num_attention_heads=(1, 2, 2),
        transformer_layers_per_block=(1, 1, 2),
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
        **_SDXL_LEVELS,
    )
    adapter = diffusers.MotionAdapter(
        block_out_channels=_SDXL_LEVELS["block_out_channels"],
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )
    return {"unet": unet, "motion_adapter": adapter, **_sdxl_parts()}


def _cast_between(parts: dict[str, Any]) -> None:
    """Let the decoder of the VAE cast between layers of unlike dtypes, as that of diffusers did before 0.36.

    AnimateDiffSDXLPipeline in float16 has its VAE cast up, and single layers of it down again. Newer decoders stop at
    the first layer that stayed in float32.
    """
    parts["vae"].decoder.up_blocks[0].register_forward_pre_hook(
        lambda block, args: (args[0].to(next(block.parameters()).dtype), *args[1:])
    )


def _stable_cascade() -> dict[str, Any]:
    convolved, attended = ("SDCascadeResBlock", "SDCascadeTimestepBlock"), "SDCascadeAttnBlock"

    def text_encoder() -> Any:
        return clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=True, hidden_act="gelu")

    return {
        "prior_prior": diffusers.StableCascadeUNet(
            in_channels=16,
            out_channels=16,
            timestep_ratio_embedding_dim=16,
            conditioning_dim=32,
            block_out_channels=(16, 16),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 2),
            up_num_layers_per_block=(2, 1),
            block_types_per_layer=((*convolved, attended),) * 2,
            clip_text_in_channels=HIDDEN,
            clip_text_pooled_in_channels=HIDDEN,
            clip_image_in_channels=HIDDEN,
            switch_level=(False,),
        ),
        "prior_scheduler": diffusers.DDPMWuerstchenScheduler(),
        "prior_text_encoder": text_encoder(),
        "prior_tokenizer": clip_tokenizer(),
        "decoder": diffusers.StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=16,
            patch_size=2,
            conditioning_dim=32,
            block_out_channels=(8, 8, 16, 16),
            num_attention_heads=(-1, -1, 2, 2),
            down_num_layers_per_block=(1, 1, 1, 1),
            up_num_layers_per_block=(1, 1, 1, 1),
            down_blocks_repeat_mappers=(1, 1, 1, 1),
            up_blocks_repeat_mappers=(3, 3, 2, 2),
            block_types_per_layer=(convolved, convolved, (*convolved, attended), (*convolved, attended)),
            clip_text_pooled_in_channels=HIDDEN,
            effnet_in_channels=16,
            dropout=(0.0, 0.0, 0.1, 0.1),
            timestep_conditioning_type=("sca",),
        ),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
        "vqgan": Library("diffusers.pipelines.stable_cascade.pipeline_stable_cascade").PaellaVQModel(
            bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=32
        ),
        # Loaded, but not run: the decoder gets the states of the prior's.
        "text_encoder": text_encoder(),
        "tokenizer": clip_tokenizer(),
    }


@torch.no_grad()
def _brighten(parts: dict[str, Any]) -> None:
    """Let the images of `_stable_cascade` be grey on average: its VQGAN decodes to 0..1, where others do to -1..1."""
    parts["vqgan"].out_block[0].bias += 0.5


UNET_RECIPES = {
    "sd15": Recipe("StableDiffusionPipeline", _sd15, {"guidance_scale": 5.0}),
    "sd15_controlnet": Recipe(
        "StableDiffusionControlNetPipeline",
        _sd15_controlnet,
        {"guidance_scale": 5.0},
        inputs=lambda: {"image": picture()},
    ),
    "sd15_ip_adapter": Recipe(
        "StableDiffusionPipeline",
        _sd15_ip_adapter,
        {"guidance_scale": 5.0},
        inputs=lambda: {"ip_adapter_image": picture(height=16, width=16)},  # as its feature extractor would give it
    ),
    "sdxl_img2img": Recipe(
        "StableDiffusionXLImg2ImgPipeline",
        _sdxl_img2img,
        {"guidance_scale": 5.0, "strength": 1.0},  # less would leave no step of a single one
        inputs=lambda: {"image": picture()},
        without=("height", "width"),
    ),
    # In float16 it casts its VAE up, and some layers of that down again. The motion adapter does not run.
    "animatediff_sdxl": Recipe(
        "AnimateDiffSDXLPipeline", _animatediff_sdxl, {"guidance_scale": 5.0, "num_frames": 4}, adjust=_cast_between
    ),
    # 3 x 3 latents of the prior become 32 x 32 of the decoder and 128 x 128 pixels, whatever is asked for.
    "stable_cascade": Recipe(
        "StableCascadeCombinedPipeline",
        _stable_cascade,
        {"height": 96, "width": 96, "prior_guidance_scale": 4.0, "prior_num_inference_steps": 4},
        adjust=_brighten,
        stds={"vqgan": 0.05},
    ),
}
