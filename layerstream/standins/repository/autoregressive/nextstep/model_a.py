"""Code A of NextStep: a PreTrainedModel with layers of its own, whose `forward_model` runs them over a static cache."""

from typing import Any

import torch
from torch import nn

from layerstream.standins.libraries import transformers
from layerstream.standins.repository.autoregressive.nextstep.head_a import FlowMatchingHead
from layerstream.standins.repository.autoregressive.nextstep.layers_a import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    causal_mask,
)
from layerstream.standins.repository.autoregressive.nextstep.patches import patchify, unpatchify


class NextStepConfig(transformers.LlamaConfig):  # type: ignore[misc, name-defined]  # Any to mypy
    """A LlamaConfig; what is NextStep's own comes as further keyword arguments."""

    model_type = "nextstep"


class NextStep(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]  # Any to mypy
    """Has no `forward`: `prepare_inputs_embeds`, `forward_model`, the projectors and the head's `sample` are called."""

    config_class = NextStepConfig
    base_model_prefix = "model"
    _no_split_modules = ("LlamaDecoderLayer",)
    _supports_sdpa = True
    head_class: type[nn.Module] = FlowMatchingHead

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        token = config.latent_channels * config.latent_patch_size**2
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config.head_dim, config.theta)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.register_buffer("gen_pos_embed", _waves(config.gen_positions, width))
        self.image_in_projector = nn.Linear(token, width)
        self.image_out_projector = nn.Linear(width, width)
        self.image_head = self.head_class(
            token=token, condition=width, width=config.fm_head_dim, blocks=config.fm_head_layers
        )
        self.post_init()

    def prepare_inputs_embeds(self, input_ids: torch.Tensor, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Return embeddings [rows, length, hidden], those of placeholders made of `latents`."""
        weight = self.embed_tokens.weight
        embeds: torch.Tensor = self.embed_tokens(input_ids.to(weight.device))
        if latents is not None:
            tokens = patchify(latents.to(weight.device, weight.dtype), self.config.latent_patch_size)
            shown = self.image_in_projector(tokens).flatten(0, 1)
            places = (input_ids == self.config.image_placeholder_id)[..., None]
            embeds = embeds.masked_scatter(places.to(embeds.device), shown)
        return embeds

    def forward_model(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> Any:
        """Return an output whose `last_hidden_state` is [rows, length, hidden]."""
        length = inputs_embeds.shape[1]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        # A new tensor: what a static cache answers is its counter, which goes on while the layers run.
        cache_position = torch.arange(length, device=inputs_embeds.device) + seen
        mask = causal_mask(attention_mask, cache_position, _room(past_key_values, attention_mask), inputs_embeds.dtype)
        position_embeddings = self.rotary_emb(inputs_embeds, cache_position[None])
        hidden_states = inputs_embeds
        for layer in self.layers:
            outputs = layer(
                hidden_states,
                attention_mask=mask,
                past_key_value=past_key_values,
                use_cache=use_cache,
                cache_position=cache_position,
                position_embeddings=position_embeddings,
            )
            hidden_states = outputs[0]
        return transformers.modeling_outputs.BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def gen_pos_embed_with_ar(self, step: int) -> torch.Tensor:
        """Return the position [1, 1, hidden] of the token `step` of an image."""
        position: torch.Tensor = self.gen_pos_embed[:, step : step + 1]
        return position

    def unpatchify(self, tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Return the latents [n, channels, height, width] of tokens [n, rows * columns, token]."""
        return unpatchify(tokens, self.config.latent_patch_size, rows, columns)


def _room(cache: Any, attention_mask: torch.Tensor) -> int:
    """Return how many keys a query is compared with."""
    if cache is None:
        return attention_mask.shape[1]
    # The name of this changed between versions of transformers.
    return int(cache.layers[0].max_cache_len)


def _waves(positions: int, width: int) -> torch.Tensor:
    """Return float32 positions [1, positions, width]."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] / 10000 ** (
        torch.arange(width // 2, dtype=torch.float32) / (width // 2)
    )
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[None]
