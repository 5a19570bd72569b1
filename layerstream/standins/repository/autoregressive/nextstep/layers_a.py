"""The layers of code A: those of Llama in an older form, which return tuples and are handed their caches."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class LlamaRotaryEmbedding(nn.Module):
    inv_freq: torch.Tensor

    def __init__(self, head: int, theta: float) -> None:
        super().__init__()
        steps = torch.arange(0, head, 2, dtype=torch.float32) / head
        self.register_buffer("inv_freq", theta**-steps, persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].float() * self.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class LlamaAttention(nn.Module):
    """Grouped attention; queries, keys and values have a bias where the config says so, the output none."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim: int = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_value: Any,
        cache_position: torch.Tensor,
    ) -> tuple[torch.Tensor, None, Any]:
        rows, length, _ = hidden_states.shape
        q, k, v = (
            part(hidden_states).view(rows, length, -1, self.head_dim).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotated(q, *position_embeddings), _rotated(k, *position_embeddings)
        if past_key_value is not None:
            # Versions of transformers before 5 read the position, later ones count by themselves.
            k, v = past_key_value.update(k, v, self.layer_idx, {"cache_position": cache_position})
        k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.o_proj(attended.transpose(1, 2).reshape(rows, length, -1)), None, past_key_value


class LlamaMLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        *,
        cache_position: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[Any, ...]:
        """Return (hidden_states, attentions if asked for, the cache if asked for)."""
        attended, attentions, cache = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, position_embeddings, past_key_value, cache_position
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states, *([attentions] if output_attentions else []), *([cache] if use_cache else []))


def causal_mask(
    attention_mask: torch.Tensor, cache_position: torch.Tensor, cache_length: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return what is added to scores, [rows, 1, queries, cache_length]: the least value where nothing may be seen.

    Args:
        attention_mask: [rows, length so far], 0 for padding.
        cache_position: [queries], where each query is in the cache.
        cache_length: of the cache, which is longer than what it holds.
    """
    length = attention_mask.shape[1]
    slots = torch.arange(cache_length, device=attention_mask.device)
    shown = F.pad(attention_mask, (0, cache_length - length)).bool()[:, None, None, :]
    visible = (slots[None, :] <= cache_position[:, None])[None, None] & shown
    hidden = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype, device=attention_mask.device)
    return hidden.masked_fill(visible, 0.0)
