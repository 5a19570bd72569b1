"""Classes of videos whose denoiser is a transformer: Wan and its descendants, LTX, CogVideoX, HunyuanVideo, Cosmos."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from layerstream.standins.components import flow_scheduler, t5_encoder
from layerstream.standins.libraries import Library, diffusers, transformers
from layerstream.standins.repository.components import qwen25_vl_encoder, video_vae_options
from layerstream.standins.repository.tiny.recipes import (
    BLOCKS,
    ENCODER_LAYERS,
    HIDDEN,
    SIDE,
    picture,
    pil_picture,
    replaced,
)
from layerstream.standins.repository.tiny.transformers import TRANSFORMER_RECIPES
from layerstream.standins.repository.tiny.variants.flux import siglip, siglip_images
from layerstream.standins.repository.tiny.variants.stable_diffusion import clip_images, vision_encoder
from layerstream.standins.repository.tiny.variants.variant import (
    Parts,
    Variant,
    changed,
    frames,
    image,
    merged,
    video,
)
from layerstream.standins.repository.tiny.video import VIDEO_RECIPES
from layerstream.standins.repository.tokenizers import BYTE_VOCAB_SIZE, qwen_tokenizer
from layerstream.standins.tokenizers import t5_tokenizer


def clean_prompts(module: str) -> Callable[[], AbstractContextManager[None]]:
    """Let a pipeline clean its prompt as WanPipeline does: its own way needs the package ftfy."""
    clean = Library("diffusers.pipelines.wan.pipeline_wan")
    return lambda: replaced(f"diffusers.pipelines.{module}", "prompt_clean", lambda kept: clean.prompt_clean)


def _without(parts: Parts, *keys: str) -> Parts:
    return lambda: {key: part for key, part in parts().items() if key not in keys}


WAN_PAIR = VIDEO_RECIPES["wan22"].parts
WAN = _without(WAN_PAIR, "transformer_2", "boundary_ratio")


def like_wan(class_name: str, **options: Any) -> Any:
    """Return a denoiser of a class that has the options of Wan's; an option that is None is left out."""
    given = {
        "patch_size": (1, 2, 2),
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": BLOCKS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "text_dim": HIDDEN,
        "freq_dim": 32,
        "ffn_dim": 64,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
        **options,
    }
    return getattr(diffusers, class_name)(**{key: value for key, value in given.items() if value is not None})


def _plain_vision() -> Any:
    return vision_encoder(projected=False)


# The latents, a mask of four frames a latent, and the latents of the first frame.
_WITH_IMAGE: dict[str, Any] = {"in_channels": 36, "image_dim": HIDDEN, "added_kv_proj_dim": 32}
_SEEING = {"image_encoder": _plain_vision, "image_processor": clip_images}
WAN_I2V = merged(WAN, transformer=lambda: like_wan("WanTransformer3DModel", **_WITH_IMAGE), **_SEEING)
SKYREELS = merged(WAN, transformer=lambda: like_wan("SkyReelsV2Transformer3DModel"))
SKYREELS_FORCING = merged(
    WAN, transformer=lambda: like_wan("SkyReelsV2Transformer3DModel", inject_sample_info=True, num_frame_per_block=1)
)
_FORCING: dict[str, Any] = {"base_num_frames": 5, "num_frames": 5}
ANYFLOW = merged(
    WAN,
    transformer=lambda: like_wan("AnyFlowTransformer3DModel"),
    scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(),
)

LTX = VIDEO_RECIPES["ltx"].parts
COGVIDEOX = VIDEO_RECIPES["cogvideox"].parts
_COG: dict[str, Any] = {"num_frames": 9}
HUNYUAN = VIDEO_RECIPES["hunyuan_video"]
_HUNYUAN_CALL = {"prompt_template": HUNYUAN.call["prompt_template"]}
COSMOS = VIDEO_RECIPES["cosmos"].parts
COSMOS2 = merged(
    changed(COSMOS, "transformer", in_channels=16 + 1, out_channels=16),
    vae=lambda: diffusers.AutoencoderKLWan(**video_vae_options(width=8)),
    scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
)


def _longer_video() -> dict[str, Any]:
    return {"video": frames(9)}


def _mochi() -> dict[str, Any]:
    return {
        "transformer": diffusers.MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=BLOCKS,
            pooled_projection_dim=32,
            in_channels=12,
            text_embed_dim=HIDDEN,
            time_embed_dim=16,
            max_sequence_length=32,
        ),
        "vae": diffusers.AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),  # its norms are of 32 groups
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": t5_tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


def _allegro() -> dict[str, Any]:
    return {
        "transformer": diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            num_layers=BLOCKS,
            cross_attention_dim=48,
            sample_width=4,
            sample_height=4,
            sample_frames=2,
            caption_channels=HIDDEN,
        ),
        "vae": diffusers.AutoencoderKLAllegro(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=4,
            sample_size=SIDE,
        ),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": t5_tokenizer(),
        "scheduler": diffusers.EulerAncestralDiscreteScheduler(),
    }


