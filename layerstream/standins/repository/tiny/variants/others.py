"""Classes of their own kind: Marigold, Kolors, Versatile Diffusion, AltDiffusion, VQ Diffusion, Shap-E and others."""

from functools import partial
from typing import Any

from layerstream.standins.components import clip_text_encoder, flow_scheduler, image_vae, t5_encoder
from layerstream.standins.libraries import Library, diffusers, transformers
from layerstream.standins.repository.components import qwen3_vl_encoder
from layerstream.standins.repository.tiny.images import IMAGE_RECIPES
from layerstream.standins.repository.tiny.recipes import BLOCKS, ENCODER_LAYERS, HIDDEN, SIDE
from layerstream.standins.repository.tiny.variants.images import Z_IMAGE, z_controlnet
from layerstream.standins.repository.tiny.variants.pixels import vq_vae
from layerstream.standins.repository.tiny.variants.stable_diffusion import (
    SD,
    clip_images,
    projected_text_encoder,
    vision_encoder,
)
from layerstream.standins.repository.tiny.variants.stable_diffusion_xl import XL
from layerstream.standins.repository.tiny.variants.variant import (
    Parts,
    Variant,
    all_images,
    changed,
    image,
    merged,
)
from layerstream.standins.repository.tiny.variants.video import WAN, clean_prompts, like_wan
from layerstream.standins.repository.tiny.video import VIDEO_RECIPES
from layerstream.standins.repository.tokenizers import (
    BYTE_VOCAB_SIZE,
    LETTER_VOCAB_SIZE,
    ROBERTA_VOCAB_SIZE,
    letter_tokenizer,
    roberta_tokenizer,
)
from layerstream.standins.tokenizers import clip_tokenizer

MARIGOLD = changed(SD, "unet", in_channels=8)
_TARGETS = {
    "target_names": ["albedo", "material"],
    "albedo": {"prediction_space": "srgb"},
    "material": {"prediction_space": "stack"},
}
_MARIGOLD: dict[str, Any] = {"processing_resolution": SIDE}


def _chat_glm() -> Any:
    text_encoder = Library("diffusers.pipelines.kolors.text_encoder")
    return text_encoder.ChatGLMModel(
        text_encoder.ChatGLMConfig(
            num_layers=ENCODER_LAYERS + 1,
            padded_vocab_size=LETTER_VOCAB_SIZE,
            hidden_size=HIDDEN,
            ffn_hidden_size=2 * HIDDEN,
            kv_channels=16,
            num_attention_heads=2,
            seq_length=256,
            multi_query_attention=True,
            multi_query_group_num=1,
            add_qkv_bias=True,
            original_rope=True,
        )
    )


def _chat_glm_tokenizer() -> Any:
    """Return a tokenizer that gives positions as well, as that of ChatGLM does."""
    letters = letter_tokenizer("PreTrainedTokenizerFast", start="<s>", end="</s>")

    class WithPositions:
        def __call__(self, text: Any, **options: Any) -> Any:
            found = letters(text, **options)
            found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            return found

    return WithPositions()


KOLORS = merged(
    changed(
        XL,
        "unet",
        cross_attention_dim=HIDDEN,
        encoder_hid_dim=None,
        projection_class_embeddings_input_dim=6 * 8 + HIDDEN,
    ),
    text_encoder=_chat_glm,
    tokenizer=_chat_glm_tokenizer,
)


def _series() -> Any:
    series = Library("diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series")
    return series.RobertaSeriesModelWithTransformation(
        series.RobertaSeriesConfig(
            vocab_size=ROBERTA_VOCAB_SIZE,
            hidden_size=HIDDEN,
            project_dim=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=ENCODER_LAYERS,
            num_attention_heads=2,
            max_position_embeddings=90,
        )
    )


ALT = merged(SD, text_encoder=_series, tokenizer=lambda: roberta_tokenizer(max_length=77))
VQ = merged(
    vqvae=lambda: vq_vae(widths=(8, 16)),
    text_encoder=lambda: clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=False),
    tokenizer=clip_tokenizer,
    transformer=lambda: diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=BLOCKS,
        cross_attention_dim=HIDDEN,
        attention_bias=True,
        sample_size=8,
        num_vector_embeds=33,
        activation_fn="geglu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm",
    ),
    scheduler=lambda: diffusers.VQDiffusionScheduler(num_vec_classes=33, num_train_timesteps=10),
    learned_classifier_free_sampling_embeddings=lambda: Library(
        "diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion"
    ).LearnedClassifierFreeSamplingEmbeddings(learnable=True, hidden_size=HIDDEN, length=77),
)


def _renderer() -> Any:
    shap_e = Library("diffusers.pipelines.shap_e")
    return shap_e.ShapERenderer(param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=16, d_hidden=8, n_output=12)


def _shap_e_prior(**options: Any) -> Any:
    return diffusers.PriorTransformer(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "embedding_dim": 16,
            "num_embeddings": 32,
            "embedding_proj_dim": HIDDEN,
            "time_embed_dim": 64,
            "num_layers": BLOCKS,
            "clip_embed_dim": 32,
            "additional_embeddings": 0,
            "time_embed_act_fn": "gelu",
            "norm_in_type": "layer",
            "encoder_hid_proj_type": None,
            "added_emb_type": None,
            **options,
        }
    )


def _few_rays(pipe: Any) -> None:
    """Let each of the twenty views be rendered from few rays, in batches that hold no more of them."""
    renderer = pipe.shap_e_renderer
    renderer.decode_to_image = partial(
        renderer.decode_to_image, ray_batch_size=640, n_coarse_samples=4, n_fine_samples=8
    )


