"""Classes that share the parts of Stable Diffusion 3, Flux, Flux 2 and their relatives."""

from typing import Any

from layerstream.standins.components import image_vae, t5_encoder
from layerstream.standins.libraries import Library, diffusers, transformers
from layerstream.standins.repository.tiny.images import IMAGE_RECIPES
from layerstream.standins.repository.tiny.recipes import BLOCKS, ENCODER_LAYERS, HIDDEN, SIDE, pil_picture
from layerstream.standins.repository.tiny.variants.variant import (
    Variant,
    all_images,
    changed,
    control_image,
    image,
    image_and_control,
    image_and_mask,
    merged,
    pil_mask,
)
from layerstream.standins.repository.tokenizers import (
    LETTER_END_ID,
    LETTER_PAD_ID,
    LETTER_START_ID,
    LETTER_VOCAB_SIZE,
    letter_tokenizer,
)
from layerstream.standins.tokenizers import t5_tokenizer


def _sd3_controlnet(**options: Any) -> Any:
    return diffusers.SD3ControlNetModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        joint_attention_dim=2 * HIDDEN,
        caption_projection_dim=32,
        pooled_projection_dim=2 * HIDDEN,
        pos_embed_max_size=16,
        **options,
    )


SD3 = IMAGE_RECIPES["sd3"].parts
SD3_PAG = merged(SD3, {"pag_applied_layers": "blocks.3"})  # not one with dual attention


FLUX = IMAGE_RECIPES["flux"].parts
FLUX_WITH_CONTROL = IMAGE_RECIPES["flux_controlnet"].parts
FLUX_OF_TWO = changed(FLUX, "transformer", in_channels=128, out_channels=64)  # the picture's latents, too
# The latents, those of the picture left to see, and a mask of a latent's pixels (4 x 4 here), each in patches of 2 x 2.
FLUX_FILL = changed(FLUX, "transformer", in_channels=64 + 64 + 4 * 16, out_channels=64)
CHROMA = merged(
    FLUX,
    text_encoder=lambda: t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
    tokenizer=t5_tokenizer,
    transformer=lambda: diffusers.ChromaTransformer2DModel(
        in_channels=64,
        num_layers=BLOCKS,
        num_single_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    ),
)
BRIA = merged(
    CHROMA,
    transformer=lambda: diffusers.BriaTransformer2DModel(
        in_channels=16,
        num_layers=BLOCKS,
        num_single_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=[4, 6, 6],
    ),
    vae=lambda: image_vae(widths=(8, 8, 16), latent=4),
)


def siglip_images() -> Any:
    """Return what prepares pictures for `siglip`."""
    return transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})


def siglip() -> Any:
    """Return a SiglipVisionModel."""
    config = transformers.SiglipVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=ENCODER_LAYERS,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return transformers.SiglipVisionModel(config)


def _llama_with_head() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=LETTER_VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=ENCODER_LAYERS + 1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        pad_token_id=LETTER_PAD_ID,
        bos_token_id=LETTER_START_ID,
        eos_token_id=LETTER_END_ID,
    )
    return transformers.LlamaForCausalLM(config)


def _hidream() -> dict[str, Any]:
    return {
        **SD3(),
        "text_encoder_3": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "text_encoder_4": _llama_with_head(),
        "tokenizer_4": letter_tokenizer("LlamaTokenizerFast", start="<s>", end="</s>"),
        "vae": image_vae(widths=(8, 8, 16)),
        "transformer": diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[HIDDEN, HIDDEN],
            text_emb_dim=2 * HIDDEN,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(16, 16),
            llama_layers=[0, 1, 2, 3],
            force_inference_output=True,
        ),
    }


def _small_area(pipe: Any) -> None:
    pipe.default_sample_size = SIDE // 4  # of latents; every image gets about that area


FLUX2 = IMAGE_RECIPES["flux2_klein"].parts
_KLEIN: dict[str, Any] = {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)}


def _large() -> dict[str, Any]:
    return {"image": pil_picture(height=64, width=64)}


def _large_and_mask() -> dict[str, Any]:
    return {**_large(), "mask_image": pil_mask(height=64, width=64)}


CLOZE = merged(FLUX_FILL, {"resolution": SIDE})
_CLOZE = {"task_prompt": "from grey to colour", "content_prompt": "a red fox"}


