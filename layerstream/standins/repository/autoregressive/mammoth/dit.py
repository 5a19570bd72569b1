"""The denoiser: it sees text, the tokens of the sketch through a Q-Former, images to edit, and noisy latents."""

from typing import Any

import torch
from torch import nn

from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.autoregressive.mammoth.dit_blocks import (
    Block,
    FeedForward,
    NormOut,
    RMSNorm,
    TimestepEmbedding,
)
from layerstream.standins.repository.autoregressive.mammoth.rope import image_positions, rotations, text_positions
from layerstream.standins.repository.autoregressive.nextstep.patches import patchify, unpatchify

MOST_IMAGES = 5


class QFormer(nn.Module):
    """As many vectors as it has queries, of however many hidden states of image tokens."""

    def __init__(self, *, states: int, width: int, heads: int, queries: int, layers: int, multiple_of: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(states, width)
        self.query = nn.Parameter(torch.zeros(1, queries, width))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_1": RMSNorm(width),
                    "self_attn": nn.MultiheadAttention(width, heads, batch_first=True),
                    "norm_2": RMSNorm(width),
                    "cross_attn": nn.MultiheadAttention(width, heads, batch_first=True),
                    "norm_3": RMSNorm(width),
                    "ffn": FeedForward(width, multiple_of),
                }
            )
            for _ in range(layers)
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        seen = self.input_proj(states)
        x = self.query.expand(len(states), -1, -1)
        layer: Any
        for layer in self.layers:
            normed = layer["norm_1"](x)
            x = x + layer["self_attn"](normed, normed, normed, need_weights=False)[0]
            x = x + layer["cross_attn"](layer["norm_2"](x), seen, seen, need_weights=False)[0]
            x = x + layer["ffn"](layer["norm_3"](x))
        return x


class TimeCaptionEmbedding(nn.Module):
    def __init__(self, *, states: int, width: int, time: int, qformer: dict[str, int], multiple_of: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(time)
        self.caption_embedder = nn.Sequential(RMSNorm(states), nn.Linear(states, width))
        self.image_embedder = QFormer(states=states, width=width, multiple_of=multiple_of, **qformer)

    def forward(
        self, timestep: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the time and [rows, text + queries, width]; without image tokens the Q-Former does not run."""
        caption = self.caption_embedder(text)
        if image is not None:
            caption = torch.cat([caption, self.image_embedder(image)], dim=1)
        return self.timestep_embedder(timestep), caption


class Transformer2DModel(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc, name-defined]
    config_name = "config.json"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.register_to_config(**options)
        width, patch, channels = options["hidden_size"], options["patch_size"], options["in_channels"]
        time = min(width, 1024)
        size = (width, options["num_attention_heads"], options["num_kv_heads"], options["multiple_of"])
        refiners = options["num_refiner_layers"]
        self.x_embedder = nn.Linear(channels * patch**2, width)
        self.ref_image_patch_embedder = nn.Linear(channels * patch**2, width)
        self.time_caption_embed = TimeCaptionEmbedding(
            states=options["text_feat_dim"],
            width=width,
            time=time,
            qformer=options["qformer"],
            multiple_of=options["multiple_of"],
        )
        self.noise_refiner = nn.ModuleList(Block(*size, time) for _ in range(refiners))
        self.ref_image_refiner = nn.ModuleList(Block(*size, time) for _ in range(refiners))
        self.context_refiner = nn.ModuleList(Block(*size, None) for _ in range(refiners))
        self.layers = nn.ModuleList(Block(*size, time) for _ in range(options["num_layers"]))
        self.norm_out = NormOut(width, time, channels * patch**2)
        self.image_index_embedding = nn.Parameter(torch.zeros(MOST_IMAGES, width))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        text_hidden_states: torch.Tensor,
        freqs_cis: list[torch.Tensor],
        image_hidden_states: torch.Tensor | None = None,
        ref_image_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return the velocity of latents [1, channels, height, width].

        Args:
            timestep: [1], 0 is noise.
            text_hidden_states: [1, tokens, states] of the language model.
            freqs_cis: tables on the CPU.
            image_hidden_states: likewise, of the tokens of the sketch.
            ref_image_hidden_states: latents of images to edit.
        """
        patch = self.config["patch_size"]
        device = hidden_states.device
        rows, columns = (side // patch for side in hidden_states.shape[-2:])
        temb, context = self.time_caption_embed(timestep, text_hidden_states, image_hidden_states)
        rope = rotations(freqs_cis, text_positions(0, context.shape[1]), device)
        for block in self.context_refiner:
            context = block(context, rope)
        parts, ropes = [context], [rope]
        place = context.shape[1]
        for index, latents in enumerate(ref_image_hidden_states or []):
            height, width = (side // patch for side in latents.shape[-2:])
            shown = self.ref_image_patch_embedder(patchify(latents, patch)) + self.image_index_embedding[index]
            rope = rotations(freqs_cis, image_positions(place, height, width), device)
            for block in self.ref_image_refiner:
                shown = block(shown, rope, temb)
            parts, ropes, place = [*parts, shown], [*ropes, rope], place + max(height, width)
        x = self.x_embedder(patchify(hidden_states, patch))
        rope = rotations(freqs_cis, image_positions(place, rows, columns), device)
        for block in self.noise_refiner:
            x = block(x, rope, temb)
        tokens = x.shape[1]
        x, rope = torch.cat([*parts, x], dim=1), torch.cat([*ropes, rope], dim=1)
        for block in self.layers:
            x = block(x, rope, temb)
        return unpatchify(self.norm_out(x[:, -tokens:], temb), patch, rows, columns)
