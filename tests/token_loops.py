"""A toy autoregressive image model, called as remote code does: by methods of its parts, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH = 32


class Layer(nn.Module):
    """A decoder layer that keeps what it saw of the tokens before."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, seen: list[torch.Tensor], number: int) -> tuple[Any, ...]:
        h = self.mix(self.norm(x))
        seen[number] = h if seen[number] is None else torch.cat([seen[number], h], dim=1)
        past = (seen[number] * mask[..., None]).mean(dim=1, keepdim=True)
        return (x + 0.5 * past + self.down(torch.tanh(self.up(h))), seen)


class HeadBlock(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(self.norm(x + c)))


class HeadNet(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.entry = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(HeadBlock() for _ in range(num_blocks))
        self.exit = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        h = self.entry(x)
        for block in self.blocks:
            h = block(h, c)
        return self.exit(h)


class Head(nn.Module):
    """Only its `net` is called, many times for a token."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.net = HeadNet(num_blocks)

    @property
    def device(self) -> torch.device:
        return self.net.entry.weight.device

    def sample(self, c: torch.Tensor, num_steps: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(len(c), 4, generator=generator).to(self.device)
        for _ in range(num_steps):
            x = x + self.net(x, c) / num_steps
        return x


class TokenModel(nn.Module):
    """`embed`, `layers`, an unused `lm_head`, projectors, a `head`. Not called itself, but by its methods."""

    def __init__(self, num_layers: int = 6, num_head_blocks: int = 3, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.image_in = nn.Linear(4, WIDTH)
        self.image_out = nn.Linear(WIDTH, WIDTH)
        self.head = Head(num_head_blocks)

    def forward(self, embeds: torch.Tensor, mask: torch.Tensor, seen: list[Any]) -> torch.Tensor:
        x = embeds
        for number, layer in enumerate(self.layers):
            x, seen = layer(x, mask, seen, number)
        return self.norm(x)


class Decoder(nn.Module):
    """Stands for a VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.conv(tokens)


class TokenPipeline:
    """A plain class: no `.components`, and it remembers the device it was made for."""

    def __init__(self, model: TokenModel, vae: Decoder) -> None:
        self.model, self.vae, self.tokenizer = model, vae, object()
        self.device = next(model.parameters()).device
        self.__device = str(self.device)

    @property
    def remembered(self) -> str:
        return self.__device

    @torch.no_grad()
    def generate_image(
        self, prompt: list[int], num_tokens: int = 9, num_steps: int = 5, stops_at: int | None = None
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.tensor([prompt], device=self.device)
        mask = torch.ones(1, len(prompt), device=self.device)
        seen: list[Any] = [None] * len(self.model.layers)
        hidden = self.model.forward(self.model.embed(ids), mask, seen)
        tokens = []
        for number in range(num_tokens):
            if number == stops_at:
                raise KeyError(number)
            condition = self.model.image_out(hidden[:, -1])
            token = self.model.head.sample(condition, num_steps, generator)
            tokens.append(token)
            mask = torch.cat([mask, torch.ones(1, 1, device=self.device)], dim=1)
            hidden = self.model.forward(self.model.image_in(token)[:, None], mask, seen)
        side = int(num_tokens**0.5)
        return self.vae.decode(torch.stack(tokens[: side * side], dim=-1).reshape(1, 4, side, side))


def token_pipeline(seed: int = 0, **kwargs: Any) -> TokenPipeline:
    torch.manual_seed(seed)
    return TokenPipeline(TokenModel(**kwargs).eval(), Decoder().eval())
