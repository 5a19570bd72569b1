"""Classes in two stages, from text to features of an image and from those to pixels: Kandinsky, unCLIP, Wuerstchen."""

from typing import Any

import torch

from layerstream.standins.components import t5_encoder
from layerstream.standins.libraries import Library, diffusers
from layerstream.standins.repository.tiny.recipes import ENCODER_LAYERS, HIDDEN, SIDE, picture
from layerstream.standins.repository.tiny.unets import UNET_RECIPES
from layerstream.standins.repository.tiny.variants.pixels import unet_2d, vq_vae
from layerstream.standins.repository.tiny.variants.stable_diffusion import (
    clip_images,
    ddim,
    prior,
    projected_text_encoder,
    vision_encoder,
)
from layerstream.standins.repository.tiny.variants.variant import (
    Variant,
    changed,
    image,
    image_and_mask,
    merged,
)
from layerstream.standins.repository.tokenizers import ROBERTA_VOCAB_SIZE, roberta_tokenizer
from layerstream.standins.tokenizers import clip_tokenizer, t5_tokenizer


def _unclip_scheduler() -> Any:
    return diffusers.UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0)


def _features(seed: int = 1) -> torch.Tensor:
    return torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed))


def _embeds() -> dict[str, Any]:
    return {"image_embeds": _features(), "negative_image_embeds": _features(2)}


def _kandinsky_unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 8,
            "block_out_channels": (16, 32),
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": HIDDEN,
            "encoder_hid_dim": HIDDEN,
            "resnet_time_scale_shift": "scale_shift",
            **options,
        }
    )


def _movq() -> Any:
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),  # its norms are of 32 groups
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=32,
        vq_embed_dim=4,
        norm_type="spatial",
    )


def _multilingual_clip() -> Any:
    text_encoder = Library("diffusers.pipelines.kandinsky.text_encoder")
    return text_encoder.MultilingualCLIP(
        text_encoder.MCLIPConfig(
            transformerDimSize=HIDDEN,
            imageDimSize=HIDDEN,
            vocab_size=ROBERTA_VOCAB_SIZE,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=ENCODER_LAYERS,
            num_attention_heads=2,
            max_position_embeddings=90,
            pad_token_id=1,
        )
    )


def _multilingual_tokenizer() -> Any:
    return roberta_tokenizer(max_length=77)


PRIOR = merged(
    prior=prior,
    image_encoder=vision_encoder,
    image_processor=clip_images,
    text_encoder=projected_text_encoder,
    tokenizer=clip_tokenizer,
    scheduler=_unclip_scheduler,
)


def _prefixed() -> dict[str, Any]:
    return {f"prior_{key}": part for key, part in PRIOR().items()}


KANDINSKY = merged(
    unet=lambda: _kandinsky_unet(
        addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj", addition_embed_type_num_heads=2
    ),
    movq=_movq,
    text_encoder=_multilingual_clip,
    tokenizer=_multilingual_tokenizer,
    scheduler=lambda: ddim(thresholding=False),
)
KANDINSKY_22 = merged(
    unet=lambda: _kandinsky_unet(addition_embed_type="image", encoder_hid_dim_type="image_proj"),
    movq=_movq,
    scheduler=lambda: diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True),
)
KANDINSKY_22_CONTROL = changed(KANDINSKY_22, "unet", in_channels=8, addition_embed_type="image_hint")
_NINE = {"in_channels": 9}
KANDINSKY_3 = merged(
    unet=lambda: diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 16, 32, 32),
        cross_attention_dim=16,
        encoder_hid_dim=HIDDEN,
    ),
    movq=_movq,
    text_encoder=lambda: t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
    tokenizer=t5_tokenizer,
    scheduler=lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True),
)
_FEW = {"prior_num_inference_steps": 2}


def _hint() -> dict[str, Any]:
    return {"hint": picture(height=4 * SIDE, width=4 * SIDE)}  # eight pixels for a latent, whatever the MoVQ has


CASCADE = UNET_RECIPES["stable_cascade"].parts


def _cascade_prior() -> dict[str, Any]:
    return {key.removeprefix("prior_"): part for key, part in CASCADE().items() if key.startswith("prior_")}


def _wuerstchen(name: str, **options: Any) -> Any:
    return getattr(Library("diffusers.pipelines.deprecated.wuerstchen"), name)(**options)


def _wuerstchen_prior() -> dict[str, Any]:
    return {
        "prior": _wuerstchen("WuerstchenPrior", c_in=16, c=16, c_cond=HIDDEN, c_r=16, depth=4, nhead=2),
        "text_encoder": projected_text_encoder(),
        "tokenizer": clip_tokenizer(),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
    }


