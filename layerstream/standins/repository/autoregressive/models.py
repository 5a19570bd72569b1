"""Autoregressive stand-ins by name: image models that are in neither diffusers nor transformers."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

from layerstream.standins.repository.autoregressive.specs import AutoregressiveSpec, Making
from layerstream.standins.repository.full_size.models import spec_of
from layerstream.standins.repository.full_size.prompts import NEGATIVE_PROMPT, PROMPT
from layerstream.standins.repository.full_size.specs import Scale

_HERE = __name__.rpartition(".")[0]


def _made_by(module: str, function: str) -> Any:
    """Return a function of a module that is imported at the first call: those of models import transformers."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"{_HERE}.{module}"), function)(*args, **kwargs)

    return call


_TINY_PROMPTS = {"prompt": "a red fox in the snow", "negative_prompt": "blurry"}
_PROMPTS = {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT}
# 24 tokens of 28 steps of the head each.
_NEXTSTEP_CALL: Mapping[Scale, Mapping[str, Any]] = {
    "full": {**_PROMPTS, "hw": (512, 512), "num_tokens": 24, "num_sampling_steps": 28, "cfg": 7.5},
    "tiny": {**_TINY_PROMPTS, "hw": (32, 48), "num_sampling_steps": 4, "cfg": 2.0},
}
# 64 tokens, of which the last of each row ends it, and 10 steps of the denoiser.
_MAMMOTH_CALL: Mapping[Scale, Mapping[str, Any]] = {
    "full": {
        **_PROMPTS,
        "ar_height": 8,
        "ar_width": 7,
        "height": 1024,
        "width": 1024,
        "num_inference_steps": 10,
        "text_guidance_scale": 9.0,
    },
    "tiny": {
        **_TINY_PROMPTS,
        "ar_height": 2,
        "ar_width": 3,
        "height": 32,
        "width": 48,
        "num_inference_steps": 4,
        "text_guidance_scale": 3.0,
        "cfg_scale": 2.0,
    },
}
_SPECS: Mapping[str, AutoregressiveSpec] = MappingProxyType(
    {
        **{
            f"nextstep_{code}": AutoregressiveSpec(
                build=_made_by("nextstep.build", f"build_{code}"),
                run=_made_by("nextstep.build", "run"),
                call={scale: {**call, "use_norm": code == "a"} for scale, call in _NEXTSTEP_CALL.items()},
            )
            for code in ("a", "b")
        },
        "mammoth": AutoregressiveSpec(
            build=_made_by("mammoth.build", "build"), run=_made_by("mammoth.build", "run"), call=_MAMMOTH_CALL
        ),
    }
)
AUTOREGRESSIVE: tuple[str, ...] = tuple(_SPECS)


def build_autoregressive(
    name: str,
    *,
    scale: Scale = "tiny",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    fill_device: torch.device | str | None = None,
    compiled: bool | None = False,
    backend: str = "inductor",
) -> Any:
    """Return the stand-in `name` in host memory, in evaluation mode, gradients off.

    Args:
        name: One of `AUTOREGRESSIVE`.
        scale: "full" is the true size; "tiny" the same classes with a few small blocks.
        dtype: Of all weights; without it float32 in the tiny scale, and bfloat16 in the other.
        seed: Of the weights; their bits also depend on `fill_device`. Every part draws from a seed of its own.
        fill_device: "cuda" draws the pool of random values there, which gives a larger pool in less time.
        compiled: Compile those functions that the original does ("nextstep_a" only). None does as the original:
            unless ENABLE_TORCH_COMPILE is "false".
        backend: Of `torch.compile`. inductor draws other random values than code that is not compiled.

    Returns:
        For "nextstep_a" and "nextstep_b" a NextStepPipeline, a plain class with `model` and `vae`. For "mammoth" a
        Mammothmoda2Model.

    Raises:
        ValueError: No stand-in has this name.
        ImportError: The installed transformers lacks a class.
    """
    if dtype is None:
        dtype = torch.float32 if scale == "tiny" else torch.bfloat16
    return _spec(name).build(Making(scale, dtype, seed, fill_device, compiled, backend))


def autoregressive_call(name: str, scale: Scale = "tiny") -> dict[str, Any]:
    """Return the arguments that `run_autoregressive(..., name, scale=scale)` takes where no others are given.

    They fix the work: for "nextstep_a" and "nextstep_b" of true size 24 of the 1024 tokens of an image of 512 x 512, 28
    steps of the head each; for "mammoth" a sketch of 64 tokens, and 10 steps of the denoiser at 1024 x 1024.
    """
    return dict(_spec(name).call[scale])


def run_autoregressive(pipe: Any, name: str, *, scale: Scale = "tiny", seed: int = 0, **overrides: Any) -> torch.Tensor:
    """Call `pipe` as its users do, with guidance.

    Args:
        pipe: What `build_autoregressive(name, scale=scale)` returned, perhaps moved or streamed since.
        name: Which stand-in, for the arguments that differ.
        scale: Of the arguments.
        seed: Of the generators. As the originals do, it is set for all of torch.
        **overrides: Arguments that replace or join those of `autoregressive_call`.

    Returns:
        float32 [1, 3, height, width] on the CPU; values in 0..1.
    """
    images = _spec(name).run(pipe, **{**autoregressive_call(name, scale), "seed": seed, **overrides})
    return images.float().cpu()


def _spec(name: str) -> AutoregressiveSpec:
    return spec_of(_SPECS, name, "autoregressive stand-in")
