"""A model in the style of remote code: its forward is never called, and an adapter says what is called instead."""

import torch
from torch import nn

import layerstream
from layerstream.testing import check_adapter


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor], number: int) -> torch.Tensor:
        cache[number] = torch.cat([cache[number], self.mix(x)])
        return x + cache[number].mean(0, keepdim=True) + self.down(torch.tanh(self.up(x)))


class Head(nn.Module):
    """Draws a token in a few steps; its own forward is never called."""

    def __init__(self, width: int, token: int = 8) -> None:
        super().__init__()
        self.entry, self.exit = nn.Linear(token, width), nn.Linear(width, token)
        self.res_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def sample(self, condition: torch.Tensor, steps: int = 4) -> torch.Tensor:
        x = torch.randn(len(condition), self.exit.out_features).to(condition)
        for _ in range(steps):
            h = self.entry(x) + condition
            for block in self.res_blocks:
                h = h + torch.tanh(block(h))
            x = x + self.exit(h) / steps
        return x


class TokenPainter(nn.Module):
    def __init__(self, width: int = 64, num_layers: int = 6, token: int = 8) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(1000, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))
        self.image_in = nn.Linear(token, width)
        self.image_head = Head(width, token)

    def forward_model(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, cache, number)
        return x


class PainterPipeline:
    """A plain class: no `.components`, and it remembers the device that its inputs go to."""

    def __init__(self, model: TokenPainter) -> None:
        self.model, self.device = model, next(model.parameters()).device

    @torch.no_grad()
    def paint(self, prompt: list[int], num_tokens: int = 12) -> torch.Tensor:
        torch.manual_seed(0)
        x = self.model.embed_tokens(torch.tensor(prompt, device=self.device)).mean(0, keepdim=True)
        cache = [x[:0] for _ in self.model.layers]
        tokens = []
        for _ in range(num_tokens):
            tokens.append(self.model.image_head.sample(self.model.forward_model(x, cache)))
            x = self.model.image_in(tokens[-1])
        return torch.cat(tokens).cpu()


# The adapter. By name, since remote code cannot be imported; its stacks would be found by themselves, too.
layerstream.register_adapter(
    "TokenPainter",
    layerstream.Adapter(
        stacks=["layers", "image_head.res_blocks"],
        is_repeated=True,
        entry_points=["forward_model", "image_head.sample", "image_in.forward"],
    ),
)

prompt = [3, 1, 4, 1, 5]
pipe = PainterPipeline(TokenPainter().eval())
report = check_adapter(pipe, lambda pipe: pipe.paint(prompt))  # raises, and says what to change, if it is not right
assert not report.findings, report
resident = pipe.paint(prompt)
with layerstream.offload(pipe, vram_budget="min", device="cpu") as streamer:  # without device: on your GPU
    assert torch.equal(pipe.paint(prompt), resident)
print(report)
print(f"identical, {streamer.stats().num_streamed_blocks} blocks streamed")
