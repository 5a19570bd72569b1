"""Blocks of the denoiser, in the form of Lumina 2: norms of their own, gates through tanh, grouped attention."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from layerstream.standins.repository.autoregressive.mammoth.rope import rotate

FREQUENCIES = 256


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class RMSNormZero(nn.Module):
    """A norm, and scales and gates of a block by the time."""

    def __init__(self, width: int, time: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time, 4 * width)
        self.norm = RMSNorm(width)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.linear(F.silu(temb))[:, None].chunk(4, dim=-1)
        return self.norm(x) * (1 + scale_msa), gate_msa, scale_mlp, gate_mlp


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head, self.groups = width // heads, heads // kv_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, kv_heads * self.head, bias=False)
        self.to_v = nn.Linear(width, kv_heads * self.head, bias=False)
        self.norm_q = RMSNorm(self.head)
        self.norm_k = RMSNorm(self.head)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head)) for part in (self.to_q, self.to_k, self.to_v))
        q, k = rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope)
        k, v = k.repeat_interleave(self.groups, dim=2), v.repeat_interleave(self.groups, dim=2)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out: torch.Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Gated; four times as wide inside, rounded up."""

    def __init__(self, width: int, multiple_of: int) -> None:
        super().__init__()
        inner = math.ceil(4 * width / multiple_of) * multiple_of
        self.linear_1 = nn.Linear(width, inner, bias=False)
        self.linear_2 = nn.Linear(inner, width, bias=False)
        self.linear_3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(F.silu(self.linear_1(x)) * self.linear_3(x))
        return out


class Block(nn.Module):
    """With `time` it depends on the time; without (for text) it is smaller."""

    def __init__(self, width: int, heads: int, kv_heads: int, multiple_of: int, time: int | None) -> None:
        super().__init__()
        self.attn = Attention(width, heads, kv_heads)
        self.feed_forward = FeedForward(width, multiple_of)
        self.norm1: Any = RMSNorm(width) if time is None else RMSNormZero(width, time)
        self.ffn_norm1 = RMSNorm(width)
        self.norm2 = RMSNorm(width)
        self.ffn_norm2 = RMSNorm(width)

    def forward(self, x: torch.Tensor, rope: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        if temb is None:
            x = x + self.norm2(self.attn(self.norm1(x), rope))
            out: torch.Tensor = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
            return out
        normed, gate_msa, scale_mlp, gate_mlp = self.norm1(x, temb)
        x = x + gate_msa.tanh() * self.norm2(self.attn(normed, rope))
        out = x + gate_mlp.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp)))
        return out


class TimestepEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(FREQUENCIES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return [rows, width] of times in 0..1 [rows]."""
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angles = 1000 * timestep[:, None].float() * torch.exp(-math.log(10000) / half * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        out: torch.Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return out


class NormOut(nn.Module):
    def __init__(self, width: int, time: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(time, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear_2 = nn.Linear(width, out)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(self.norm(x) * (1 + self.linear_1(F.silu(temb)))[:, None])
        return out
