"""The demo: one pipeline run twice, resident and streamed under a budget of a fraction of its weights, compared.

Without a model it runs an offline stand-in with random weights, and without a GPU on the simulated device, so that it
works on any machine. What is printed is decided in `cli.py`; here are only the steps and what they return.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerstream.api import offload
from layerstream.device.cuda import find_device
from layerstream.errors import BudgetError, PipelineError
from layerstream.model.adapters.registry import adapter_for
from layerstream.standins import DEMO_CALL, build_demo
from layerstream.stats import Stats

# Little enough that most blocks must stream, and room for more than the two slots of "min".
BUDGET_SHARE = 1 / 3
# Enough for kernels to be chosen and for the order of the blocks to be learned, before anything is timed.
_WARM_UP_STEPS = 2
# A prompt for models that were given none.
PROMPT = DEMO_CALL["prompt"]


@dataclass(frozen=True, slots=True)
class Part:
    """One component of the pipeline.

    Attributes:
        num_bytes: of all its weights, shared ones with the component that comes first.
        block_bytes: of the part of them in blocks, which can stream.
        stacks: dotted names of its stacks.
    """

    name: str
    class_name: str
    num_bytes: int
    num_blocks: int
    block_bytes: int
    stacks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One timed call of the pipeline; `image` is on the CPU, in the pipeline's shape and dtype."""

    image: torch.Tensor
    seconds: float


@dataclass(frozen=True, slots=True)
class StreamedRun(Run):
    """A timed call while streaming.

    Attributes:
        budget: what was given to `offload`.
        stats: of the whole context; counters that grow (loads, bytes, stalls) are those of the timed call alone.
        report: what the streamer said at the end of the context, which includes a call to warm up.
    """

    budget: int | str
    stats: Stats
    report: str


def load_pipeline(model: str | None, dtype: torch.dtype) -> Any:
    """The offline stand-in, or a model by its id on the hub or its folder; in host memory.

    Raises:
        PipelineError: diffusers is missing, or it cannot load the model.
    """
    try:
        # At import it tells what else could be installed, which is nobody's question here.
        import_module("transformers.utils.logging").set_verbosity_error()
        if model is None:
            return build_demo(dtype=dtype)
        diffusers = import_module("diffusers")
    except ImportError as exc:
        raise PipelineError(f'the demo needs diffusers: {exc}. Run: pip install "layerstream[demo]"') from exc
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise PipelineError(f"there is no folder {model}. Give a folder with a model_index.json, or an id on the hub.")
    try:
        with warnings.catch_warnings():
            # The newer name of the argument is not known to diffusers 0.35.
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            return diffusers.DiffusionPipeline.from_pretrained(str(Path(model).expanduser()), torch_dtype=dtype)
    except (OSError, ValueError, ImportError) as exc:
        raise PipelineError(f"diffusers cannot load {model!r}: {exc}") from exc


def describe(pipe: Any) -> list[Part]:
    """The pipeline's components that have weights, in its order."""
    seen: set[int] = set()
    parts = []
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            layout = adapter_for(module).layout(name, module)
            blocks = [block for stack in layout.stacks for _, block in stack.blocks]
            block_bytes = sum(_new_bytes(block, seen) for block in blocks)
            num_bytes = block_bytes + _new_bytes(module, seen)
            stacks = tuple(stack.name for stack in layout.stacks)
            parts.append(Part(name, type(module).__name__, num_bytes, len(blocks), block_bytes, stacks))
    return parts


