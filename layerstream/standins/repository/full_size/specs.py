"""What describes a model at true size: its denoiser, its pipeline, and both again with a few small blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Scale = Literal["full", "tiny"]


@dataclass(frozen=True)
class Pass:
    """What the inputs of one pass of a denoiser are made from.

    Attributes:
        config: of the denoiser; gives the widths.
        height: of the latent image, in patches.
        width: likewise.
        text: tokens of the prompt.
        device: where the tensors are put.
        dtype: of latents, text and timestep.
        generator: on the CPU, so that values do not depend on `device`.
        frames: of latents.
    """

    config: Any
    height: int
    width: int
    text: int
    device: torch.device | str
    dtype: torch.dtype
    generator: torch.Generator
    frames: int = 1

    def normal(self, *shape: int) -> torch.Tensor:
        """Return the next random normal values of this shape."""
        return torch.randn(shape, generator=self.generator).to(device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class DenoiserSpec:
    """A class of diffusers with its options and the sizes of its inputs, each by scale.

    Attributes:
        class_name: of the denoiser, in diffusers.
        options: of its constructor.
        grid: height and width of the latent image in patches.
        text_tokens: of the prompt.
        inputs: returns the keyword arguments of one pass.
        frames: of latents, for those that make a video.
    """

    class_name: str
    options: Mapping[Scale, Mapping[str, Any]]
    grid: Mapping[Scale, tuple[int, int]]
    text_tokens: Mapping[Scale, int]
    inputs: Callable[[Pass], dict[str, Any]]
    frames: Mapping[Scale, int] = field(default_factory=lambda: {"full": 1, "tiny": 1})


@dataclass(frozen=True)
class PipelineSpec:
    """A class of diffusers, what makes its parts except the denoiser, and the arguments of its call.

    Attributes:
        class_name: of the pipeline, in diffusers.
        parts: returns the arguments of its constructor but `transformer`; weights are filled in afterwards.
        call: arguments of a call besides those that all share.
        size: height and width of the image.
        num_frames: of the video, for those that make one.
        suffix: what this pipeline wants at the end of the prompt.
        without: arguments that all share, and this pipeline does not take.
    """

    class_name: str
    parts: Callable[[Scale], dict[str, Any]]
    call: Mapping[str, Any]
    size: Mapping[Scale, tuple[int, int]]
    num_frames: Mapping[Scale, int] | None = None
    suffix: str = ""
    without: tuple[str, ...] = ()
