"""What is measured: pipelines at true size, whole and as denoisers alone, and tiny ones to try the harness on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerstream.standins.repository import (
    autoregressive_call,
    build_autoregressive,
    build_denoiser,
    build_pipeline,
    denoiser_inputs,
    pipeline_call,
    run_autoregressive,
)
from layerstream.standins.repository.full_size.specs import Scale
from layerstream.standins.weights import unfilled

Form = Literal["denoiser", "pipeline"]
FORMS: tuple[Form, ...] = ("denoiser", "pipeline")
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_STEPS_IN_TURN = 4  # of a denoiser alone, with other latents each
_SEEDS = (1, 2)  # of the inputs: with the prompt, and with the negative one


class Repeated(NamedTuple):
    """Something that a call does again and again: tokens of a language model, or passes of a denoiser.

    Attributes:
        kind: "token" or "pass".
        first: the module that begins it, by its name in what is called.
        last: the module that ends it; the rest of a token is outside of the language model.
    """

    kind: str
    first: str
    last: str


@dataclass(frozen=True)
class Case:
    """How a case is built and called.

    Attributes:
        guidance: how a step's guidance runs the denoiser: one pass over a batch of two, or two passes with other texts.
        model: the stand-in's name.
        forms: in which it is measured.
        is_shared: its weights are drawn once and kept in files; else each process draws the same for itself, since
            files and a process' own memory would not fit into the host together, or are slower.
        call: arguments of a call that differ from those of its stand-in, at true size.
        steps: the argument that says how many steps there are.
        short: arguments that make a call short, in which what will happen can be learned.
        short_tokens: so many tokens the model `limited` generates in a short call, at true size.
        limited: the component whose `most_new_tokens` limits a call.
        repeated: what a call repeats; its times are told, and what limits them.
        experts: the denoisers that take turns within a call, with a timestep of each.
        num_steps: timed steps of the denoiser alone; None: as many passes as are asked for.
        is_without_cudnn: attention goes without cuDNN's kernels, with which the resident model does not repeat itself.
    """

    guidance: str
    model: str
    forms: tuple[Form, ...] = FORMS
    is_shared: bool = False
    is_autoregressive: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    steps: str = "num_inference_steps"
    short: Mapping[str, Any] = field(default_factory=dict)
    short_tokens: int | None = None
    limited: str | None = None
    repeated: tuple[Repeated, ...] = ()
    experts: Mapping[str, int] = field(default_factory=lambda: {"transformer": 500})
    num_steps: int | None = None
    is_without_cudnn: bool = False


_DENOISER = Repeated("pass", "transformer", "transformer")
_NEXTSTEP = Case(
    "batched",
    "nextstep_b",
    forms=("pipeline",),
    is_autoregressive=True,
    steps="num_sampling_steps",
    short={"num_tokens": 12},  # of fewer, what only the prompt needs does not seem seldom
    repeated=(Repeated("token", "model.layers.0", "model.layers.-1"),),
)
_CASES: Mapping[str, Case] = {
    "sd35m": Case("batched", "sd35m", is_shared=True),
    "ovis": Case("single", "ovis", is_shared=True),
    "longcat": Case("single", "longcat", is_shared=True),
    "nextstep": _NEXTSTEP,  # the code whose layers run by `forward`, with a DynamicCache
    # The first one: `forward_model`, with a StaticCache.
    "nextstep-static": replace(_NEXTSTEP, model="nextstep_a", is_without_cudnn=True),
    "mammoth": Case(
        "single",
        "mammoth",
        forms=("pipeline",),
        is_autoregressive=True,
        short={"ar_height": 2, "num_inference_steps": 3},
        repeated=(
            Repeated("token", "llm_model", "llm_model"),
            Repeated("pass", "gen_transformer", "gen_transformer"),
        ),
    ),
    "glm": Case(
        "single",
        "glm",
        call={"num_inference_steps": 10},
        short={"num_inference_steps": 3},
        short_tokens=16,
        limited="vision_language_encoder",
        repeated=(
            Repeated("token", "vision_language_encoder", "vision_language_encoder"),
            _DENOISER,
        ),
        num_steps=4,
    ),
    "qwen": Case("single", "qwen", forms=("denoiser",), num_steps=4),
    "sd15": Case("single", "sd15", forms=("denoiser",)),
    "wan22": Case(
        "single", "wan22", forms=("denoiser",), experts={"transformer": 950, "transformer_2": 500}, num_steps=4
    ),
    "longcat-rewrite": Case(
        "single",
        "longcat",
        forms=("pipeline",),
        call={"num_inference_steps": 10, "enable_prompt_rewrite": True},
        short={"num_inference_steps": 3},
        short_tokens=16,
        limited="text_encoder",
        repeated=(Repeated("token", "text_encoder", "text_encoder"), _DENOISER),
    ),
}
CASES: tuple[str, ...] = tuple(_CASES)
# Those whose peers are measured, too: whole suites are made of them, for others there are sets of their own.
WITH_PEERS: tuple[str, ...] = ("sd35m", "ovis", "longcat")
GUIDANCE: Mapping[str, str] = {name: case.guidance for name, case in _CASES.items()}


def forms_of(case: str) -> tuple[Form, ...]:
    return _CASES[case].forms


def is_shared(case: str) -> bool:
    """Whether the weights of this case are drawn once for all processes."""
    return _CASES[case].is_shared


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
    def about(self) -> Case:
        return _CASES[self.case]

    @property
    def denoiser(self) -> nn.Module:
        return self.modules["transformer"]

    @property
    def target(self) -> Any:
        """What is offloaded: the pipeline, or the denoiser, or both of two."""
        if self.pipe is not None:
            return self.pipe
        return self.denoiser if len(self.modules) == 1 else self.modules

    @property
    def passes_per_step(self) -> int:
        return 1 if GUIDANCE[self.case] == "batched" else len(_SEEDS)

    @property
    def num_inputs(self) -> int:
        return 1 if self.form == "pipeline" else self.passes_per_step

    @property
    def repeated(self) -> tuple[Repeated, ...]:
        """What is told of a call beside its seconds."""
        return self.about.repeated if self.form == "pipeline" else ()

    def part(self, name: str) -> nn.Module:
        """A module of what is called, by its dotted name; a number is an index."""
        found: Any = self.pipe
        for step in name.split("."):
            found = found[int(step)] if step.lstrip("-").isdigit() else getattr(found, step)
        assert isinstance(found, nn.Module)
        return found

    def inputs(self, device: torch.device) -> list[dict[str, Any]]:
        """Arguments of a pass for each text, on the device; the latents are the same."""
        made = [
            denoiser_inputs(
                self.about.model, self.denoiser, device=device, dtype=torch.bfloat16, seed=seed, scale=self.scale
            )
            for seed in _SEEDS[: self.num_inputs]
        ]
        for other in made[1:]:
            latents = "sample" if "sample" in other else "hidden_states"
            other[latents] = made[0][latents]
        return made

    def turns(self, device: torch.device) -> list[tuple[str, dict[str, Any]]]:
        """The passes that take turns: the names of their denoisers, and their arguments.

        Latents and time differ from step to step, as a pipeline's do. Of two experts these are the steps of a call, the
        first half of the one and the rest of the other.
        """
        inputs = self.inputs(device)
        experts = self.about.experts
        if len(experts) == 1:
            steps = [("transformer", None)] * _STEPS_IN_TURN
        else:
            steps_each = (self.about.num_steps or len(experts)) // len(experts)
            steps = [(name, time) for name, time in experts.items() for _ in range(steps_each)]
        return [(name, given) for number, (name, time) in enumerate(steps) for given in _of_step(inputs, number, time)]

    def call(self) -> dict[str, Any]:
        """Arguments of a call of the pipeline, but for the generator."""
        about = self.about
        made = autoregressive_call if about.is_autoregressive else pipeline_call
        call = {**made(about.model, self.scale), **about.call}
        if self.scale == "tiny" and about.steps in about.call:
            call[about.steps] = made(about.model, self.scale)[about.steps]
        if self.steps is not None:
            call[about.steps] = self.steps
        return call

    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        call = self.call()
        height, width = call["hw"] if "hw" in call else (call["height"], call["width"])
        return height, width

    def run_pipeline(self, **changes: Any) -> torch.Tensor:
        """The images [1, 3, height, width] of one call, on the host."""
        if self.about.is_autoregressive:
            call = {**self.call(), **changes}
            with sdpa_kernel(_WITHOUT_CUDNN) if self.about.is_without_cudnn else contextlib.nullcontext():
                return run_autoregressive(self.pipe, self.about.model, scale=self.scale, seed=0, **call)
        generator = torch.Generator("cpu").manual_seed(0)
        if self.about.repeated:
            torch.manual_seed(0)  # a language model may draw its tokens by the generator of all
        images: torch.Tensor = self.pipe(**{**self.call(), **changes}, generator=generator).images
        return images.cpu()

    def run_short(self) -> torch.Tensor:
        """The images of a call of fewer tokens and steps."""
        call = self.call()
        short = {name: min(value, call.get(name, value)) for name, value in self.about.short.items()}
        with self._fewer_tokens():
            return self.run_pipeline(**short)

    @contextlib.contextmanager
    def _fewer_tokens(self) -> Iterator[None]:
        model: Any = self.modules[self.about.limited] if self.about.limited else None
        most = getattr(model, "most_new_tokens", None)
        if most is None or self.about.short_tokens is None:
            yield
            return
        model.most_new_tokens = min(most, self.about.short_tokens)
        try:
            yield
        finally:
            model.most_new_tokens = most


def _of_step(inputs: Sequence[dict[str, Any]], number: int, time: int | None) -> list[dict[str, Any]]:
    """The arguments of a step's passes, which share latents and time."""
    latents = "sample" if "sample" in inputs[0] else "hidden_states"
    before = inputs[0]["timestep"]
    shared = {
        latents: inputs[0][latents] * (1 - number / 8),
        "timestep": before * (1 - number / 8) if time is None else torch.full_like(before, time - number),
    }
    return [{**given, **shared} for given in inputs]


