"""The network of the flow-matching head, which both codes have: a stack of residual blocks over single tokens."""

import math

import torch
from torch import nn

FREQUENCIES = 256


class TimestepEmbedder(nn.Module):
    """A time in 0..1 as a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = 1000 * t[:, None].float() * torch.exp(-math.log(10000) / half * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        weight = next(self.mlp.parameters())
        embedded: torch.Tensor = self.mlp(waves.to(weight.dtype))
        return embedded


class ResBlock(nn.Module):
    """Two linear layers between a shift and scale and a gate that depend on time and condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        out: torch.Tensor = x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)
        return out


class FinalLayer(nn.Module):
    """From the width of the blocks to that of a token."""

    def __init__(self, width: int, token: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, token)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        out: torch.Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


class SimpleMLPAdaLN(nn.Module):
    """The velocity of a noisy token, given its time and what the language model says of it."""

    def __init__(self, *, token: int, condition: int, width: int, blocks: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(token, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(blocks))
        self.final_layer = FinalLayer(width, token)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return velocities [rows, token] of `x` [rows, token] at `t` [rows], under `c` [rows, condition]."""
        x = self.input_proj(x)
        y = self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        out: torch.Tensor = self.final_layer(x, y)
        return out


def rows_per_image(cfg: float, cfg_img: float) -> int:
    """Return how many rows of the batch guidance takes for an image: 1 without, 2 of texts, 3 of text and image."""
    if cfg_img != 1.0:
        return 3
    return 2 if cfg != 1.0 else 1


def guided(velocity: torch.Tensor, *, cfg: float, cfg_img: float) -> torch.Tensor:
    """Return the velocities [images, token] that guidance makes of [rows, token]: all conditional rows come first."""
    mult = rows_per_image(cfg, cfg_img)
    if mult == 1:
        return velocity
    if mult == 2:
        conditional, without = velocity.chunk(2)
        return without + cfg * (conditional - without)
    conditional, with_image, without = velocity.chunk(3)
    return without + cfg_img * (with_image - without) + cfg * (conditional - with_image)


def shifted(t: float, shift: float) -> float:
    """Return the time `t` of 0..1 moved towards the noise, at 0, by `shift` > 1."""
    return t / (t + shift * (1 - t))
