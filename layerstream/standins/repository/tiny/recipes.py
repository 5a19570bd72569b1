"""What describes a tiny pipeline: its class, its parts and one call of it, with the sizes that all have in common.

The weights are larger than in a trained model (`TINY_STD`): with few channels and the usual 0.02, the signal of a text
encoder would fade below the rounding of the output, and a test that compares outputs would miss a wrong weight there.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

TINY_STD = 0.2
VAE_STD = 0.06  # keeps nearly all values of the image inside the clamp to 0..1
HIDDEN = 32  # of every text encoder
ENCODER_LAYERS = 3
BLOCKS = 4  # of every stack of a denoiser
SIDE = 32  # pixels of every image and frame
PROMPT = "a red fox in the snow"
NEGATIVE_PROMPT = "blurry"

_REPLACING = threading.Lock()


@dataclass(frozen=True)
class Recipe:
    """How `build_tiny` makes a pipeline and `run_tiny` calls it.

    Attributes:
        class_name: Of the pipeline, in diffusers.
        parts: Returns the arguments of its constructor; runs under `skip_init`, and weights are filled in afterwards.
        call: Arguments of a call besides those that all pipelines share; guidance is on.
        inputs: Returns further arguments that are made anew for each call, such as images.
        without: Shared arguments that this pipeline does not take.
        around: Returns a context for the call.
        adjust: Changes weights of the filled `parts`, where random ones would not do.
        stds: Standard deviation of a part's weights, where neither `TINY_STD` nor, for a "vae", `VAE_STD` fits.
    """

    class_name: str
    parts: Callable[[], dict[str, Any]]
    call: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Any]] = dict
    without: tuple[str, ...] = ()
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    adjust: Callable[[dict[str, Any]], None] | None = None
    stds: Mapping[str, float] = field(default_factory=dict)

    def std_of(self, part: str) -> float:
        """Return the standard deviation of the weights of `part`, a key of what `parts` returns."""
        return self.stds.get(part, VAE_STD if part == "vae" else TINY_STD)


def picture(*, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    """Return a float32 image [1, 3, height, width] in 0..1, the same each time: a gradient with waves on it."""
    rows = torch.linspace(0, 1, height)[:, None]
    columns = torch.linspace(0, 1, width)[None, :]
    waves = 0.5 + 0.5 * torch.sin(9 * rows + 5 * columns)
    return torch.stack([rows.expand(height, width), columns.expand(height, width), waves])[None]


def pil_picture(*, height: int = SIDE, width: int = SIDE) -> Any:
    """Return `picture` as a PIL image, for pipelines that ask their input for its size."""
    from PIL import Image

    values = picture(height=height, width=width)[0].mul(255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


@contextmanager
def replaced(module_name: str, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Let a global of a module be what `make` returns for it, where a pipeline has it as a constant in its source.

    One call at a time.
    """
    module = import_module(module_name)
    with _REPLACING:
        kept = getattr(module, name)
        setattr(module, name, make(kept))
        try:
            yield
        finally:
            setattr(module, name, kept)