SHAP_E = merged(
    prior=_shap_e_prior,
    text_encoder=projected_text_encoder,
    tokenizer=clip_tokenizer,
    scheduler=lambda: diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True, clip_sample=True, clip_sample_range=1.0
    ),
    shap_e_renderer=_renderer,
)
KANDINSKY5 = merged(
    changed(VIDEO_RECIPES["kandinsky5"].parts, "transformer", in_visual_dim=16, out_visual_dim=16),
    vae=lambda: image_vae(widths=(8, 8, 8, 16)),
)


def _small_only(pipe: Any) -> None:
    pipe.resolutions = [(SIDE, SIDE)]  # the nearest of which an image gets


HELIOS = merged(
    WAN,
    transformer=lambda: like_wan(
        "HeliosTransformer3DModel", rope_dim=(4, 6, 6), qk_norm="rms_norm_across_heads", rope_max_seq_len=None
    ),
    scheduler=lambda: diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1 / 3),
)
KREA2 = merged(
    IMAGE_RECIPES["qwen_image"].parts,
    {"text_encoder_select_layers": (1, 2, 3)},
    text_encoder=lambda: qwen3_vl_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, vision_layers=2),
    transformer=lambda: diffusers.Krea2Transformer2DModel(
        in_channels=64,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=HIDDEN,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        axes_dims_rope=(4, 6, 6),
    ),
)
ERNIE = merged(
    IMAGE_RECIPES["flux2_klein"].parts,
    transformer=lambda: diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=BLOCKS,
        ffn_hidden_size=64,
        in_channels=32,
        out_channels=32,
        text_in_dim=HIDDEN,
        rope_axes_dim=(4, 6, 6),
    ),
    scheduler=flow_scheduler,
)


def _hunyuan_image(**options: Any) -> Parts:
    return merged(
        IMAGE_RECIPES["qwen_image"].parts,
        vae=lambda: diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(32, 32, 32),  # its norms are of 32 groups
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=SIDE,
            scaling_factor=0.75,
        ),
        text_encoder_2=lambda: t5_encoder(
            hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS, vocab_size=BYTE_VOCAB_SIZE
        ),
        tokenizer_2=lambda: transformers.ByT5Tokenizer(),
        transformer=lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=BLOCKS,
            num_single_layers=BLOCKS,
            mlp_ratio=2.0,
            text_embed_dim=HIDDEN,
            text_embed_2_dim=HIDDEN,
            rope_axes_dim=(8, 8),
            **options,
        ),
        guider=lambda: diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5),
        scheduler=flow_scheduler,
    )


VARIANTS = (
    Variant("MarigoldDepthPipeline", MARIGOLD, {**_MARIGOLD, "output_type": "pt"}, inputs=image),
    Variant("MarigoldNormalsPipeline", MARIGOLD, {**_MARIGOLD, "output_type": "pt"}, inputs=image),
    Variant(
        "MarigoldIntrinsicsPipeline",
        merged(changed(SD, "unet", in_channels=12, out_channels=8), {"target_properties": _TARGETS}),
        {**_MARIGOLD, "output_type": "pt"},
        inputs=image,
    ),
    Variant("KolorsPipeline", KOLORS),
    Variant("KolorsImg2ImgPipeline", KOLORS, inputs=image),
    Variant("KolorsPAGPipeline", KOLORS),
    Variant("AltDiffusionPipeline", ALT),
    Variant("AltDiffusionImg2ImgPipeline", ALT, inputs=image),
    Variant("StableDiffusionPipelineSafe", SD),
    Variant("VQDiffusionPipeline", VQ, {"output_type": "np"}),
    Variant("ShapEPipeline", SHAP_E, {"frame_size": 8, "output_type": "np"}, prepare=_few_rays),
    Variant(
        "ShapEImg2ImgPipeline",
        merged(
            SHAP_E,
            image_encoder=lambda: vision_encoder(projected=False),
            image_processor=clip_images,
        ),
        {"frame_size": 8, "output_type": "np"},
        inputs=image,
        prepare=_few_rays,
    ),
    Variant(
        "VersatileDiffusionImageVariationPipeline",
        merged(
            image_unet=lambda: SD()["unet"],
            vae=lambda: SD()["vae"],
            scheduler=lambda: SD()["scheduler"],
            image_encoder=vision_encoder,
            image_feature_extractor=clip_images,
        ),
        {"output_type": "np"},
        inputs=image,
        without=("negative_prompt",),
    ),
    Variant(
        "Kandinsky5T2IPipeline",
        changed(KANDINSKY5, "transformer", visual_cond=False),
        {"max_sequence_length": 1000},
        prepare=_small_only,
    ),
    Variant("Kandinsky5I2IPipeline", KANDINSKY5, {"max_sequence_length": 1000}, inputs=image, prepare=_small_only),
    Variant(
        "HeliosPipeline",
        HELIOS,
        {"num_frames": 9, "num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]},
        around=clean_prompts("helios.pipeline_helios"),
    ),
    Variant("Krea2Pipeline", KREA2, {"max_sequence_length": 64}),
    Variant("ErnieImagePipeline", ERNIE, {"use_pe": False}, adjust=IMAGE_RECIPES["flux2_klein"].adjust),
    Variant("HunyuanImagePipeline", _hunyuan_image(), {"prompt": 'a sign that says "fox"'}),
    Variant(
        "ZImageControlNetInpaintPipeline",
        merged(
            Z_IMAGE,
            controlnet=lambda: diffusers.ZImageControlNetModel.from_config(z_controlnet().config, control_in_dim=33),
        ),
        inputs=all_images,
    ),
)
