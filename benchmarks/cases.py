"""What is measured: three pipelines of the seed at true size, whole and as denoisers alone, and tiny ones to try on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from layerstream.standins.repository import (
    build_denoiser,
    build_pipeline,
    denoiser_inputs,
    pipeline_call,
)
from layerstream.standins.repository.full_size.specs import Scale
from layerstream.standins.weights import unfilled

CASES: tuple[str, ...] = ("sd35m", "ovis", "longcat")
Form = Literal["denoiser", "pipeline"]
FORMS: tuple[Form, ...] = ("denoiser", "pipeline")
# How a step's guidance runs the denoiser: one pass over a batch of two, or two passes with other texts.
GUIDANCE: Mapping[str, str] = {"sd35m": "batched", "ovis": "single", "longcat": "single"}
# Options of a denoiser's rotary embedding or positions live in no file, and are computed when it is built.
_SEEDS = (1, 2)  # of the inputs: with the prompt, and with the negative one


@dataclass
class Work:
    """Something to run again and again.

    Attributes:
        modules: the components, by name; those that offloading is about.
        pipe: the pipeline; None when it is the denoiser alone.
        num_inputs: a denoiser's passes take turns between so many texts, as those of guidance do.
    """

    case: str
    form: Form
    scale: Scale
    modules: dict[str, nn.Module]
    pipe: Any
    steps: int | None = None

    @property
    def denoiser(self) -> nn.Module:
        return self.modules["transformer"]

    @property
    def passes_per_step(self) -> int:
        return 1 if GUIDANCE[self.case] == "batched" else len(_SEEDS)

    @property
    def num_inputs(self) -> int:
        return 1 if self.form == "pipeline" else self.passes_per_step

    def inputs(self, device: torch.device) -> list[dict[str, Any]]:
        """Arguments of a pass for each text, on the device; the latents are the same."""
        made = [
            denoiser_inputs(self.case, self.denoiser, device=device, dtype=torch.bfloat16, seed=seed, scale=self.scale)
            for seed in _SEEDS[: self.num_inputs]
        ]
        for other in made[1:]:
            other["hidden_states"] = made[0]["hidden_states"]
        return made

    def call(self) -> dict[str, Any]:
        """Arguments of a call of the pipeline, but for the generator."""
        call = pipeline_call(self.case, self.scale)
        if self.steps is not None:
            call["num_inference_steps"] = self.steps
        return call

    def run_pipeline(self, **changes: Any) -> torch.Tensor:
        """The images [1, 3, height, width] of one call, on the host."""
        generator = torch.Generator("cpu").manual_seed(0)
        images: torch.Tensor = self.pipe(**{**self.call(), **changes}, generator=generator).images
        return images.cpu()


def build(case: str, form: Form, scale: Scale, *, fill_device: str | None = None, is_filled: bool = True) -> Work:
    """The modules of one case in host memory.

    Args:
        fill_device: where the random values are drawn.
        is_filled: False leaves the weights undefined and their memory untouched.
    """
    if not is_filled:
        with unfilled():
            return build(case, form, scale)
    if form == "denoiser":
        model = build_denoiser(case, scale=scale, fill_device=fill_device)
        return Work(case, form, scale, {"transformer": model}, None)
    pipe = build_pipeline(case, scale=scale, fill_device=fill_device)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return Work(case, form, scale, modules, pipe)
