"""The VAE of code A: a module of its own in the layout of Flux's first VAE, latents normed over their channels."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class NormedLatents:
    """The latents of an image, which are not drawn: `sample` and `mode` are the same."""

    def __init__(self, latents: torch.Tensor) -> None:
        self.latents = F.layer_norm(latents.movedim(1, -1), latents.shape[1:2]).movedim(-1, 1)

    def sample(self) -> torch.Tensor:
        return self.latents

    def mode(self) -> torch.Tensor:
        return self.latents


class ResnetBlock(nn.Module):
    """Two convolutions, with a third around them where the number of channels changes."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: torch.Tensor = (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h
        return out


class AttnBlock(nn.Module):
    """Attention of one head over all pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = x + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _middle(channels: int, groups: int) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = ResnetBlock(channels, channels, groups)
    middle.attn_1 = AttnBlock(channels, groups)
    middle.block_2 = ResnetBlock(channels, channels, groups)
    return middle


def _through(middle: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = middle.block_2(middle.attn_1(middle.block_1(x)))
    return out


class Encoder(nn.Module):
    """From an image to the mean and the logarithm of the variance of its latents."""

    def __init__(self, widths: Sequence[int], blocks: int, latent: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(blocks):
                level.block.append(ResnetBlock(channels, width, groups))
                channels = width
            if i + 1 < len(widths):
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = _middle(channels, groups)
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * latent, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        level: Any
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(_through(self.mid, h))))
        return out


class Decoder(nn.Module):
    """From latents to an image; `up` is in the order of the levels, and so run from its end."""

    def __init__(self, widths: Sequence[int], blocks: int, latent: int, groups: int) -> None:
        super().__init__()
        channels = widths[-1]
        self.conv_in = nn.Conv2d(latent, channels, 3, padding=1)
        self.mid = _middle(channels, groups)
        levels: list[nn.Module] = []
        for i, width in reversed(list(enumerate(widths))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(blocks + 1):
                level.block.append(ResnetBlock(channels, width, groups))
                channels = width
            if i:
                level.upsample = Upsample(channels)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = _through(self.mid, self.conv_in(z))
        level: Any
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class AutoencoderKL(nn.Module):
    """Is itself never called, only `encode` and `decode`."""

    encoder_class: type[nn.Module] = Encoder
    decoder_class: type[nn.Module] = Decoder

    def __init__(self, *, width: int, ch_mult: Sequence[int], blocks: int, latent: int, groups: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            block_out_channels=list(ch_mult), latent_channels=latent, scaling_factor=1.0, shift_factor=0.0
        )
        widths = [width * factor for factor in ch_mult]
        self.encoder = self.encoder_class(widths, blocks, latent, groups)
        self.decoder = self.decoder_class(widths, blocks, latent, groups)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        """Return an object whose `latent_dist` holds the latents of images [n, 3, height, width] in -1..1."""
        mean, _ = self.encoder(x).chunk(2, dim=1)
        return SimpleNamespace(latent_dist=NormedLatents(mean))

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        """Return an object whose `sample` is the images of latents [n, latent, height / 8, width / 8]."""
        return SimpleNamespace(sample=self.decoder(z))
