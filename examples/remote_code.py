"""A model in the style of remote code: its forward is never called, and an adapter says what is called instead."""

import torch
from torch import nn

import layerstream
from layerstream.testing import check_adapter


class TokenPainter(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.head = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])

    def forward_model(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

    @torch.no_grad()
    def generate(self, num_tokens: int = 12) -> torch.Tensor:
        x = torch.ones(1, 64, device=self.layers[0].weight.device)
        for _ in range(num_tokens):
            x = self.forward_model(x / x.norm())
            for _ in range(4):  # steps of the head, many for each token
                x = self.head(x)
        return x.cpu()


passes = ["forward_model", "head.forward"]
adapter = layerstream.Adapter(stacks=["layers", "head"], is_repeated=True, entry_points=passes)
layerstream.register_adapter("TokenPainter", adapter)  # by name: remote code cannot be imported
model = TokenPainter().eval()
report = check_adapter(model, TokenPainter.generate)  # raises, and says what to change, if anything is not right
with layerstream.offload(model, vram_budget="min", device="cpu"):  # without a device: on your GPU
    streamed = model.generate()
assert torch.equal(streamed, model.generate())
print(report, "identical", sep="\n")
