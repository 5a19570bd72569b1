"""Classes that make sound, alone or with a video: Stable Audio, AudioLDM, MusicLDM, LTX 2."""

from typing import Any

from layerstream.standins.components import flow_scheduler, t5_encoder
from layerstream.standins.libraries import Library, diffusers, transformers
from layerstream.standins.repository.tiny.generating import GENERATING_RECIPES
from layerstream.standins.repository.tiny.recipes import BLOCKS, ENCODER_LAYERS, HIDDEN
from layerstream.standins.repository.tiny.variants.stable_diffusion import ddim
from layerstream.standins.repository.tiny.variants.variant import Parts, Variant, frames, image, merged
from layerstream.standins.repository.tokenizers import (
    LETTER_END_ID,
    LETTER_PAD_ID,
    LETTER_START_ID,
    LETTER_VOCAB_SIZE,
    letter_tokenizer,
)
from layerstream.standins.tokenizers import t5_tokenizer

AUDIOLDM2 = GENERATING_RECIPES["audioldm2"].parts


def _unet() -> Any:
    """Return a U-Net that is told of the text by an embedding that stands beside the time's."""
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=(8, 16),  # of itself
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=HIDDEN,
        class_embeddings_concat=True,
    )


def _clap_text() -> Any:
    clap = AUDIOLDM2()["text_encoder"]
    return transformers.ClapTextModelWithProjection(clap.config.text_config)


MUSIC = merged(AUDIOLDM2, unet=_unet, scheduler=ddim)
_SHORT: dict[str, Any] = {"audio_length_in_s": 0.032, "output_type": "np"}
STABLE_AUDIO = merged(
    transformer=lambda: diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=2 * HIDDEN,
        cross_attention_input_dim=HIDDEN,
    ),
    vae=lambda: diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=8,
        sampling_rate=1024,
    ),
    projection_model=lambda: Library("diffusers.pipelines.stable_audio").StableAudioProjectionModel(
        text_encoder_dim=HIDDEN, conditioning_dim=HIDDEN, min_value=0, max_value=32
    ),
    text_encoder=lambda: t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
    tokenizer=lambda: t5_tokenizer(max_length=48),
    scheduler=lambda: diffusers.EDMDPMSolverMultistepScheduler(sigma_data=1.0),
)


def _gemma3() -> Any:
    text = {
        "vocab_size": LETTER_VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": ENCODER_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 16,
        "max_position_embeddings": 1024,
        "pad_token_id": LETTER_PAD_ID,
        "bos_token_id": LETTER_START_ID,
        "eos_token_id": LETTER_END_ID,
    }
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": ENCODER_LAYERS,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


LTX2: Parts = merged(
    transformer=lambda: diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=BLOCKS,
        caption_channels=HIDDEN,
        rope_double_precision=False,
    ),
    vae=lambda: diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, True),
        decoder_spatio_temporal_scaling=(True, True, True),
        upsample_residual=(False, False, False),
        upsample_factor=(1, 1, 1),
        spatial_compression_ratio=16,
        temporal_compression_ratio=8,
        patch_size=2,
    ),
    audio_vae=lambda: diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 2, 2), num_res_blocks=1, latent_channels=2, mel_bins=16, resolution=32
    ),
    text_encoder=_gemma3,
    tokenizer=lambda: letter_tokenizer("GemmaTokenizerFast", start="<bos>", end="<eos>"),
    connectors=lambda: Library("diffusers.pipelines.ltx2").LTX2TextConnectors(
        caption_channels=HIDDEN,
        text_proj_in_factor=ENCODER_LAYERS + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_learnable_registers=8,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
    ),
    vocoder=lambda: Library("diffusers.pipelines.ltx2").LTX2Vocoder(
        in_channels=32,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        output_sampling_rate=16000,
    ),
    scheduler=lambda: flow_scheduler(by_size=True),
)
_LTX2_CALL: dict[str, Any] = {"num_frames": 9, "spatio_temporal_guidance_blocks": [1]}


def _upsampler() -> Any:
    return Library("diffusers.pipelines.ltx2").LTX2LatentUpsamplerModel(
        in_channels=8, mid_channels=32, num_blocks_per_stage=2, use_rational_resampler=False
    )


VARIANTS = (
    Variant("StableAudioPipeline", STABLE_AUDIO, {"audio_end_in_s": 0.1}, stds={"vae": 0.5}),
    Variant("AudioLDMPipeline", merged(MUSIC, text_encoder=_clap_text), _SHORT),
    Variant("LTX2Pipeline", LTX2, _LTX2_CALL),
    Variant("LTX2ImageToVideoPipeline", LTX2, {**_LTX2_CALL, "image_crf": 0}, inputs=image),
    Variant("LTX2ConditionPipeline", LTX2, _LTX2_CALL),
    Variant("LTX2InContextPipeline", LTX2, _LTX2_CALL),
    Variant(
        "LTX2LatentUpsamplePipeline",
        merged(LTX2, latent_upsampler=_upsampler),
        {"num_frames": 9},
        inputs=lambda: {"video": frames(9)},
    ),
)
