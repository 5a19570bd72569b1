"""Classes that share the parts of Stable Diffusion 1 and 2."""

from typing import Any

from layerstream.standins.components import clip_text_encoder
from layerstream.standins.libraries import Library, diffusers, transformers
from layerstream.standins.repository.tiny.recipes import ENCODER_LAYERS, HIDDEN, PROMPT, SIDE, pil_picture
from layerstream.standins.repository.tiny.unets import UNET_RECIPES
from layerstream.standins.repository.tiny.variants.variant import (
    Variant,
    all_images,
    changed,
    image,
    image_and_control,
    image_and_mask,
    merged,
)
from layerstream.standins.tokenizers import clip_tokenizer


def ddim(**options: Any) -> Any:
    """Return a scheduler that any U-Net pipeline takes."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, **options
    )


def sde() -> Any:
    """Return the scheduler that LEDITS++ takes."""
    return diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)


def vision_encoder(*, projected: bool = True, image_size: int = 32, patch: int = 8, hidden: int = HIDDEN) -> Any:
    """Return a CLIPVisionModelWithProjection, or a CLIPVisionModel."""
    config = transformers.CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=ENCODER_LAYERS,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch,
    )
    return transformers.CLIPVisionModelWithProjection(config) if projected else transformers.CLIPVisionModel(config)


def clip_images(size: int = 32) -> Any:
    """Return what prepares pictures for `vision_encoder`."""
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def controlnet_xs(unet: Any) -> Any:
    """Return a ControlNetXSAdapter for a U-Net."""
    return diffusers.ControlNetXSAdapter.from_unet(
        unet, block_out_channels=[4, 4, 8, 8], conditioning_embedding_out_channels=(8, 16), num_attention_heads=[2] * 4
    )


SD = merged(UNET_RECIPES["sd15"].parts, scheduler=ddim)
WITH_CONTROL = merged(UNET_RECIPES["sd15_controlnet"].parts, scheduler=ddim)
LCM = merged(
    changed(SD, "unet", time_cond_proj_dim=8),
    scheduler=lambda: diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
)
WITH_IMAGES = merged(SD, image_encoder=vision_encoder, feature_extractor=clip_images)
UNCLIP = merged(
    changed(SD, "unet", class_embed_type="projection", projection_class_embeddings_input_dim=2 * HIDDEN),
    image_noising_scheduler=lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    image_normalizer=lambda: Library("diffusers.pipelines.stable_diffusion").StableUnCLIPImageNormalizer(
        embedding_dim=HIDDEN
    ),
    image_encoder=vision_encoder,
    feature_extractor=clip_images,
)


def prior(**options: Any) -> Any:
    """Return a PriorTransformer from a text's states to an image's."""
    return diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        embedding_dim=HIDDEN,
        num_embeddings=77,
        additional_embeddings=4,
        **options,
    )


def projected_text_encoder() -> Any:
    """Return a CLIPTextModelWithProjection."""
    return clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=True)


def _depth_estimator() -> Any:
    config = transformers.DPTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=2 * HIDDEN,
        image_size=SIDE,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
    )
    return transformers.DPTForDepthEstimation(config)


def _depth_images() -> Any:
    return transformers.DPTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def _invert_first(pipe: Any, arguments: dict[str, Any]) -> Any:
    pipe.invert(image=pil_picture(), source_prompt=PROMPT, num_inversion_steps=4, skip=0.25, height=SIDE, width=SIDE)
    return pipe(**arguments)


def _diffedit(pipe: Any, arguments: dict[str, Any]) -> Any:
    seeded = {"generator": arguments["generator"], "num_inference_steps": 2}
    mask = pipe.generate_mask(
        image=pil_picture(), source_prompt=PROMPT, target_prompt="a blue boat", num_maps_per_mask=1, **seeded
    )
    latents = pipe.invert(
        image=pil_picture(),
        prompt=PROMPT,
        num_inference_steps=2,
        inpaint_strength=1.0,
        generator=arguments["generator"],
    ).latents
    return pipe(mask_image=mask, image_latents=latents, **{**arguments, "inpaint_strength": 1.0})


_TWO_LAYERS = changed(SD, "unet", layers_per_block=2)
FOR_XS = merged(_TWO_LAYERS, controlnet=lambda: controlnet_xs(_TWO_LAYERS()["unet"]))
GLIGEN = changed(SD, "unet", attention_type="gated")
EDIT: dict[str, Any] = {"editing_prompt": ["a blue boat"], "edit_guidance_scale": 3.0}

VARIANTS = (
    Variant("StableDiffusionPipeline", SD),
    Variant("StableDiffusionImg2ImgPipeline", SD, inputs=image),
    Variant("StableDiffusionInpaintPipeline", changed(SD, "unet", in_channels=9), inputs=image_and_mask),
    Variant("StableDiffusionInstructPix2PixPipeline", changed(SD, "unet", in_channels=8), inputs=image),
    Variant("StableDiffusionControlNetPipeline", WITH_CONTROL, inputs=image),
    Variant("StableDiffusionControlNetImg2ImgPipeline", WITH_CONTROL, inputs=image_and_control),
    Variant("StableDiffusionControlNetInpaintPipeline", WITH_CONTROL, inputs=all_images),
    Variant("StableDiffusionPAGPipeline", SD),
    Variant("StableDiffusionPAGImg2ImgPipeline", SD, inputs=image),
    Variant("StableDiffusionPAGInpaintPipeline", SD, inputs=image_and_mask),
    Variant("StableDiffusionControlNetPAGPipeline", WITH_CONTROL, inputs=image),
    Variant("StableDiffusionControlNetPAGInpaintPipeline", WITH_CONTROL, inputs=all_images),
    Variant("LatentConsistencyModelPipeline", LCM),
    Variant("LatentConsistencyModelImg2ImgPipeline", LCM, inputs=image),
    Variant(
        "StableDiffusionAdapterPipeline",
        merged(SD, adapter=lambda: diffusers.T2IAdapter(channels=[8, 8, 16, 16], num_res_blocks=2, downscale_factor=2)),
        inputs=image,
    ),
    Variant(
        "StableDiffusionUpscalePipeline",
        merged(
            changed(SD, "unet", in_channels=7, num_class_embeds=1000),
            low_res_scheduler=lambda: diffusers.DDPMScheduler(),
        ),
        inputs=image,
    ),
    Variant(
        "StableDiffusionLatentUpscalePipeline",
        merged(
            # the pooled states of the text, and a noise level
            changed(SD, "unet", in_channels=8, out_channels=5, time_cond_proj_dim=128 + HIDDEN),
            scheduler=lambda: diffusers.EulerDiscreteScheduler(prediction_type="sample"),
        ),
        inputs=image,
    ),
    Variant(
        "StableDiffusionDepth2ImgPipeline",
        merged(changed(SD, "unet", in_channels=5), depth_estimator=_depth_estimator, feature_extractor=_depth_images),
        inputs=image,
    ),
    Variant("StableDiffusionImageVariationPipeline", WITH_IMAGES, inputs=image),
    Variant(
        "StableUnCLIPPipeline",
        merged(
            UNCLIP,
            prior=prior,
            prior_text_encoder=projected_text_encoder,
            prior_tokenizer=clip_tokenizer,
            prior_scheduler=lambda: diffusers.UnCLIPScheduler(
                prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0
            ),
        ),
        {"prior_num_inference_steps": 2},
    ),
    Variant("StableUnCLIPImg2ImgPipeline", UNCLIP, inputs=image),
    Variant("StableDiffusionControlNetXSPipeline", FOR_XS, inputs=image),
    Variant("StableDiffusionGLIGENPipeline", GLIGEN, {"gligen_phrases": ["fox"], "gligen_boxes": [[0, 0, 0.5, 0.5]]}),
    Variant(
        "StableDiffusionGLIGENTextImagePipeline",
        merged(
            changed(SD, "unet", attention_type="gated-text-image"),
            image_encoder=vision_encoder,
            image_project=lambda: Library("diffusers.pipelines.stable_diffusion").CLIPImageProjection(HIDDEN),
            processor=lambda: transformers.CLIPProcessor(clip_images(), clip_tokenizer()),
        ),
        {"gligen_phrases": ["fox"], "gligen_boxes": [[0, 0, 0.5, 0.5]]},
        inputs=lambda: {"gligen_images": [pil_picture()]},
    ),
    Variant("StableDiffusionPanoramaPipeline", SD, {"width": 48}),
    Variant("StableDiffusionSAGPipeline", SD),
    Variant(
        "StableDiffusionDiffEditPipeline",
        merged(SD, inverse_scheduler=lambda: diffusers.DDIMInverseScheduler(clip_sample=False)),
        run=_diffedit,
    ),
    Variant(
        "StableDiffusionLDM3DPipeline",
        merged(changed(SD, "vae", in_channels=6, out_channels=6), {"image_encoder": None}),
        {"output_type": "np"},
    ),
    Variant("StableDiffusionModelEditingPipeline", SD),
    Variant("StableDiffusionParadigmsPipeline", merged(SD, scheduler=lambda: diffusers.DDIMParallelScheduler())),
    Variant("StableDiffusionInpaintPipelineLegacy", SD, inputs=image_and_mask),
    Variant(
        "CycleDiffusionPipeline",
        merged(SD, scheduler=lambda: ddim(set_alpha_to_one=False)),
        {"source_prompt": "a blue boat", "eta": 0.1},
        inputs=image,
    ),
    Variant("SemanticStableDiffusionPipeline", SD, {**EDIT, "edit_warmup_steps": 0}),
    Variant("LEditsPPPipelineStableDiffusion", merged(SD, scheduler=sde), EDIT, run=_invert_first),
    Variant(
        "TextToVideoZeroPipeline",
        SD,
        {"video_length": 2, "num_inference_steps": 3, "t0": 1, "t1": 2, "output_type": "np"},
    ),
    Variant(
        "PaintByExamplePipeline",
        merged(
            changed(SD, "unet", in_channels=9),
            image_encoder=lambda: Library("diffusers.pipelines.deprecated.paint_by_example").PaintByExampleImageEncoder(
                transformers.CLIPVisionConfig(
                    hidden_size=HIDDEN,
                    intermediate_size=64,
                    projection_dim=HIDDEN,
                    num_hidden_layers=ENCODER_LAYERS,
                    num_attention_heads=2,
                    image_size=32,
                    patch_size=8,
                ),
                proj_size=HIDDEN,
            ),
            feature_extractor=clip_images,
        ),
        inputs=lambda: {**image_and_mask(), "example_image": pil_picture()},
    ),
)