def make_call(pipe: Any, *, is_standin: bool, seed: int, **given: Any) -> dict[str, Any]:
    """The arguments of one call: the stand-in's, or a prompt; and those that were given and are not None.

    Raises:
        PipelineError: the pipeline takes no argument of that name.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    call = dict(DEMO_CALL) if is_standin else {"prompt": PROMPT} if "prompt" in parameters else {}
    call |= {name: value for name, value in given.items() if value is not None}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in call if name not in parameters]
    if unknown and not takes_any:
        raise PipelineError(f"a call of {type(pipe).__name__} takes no {', '.join(unknown)}.")
    return {**call, "seed": seed}


def run_resident(pipe: Any, call: Mapping[str, Any], device: str | None) -> Run | None:
    """Run with all weights on the device, and bring them back to host memory; None if they do not fit.

    Raises:
        DeviceError: the device does not exist.
        PipelineError: the pipeline refuses an argument's value.
    """
    target = find_device(device)
    try:
        pipe.to(target)
        image, seconds = _warm_and_run(pipe, call)
    except torch.OutOfMemoryError:
        return None
    except ValueError as exc:
        raise PipelineError(f"{type(pipe).__name__} refused the call: {exc}") from exc
    finally:
        pipe.to("cpu")
    return Run(image, seconds)


def run_streamed(
    pipe: Any,
    call: Mapping[str, Any],
    device: str | None,
    vram_budget: int | str | None,
    **options: Any,
) -> StreamedRun:
    """Run under `vram_budget`; without one, with about a third of the weights' size, or the least that works.

    Args:
        options: more of `layerstream.offload`.

    Raises:
        LayerstreamError: see `layerstream.offload`.
    """
    if vram_budget is not None:
        return _run_streamed(pipe, call, device, vram_budget, options)
    third = int(BUDGET_SHARE * sum(part.num_bytes for part in describe(pipe)))
    try:
        return _run_streamed(pipe, call, device, third, options)
    except BudgetError:  # activations, and what lies outside the blocks, take more than that
        return _run_streamed(pipe, call, device, "min", options)


def are_identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two images are equal in shape, dtype and every bit (also in those of NaN)."""
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(_bits(first), _bits(second))


def difference(first: torch.Tensor, second: torch.Tensor) -> str:
    """How two images differ, in words."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return f"{first.dtype} {list(first.shape)} became {second.dtype} {list(second.shape)}"
    apart = (first.double() - second.double()).abs()
    return f"{int((apart != 0).sum())} of {apart.numel()} values, at most by {float(apart.nan_to_num(1).max()):.3g}"


def save_png(image: torch.Tensor, path: Path) -> None:
    """Write the first image (of a video, the first frame) of a batch with values in 0..1 as PNG."""
    from PIL import Image

    picture = image.float().nan_to_num().clamp(0, 1)
    while picture.ndim > 3:
        picture = picture[0]
    pixels = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path, format="PNG")


def _run_streamed(
    pipe: Any, call: Mapping[str, Any], device: str | None, budget: int | str, options: Mapping[str, Any]
) -> StreamedRun:
    with offload(pipe, vram_budget=budget, device=device, **options) as streamer:
        _run(pipe, call, num_steps=_WARM_UP_STEPS)
        before = streamer.stats().as_dict()
        image, seconds = _run(pipe, call)
        after = streamer.stats().as_dict()
        text = str(streamer.report())
    stats = streamer.stats()
    timed = {name: after[name] - before[name] for name in _GROWING}
    values = {field.name: timed.get(field.name, getattr(stats, field.name)) for field in fields(stats)}
    return StreamedRun(image, seconds, budget, Stats(**values), text)


_GROWING = ("num_loads", "loaded_bytes", "num_demand_loads", "num_touch_loads", "num_stalls", "stall_ms")


def _warm_and_run(pipe: Any, call: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    _run(pipe, call, num_steps=_WARM_UP_STEPS)
    return _run(pipe, call)


def _run(pipe: Any, call: Mapping[str, Any], num_steps: int | None = None) -> tuple[torch.Tensor, float]:
    """Call the pipeline; the image on the CPU, and the seconds until it was there."""
    arguments = dict(call)
    arguments["generator"] = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
    if num_steps is not None and "num_inference_steps" in inspect.signature(type(pipe).__call__).parameters:
        arguments["num_inference_steps"] = min(num_steps, arguments.get("num_inference_steps", num_steps))
    started = time.perf_counter()
    output = pipe(**arguments, output_type="pt")
    images = output.frames if hasattr(output, "frames") else output.images
    image = torch.stack(list(images)) if isinstance(images, list | tuple) else torch.as_tensor(images)
    image = image.cpu()  # waits for the device
    return image, time.perf_counter() - started


def _new_bytes(module: nn.Module, seen: set[int]) -> int:
    """Bytes of the module's weights that are not in `seen`; adds them to it."""
    new = {id(t): t for t in [*module.parameters(), *module.buffers()] if id(t) not in seen}
    seen.update(new)
    return sum(t.numel() * t.element_size() for t in new.values())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
