"""The tokenizer of images: a ViT to codes, a second one and convolutions back. A call runs it only for edits."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from layerstream.standins.repository.autoregressive.nextstep.vae_a import Decoder


class ViTBlock(nn.Module):
    """Attention and a feed-forward part, which is gated in the encoder."""

    def __init__(self, width: int, heads: int, ffn: int, *, is_gated: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=not is_gated)
        self.proj = nn.Linear(width, width, bias=not is_gated)
        self.norm_2 = nn.RMSNorm(width, eps=1e-5)
        self.fc1 = nn.Linear(width, ffn, bias=not is_gated)
        self.fc3 = nn.Linear(width, ffn, bias=False) if is_gated else None
        self.fc2 = nn.Linear(ffn, width, bias=not is_gated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        normed = self.norm_2(x)
        inner = F.gelu(self.fc1(normed)) if self.fc3 is None else F.silu(self.fc1(normed)) * self.fc3(normed)
        out: torch.Tensor = x + self.fc2(inner)
        return out


class ViT(nn.Module):
    def __init__(self, *, width: int, heads: int, ffn: int, depth: int, is_gated: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ViTBlock(width, heads, ffn, is_gated=is_gated) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.norm(x)
        return out


class VisualDiscreteTokenizer(nn.Module):
    """Is itself never called, only `encode` and `decode`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["width"]
        self.patch_embed = nn.Conv2d(3, width, config["patch"], stride=config["patch"])
        self.encoder = ViT(width=width, heads=config["heads"], ffn=config["ffn"], depth=config["depth"], is_gated=True)
        self.quant_proj = nn.Linear(width, config["code_width"])
        self.codebook = nn.Embedding(config["num_codes"], config["code_width"])
        self.post_quant_proj = nn.Linear(config["code_width"], width)
        self.vit_decoder = ViT(
            width=width, heads=config["heads"], ffn=4 * width, depth=config["decoder_depth"], is_gated=False
        )
        self.conv_decoder = Decoder(config["conv_widths"], config["conv_blocks"], width, config["groups"])

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return codes [n, rows * columns] of images [n, 3, height, width] in -1..1."""
        seen = self.encoder(self.patch_embed(pixels).flatten(2).transpose(1, 2))
        values = F.normalize(self.quant_proj(seen).float(), dim=-1)
        likeness = values @ F.normalize(self.codebook.weight.float(), dim=-1).T
        return likeness.argmax(-1)

    def decode(self, codes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Return images [n, 3, height, width] of codes [n, rows * columns]."""
        x = self.vit_decoder(self.post_quant_proj(self.codebook(codes)))
        out: torch.Tensor = self.conv_decoder(x.transpose(1, 2).unflatten(-1, (rows, columns)))
        return out
