"""Tiny video pipelines: Wan 2.2, VACE, HunyuanVideo, LTX-Video, CogVideoX, Kandinsky 5, Latte and Cosmos."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from layerstream.standins.components import clip_text_encoder, flow_scheduler, image_vae, t5_encoder
from layerstream.standins.libraries import Library, diffusers
from layerstream.standins.repository.components import llama_encoder, qwen25_vl_encoder, video_vae_options
from layerstream.standins.repository.tiny.recipes import (
    BLOCKS,
    ENCODER_LAYERS,
    HIDDEN,
    PROMPT,
    Recipe,
    pil_picture,
    replaced,
)
from layerstream.standins.repository.tokenizers import letter_tokenizer, qwen_tokenizer, qwen_vl_processor
from layerstream.standins.tokenizers import clip_tokenizer, t5_tokenizer


def _wan_parts() -> dict[str, Any]:
    """Return what Wan's pipelines have beside their denoisers."""
    try:
        Library("diffusers.pipelines.wan.pipeline_wan").prompt_clean(PROMPT)
    except NameError as error:  # diffusers before 0.36 calls ftfy without having imported it
        raise ImportError("WanPipeline of this diffusers needs the package ftfy", name="ftfy") from error
    return {
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": diffusers.AutoencoderKLWan(**video_vae_options(width=8)),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS, per_layer_bias=True),
        "tokenizer": t5_tokenizer(),
    }


def _wan_denoiser_options(*, layers: int) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "text_dim": HIDDEN,
        "freq_dim": 32,
        "ffn_dim": 64,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }


def _wan22() -> dict[str, Any]:
    parts = _wan_parts()
    return {
        "transformer": diffusers.WanTransformer3DModel(**_wan_denoiser_options(layers=BLOCKS)),
        "transformer_2": diffusers.WanTransformer3DModel(**_wan_denoiser_options(layers=BLOCKS)),
        "boundary_ratio": 0.875,
        **parts,
    }


def _wan_vace() -> dict[str, Any]:
    parts = _wan_parts()
    return {
        # All of `vace_blocks` run first, though defined last; each gives a hint to every other block.
        "transformer": diffusers.WanVACETransformer3DModel(
            **_wan_denoiser_options(layers=2 * BLOCKS),
            vace_layers=list(range(0, 2 * BLOCKS, 2)),
            vace_in_channels=2 * 16 + 8 * 8,  # what is to stay and to change, and a mask of a latent's pixels
        ),
        **parts,
    }


def _clean_prompts() -> AbstractContextManager[None]:
    """Let WanVACEPipeline clean its prompt as WanPipeline does: its own way needs the package ftfy."""
    clean = Library("diffusers.pipelines.wan.pipeline_wan").prompt_clean
    return replaced("diffusers.pipelines.wan.pipeline_wan_vace", "prompt_clean", lambda kept: clean)


def _latte() -> dict[str, Any]:
    return {
        # A block that attends within a frame and one that attends over the frames take turns.
        "transformer": diffusers.LatteTransformer3DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=BLOCKS,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=HIDDEN,
            video_length=4,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
        ),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False
        ),
        "vae": image_vae(widths=(8, 8, 16), latent=4),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": t5_tokenizer(),
    }


def _hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def _hunyuan_video() -> dict[str, Any]:
    return {
        "transformer": diffusers.HunyuanVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_layers=BLOCKS,
            num_single_layers=BLOCKS,
            num_refiner_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            mlp_ratio=2.0,
            guidance_embeds=True,
            text_embed_dim=HIDDEN,
            pooled_projection_dim=HIDDEN,
            rope_axes_dim=(4, 6, 6),
        ),
        "scheduler": flow_scheduler(shift=7.0),
        "vae": _hunyuan_vae(),
        # Two more: the pipeline takes the states before the last two layers.
        "text_encoder": llama_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS + 2),
        "tokenizer": letter_tokenizer("LlamaTokenizerFast", start="<s>", end="</s>"),
        "text_encoder_2": clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=False),
        "tokenizer_2": clip_tokenizer(),
    }


def _ltx() -> dict[str, Any]:
    widths, scaled, layers = (8, 8, 16), (True, True, False), (1, 1, 1, 1)
    return {
        "transformer": diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_layers=BLOCKS,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=HIDDEN,
        ),
        "scheduler": flow_scheduler(by_size=True),
        "vae": diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=widths,
            decoder_block_out_channels=widths,
            down_block_types=("LTXVideoDownBlock3D",) * 3,
            layers_per_block=layers,
            decoder_layers_per_block=layers,
            spatio_temporal_scaling=scaled,
            decoder_spatio_temporal_scaling=scaled,
            decoder_inject_noise=(False,) * 4,
            downsample_type=("conv",) * 3,
            upsample_residual=(False,) * 3,
            upsample_factor=(1,) * 3,
            patch_size=2,
        ),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": t5_tokenizer(),
    }


def _cogvideox() -> dict[str, Any]:
    return {
        "transformer": diffusers.CogVideoXTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=BLOCKS,
            num_attention_heads=2,
            attention_head_dim=16,
            time_embed_dim=16,
            text_embed_dim=HIDDEN,
            max_text_seq_length=32,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            use_rotary_positional_embeddings=True,
        ),
        "scheduler": diffusers.CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
        "vae": diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": t5_tokenizer(),
    }