SANA_VIDEO = merged(
    TRANSFORMER_RECIPES["sana"].parts,
    vae=lambda: diffusers.AutoencoderKLWan(**video_vae_options(width=8)),
    transformer=lambda: diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=BLOCKS,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=HIDDEN,
        sample_size=4,
        rope_max_seq_len=32,
    ),
    scheduler=flow_scheduler,
)
_SANA_CALL: dict[str, Any] = {"complex_human_instruction": ["Enhance.", "User Prompt: "], "frames": 5}


def _easy_text() -> dict[str, Any]:
    head = HIDDEN // 2
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 272,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": ENCODER_LAYERS + 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, head // 2 - 5]},
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2},
    )
    return {"text_encoder": transformers.Qwen2VLForConditionalGeneration(config), "tokenizer": qwen_tokenizer()}


def _easy(**options: Any) -> Parts:
    return merged(
        _easy_text,
        transformer=lambda: diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            out_channels=4,
            patch_size=2,
            num_layers=BLOCKS,
            mmdit_layers=2,
            time_embed_dim=16,
            text_embed_dim=HIDDEN,
            sample_width=4,
            sample_height=4,
            **{"in_channels": 4, **options},
        ),
        vae=lambda: diffusers.AutoencoderKLMagvit(
            latent_channels=4,
            block_out_channels=[8, 8, 8, 8],
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
        scheduler=lambda: flow_scheduler(shift=1.0),
    )


def _stacked() -> torch.Tensor:
    """Return a video as [1, 3, frames, height, width]."""
    return picture()[:, :, None].repeat(1, 1, 5, 1, 1)


def _note_cache(parts: dict[str, Any]) -> None:
    """Give the VAE an option that EasyAnimateInpaintPipeline reads, and that the class does not have."""
    parts["vae"].register_to_config(cache_mag_vae=False)


HUNYUAN_15: Parts = merged(
    {"guider": None},
    text_encoder=lambda: (
        qwen25_vl_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS + 2, vision_layers=2).model.language_model
    ),
    tokenizer=qwen_tokenizer,
    text_encoder_2=lambda: t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS, vocab_size=BYTE_VOCAB_SIZE),
    tokenizer_2=lambda: transformers.ByT5Tokenizer(),
    guider=lambda: diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    vae=lambda: diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    ),
    scheduler=lambda: flow_scheduler(shift=5.0),
    image_encoder=siglip,
    feature_extractor=siglip_images,
)


def _hunyuan_15_denoiser(task: str) -> Any:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=BLOCKS,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=HIDDEN,
        text_embed_2_dim=HIDDEN,
        image_embed_dim=HIDDEN,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type=task,
    )


