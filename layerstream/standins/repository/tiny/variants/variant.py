"""What describes a variant: parts that a family has in common, a pipeline class, and the arguments of its calls."""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from layerstream.standins.components import finish
from layerstream.standins.libraries import diffusers
from layerstream.standins.repository.tiny.recipes import (
    NEGATIVE_PROMPT,
    PROMPT,
    SIDE,
    Recipe,
    pil_picture,
)
from layerstream.standins.weights import skip_init

Parts = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Variant(Recipe):
    """A `Recipe` whose `parts` may hold more than its class takes; a call gets the shared arguments that it knows.

    Attributes:
        prepare: Changes what the pipeline notes of its parts, where that takes real sizes for granted.
        run: Calls the pipeline with the arguments, where that is more than one call.
    """

    prepare: Callable[[Any], None] | None = None
    run: Callable[[Any, dict[str, Any]], Any] = lambda pipe, arguments: pipe(**arguments)


def shared_arguments() -> dict[str, Any]:
    """Arguments that a call gets where its signature names them: guidance is on, and two steps run."""
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE_PROMPT,
        "height": SIDE,
        "width": SIDE,
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "true_cfg_scale": 3.0,
        "max_sequence_length": 32,
        "clean_caption": False,  # cleaning wants two more packages
        "use_resolution_binning": False,
        "output_type": "pt",
    }


def merged(*all_parts: Parts | Mapping[str, Any], **more: Callable[[], Any]) -> Parts:
    """Return parts that are made of others: later ones replace earlier ones, and `more` makes single ones."""

    def parts() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for made in all_parts:
            found.update(made() if callable(made) else made)
        found.update({key: make() for key, make in more.items()})
        return found

    return parts


def changed(parts: Parts, key: str, **options: Any) -> Parts:
    """Return `parts` with one of them, of diffusers, built anew with other options in its config."""

    def make() -> Any:
        part = parts()[key]
        return type(part).from_config(part.config, **options)  # not a merged dict: it notes which were defaults

    return merged(parts, **{key: make})


def _named(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "args", "kwargs"}


def build(variant: Variant, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return the pipeline on the CPU, in evaluation mode, progress bar off.

    Raises:
        ImportError: The installed diffusers or transformers has no such class, or it lacks a package.
    """
    pipeline_class = getattr(diffusers, variant.class_name)
    wanted = _named(pipeline_class.__init__)
    with skip_init():
        parts = {key: part for key, part in variant.parts().items() if key in wanted}
    for index, (key, part) in enumerate(parts.items()):
        if isinstance(part, torch.nn.Module):
            finish(part, dtype=dtype, seed=1000 * seed + index, std=variant.std_of(key))
    if variant.adjust is not None:
        variant.adjust(parts)
    pipe = pipeline_class(**parts)
    if variant.prepare is not None:
        variant.prepare(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, variant: Variant, *, seed: int = 0) -> list[torch.Tensor]:
    """Call `pipe` once; all tensors of what it returns, in float32 and in order."""
    taken = _named(type(pipe).__call__)
    arguments = {k: v for k, v in shared_arguments().items() if k in taken and k not in variant.without}
    if "strength" in taken:
        arguments |= {"strength": 0.5, "num_inference_steps": 4}  # which are two again
    if "generator" in taken:
        arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
    _seed_all(seed)  # some pipelines draw without a generator
    with variant.around():
        output = variant.run(pipe, {**arguments, **variant.call, **variant.inputs()})
    return list(_tensors(output))


def _seed_all(seed: int) -> None:
    import numpy

    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor, array and picture in what a pipeline returned."""
    if isinstance(value, torch.Tensor):
        yield value.detach().clone().float()
    elif isinstance(value, str):
        yield torch.tensor([ord(letter) for letter in value]).float()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif is_dataclass(value):
        for each in fields(value):
            yield from _tensors(getattr(value, each.name))
    elif isinstance(value, Sequence):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__array_interface__"):
        import numpy

        yield torch.from_numpy(numpy.array(value)).float()


def pil_mask(*, height: int = SIDE, width: int = SIDE) -> Any:
    """Return a PIL image, white in its right half, where an inpainting pipeline may paint."""
    from PIL import Image

    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def image() -> dict[str, Any]:
    """Inputs of a pipeline that changes a picture."""
    return {"image": pil_picture()}


def image_and_mask() -> dict[str, Any]:
    """Inputs of a pipeline that paints in a picture."""
    return {"image": pil_picture(), "mask_image": pil_mask()}


def control_image() -> dict[str, Any]:
    """Inputs of a pipeline that is led by a picture."""
    return {"control_image": pil_picture()}


def image_and_control() -> dict[str, Any]:
    """Inputs of a pipeline that changes a picture and is led by one."""
    return {**image(), **control_image()}


def all_images() -> dict[str, Any]:
    """Inputs of a pipeline that paints in a picture and is led by one."""
    return {**image_and_mask(), **control_image()}


def frames(number: int = 5, **sizes: int) -> list[Any]:
    """Return pictures for a video: each is the one before, turned by a quarter."""
    first = pil_picture(**sizes)
    return [first.rotate(90 * turn) for turn in range(number)]


def video() -> dict[str, Any]:
    """Inputs of a pipeline that changes a video."""
    return {"video": frames()}