def _examples() -> dict[str, Any]:
    """One pair of pictures, and one whose second is asked for."""
    return {"image": [[pil_picture(), pil_picture()], [pil_picture(), None]]}


def _note_guidance(parts: dict[str, Any]) -> None:
    """Give the denoiser an option that ChromaInpaintPipeline reads, and that the class does not have."""
    parts["transformer"].register_to_config(guidance_embeds=False)


_KONTEXT = {"max_area": SIDE * SIDE, "_auto_resize": False}

VARIANTS = (
    Variant("StableDiffusion3Pipeline", SD3),
    Variant("StableDiffusion3Img2ImgPipeline", SD3, inputs=image),
    Variant("StableDiffusion3InpaintPipeline", SD3, inputs=image_and_mask),
    Variant("StableDiffusion3PAGPipeline", SD3_PAG),
    Variant("StableDiffusion3PAGImg2ImgPipeline", SD3_PAG, inputs=image),
    Variant("StableDiffusion3ControlNetPipeline", merged(SD3, controlnet=_sd3_controlnet), inputs=control_image),
    Variant(
        "StableDiffusion3ControlNetInpaintingPipeline",
        merged(SD3, controlnet=lambda: _sd3_controlnet(extra_conditioning_channels=1)),
        inputs=lambda: {**control_image(), "control_mask": pil_mask()},
    ),
    Variant("HiDreamImagePipeline", _hidream, prepare=_small_area),
    Variant("FluxPipeline", FLUX),
    Variant("FluxImg2ImgPipeline", FLUX, inputs=image),
    Variant("FluxInpaintPipeline", FLUX, inputs=image_and_mask),
    Variant("FluxControlNetPipeline", FLUX_WITH_CONTROL, inputs=control_image),
    Variant("FluxControlNetImg2ImgPipeline", FLUX_WITH_CONTROL, inputs=image_and_control),
    Variant("FluxControlNetInpaintPipeline", FLUX_WITH_CONTROL, inputs=all_images),
    Variant("FluxControlPipeline", FLUX_OF_TWO, inputs=control_image),
    Variant("FluxControlImg2ImgPipeline", FLUX_OF_TWO, inputs=image_and_control),
    Variant("FluxControlInpaintPipeline", FLUX_OF_TWO, inputs=all_images),
    Variant("FluxFillPipeline", FLUX_FILL, inputs=image_and_mask),
    Variant("FluxKontextPipeline", FLUX, _KONTEXT, inputs=image),
    Variant("FluxKontextInpaintPipeline", FLUX, _KONTEXT, inputs=image_and_mask),
    Variant(
        "FluxPriorReduxPipeline",
        merged(
            FLUX,
            image_encoder=siglip,
            feature_extractor=siglip_images,
            image_embedder=lambda: Library("diffusers.pipelines.flux").ReduxImageEncoder(
                redux_dim=HIDDEN, txt_in_features=HIDDEN
            ),
        ),
        inputs=image,
    ),
    Variant("VisualClozeGenerationPipeline", CLOZE, _CLOZE, inputs=_examples),
    Variant(
        "VisualClozePipeline",
        CLOZE,
        {**_CLOZE, "upsampling_height": SIDE, "upsampling_width": SIDE, "upsampling_strength": 0.5},
        inputs=_examples,
    ),
    Variant("ChromaPipeline", CHROMA),
    Variant("ChromaImg2ImgPipeline", CHROMA, inputs=image),
    Variant("ChromaInpaintPipeline", CHROMA, inputs=image_and_mask, adjust=_note_guidance),
    Variant("BriaPipeline", BRIA),
    Variant("BriaFiboPipeline", IMAGE_RECIPES["bria_fibo_edit"].parts, {"max_sequence_length": 128}),
    Variant("Flux2KleinPipeline", FLUX2, _KLEIN, inputs=_large, adjust=IMAGE_RECIPES["flux2_klein"].adjust),
    Variant(
        "Flux2KleinInpaintPipeline",
        FLUX2,
        {**_KLEIN, "height": 64, "width": 64},
        inputs=_large_and_mask,
        adjust=IMAGE_RECIPES["flux2_klein"].adjust,
    ),
    Variant("Flux2KleinKVPipeline", FLUX2, _KLEIN, inputs=_large, adjust=IMAGE_RECIPES["flux2_klein"].adjust),
)
