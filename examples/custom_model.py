"""A model of your own, no diffusers: the blocks are in an nn.Sequential, so an adapter names them."""

import torch
from torch import nn

import layerstream


class Denoiser(nn.Module):
    def __init__(self, width: int = 256, num_blocks: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        blocks = [nn.TransformerEncoderLayer(width, nhead=4, batch_first=True) for _ in range(num_blocks)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)))


@torch.inference_mode()
def denoise(model: Denoiser, device: str) -> torch.Tensor:
    x = torch.randn(1, 64, 16, generator=torch.Generator("cpu").manual_seed(0)).to(device)
    for _ in range(4):
        x = x - 0.1 * model(x)
    return x.cpu()


layerstream.register_adapter(Denoiser, layerstream.Adapter(stacks=["body"], is_repeated=True))
device = "cuda" if torch.cuda.is_available() else "cpu"  # "cpu" is the simulated device
model = Denoiser().eval()
resident = denoise(model.to(device), device)
model.to("cpu")
with layerstream.offload(model, vram_budget="min", device=device) as streamer:
    assert torch.equal(denoise(model, device), resident)
print(f"identical, {streamer.stats().num_streamed_blocks} blocks streamed")