WUERSTCHEN = merged(
    lambda: {key: part for key, part in CASCADE().items() if not key.startswith("prior_")},
    lambda: {f"prior_{key}": part for key, part in _wuerstchen_prior().items()},
    decoder=lambda: _wuerstchen(
        "WuerstchenDiffNeXt",
        c_r=16,
        c_cond=HIDDEN,
        c_hidden=[16, 16, 32, 32],
        nhead=[-1, 2, 2, 2],
        blocks=[2, 2, 3, 2],
        clip_embd=HIDDEN,
    ),
)
UNCLIP = merged(
    prior=prior,
    decoder=lambda: _kandinsky_unet(
        in_channels=3,
        out_channels=6,
        encoder_hid_dim=None,
        class_embed_type="identity",
        cross_attention_dim=HIDDEN,
        sample_size=16,
    ),
    text_encoder=projected_text_encoder,
    tokenizer=clip_tokenizer,
    text_proj=lambda: Library("diffusers.pipelines.deprecated.unclip").UnCLIPTextProjModel(
        clip_embeddings_dim=HIDDEN, time_embed_dim=64, cross_attention_dim=HIDDEN
    ),
    super_res_first=lambda: unet_2d(in_channels=6, out_channels=3),
    super_res_last=lambda: unet_2d(in_channels=6, out_channels=3),
    prior_scheduler=_unclip_scheduler,
    decoder_scheduler=lambda: diffusers.UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
    super_res_scheduler=lambda: diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    image_encoder=vision_encoder,
    feature_extractor=clip_images,
)
_PIXELS = {"super_res_first": 0.06, "super_res_last": 0.06}
_STEPS = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
AMUSED = merged(
    transformer=lambda: diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=HIDDEN,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=HIDDEN,
        vocab_size=32,
        codebook_size=24,  # masked pixels have one of the others
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        sample_size=16,
    ),
    vqvae=lambda: vq_vae(lookup_from_codebook=True, widths=(8, 16)),
    text_encoder=projected_text_encoder,
    tokenizer=clip_tokenizer,
    scheduler=lambda: diffusers.AmusedScheduler(mask_token_id=31),
)


def _shap_e_prior() -> Any:
    return diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        embedding_dim=HIDDEN,
        embedding_proj_dim=HIDDEN,
        time_embed_dim=64,
        num_embeddings=HIDDEN,
        clip_embed_dim=2 * HIDDEN,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        embedding_proj_norm_type=None,
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )


VARIANTS = (
    Variant("KandinskyPriorPipeline", PRIOR),
    Variant("KandinskyPipeline", KANDINSKY, inputs=_embeds),
    Variant("KandinskyImg2ImgPipeline", KANDINSKY, inputs=lambda: {**_embeds(), **image()}),
    Variant(
        "KandinskyInpaintPipeline",
        changed(KANDINSKY, "unet", **_NINE),
        inputs=lambda: {**_embeds(), **image_and_mask()},
    ),
    Variant("KandinskyCombinedPipeline", merged(KANDINSKY, _prefixed), _FEW),
    Variant("KandinskyImg2ImgCombinedPipeline", merged(KANDINSKY, _prefixed), _FEW, inputs=image),
    Variant(
        "KandinskyInpaintCombinedPipeline",
        merged(changed(KANDINSKY, "unet", **_NINE), _prefixed),
        _FEW,
        inputs=image_and_mask,
    ),
    Variant("KandinskyV22PriorPipeline", PRIOR),
    Variant("KandinskyV22PriorEmb2EmbPipeline", PRIOR, inputs=image),
    Variant("KandinskyV22Pipeline", KANDINSKY_22, inputs=_embeds),
    Variant("KandinskyV22Img2ImgPipeline", KANDINSKY_22, inputs=lambda: {**_embeds(), **image()}),
    Variant(
        "KandinskyV22InpaintPipeline",
        changed(KANDINSKY_22, "unet", **_NINE),
        inputs=lambda: {**_embeds(), **image_and_mask()},
    ),
    Variant("KandinskyV22ControlnetPipeline", KANDINSKY_22_CONTROL, inputs=lambda: {**_embeds(), **_hint()}),
    Variant(
        "KandinskyV22ControlnetImg2ImgPipeline",
        KANDINSKY_22_CONTROL,
        inputs=lambda: {**_embeds(), **image(), **_hint()},
    ),
    Variant("KandinskyV22CombinedPipeline", merged(KANDINSKY_22, _prefixed), _FEW),
    Variant("KandinskyV22Img2ImgCombinedPipeline", merged(KANDINSKY_22, _prefixed), _FEW, inputs=image),
    Variant(
        "KandinskyV22InpaintCombinedPipeline",
        merged(changed(KANDINSKY_22, "unet", **_NINE), _prefixed),
        _FEW,
        inputs=image_and_mask,
    ),
    Variant("Kandinsky3Pipeline", KANDINSKY_3),
    Variant("Kandinsky3Img2ImgPipeline", KANDINSKY_3, inputs=image),
    Variant("StableCascadePriorPipeline", _cascade_prior, {"height": 96, "width": 96}),
    Variant(
        "StableCascadeDecoderPipeline",
        CASCADE,
        {"guidance_scale": 2.0},
        inputs=lambda: {"image_embeddings": _features().view(1, 2, 4, 4).repeat(1, 8, 1, 1)[:, :, :3, :3]},
        stds=UNET_RECIPES["stable_cascade"].stds,
    ),
    Variant("WuerstchenPriorPipeline", _wuerstchen_prior, {"height": 96, "width": 96}),
    Variant(
        "WuerstchenDecoderPipeline",
        WUERSTCHEN,
        {"guidance_scale": 2.0},
        inputs=lambda: {"image_embeddings": _features().view(1, 2, 4, 4).repeat(1, 8, 1, 1)[:, :, :3, :3]},
        stds={"vqgan": 0.05},
    ),
    Variant("WuerstchenCombinedPipeline", WUERSTCHEN, {"height": 96, "width": 96, **_FEW}, stds={"vqgan": 0.05}),
    Variant("UnCLIPPipeline", UNCLIP, {**_STEPS, **_FEW}, stds=_PIXELS),
    Variant("UnCLIPImageVariationPipeline", UNCLIP, _STEPS, inputs=image, stds=_PIXELS),
    Variant("AmusedPipeline", AMUSED),
    Variant("AmusedImg2ImgPipeline", AMUSED, inputs=image),
    Variant("AmusedInpaintPipeline", AMUSED, inputs=image_and_mask),
)