VARIANTS = (
    Variant("WanPipeline", WAN_PAIR),
    Variant("WanImageToVideoPipeline", WAN_I2V, inputs=image, around=clean_prompts("wan.pipeline_wan_i2v")),
    Variant("WanVideoToVideoPipeline", WAN, inputs=video, around=clean_prompts("wan.pipeline_wan_video2video")),
    Variant("WanVACEPipeline", VIDEO_RECIPES["wan_vace"].parts, inputs=video, around=VIDEO_RECIPES["wan_vace"].around),
    Variant(
        "WanAnimatePipeline",
        merged(
            WAN,
            transformer=lambda: like_wan(
                "WanAnimateTransformer3DModel",
                in_channels=36,
                latent_channels=16,
                image_dim=HIDDEN,
                motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
                motion_encoder_size=16,
                motion_style_dim=8,
                motion_dim=4,
                motion_encoder_dim=16,
                face_encoder_hidden_dim=16,
                face_encoder_num_heads=2,
                inject_face_latents_blocks=2,
            ),
            **_SEEING,
        ),
        {"segment_frame_length": 5},
        inputs=lambda: {**image(), "pose_video": frames(5), "face_video": frames(5, height=16, width=16)},
        around=clean_prompts("wan.pipeline_wan_animate"),
    ),
    Variant("SkyReelsV2Pipeline", SKYREELS, around=clean_prompts("skyreels_v2.pipeline_skyreels_v2")),
    Variant(
        "SkyReelsV2ImageToVideoPipeline",
        merged(SKYREELS, transformer=lambda: like_wan("SkyReelsV2Transformer3DModel", **_WITH_IMAGE), **_SEEING),
        inputs=image,
        around=clean_prompts("skyreels_v2.pipeline_skyreels_v2_i2v"),
    ),
    Variant(
        "SkyReelsV2DiffusionForcingPipeline",
        SKYREELS_FORCING,
        _FORCING,
        around=clean_prompts("skyreels_v2.pipeline_skyreels_v2_diffusion_forcing"),
    ),
    Variant(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        SKYREELS_FORCING,
        _FORCING,
        inputs=image,
        around=clean_prompts("skyreels_v2.pipeline_skyreels_v2_diffusion_forcing_i2v"),
    ),
    Variant(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        SKYREELS_FORCING,
        {**_FORCING, "num_frames": 9, "overlap_history": 1},
        inputs=_longer_video,
        around=clean_prompts("skyreels_v2.pipeline_skyreels_v2_diffusion_forcing_v2v"),
    ),
    Variant(
        "ChronoEditPipeline",
        merged(WAN, transformer=lambda: like_wan("ChronoEditTransformer3DModel", **_WITH_IMAGE), **_SEEING),
        inputs=image,
        around=clean_prompts("chronoedit.pipeline_chronoedit"),
    ),
    Variant(
        "LucyEditPipeline",
        merged(WAN, transformer=lambda: like_wan("WanTransformer3DModel", in_channels=32)),
        inputs=video,
        around=clean_prompts("lucy.pipeline_lucy_edit"),
    ),
    Variant("AnyFlowPipeline", ANYFLOW),
    Variant("LTXPipeline", LTX),
    Variant("LTXImageToVideoPipeline", LTX, inputs=image),
    Variant("LTXConditionPipeline", merged(LTX, scheduler=flow_scheduler), {"num_frames": 9}, inputs=image),
    Variant(
        "LTXI2VLongMultiPromptPipeline",
        merged(LTX, scheduler=flow_scheduler),
        {
            "num_frames": 9,
            "temporal_tile_size": 8,
            "temporal_overlap": 4,
            "decode_horizontal_tiles": 1,
            "decode_vertical_tiles": 1,
        },
        inputs=lambda: {"cond_image": pil_picture()},
    ),
    Variant(
        "LTXLatentUpsamplePipeline",
        merged(
            LTX,
            latent_upsampler=lambda: Library(
                "diffusers.pipelines.ltx.modeling_latent_upsampler"
            ).LTXLatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=2),
        ),
        inputs=_longer_video,
    ),
    Variant("CogVideoXPipeline", COGVIDEOX, _COG),
    Variant("CogVideoXImageToVideoPipeline", changed(COGVIDEOX, "transformer", in_channels=8), _COG, inputs=image),
    Variant("CogVideoXVideoToVideoPipeline", COGVIDEOX, inputs=_longer_video),
    Variant(
        "CogVideoXFunControlPipeline",
        changed(COGVIDEOX, "transformer", in_channels=8),
        inputs=lambda: {"control_video": frames(9)},
    ),
    Variant("LattePipeline", VIDEO_RECIPES["latte"].parts, VIDEO_RECIPES["latte"].call),
    Variant("HunyuanVideoPipeline", HUNYUAN.parts, _HUNYUAN_CALL),
    Variant(
        "HunyuanSkyreelsImageToVideoPipeline",
        changed(HUNYUAN.parts, "transformer", in_channels=16),
        _HUNYUAN_CALL,
        inputs=image,
    ),
    Variant(
        "HunyuanVideoFramepackPipeline",
        merged(
            HUNYUAN.parts,
            transformer=lambda: diffusers.HunyuanVideoFramepackTransformer3DModel.from_config(
                HUNYUAN.parts()["transformer"].config,
                has_image_proj=True,
                image_proj_dim=HIDDEN,
                has_clean_x_embedder=True,
            ),
            image_encoder=siglip,
            feature_extractor=siglip_images,
        ),
        {**_HUNYUAN_CALL, "latent_window_size": 3},
        inputs=image,
    ),
    Variant("HunyuanVideo15Pipeline", merged(HUNYUAN_15, transformer=lambda: _hunyuan_15_denoiser("t2v"))),
    Variant(
        "HunyuanVideo15ImageToVideoPipeline",
        merged(HUNYUAN_15, transformer=lambda: _hunyuan_15_denoiser("i2v")),
        inputs=image,
    ),
    Variant("CosmosTextToWorldPipeline", COSMOS, {"num_frames": 9}),
    Variant(
        "CosmosVideoToWorldPipeline", changed(COSMOS, "transformer", in_channels=5), {"num_frames": 9}, inputs=image
    ),
    Variant("Cosmos2TextToImagePipeline", changed(COSMOS2, "transformer", in_channels=16)),
    Variant("Cosmos2VideoToWorldPipeline", COSMOS2, {"num_frames": 9}, inputs=image),
    Variant("MochiPipeline", _mochi, {"num_frames": 7}),
    Variant("AllegroPipeline", _allegro, {"num_frames": 24}, prepare=lambda pipe: pipe.vae.enable_tiling()),
    Variant("SanaVideoPipeline", SANA_VIDEO, _SANA_CALL),
    Variant("SanaImageToVideoPipeline", SANA_VIDEO, _SANA_CALL, inputs=image),
    Variant("EasyAnimatePipeline", _easy()),
    Variant(
        "EasyAnimateInpaintPipeline",
        _easy(in_channels=9, resize_inpaint_mask_directly=True),
        adjust=_note_cache,
        inputs=lambda: {"video": _stacked(), "mask_video": _stacked()[:, :1]},
    ),
    Variant("Kandinsky5T2VPipeline", VIDEO_RECIPES["kandinsky5"].parts, {"max_sequence_length": 1000}),
    Variant(
        "Kandinsky5I2VPipeline",
        VIDEO_RECIPES["kandinsky5"].parts,
        {"max_sequence_length": 1000, "num_frames": 21},
        inputs=image,
    ),
)
