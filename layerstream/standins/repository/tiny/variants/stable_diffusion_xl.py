"""Classes that share the parts of Stable Diffusion XL."""

from typing import Any

from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.tiny.recipes import SIDE, pil_picture
from layerstream.standins.repository.tiny.unets import UNET_RECIPES
from layerstream.standins.repository.tiny.variants.stable_diffusion import EDIT, sde
from layerstream.standins.repository.tiny.variants.variant import (
    Variant,
    all_images,
    changed,
    control_image,
    image,
    image_and_control,
    image_and_mask,
    merged,
)

XL = UNET_RECIPES["sdxl_img2img"].parts
# A U-Net's options that a ControlNet has as well.
_SHARED = (
    *("block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups", "attention_head_dim"),
    *("use_linear_projection", "cross_attention_dim", "transformer_layers_per_block", "addition_embed_type"),
    *("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)


def _like_unet(class_name: str, **options: Any) -> Any:
    config = XL()["unet"].config
    shared = {key: config[key] for key in _SHARED}
    return getattr(diffusers, class_name)(**shared, conditioning_embedding_out_channels=(8, 8, 16), **options)


WITH_CONTROL = merged(XL, controlnet=lambda: _like_unet("ControlNetModel"))
WITH_UNION = merged(
    XL,
    controlnet=lambda: _like_unet(
        "ControlNetUnionModel", num_trans_channel=8, num_trans_head=2, num_proj_channel=8, num_control_type=6
    ),
)
_TWO_LAYERS = changed(XL, "unet", layers_per_block=2)
FOR_XS = merged(
    _TWO_LAYERS,
    controlnet=lambda: diffusers.ControlNetXSAdapter.from_unet(
        _TWO_LAYERS()["unet"],
        block_out_channels=[4, 8, 8],
        conditioning_embedding_out_channels=(8, 8, 16),
        num_attention_heads=[1, 2, 2],
    ),
)


def _invert_first(pipe: Any, arguments: dict[str, Any]) -> Any:
    pipe.invert(image=pil_picture(), num_inversion_steps=4, skip=0.25, height=SIDE, width=SIDE)
    return pipe(**arguments)


def _modes(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "control_image": [inputs["control_image"]], "control_mode": [1]}


VARIANTS = (
    Variant("StableDiffusionXLPipeline", XL),
    Variant("StableDiffusionXLImg2ImgPipeline", XL, inputs=image),
    Variant("StableDiffusionXLInpaintPipeline", XL, inputs=image_and_mask),
    Variant("StableDiffusionXLInstructPix2PixPipeline", changed(XL, "unet", in_channels=8), inputs=image),
    Variant("StableDiffusionXLPAGPipeline", XL),
    Variant("StableDiffusionXLPAGImg2ImgPipeline", XL, inputs=image),
    Variant("StableDiffusionXLPAGInpaintPipeline", XL, inputs=image_and_mask),
    Variant("StableDiffusionXLControlNetPipeline", WITH_CONTROL, inputs=image),
    Variant("StableDiffusionXLControlNetImg2ImgPipeline", WITH_CONTROL, inputs=image_and_control),
    Variant("StableDiffusionXLControlNetInpaintPipeline", WITH_CONTROL, inputs=all_images),
    Variant("StableDiffusionXLControlNetPAGPipeline", WITH_CONTROL, inputs=image),
    Variant("StableDiffusionXLControlNetPAGImg2ImgPipeline", WITH_CONTROL, inputs=image_and_control),
    Variant("StableDiffusionXLControlNetUnionPipeline", WITH_UNION, inputs=lambda: _modes(control_image())),
    Variant("StableDiffusionXLControlNetUnionImg2ImgPipeline", WITH_UNION, inputs=lambda: _modes(image_and_control())),
    Variant("StableDiffusionXLControlNetUnionInpaintPipeline", WITH_UNION, inputs=lambda: _modes(all_images())),
    Variant("StableDiffusionXLControlNetXSPipeline", FOR_XS, inputs=image),
    Variant(
        "StableDiffusionXLAdapterPipeline",
        merged(
            XL,
            adapter=lambda: diffusers.T2IAdapter(
                channels=[8, 16, 16, 16], num_res_blocks=2, downscale_factor=8, adapter_type="full_adapter_xl"
            ),
        ),
        inputs=image,
    ),
    Variant("LEditsPPPipelineStableDiffusionXL", merged(XL, scheduler=sde), EDIT, run=_invert_first),
    Variant(
        "TextToVideoZeroSDXLPipeline",
        XL,
        {"video_length": 2, "num_inference_steps": 3, "t0": 1, "t1": 2},
    ),
)
