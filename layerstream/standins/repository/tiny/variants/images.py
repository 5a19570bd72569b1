"""Classes of images whose denoiser is a transformer: Qwen-Image, PixArt, Sana, Lumina, CogView, Z-Image and others."""

from contextlib import AbstractContextManager
from typing import Any

from layerstream.standins.components import flow_scheduler, image_vae, t5_encoder
from layerstream.standins.libraries import diffusers, transformers
from layerstream.standins.repository.components import qwen3_encoder
from layerstream.standins.repository.tiny.images import IMAGE_RECIPES
from layerstream.standins.repository.tiny.recipes import (
    BLOCKS,
    ENCODER_LAYERS,
    HIDDEN,
    pil_picture,
    replaced,
)
from layerstream.standins.repository.tiny.transformers import TRANSFORMER_RECIPES
from layerstream.standins.repository.tiny.variants.variant import (
    Variant,
    changed,
    control_image,
    image,
    image_and_mask,
    merged,
    pil_mask,
)
from layerstream.standins.repository.tokenizers import (
    LETTER_END_ID,
    LETTER_PAD_ID,
    LETTER_START_ID,
    LETTER_VOCAB_SIZE,
    ROBERTA_VOCAB_SIZE,
    letter_tokenizer,
    qwen_tokenizer,
    qwen_vl_processor,
    roberta_tokenizer,
)
from layerstream.standins.tokenizers import t5_tokenizer


def _t5() -> Any:
    return t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS)


QWEN = IMAGE_RECIPES["qwen_image"].parts
QWEN_EDIT = IMAGE_RECIPES["qwen_image_edit"].parts


def _qwen_controlnet(**options: Any) -> Any:
    return diffusers.QwenImageControlNetModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(4, 6, 6),
        **options,
    )


def _small(name: str) -> AbstractContextManager[None]:
    """Let an edit pipeline work on small images, which it would enlarge to an area in its source."""
    return replaced(
        f"diffusers.pipelines.{name}", "calculate_dimensions", lambda kept: lambda area, ratio: kept(64 * 64, ratio)
    )


PIXART = TRANSFORMER_RECIPES["pixart"].parts
SANA = TRANSFORMER_RECIPES["sana"].parts
_SANA_CALL: dict[str, Any] = {"complex_human_instruction": ["Enhance.", "User Prompt: "]}
SPRINT = merged(
    changed(SANA, "transformer", guidance_embeds=True, guidance_embeds_scale=0.1, qk_norm="rms_norm_across_heads"),
    scheduler=lambda: diffusers.SCMScheduler(),
)


def _glm() -> Any:
    return transformers.GlmModel(
        transformers.GlmConfig(
            vocab_size=LETTER_VOCAB_SIZE,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=ENCODER_LAYERS + 1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=HIDDEN // 2,
            max_position_embeddings=1024,
            pad_token_id=LETTER_PAD_ID,
            bos_token_id=LETTER_START_ID,
            eos_token_id=LETTER_END_ID,
        )
    )


def _glm_tokenizer() -> Any:
    tokenizer = letter_tokenizer("PreTrainedTokenizerFast", start="<s>", end="</s>")
    tokenizer.padding_side = "left"
    return tokenizer


def _cogview4(**options: Any) -> Any:
    return diffusers.CogView4Transformer2DModel(
        **{
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": BLOCKS,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": HIDDEN,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 8,
            "rope_axes_dim": (16, 16),
            **options,
        }
    )


COGVIEW4 = merged(
    transformer=_cogview4,
    vae=lambda: image_vae(widths=(8, 8, 16)),
    text_encoder=_glm,
    tokenizer=_glm_tokenizer,
    scheduler=lambda: flow_scheduler(by_size=True),
)
COGVIEW3 = merged(
    transformer=lambda: diffusers.CogView3PlusTransformer2DModel(
        in_channels=16,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=HIDDEN,
        time_embed_dim=32,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
    ),
    vae=lambda: image_vae(widths=(8, 8, 16)),
    text_encoder=_t5,
    tokenizer=t5_tokenizer,
    scheduler=lambda: diffusers.CogVideoXDDIMScheduler(beta_schedule="scaled_linear", snr_shift_scale=1.0),
)


def _bert() -> Any:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=ROBERTA_VOCAB_SIZE,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=ENCODER_LAYERS,
            num_attention_heads=2,
        )
    )


def _hunyuan_options() -> dict[str, Any]:
    return {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 32,
        "cross_attention_dim": HIDDEN,
        "cross_attention_dim_t5": HIDDEN,
        "pooled_projection_dim": 16,
        "text_len": 77,
        "text_len_t5": 256,
    }


def _roberta() -> Any:
    return roberta_tokenizer(max_length=77)


HUNYUAN_DIT = merged(
    {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    transformer=lambda: diffusers.HunyuanDiT2DModel(num_layers=BLOCKS, **_hunyuan_options()),
    vae=lambda: image_vae(widths=(8, 8, 8, 16), latent=4),  # the pipeline takes 8 pixels per latent for granted
    text_encoder=_bert,
    tokenizer=_roberta,
    text_encoder_2=_t5,
    tokenizer_2=t5_tokenizer,
    scheduler=lambda: diffusers.DDPMScheduler(prediction_type="v_prediction", steps_offset=1),
)
Z_IMAGE = merged(
    transformer=lambda: diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=BLOCKS,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=HIDDEN,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 64, 64],
    ),
    vae=lambda: image_vae(widths=(8, 8, 16)),
    text_encoder=lambda: qwen3_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS),
    tokenizer=qwen_tokenizer,
    scheduler=flow_scheduler,
)


