"""The autoregressive stand-ins: they repeat to the bit, every part of them matters, and their true sizes are true."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from layerstream.standins import AUTOREGRESSIVE, autoregressive_call, build_autoregressive, run_autoregressive
from layerstream.standins.weights import unfilled

pytest.importorskip("diffusers", reason="the VAEs of the stand-ins are those of diffusers")
pytest.importorskip("transformers", reason="the language models of the stand-ins are transformers models")

NEXTSTEP = ("nextstep_a", "nextstep_b")
# Less work than the call of the tiny scale, where a test makes many calls.
SHORT: dict[str, dict[str, Any]] = {name: {"hw": (32, 32), "num_sampling_steps": 2} for name in NEXTSTEP}
SHAPES = {"nextstep_a": (1, 3, 32, 48), "nextstep_b": (1, 3, 32, 48)}
MB = 1_000_000

Run = Callable[[], torch.Tensor]


@cache
def tiny(name: str) -> Any:
    """Build each once for the tests that only call it."""
    return tiny_or_skip(name)


def tiny_or_skip(name: str, **options: Any) -> Any:
    try:
        return build_autoregressive(name, **options)
    except ImportError as error:
        pytest.skip(str(error))


def root_of(name: str, pipe: Any) -> nn.Module:
    """All modules of a stand-in below one."""
    return nn.ModuleDict({"model": pipe.model, "vae": pipe.vae}) if name in NEXTSTEP else pipe


def picture() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    return torch.stack([rows, columns, rows * columns])[None]


@contextmanager
def changed(module: nn.Module) -> Iterator[None]:
    """Every parameter of `module` two percent larger, inside."""
    kept = [parameter.detach().clone() for parameter in module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.02)
        try:
            yield
        finally:
            for parameter, values in zip(module.parameters(), kept, strict=True):
                parameter.copy_(values)


def parts_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What is below `module`: the entries of its lists by themselves, and all that has weights and no list inside."""
    for name, part in module.named_children():
        if not any(True for _ in part.parameters()):
            continue
        if any(isinstance(inner, nn.ModuleList) for inner in part.modules()):
            yield from parts_of(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part


def without_effect(root: nn.Module, run: Run) -> set[str]:
    """The parts of which the output says nothing."""
    output = run()
    found = set()
    for name, part in parts_of(root):
        with changed(part):
            if torch.equal(run(), output):
                found.add(name)
    assert torch.equal(run(), output)
    return found


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_output_repeats_to_the_bit_and_follows_its_arguments(name: str) -> None:
    first = run_autoregressive(tiny(name), name)
    assert first.dtype == torch.float32
    assert first.shape == SHAPES[name]
    assert first.isfinite().all()
    assert first.std() > 0.05
    assert ((first <= 0) | (first >= 1)).float().mean() < 0.1, "clamped values would hide differences"
    assert torch.equal(first, run_autoregressive(tiny(name), name))
    for change in ({"seed": 1}, {"prompt": "a blue boat"}, {"negative_prompt": "a fox"}):
        assert not torch.equal(first, run_autoregressive(tiny(name), name, **change)), change


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_weights_come_from_the_seed(name: str) -> None:
    torch.manual_seed(123)  # the global generator must not matter
    again, other = tiny_or_skip(name), tiny_or_skip(name, seed=1)
    output = run_autoregressive(tiny(name), name)
    assert torch.equal(output, run_autoregressive(again, name))
    assert not torch.equal(output, run_autoregressive(other, name))


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_state_is_that_of_a_loaded_model(name: str) -> None:
    root = root_of(name, tiny(name))
    assert sum(p.numel() * p.element_size() for p in root.parameters()) < 3 * MB
    assert not any(p.requires_grad for p in root.parameters())
    assert not any(m.training for m in tiny(name).model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_it_runs_in_low_precision(name: str, dtype: torch.dtype) -> None:
    pipe = tiny_or_skip(name, dtype=dtype)
    assert {p.dtype for p in root_of(name, pipe).parameters()} == {dtype}
    assert run_autoregressive(pipe, name).isfinite().all()


@pytest.mark.parametrize("name", NEXTSTEP)
def test_every_part_of_nextstep_matters(name: str) -> None:
    pipe = tiny_or_skip(name)
    unused = without_effect(root_of(name, pipe), lambda: run_autoregressive(pipe, name, **SHORT[name]))
    encoder = {part for part in unused if part.startswith("vae.encoder")}
    assert unused - encoder == {"model.lm_head"}
    edit = {**SHORT[name], "images": picture(), "cfg_img": 1.5}
    unused = without_effect(root_of(name, pipe), lambda: run_autoregressive(pipe, name, **edit))
    assert unused == {"model.lm_head"}


@pytest.mark.parametrize("name", NEXTSTEP)
def test_arguments_of_nextstep(name: str) -> None:
    pipe = tiny(name)
    output = run_autoregressive(pipe, name)
    changes: tuple[dict[str, Any], ...] = (
        {"cfg": 1.0},
        {"use_norm": name == "nextstep_b"},
        {"num_tokens": 2},
        {"num_sampling_steps": 5},
        {"timesteps_shift": 3.0},
        {"positive_prompt": "sharp, "},
        {"images": picture()},
    )
    for change in changes:
        assert not torch.equal(output, run_autoregressive(pipe, name, **change)), change
    assert run_autoregressive(pipe, name, num_images_per_caption=2).shape == (2, *output.shape[1:])
    assert run_autoregressive(pipe, name, prompt=["a fox", "a boat"]).shape == (2, *output.shape[1:])
    edit = {"images": picture()}
    edits = [run_autoregressive(pipe, name, **edit, cfg=cfg, cfg_img=g) for cfg in (1.0, 2.0) for g in (1.0, 1.5)]
    assert not any(torch.equal(a, b) for i, a in enumerate(edits) for b in edits[:i])


@pytest.mark.parametrize("sampler", ["ode", "cps"])
def test_samplers_of_nextstep_b(sampler: str) -> None:
    output = run_autoregressive(tiny("nextstep_b"), "nextstep_b")
    other = run_autoregressive(tiny("nextstep_b"), "nextstep_b", sampler=sampler)
    assert other.isfinite().all()
    assert not torch.equal(output, other)


def test_both_codes_of_nextstep_have_the_same_weights() -> None:
    first, second = (
        {key: p.shape for key, p in tiny(name).model.named_parameters() if not key.startswith("lm_head")}
        for name in NEXTSTEP
    )
    assert first == second
    assert all(type(tiny(name)).__name__ == "NextStepPipeline" for name in NEXTSTEP)
    assert all(type(tiny(name).model).__name__ == "NextStep" for name in NEXTSTEP)
    assert not any(hasattr(tiny(name), "components") for name in NEXTSTEP)
    modules = ["embed_tokens", "layers", "norm", "rotary_emb", "lm_head"]
    modules += ["image_in_projector", "image_out_projector", "image_head"]
    assert all([key for key, _ in tiny(name).model.named_children()] == modules for name in NEXTSTEP)


def test_nextstep_pipelines_remember_their_device() -> None:
    first, second = (tiny(name) for name in NEXTSTEP)
    assert vars(first)["_NextStepPipeline__device"] == first.device == torch.device("cpu")
    assert "device" not in vars(first)
    assert vars(second)["device"] == torch.device("cpu")


@pytest.mark.parametrize("name", NEXTSTEP)
def test_calls_of_nextstep(name: str) -> None:
    pipe = tiny(name)
    model = pipe.model
    rooted: list[str] = []
    called: list[str] = []
    watched = {
        "image_head": model.image_head,
        "net": model.image_head.net,
        "layer": model.layers[0],
        "in": model.image_in_projector,
        "out": model.image_out_projector,
    }
    handles = [m.register_forward_pre_hook(lambda *_, key=key: called.append(key)) for key, m in watched.items()]
    handles += [m.register_forward_pre_hook(lambda *_: rooted.append("called")) for m in (model, pipe.vae)]
    run_autoregressive(pipe, name)
    for handle in handles:
        handle.remove()
    token = ["out", *["net"] * 4, "in", "layer"]
    assert called == ["layer", *token * 6]
    assert rooted == []


def test_layers_of_code_a_return_tuples() -> None:
    found: list[tuple[type, type]] = []
    handles = [
        tiny(name)
        .model.layers[0]
        .register_forward_hook(
            lambda module, args, kwargs, output: found.append(
                (type(output), type(kwargs.get("past_key_value", kwargs.get("past_key_values"))))
            ),
            with_kwargs=True,
        )
        for name in NEXTSTEP
    ]
    for name in NEXTSTEP:
        run_autoregressive(tiny(name), name, **SHORT[name])
    for handle in handles:
        handle.remove()
    assert {(output.__name__, kept.__name__) for output, kept in found} == {
        ("tuple", "StaticCache"),
        ("Tensor", "DynamicCache"),
    }


def test_nothing_is_compiled_unless_asked_for() -> None:
    model = type(tiny("nextstep_a").model)
    assert not hasattr(model.forward_model, "__wrapped__")


def test_the_environment_decides_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in ((None, True), ("true", True), ("0", False), ("False", False)):
        if said is None:
            monkeypatch.delenv("ENABLE_TORCH_COMPILE", raising=False)
        else:
            monkeypatch.setenv("ENABLE_TORCH_COMPILE", said)
        pipe = tiny_or_skip("nextstep_a", compiled=None)
        assert hasattr(type(pipe.model).forward_model, "__wrapped__") is expected
        assert hasattr(type(pipe.model.image_head).sample, "__wrapped__") is expected
        assert hasattr(type(pipe.model.image_head.net).forward, "__wrapped__") is expected
        assert hasattr(type(pipe.vae.decoder).forward, "__wrapped__") is expected


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_nextstep_a_compiled(backend: str) -> None:
    torch._dynamo.reset()
    pipe = tiny_or_skip("nextstep_a", compiled=True, backend=backend)
    output = run_autoregressive(pipe, "nextstep_a", **SHORT["nextstep_a"])
    assert torch.equal(output, run_autoregressive(pipe, "nextstep_a", **SHORT["nextstep_a"]))
    if backend == "eager":  # inductor draws other noise
        assert torch.equal(output, run_autoregressive(tiny("nextstep_a"), "nextstep_a", **SHORT["nextstep_a"]))


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def on_meta(name: str) -> Any:
    try:
        with torch.device("meta"), unfilled():  # there are no values to fill there
            return build_autoregressive(name, scale="full")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NEXTSTEP)
def test_nextstep_has_its_true_size(name: str) -> None:
    pipe = on_meta(name)
    model, vae = pipe.model, pipe.vae
    sizes = {
        "model": model,
        "layers": model.layers,
        "layer": model.layers[0],
        "embed_tokens": model.embed_tokens,
        "lm_head": model.lm_head,
        "in": model.image_in_projector,
        "out": model.image_out_projector,
        "head": model.image_head,
        "res_block": model.image_head.net.res_blocks[0],
        "encoder": vae.encoder,
        "decoder": vae.decoder,
    }
    assert {key: millions(module) for key, module in sizes.items()} == pytest.approx(
        {
            "model": 14954,
            "layers": 13213,
            "layer": 275.27,
            "embed_tokens": 778.6,
            "lm_head": 778.6,
            "in": 0.33,
            "out": 26.2,
            "head": 157.23,
            "res_block": 11.81,
            "encoder": 34.27,
            "decoder": 49.55,
        },
        rel=0.01,
    )
    assert (len(model.layers), len(model.image_head.net.res_blocks)) == (48, 12)
    assert {(p.dtype, p.device.type) for m in (model, vae) for p in m.parameters()} == {(torch.bfloat16, "meta")}


@pytest.mark.parametrize("name", NEXTSTEP)
def test_the_call_of_nextstep_at_its_true_size_fixes_the_work(name: str) -> None:
    call = autoregressive_call(name, "full")
    assert (call["num_tokens"], call["num_sampling_steps"], call["hw"], call["cfg"]) == (24, 28, (512, 512), 7.5)


@pytest.mark.parametrize("function", [build_autoregressive, autoregressive_call])
def test_an_unknown_name_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="no autoregressive stand-in is named 'janus'; choose one of nextstep_a"):
        function("janus")
