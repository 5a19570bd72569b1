"""Classes that denoise pixels, or latents without text: DeepFloyd IF, DDPM and others, latent diffusion."""

from typing import Any

from layerstream.standins.components import image_vae, t5_encoder
from layerstream.standins.libraries import Library, diffusers
from layerstream.standins.repository.tiny.recipes import ENCODER_LAYERS, HIDDEN, SIDE, pil_picture
from layerstream.standins.repository.tiny.variants.stable_diffusion import ddim
from layerstream.standins.repository.tiny.variants.variant import (
    Variant,
    changed,
    image,
    image_and_mask,
    merged,
    pil_mask,
)
from layerstream.standins.tokenizers import CLIP_VOCAB_SIZE, clip_tokenizer, t5_tokenizer


def _if_unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": SIDE,
            "in_channels": 3,
            "out_channels": 6,
            "block_out_channels": (16, 32),
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": HIDDEN,
            "encoder_hid_dim": HIDDEN,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            "resnet_time_scale_shift": "scale_shift",
            "act_fn": "gelu",
            "cross_attention_norm": "group_norm",
            **options,
        }
    )


def _learned_variance() -> Any:
    return diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, sample_max_value=1.0
    )


IF = merged(
    {
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    },
    unet=_if_unet,
    scheduler=_learned_variance,
    image_noising_scheduler=lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    text_encoder=lambda: t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
    tokenizer=lambda: t5_tokenizer(max_length=77),
)
IF_LARGER = changed(IF, "unet", in_channels=6, class_embed_type="timestep")


def _larger(*, with_mask: bool = False) -> dict[str, Any]:
    small = pil_picture(height=SIDE // 2, width=SIDE // 2)
    found = {"image": small, "original_image": pil_picture()}
    return {**found, "mask_image": pil_mask()} if with_mask else found


def unet_2d(**options: Any) -> Any:
    """Return a U-Net that reads no text."""
    return diffusers.UNet2DModel(
        **{
            "sample_size": SIDE,
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            **options,
        }
    )


def vq_vae(*, latent: int = 4, widths: tuple[int, ...] = (16, 16), **options: Any) -> Any:
    """Return a VQModel that halves the size between each two `widths`."""
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        norm_num_groups=4,
        latent_channels=latent,
        num_vq_embeddings=32,
        vq_embed_dim=latent,
        **options,
    )


def _ldm_bert() -> Any:
    latent_diffusion = Library("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    return latent_diffusion.LDMBertModel(
        latent_diffusion.LDMBertConfig(
            vocab_size=CLIP_VOCAB_SIZE,
            encoder_layers=ENCODER_LAYERS,
            encoder_ffn_dim=2 * HIDDEN,
            encoder_attention_heads=2,
            head_dim=16,
            d_model=HIDDEN,
        )
    )


UNCONDITIONAL = merged(unet=unet_2d)
_ARRAY = {"output_type": "np"}
_STD = {"unet": 0.06}  # what they denoise is what they return

VARIANTS = (
    Variant("IFPipeline", IF, stds=_STD),
    Variant("IFImg2ImgPipeline", IF, inputs=image, stds=_STD),
    Variant("IFInpaintingPipeline", IF, inputs=image_and_mask, stds=_STD),
    Variant("IFSuperResolutionPipeline", IF_LARGER, inputs=image, stds=_STD),
    Variant("IFImg2ImgSuperResolutionPipeline", IF_LARGER, inputs=_larger, stds=_STD),
    Variant("IFInpaintingSuperResolutionPipeline", IF_LARGER, inputs=lambda: _larger(with_mask=True), stds=_STD),
    Variant("DDPMPipeline", merged(UNCONDITIONAL, scheduler=lambda: diffusers.DDPMScheduler()), _ARRAY, stds=_STD),
    Variant("DDIMPipeline", merged(UNCONDITIONAL, scheduler=lambda: diffusers.DDIMScheduler()), _ARRAY, stds=_STD),
    Variant(
        "PNDMPipeline",
        merged(UNCONDITIONAL, scheduler=lambda: diffusers.PNDMScheduler(skip_prk_steps=True)),
        _ARRAY,
        stds=_STD,
    ),
    Variant(
        "ScoreSdeVePipeline",
        merged(UNCONDITIONAL, scheduler=lambda: diffusers.ScoreSdeVeScheduler(sigma_max=2.0, correct_steps=1)),
        _ARRAY,
        stds=_STD,
    ),
    Variant(
        "KarrasVePipeline",
        merged(UNCONDITIONAL, scheduler=lambda: diffusers.KarrasVeScheduler(sigma_max=2.0)),
        _ARRAY,
        stds=_STD,
    ),
    Variant(
        "RePaintPipeline",
        merged(UNCONDITIONAL, scheduler=lambda: diffusers.RePaintScheduler()),
        {**_ARRAY, "num_inference_steps": 4, "jump_length": 2, "jump_n_sample": 2},
        inputs=image_and_mask,
    ),
    Variant(
        "ConsistencyModelPipeline",
        merged(
            changed(UNCONDITIONAL, "unet", num_class_embeds=10),
            scheduler=lambda: diffusers.CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0),
        ),
        {"class_labels": 3},
    ),
    Variant(
        "LDMPipeline",
        merged(
            changed(UNCONDITIONAL, "unet", in_channels=4, out_channels=4, sample_size=16), vqvae=vq_vae, scheduler=ddim
        ),
        _ARRAY,
    ),
    Variant(
        "LDMSuperResolutionPipeline",
        merged(changed(UNCONDITIONAL, "unet", in_channels=6), vqvae=lambda: vq_vae(latent=3), scheduler=ddim),
        _ARRAY,
        inputs=image,
    ),
    Variant(
        "LDMTextToImagePipeline",
        merged(
            scheduler=ddim,
            vqvae=lambda: image_vae(widths=(8, 16), latent=4),
            bert=_ldm_bert,
            tokenizer=clip_tokenizer,
            unet=lambda: diffusers.UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=2,
                norm_num_groups=4,
                attention_head_dim=2,
                cross_attention_dim=HIDDEN,
            ),
        ),
        _ARRAY,
    ),
    Variant(
        "DiTPipeline",
        merged(
            vae=lambda: image_vae(widths=(8, 8), latent=4),
            scheduler=ddim,
            transformer=lambda: diffusers.DiTTransformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=8,
                num_layers=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_zero",
            ),
        ),
        {**_ARRAY, "class_labels": [3]},
    ),
    Variant(
        "DanceDiffusionPipeline",
        merged(
            unet=lambda: diffusers.UNet1DModel(
                block_out_channels=(32, 32, 64),
                extra_in_channels=64,
                sample_size=512,
                sample_rate=16_000,
                in_channels=2,
                out_channels=2,
                flip_sin_to_cos=True,
                use_timestep_embedding=False,
                time_embedding_type="fourier",
                mid_block_type="UNetMidBlock1D",
                down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
                up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
            ),
            scheduler=lambda: diffusers.IPNDMScheduler(),
        ),
    ),
)