def z_controlnet() -> Any:
    """Return a ZImageControlNetModel for `Z_IMAGE`."""
    return diffusers.ZImageControlNetModel(
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0, 1],
        control_in_dim=16,
        dim=32,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
    )


def _gemma() -> Any:
    return transformers.GemmaModel(
        transformers.GemmaConfig(
            vocab_size=LETTER_VOCAB_SIZE,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=ENCODER_LAYERS + 1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=LETTER_PAD_ID,
            bos_token_id=LETTER_START_ID,
            eos_token_id=LETTER_END_ID,
        )
    )


LUMINA = merged(
    transformer=lambda: diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=BLOCKS,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=HIDDEN,
    ),
    vae=lambda: image_vae(widths=(8, 8, 16), latent=4),
    text_encoder=_gemma,
    tokenizer=lambda: letter_tokenizer("GemmaTokenizerFast", start="<bos>", end="<eos>"),
    scheduler=flow_scheduler,
)

VARIANTS = (
    Variant("QwenImagePipeline", QWEN),
    Variant("QwenImageImg2ImgPipeline", QWEN, inputs=image),
    Variant("QwenImageInpaintPipeline", QWEN, inputs=image_and_mask),
    Variant("QwenImageControlNetPipeline", merged(QWEN, controlnet=_qwen_controlnet), inputs=control_image),
    Variant(
        "QwenImageControlNetInpaintPipeline",
        merged(QWEN, controlnet=lambda: _qwen_controlnet(extra_condition_channels=4)),
        inputs=lambda: {**control_image(), "control_mask": pil_mask()},
    ),
    Variant(
        "QwenImageEditPipeline", QWEN_EDIT, inputs=image, around=lambda: _small("qwenimage.pipeline_qwenimage_edit")
    ),
    Variant(
        "QwenImageEditInpaintPipeline",
        QWEN_EDIT,
        inputs=image_and_mask,
        around=lambda: _small("qwenimage.pipeline_qwenimage_edit_inpaint"),
    ),
    Variant(
        "QwenImageEditPlusPipeline",
        QWEN_EDIT,
        inputs=image,
        around=lambda: _small("qwenimage.pipeline_qwenimage_edit_plus"),
    ),
    Variant(
        "QwenImageLayeredPipeline",
        changed(
            changed(QWEN_EDIT, "transformer", use_layer3d_rope=True, use_additional_t_cond=True),
            "vae",
            input_channels=4,
        ),
        {"layers": 2},
        inputs=lambda: {"image": pil_picture().convert("RGBA")},
        around=lambda: _small("qwenimage.pipeline_qwenimage_layered"),
    ),
    Variant(
        "LongCatImageEditPipeline",
        merged(
            IMAGE_RECIPES["longcat"].parts,
            text_processor=lambda: qwen_vl_processor(qwen_tokenizer(), image_pixels=1024),
        ),
        inputs=image,
        around=lambda: _small("longcat_image.pipeline_longcat_image_edit"),
    ),
    Variant("AuraFlowPipeline", TRANSFORMER_RECIPES["aura_flow"].parts),
    Variant("PixArtAlphaPipeline", PIXART),
    Variant("PixArtSigmaPipeline", PIXART),
    Variant("PixArtSigmaPAGPipeline", merged(PIXART, {"pag_applied_layers": "blocks.1"})),
    Variant("SanaPipeline", SANA, _SANA_CALL),
    Variant("SanaPAGPipeline", merged(SANA, {"pag_applied_layers": "blocks.1"}), _SANA_CALL),
    Variant(
        "SanaControlNetPipeline",
        merged(
            SANA,
            controlnet=lambda: diffusers.SanaControlNetModel(
                sample_size=8,
                in_channels=8,
                out_channels=8,
                num_layers=2,
                num_attention_heads=4,
                attention_head_dim=8,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=HIDDEN,
            ),
        ),
        _SANA_CALL,
        inputs=control_image,
    ),
    Variant("SanaSprintPipeline", SPRINT, _SANA_CALL),
    Variant("SanaSprintImg2ImgPipeline", SPRINT, {**_SANA_CALL, "num_inference_steps": 2}, inputs=image),
    Variant(
        "Lumina2Pipeline", TRANSFORMER_RECIPES["lumina2"].parts, {"system_prompt": "Draw.", "max_sequence_length": 64}
    ),
    Variant("LuminaPipeline", LUMINA),
    Variant("CogView3PlusPipeline", COGVIEW3),
    Variant("CogView4Pipeline", COGVIEW4),
    Variant(
        "CogView4ControlPipeline", merged(COGVIEW4, transformer=lambda: _cogview4(in_channels=32)), inputs=control_image
    ),
    Variant("HunyuanDiTPipeline", HUNYUAN_DIT),
    Variant("HunyuanDiTPAGPipeline", merged(HUNYUAN_DIT, {"pag_applied_layers": "blocks.1"})),
    Variant(
        "HunyuanDiTControlNetPipeline",
        merged(
            HUNYUAN_DIT,
            controlnet=lambda: diffusers.HunyuanDiT2DControlNetModel(
                transformer_num_layers=BLOCKS, **_hunyuan_options()
            ),
        ),
        inputs=control_image,
    ),
    Variant("ZImagePipeline", Z_IMAGE),
    Variant("ZImageImg2ImgPipeline", Z_IMAGE, inputs=image),
    Variant("ZImageInpaintPipeline", Z_IMAGE, inputs=image_and_mask),
    Variant("ZImageControlNetPipeline", merged(Z_IMAGE, controlnet=z_controlnet), inputs=control_image),
)
