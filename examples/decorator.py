"""offload() as a decorator: of a function, and of a pipeline class."""

import diffusers
import torch

import layerstream
from layerstream.standins import DEMO_CALL, build_demo


def call(pipe: diffusers.StableDiffusion3Pipeline) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(**{**DEMO_CALL, "num_inference_steps": 2}, generator=generator, output_type="pt").images.cpu()


@layerstream.offload(vram_budget="min")
def paint(pipe: diffusers.StableDiffusion3Pipeline) -> torch.Tensor:
    """Streams from the call until it returns; the pipeline is the first argument."""
    return call(pipe)


@layerstream.offload(vram_budget="min")
class StreamedPipeline(diffusers.StableDiffusion3Pipeline):
    """Each call of its objects streams."""


pipe = build_demo()  # random weights, 300 MB
by_function = paint(pipe)
by_class = call(StreamedPipeline(**pipe.components))
assert torch.equal(by_function, by_class)
print("identical")
