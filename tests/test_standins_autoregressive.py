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
SHORT["mammoth"] = {"ar_height": 1, "num_inference_steps": 2}
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
def changed(module: nn.Module, factor: float) -> Iterator[None]:
    """Every parameter of `module` times `factor`, inside."""
    kept = [parameter.detach().clone() for parameter in module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)
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
        is_entry = isinstance(module, nn.ModuleList)
        if not is_entry and any(isinstance(inner, nn.ModuleList) for inner in part.modules()):
            yield from parts_of(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part


def without_effect(root: nn.Module, run: Run, among: set[str] | None = None) -> set[str]:
    """The parts of which the output says nothing: not of two percent more, and not of the opposite sign.

    Where tokens are drawn, a small change may leave them all as they were.
    """
    output = run()
    found = set()
    for name, part in parts_of(root):
        if among is not None and name not in among:
            continue
        for factor in (1.02, -1.0):
            with changed(part, factor):
                if not torch.equal(run(), output):
                    break
        else:
            found.add(name)
    assert torch.equal(run(), output)
    return found


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_output_repeats_to_the_bit_and_follows_its_arguments(name: str) -> None:
    first = run_autoregressive(tiny(name), name)
    assert first.dtype == torch.float32
    assert first.shape == (1, 3, 32, 48)
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
    assert not any(m.training for m in root.children() for m in m.modules())


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
    unused = without_effect(root_of(name, pipe), lambda: run_autoregressive(pipe, name, **edit), unused)
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


def test_every_part_of_mammoth_matters() -> None:
    model = tiny_or_skip("mammoth")
    # The head of the text tokens takes part in the call, but no text token may be drawn.
    never = {"llm_model.lm_head", "gen_transformer.ref_image_patch_embedder"}
    unused = without_effect(model, lambda: run_autoregressive(model, "mammoth", **SHORT["mammoth"]))
    edits = ("llm_model.model.visual.", "gen_tokenizer.", "gen_vae.encoder", "gen_vae.quant_conv")
    edits += ("gen_transformer.ref_image_refiner.",)
    assert {part for part in unused if not part.startswith(edits)} == never
    assert not any(part.startswith("llm_model.model.language_model") for part in unused)
    edit = {**SHORT["mammoth"], "image": picture(), "image_guidance_scale": 1.5}
    unused = without_effect(model, lambda: run_autoregressive(model, "mammoth", **edit), unused)
    decoding = ("gen_tokenizer.vit_decoder.", "gen_tokenizer.conv_decoder.", "gen_tokenizer.post_quant_proj")
    assert {part for part in unused if not part.startswith(decoding)} == {"llm_model.lm_head"}


def test_arguments_of_mammoth() -> None:
    model = tiny("mammoth")
    output = run_autoregressive(model, "mammoth")
    changes: tuple[dict[str, Any], ...] = (
        {"cfg_scale": 1.0},
        {"text_guidance_scale": 1.0},
        {"cfg_range": (0.0, 0.5)},
        {"num_inference_steps": 5},
        {"ar_height": 1},
        {"ar_width": 2},
        {"temperature": 4.0},
        {"top_k": 1},
        {"image": picture()},
    )
    outputs = [output, *(run_autoregressive(model, "mammoth", **change) for change in changes)]
    for i, a in enumerate(outputs):
        assert not any(torch.equal(a, b) for b in outputs[:i]), changes[i - 1]
    # Of the likeliest alone, a token has all of a small probability.
    assert torch.equal(run_autoregressive(model, "mammoth", top_p=1e-6), run_autoregressive(model, "mammoth", top_k=1))
    assert not torch.equal(
        run_autoregressive(model, "mammoth", image=picture()),
        run_autoregressive(model, "mammoth", image=picture(), image_guidance_scale=1.5),
    )


def test_calls_of_mammoth() -> None:
    model = tiny("mammoth")
    called: list[str] = []
    tokens: list[tuple[int, ...]] = []
    watched = {
        "root": model,
        "llm": model.llm_model,
        "dit": model.gen_transformer,
        "qformer": model.gen_transformer.time_caption_embed.image_embedder,
        "vae": model.gen_vae.decoder,
        "encoder": model.gen_vae.encoder,
        "tokenizer": model.gen_tokenizer.encoder,
        "visual": model.llm_model.model.visual,
    }
    handles = [m.register_forward_pre_hook(lambda *_, key=key: called.append(key)) for key, m in watched.items()]
    handles.append(
        model.llm_model.register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
    )
    run_autoregressive(model, "mammoth")
    step = ["dit", "qformer", "dit"]  # with the sketch, and without
    assert called == [*["llm"] * 8, *["llm"] * 2, *step * 4, "vae"]
    prompt = tokens[0][1]
    assert tokens[:8] == [(2, prompt), *[(2, 1)] * 7]
    assert tokens[8] == (1, prompt + 8)
    called.clear()
    run_autoregressive(model, "mammoth", image=picture(), image_guidance_scale=1.5)
    for handle in handles:
        handle.remove()
    step = ["dit", "qformer", "dit", "dit"]
    expected = ["tokenizer", "llm", "visual", *["llm"] * 7, "llm", "visual", "llm", "encoder", *step * 4, "vae"]
    assert called == expected


def test_tokens_of_mammoth_are_routed() -> None:
    model = tiny("mammoth")
    layer = model.llm_model.model.language_model.layers[2]
    called: list[tuple[str, int]] = []
    handles = [
        getattr(layer, key).register_forward_pre_hook(
            lambda module, args, key=key: called.append((key, args[0].shape[-2]))
        )
        for key in ("mlp", "gen_mlp")
    ]
    run_autoregressive(model, "mammoth")
    for handle in handles:
        handle.remove()
    prompt, both, negative = called[0][1], called[8][1], called[10][1]
    assert called[:8] == [("mlp", prompt), *[("gen_mlp", 1)] * 7]
    assert called[8:] == [("mlp", both), ("gen_mlp", 8), ("mlp", negative)]
    assert both == prompt
    layers = model.llm_model.model.language_model.layers
    assert [layer.gen_mlp is None for layer in layers] == [True, True, False, False, False, False]


def test_mammoth_is_made_as_the_original() -> None:
    model = tiny("mammoth")
    assert type(model).__name__ == "Mammothmoda2Model"
    assert [key for key, _ in model.named_children()] == ["llm_model", "gen_tokenizer", "gen_vae", "gen_transformer"]
    language = ["embed_tokens", "gen_embed_tokens", "layers", "norm", "rotary_emb"]
    assert [key for key, _ in model.llm_model.model.language_model.named_children()] == language
    assert {table.device.type for table in model.gen_freqs_cis} == {"cpu"}
    run_autoregressive(model, "mammoth")
    assert isinstance(model.llm_model.model.rope_deltas, torch.Tensor)
    with pytest.raises(NotImplementedError):
        model(torch.zeros(1))


def test_mammoth_has_its_true_size() -> None:
    model = on_meta("mammoth")
    llm, dit = model.llm_model, model.gen_transformer
    layers = llm.model.language_model.layers
    qformer = dit.time_caption_embed.image_embedder
    sizes = {
        "llm": llm,
        "visual": llm.model.visual,
        "layer": layers[0],
        "layer with experts": layers[14],
        "tokenizer": model.gen_tokenizer,
        "tokenizer.encoder": model.gen_tokenizer.encoder,
        "tokenizer.decoder": model.gen_tokenizer.vit_decoder,
        "block": dit.layers[0],
        "context block": dit.context_refiner[0],
        "qformer": qformer,
    }
    assert {key: millions(module) for key, module in sizes.items()} == pytest.approx(
        {
            "llm": 12360,
            "visual": 576.4,
            "layer": 192.9,
            "layer with experts": 343.9,
            "tokenizer": 705.4,
            "tokenizer.encoder": 308.9,
            "tokenizer.decoder": 340.1,
            "block": 104.7,
            "context block": 94.4,
            "qformer": 267,
        },
        rel=0.01,
    )
    assert millions(dit) - millions(qformer) == pytest.approx(2290, rel=0.01)
    assert [layer.gen_mlp is not None for layer in layers] == [False] * 14 + [True] * 22
    assert (len(dit.layers), len(llm.model.visual.blocks)) == (16, 27)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
    call = autoregressive_call("mammoth", "full")
    assert (call["ar_height"] * (call["ar_width"] + 1), call["num_inference_steps"]) == (64, 10)


@pytest.mark.parametrize("function", [build_autoregressive, autoregressive_call])
def test_an_unknown_name_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="no autoregressive stand-in is named 'janus'; choose one of nextstep_a"):
        function("janus")