def _kandinsky5() -> dict[str, Any]:
    return {
        "transformer": diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=8,
            out_visual_dim=8,
            in_text_dim=HIDDEN,
            in_text_dim2=HIDDEN,
            time_dim=32,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=2,
            num_visual_blocks=BLOCKS,
            axes_dims=(4, 6, 6),
            visual_cond=True,
        ),
        "scheduler": flow_scheduler(shift=5.0),
        "vae": _hunyuan_vae(),
        "text_encoder": qwen25_vl_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, vision_layers=ENCODER_LAYERS),
        "tokenizer": qwen_vl_processor(qwen_tokenizer()),
        "text_encoder_2": clip_text_encoder(hidden=HIDDEN, layers=ENCODER_LAYERS, projected=False),
        "tokenizer_2": clip_tokenizer(),
    }


class _SafetyChecker(torch.nn.Module):
    """Stands for the checker of Cosmos, of a package of its own; its pipelines move it to the device and back."""

    def __init__(self) -> None:
        super().__init__()
        self.text = torch.nn.Sequential(torch.nn.Embedding(128, HIDDEN), torch.nn.Linear(HIDDEN, HIDDEN))
        self.frame = torch.nn.Linear(3, 3, bias=False)

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.frame.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the weights."""
        return self.frame.weight.dtype

    def check_text_safety(self, prompt: str) -> bool:
        """Return True, having read `prompt` on the device of the weights."""
        letters = torch.tensor([min(ord(letter), 127) for letter in prompt], device=self.device)
        return bool(self.text(letters).isfinite().all())

    def check_video_safety(self, frames: Any) -> Any:
        """Return uint8 [frames, height, width, 3] with colours mixed, so that a wrong weight shows in the video."""
        weight = self.frame.weight
        mixed = self.frame(torch.from_numpy(frames).to(self.device, weight.dtype) / 255).sigmoid()
        return (255 * mixed).round().to(torch.uint8).cpu().numpy()


def _cosmos() -> dict[str, Any]:
    return {
        "transformer": diffusers.CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=BLOCKS,
            num_attention_heads=2,
            attention_head_dim=16,
            text_embed_dim=HIDDEN,
            adaln_lora_dim=8,
            max_size=(4, 16, 16),
            concat_padding_mask=False,  # resizing the mask wants torchvision
        ),
        "scheduler": diffusers.EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=80,
            sigma_data=0.5,
            sigma_schedule="karras",
            prediction_type="epsilon",
            final_sigmas_type="sigma_min",
        ),
        "vae": diffusers.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            patch_size=4,
            latents_mean=None,
            latents_std=None,
        ),
        "text_encoder": t5_encoder(hidden=HIDDEN, ffn=2 * HIDDEN, layers=ENCODER_LAYERS),
        "tokenizer": t5_tokenizer(),
        "safety_checker": _SafetyChecker(),
    }


VIDEO_RECIPES = {
    "wan22": Recipe("WanPipeline", _wan22, {"guidance_scale": 4.0, "num_frames": 5, "max_sequence_length": 32}),
    # A reference image and a video to change, so that the VAE encodes three times.
    "wan_vace": Recipe(
        "WanVACEPipeline",
        _wan_vace,
        {"guidance_scale": 4.0, "num_frames": 5, "max_sequence_length": 32},
        inputs=lambda: {"video": [pil_picture()] * 5, "reference_images": [pil_picture()]},
        around=_clean_prompts,
    ),
    # Its own template would be some four hundred letters; the start token and "Describe: " are cut off again.
    "hunyuan_video": Recipe(
        "HunyuanVideoPipeline",
        _hunyuan_video,
        {
            "guidance_scale": 6.0,
            "true_cfg_scale": 3.0,
            "num_frames": 5,
            "max_sequence_length": 32,
            "prompt_template": {"template": "Describe: {}", "crop_start": 11},
        },
    ),
    "ltx": Recipe("LTXPipeline", _ltx, {"guidance_scale": 3.0, "num_frames": 5, "max_sequence_length": 32}),
    "cogvideox": Recipe(
        "CogVideoXPipeline",
        _cogvideox,
        {"guidance_scale": 6.0, "num_frames": 9, "max_sequence_length": 32},
        stds={"vae": 0.1},
    ),
    # Decodes two frames at a time. Cleaning the caption would want two more packages.
    "latte": Recipe(
        "LattePipeline",
        _latte,
        {"guidance_scale": 5.0, "video_length": 4, "decode_chunk_size": 2, "clean_caption": False},
    ),
    # Its template alone is more than the 512 tokens that it keeps by default, a token per byte here.
    "kandinsky5": Recipe(
        "Kandinsky5T2VPipeline", _kandinsky5, {"guidance_scale": 5.0, "num_frames": 5, "max_sequence_length": 1000}
    ),
    # Moves its safety checker to the device twice in a call, and back.
    "cosmos": Recipe(
        "CosmosTextToWorldPipeline",
        _cosmos,
        {"guidance_scale": 3.0, "num_frames": 9, "max_sequence_length": 32},
    ),
}
