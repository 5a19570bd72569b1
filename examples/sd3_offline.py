"""Stable Diffusion 3 without a download: the stand-in with random weights, resident and then streamed."""

import torch

import layerstream
from layerstream.standins import DEMO_CALL, build_demo


def paint(pipe) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(**DEMO_CALL, generator=generator, output_type="pt").images.cpu()


pipe = build_demo()
device = "cuda" if torch.cuda.is_available() else "cpu"  # "cpu" is the simulated device

pipe.to(device)
resident = paint(pipe)
pipe.to("cpu")

with layerstream.offload(pipe, vram_budget="100MB", device=device) as streamer:
    streamed = paint(pipe)
    print(streamer)

assert torch.equal(resident, streamed)
print(f"identical, with {streamer.stats().loaded_bytes} bytes loaded on the way")