def build(case: str, form: Form, scale: Scale, *, fill_device: str | None = None, is_filled: bool = True) -> Work:
    """The modules of one case in host memory.

    Args:
        fill_device: where the random values are drawn.
        is_filled: False leaves the weights undefined and their memory untouched.
    """
    if not is_filled:
        with unfilled():
            return build(case, form, scale)
    about = _CASES[case]
    if form == "denoiser":
        models = {
            name: build_denoiser(about.model, scale=scale, seed=seed, fill_device=fill_device)
            for seed, name in enumerate(about.experts)
        }
        return Work(case, form, scale, models, None)
    if about.is_autoregressive:
        pipe = build_autoregressive(about.model, scale=scale, dtype=torch.bfloat16, fill_device=fill_device)
        return Work(case, form, scale, _modules_of(pipe), pipe)
    pipe = build_pipeline(about.model, scale=scale, fill_device=fill_device)
    return Work(case, form, scale, _modules_of(pipe, pipe.components), pipe)


def _modules_of(pipe: Any, components: Mapping[str, Any] | None = None) -> dict[str, nn.Module]:
    if isinstance(pipe, nn.Module):
        return dict(pipe.named_children())
    named: Mapping[str, Any] = vars(pipe) if components is None else components
    return {name: part for name, part in named.items() if isinstance(part, nn.Module)}


def passes_of(turns: Sequence[Any], case: str, asked: int | None, default: int) -> int:
    """How many passes are timed: those asked for, or those of the case's steps, or `default`."""
    steps = _CASES[case].num_steps
    if asked is not None:
        return asked
    return default if steps is None else max(len(turns), steps * len(_SEEDS))
