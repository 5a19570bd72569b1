"""Code B of NextStep: a subclass of Qwen2Model whose `forward` is called as a method, and a VAE of diffusers' class."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from layerstream.standins.libraries import diffusers, transformers
from layerstream.standins.repository.autoregressive.nextstep.head_b import FlowMatchingHead
from layerstream.standins.repository.autoregressive.nextstep.patches import patchify, unpatchify
from layerstream.standins.repository.autoregressive.nextstep.vae_a import NormedLatents


class NextStepConfig(transformers.Qwen2Config):  # type: ignore[misc, name-defined]  # Any to mypy
    """A Qwen2Config; what is NextStep's own comes as further keyword arguments."""

    model_type = "stepx_llama"


class NextStep(transformers.Qwen2Model):  # type: ignore[misc, name-defined]  # Any to mypy
    config_class = NextStepConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        token = config.latent_channels * config.latent_patch_size**2
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.image_in_projector = nn.Linear(token, width)
        self.image_out_projector = nn.Linear(width, width)
        self.image_head = FlowMatchingHead(
            token=token, condition=width, width=config.fm_head_dim, blocks=config.fm_head_layers
        )
        self.post_init()

    def prepare_inputs_embeds(self, input_ids: torch.Tensor, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Return embeddings [rows, length, hidden], those of placeholders made of `latents`."""
        weight = self.embed_tokens.weight
        embeds: torch.Tensor = self.embed_tokens(input_ids.to(weight.device))
        if latents is None:
            return embeds
        tokens = patchify(latents.to(weight.device, weight.dtype), self.config.latent_patch_size)
        places = (input_ids == self.config.image_placeholder_id)[..., None].to(embeds.device)
        return embeds.masked_scatter(places, self.image_in_projector(tokens).flatten(0, 1))

    def unpatchify(self, tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """Return the latents [n, channels, height, width] of tokens [n, h * w, token]."""
        return unpatchify(tokens, self.config.latent_patch_size, h, w)


class AutoencoderKL(diffusers.AutoencoderKL):  # type: ignore[misc, name-defined]  # Any to mypy
    """That of diffusers, without quantising convolutions, with latents that are normed over their channels."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        mean, _ = self.encoder(x).chunk(2, dim=1)
        latents = NormedLatents(mean)
        return SimpleNamespace(latent_dist=latents) if return_dict else (latents,)
