"""Classes whose U-Net works on the frames of a video: AnimateDiff, Stable Video Diffusion and older ones."""

from typing import Any

from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.tiny.recipes import HIDDEN, pil_picture
from layerstream.standins.repository.tiny.variants.stable_diffusion import (
    SD,
    WITH_CONTROL,
    clip_images,
    vision_encoder,
)
from layerstream.standins.repository.tiny.variants.variant import Variant, frames, image, merged, video

_MOTION = {"motion_num_attention_heads": 2, "motion_max_seq_length": 8, "use_motion_mid_block": False}


def _motion_adapter(**options: Any) -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=(8, 8, 16, 16), motion_layers_per_block=1, motion_norm_num_groups=4, **_MOTION, **options
    )


def _motion_unet(**options: Any) -> Any:
    """Return a U-Net with its motion modules in it, so that none have to be copied into one."""
    return diffusers.UNetMotionModel(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=(*("CrossAttnDownBlockMotion",) * 3, "DownBlockMotion"),
        up_block_types=("UpBlockMotion", *("CrossAttnUpBlockMotion",) * 3),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=HIDDEN,
        num_attention_heads=2,
        **_MOTION,
        **options,
    )


def _sparse_controlnet() -> Any:
    return diffusers.SparseControlNetModel(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=HIDDEN,
        attention_head_dim=2,
        conditioning_channels=4,
        motion_max_seq_length=8,
        motion_num_attention_heads=2,
        use_simplified_condition_embedding=True,
    )


def _unet_3d(class_name: str = "UNet3DConditionModel", **options: Any) -> Any:
    return getattr(diffusers, class_name)(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,
        **options,
    )


def _temporal_vae() -> Any:
    return diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), layers_per_block=1
    )


def _spatio_temporal_unet() -> Any:
    return diffusers.UNetSpatioTemporalConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=HIDDEN,
        num_attention_heads=(2, 2),
        num_frames=3,
    )


MOVING = merged(SD, unet=_motion_unet, motion_adapter=_motion_adapter)
MOVING_WITH_CONTROL = merged(WITH_CONTROL, MOVING)
_SHORT = {"num_frames": 4}


def _conditioned(*, with_video: bool = False) -> dict[str, Any]:
    return {"conditioning_frames": frames(4), **({"video": frames(4)} if with_video else {})}


VARIANTS = (
    Variant("AnimateDiffPipeline", MOVING, _SHORT),
    Variant("AnimateDiffPAGPipeline", MOVING, _SHORT),
    Variant("AnimateDiffControlNetPipeline", MOVING_WITH_CONTROL, _SHORT, inputs=_conditioned),
    Variant(
        "AnimateDiffSparseControlNetPipeline",
        merged(MOVING, controlnet=_sparse_controlnet),
        _SHORT,
        inputs=lambda: {"conditioning_frames": frames(1)},
    ),
    Variant("AnimateDiffVideoToVideoPipeline", MOVING, inputs=video),
    Variant(
        "AnimateDiffVideoToVideoControlNetPipeline", MOVING_WITH_CONTROL, inputs=lambda: _conditioned(with_video=True)
    ),
    Variant(
        "PIAPipeline",
        merged(MOVING, unet=lambda: _motion_unet(in_channels=9)),
        {**_SHORT, "strength": 1.0},
        inputs=image,
    ),
    Variant("TextToVideoSDPipeline", merged(SD, unet=_unet_3d), _SHORT),
    Variant("VideoToVideoSDPipeline", merged(SD, unet=_unet_3d), inputs=video),
    Variant(
        "I2VGenXLPipeline",
        merged(
            SD,
            unet=lambda: _unet_3d("I2VGenXLUNet"),
            image_encoder=vision_encoder,
            feature_extractor=clip_images,
        ),
        {**_SHORT, "target_fps": 4, "clip_skip": None},
        inputs=image,
    ),
    Variant(
        "StableVideoDiffusionPipeline",
        merged(
            vae=_temporal_vae,
            unet=_spatio_temporal_unet,
            image_encoder=lambda: vision_encoder(image_size=224, patch=32),
            feature_extractor=lambda: clip_images(224),
            scheduler=lambda: diffusers.EulerDiscreteScheduler(
                timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002
            ),
        ),
        {"num_frames": 3},
        inputs=lambda: {"image": pil_picture()},
    ),
)
