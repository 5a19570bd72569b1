"""offload() as a decorator: of a function, and of a pipeline class."""

import diffusers
import torch

import layerstream
from layerstream.standins import build_tiny, run_tiny


@layerstream.offload(vram_budget="min")
def paint(pipe: diffusers.StableDiffusion3Pipeline) -> torch.Tensor:
    """Streams from the call until it returns; the pipeline is the first argument."""
    return run_tiny(pipe, "sd3").cpu()


@layerstream.offload(vram_budget="min")
class StreamedPipeline(diffusers.StableDiffusion3Pipeline):
    """Each call of its objects streams."""


pipe = build_tiny("sd3")  # a few hundred kilobytes of the real classes
by_function = paint(pipe)
by_class = run_tiny(StreamedPipeline(**pipe.components), "sd3").cpu()
assert torch.equal(by_function, by_class)
print("identical")
