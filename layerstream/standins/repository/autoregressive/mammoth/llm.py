"""The language model: Qwen3-VL whose upper layers have a second feed-forward part, for tokens of images."""

from typing import Any

import torch
from torch import nn

from layerstream.standins.libraries import transformers

_qwen = transformers.models.qwen3_vl.modeling_qwen3_vl


def expert_layers(moe_type: str) -> range:
    """Return the layers with a second feed-forward part: "ffn-14:36" says 14 to 35."""
    first, last = moe_type.removeprefix("ffn-").split(":")
    return range(int(first), int(last))


class MammothDecoderLayer(_qwen.Qwen3VLTextDecoderLayer):  # type: ignore[misc, name-defined]  # Any to mypy
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gen_mlp = _qwen.Qwen3VLTextMLP(config) if layer_idx in expert_layers(config.moe_type) else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        gen_token_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return hidden states of the shape given; `gen_token_mask` [rows, length] marks the tokens of images."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self._feed_forward(self.post_attention_layernorm(hidden_states), gen_token_mask)

    def _feed_forward(self, x: torch.Tensor, gen_token_mask: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor
        # Both questions wait for the device, in each of these layers and for each token.
        if self.gen_mlp is None or gen_token_mask is None or not gen_token_mask.any():
            out = self.mlp(x)
        elif gen_token_mask.all():
            out = self.gen_mlp(x)
        else:
            flat, marks = x.flatten(0, 1), gen_token_mask.flatten()
            order = torch.argsort(marks.to(torch.int8), stable=True)
            num_text = int((~marks).sum())
            text, image = flat[order].split([num_text, len(flat) - num_text])
            both = torch.cat([self.mlp(text), self.gen_mlp(image)])
            out = both[torch.argsort(order)].view_as(x)
        return out


class MammothTextModel(_qwen.Qwen3VLTextModel):  # type: ignore[misc, name-defined]  # Any to mypy
    def __init__(self, config: Any) -> None:
        # Past the parent, which would make layers without a second part.
        _qwen.Qwen3VLPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.gen_embed_tokens = nn.Embedding(config.gen_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MammothDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _qwen.Qwen3VLTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = _qwen.Qwen3VLTextRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids: torch.Tensor, gen_token_mask: torch.Tensor) -> torch.Tensor:
        """Return embeddings [rows, length, hidden] of text and image tokens."""
        start = self.config.gen_vocab_start_index
        text = self.embed_tokens(input_ids.masked_fill(gen_token_mask, 0))
        image = self.gen_embed_tokens((input_ids - start).clamp(min=0))
        return torch.where(gen_token_mask[..., None], image, text)


class MammothQwen3VLModel(_qwen.Qwen3VLModel):  # type: ignore[misc, name-defined]  # Any to mypy
    def __init__(self, config: Any) -> None:
        _qwen.Qwen3VLPreTrainedModel.__init__(self, config)
        self.visual = _qwen.Qwen3VLVisionModel(config.vision_config)
        self.language_model = MammothTextModel(config.text_config)
        self.rope_deltas: torch.Tensor | None = None
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Any = None,
        cache_position: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        gen_token_mask = input_ids >= self.config.text_config.gen_vocab_start_index
        embeds = self.language_model.embed(input_ids, gen_token_mask)
        shown: dict[str, Any] = {}
        if pixel_values is not None:
            seen = self.visual(pixel_values.to(embeds.dtype), grid_thw=image_grid_thw, return_dict=True)
            places = input_ids == self.config.image_token_id
            embeds = embeds.masked_scatter(places[..., None], seen.pooler_output.to(embeds.dtype))
            shown = {"visual_pos_masks": places, "deepstack_visual_embeds": seen.deepstack_features}
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=self._positions(attention_mask, cache_position, input_ids.shape[1]),
            past_key_values=past_key_values,
            gen_token_mask=gen_token_mask,
            **shown,
            **kwargs,
        )

    def _positions(
        self, attention_mask: torch.Tensor, cache_position: torch.Tensor | None, length: int
    ) -> torch.Tensor:
        """Return positions [3, rows, length]: without padding, and in later tokens by what the first call left here."""
        if cache_position is None or length > 1:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            self.rope_deltas = positions.amax(-1, keepdim=True) + 1 - attention_mask.shape[1]
        else:
            assert self.rope_deltas is not None
            positions = cache_position[None] + self.rope_deltas
        return positions[None].expand(3, -1, -1)


class MammothQwen3VL(_qwen.Qwen3VLForConditionalGeneration):  # type: ignore[misc, name-defined]  # Any to mypy
    def __init__(self, config: Any) -> None:
        _qwen.Qwen3VLPreTrainedModel.__init__(self, config)
        text = config.text_config
        self.model = MammothQwen3VLModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.gen_head = nn.Linear(text.hidden_size, text.gen_vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """Return an output with `logits` [rows, length, text ids ++ image ids] and the `hidden_states` asked for."""
        outputs = self.model(input_ids, **kwargs)
        hidden = outputs.last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=torch.cat([self.lm_head(hidden), self.gen_head(hidden)], dim=-1),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
