"""The usual calls, those for LoRA above all, leave the same images and weights as on a pipeline that nobody streams."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.pipeline import changes
from layerstream.standins import build_tiny, run_tiny
from tests.fakes import adversary, assert_equal
from tests.test_changes import assert_same, denoiser, image, kinds, left, middle

peft = pytest.importorskip("peft")

pytestmark = [
    # transformers loads every adapter after the first of a text encoder this way
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    # Flux fuses only its transformer unless told otherwise, and unfuses all
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
]


Script = Callable[[Any, str, Path], Iterator[str]]


@dataclass
class Played:
    """What a script led to: after each step what the image is called, the image, and the kinds of weights."""

    labels: list[str]
    images: list[torch.Tensor]
    kinds: list[dict[str, Any]]
    random: torch.Tensor


def play(pipe: Any, name: str, script: Script, folder: Path) -> Played:
    played = Played(["plain"], [image(pipe, name)], [kinds(pipe)], torch.empty(0))
    torch.manual_seed(0)  # new adapters are random
    for label in script(pipe, name, folder):
        played.labels.append(label)
        played.images.append(image(pipe, name))
        played.kinds.append(kinds(pipe))
    played.random = torch.rand(4)
    return played


@functools.cache
def resident(name: str, script: Script, folder: Path) -> tuple[Played, dict[str, Any]]:
    """The script on a pipeline that nobody streams; images are equal where their labels are, and only there."""
    pipe = build_tiny(name)
    played = play(pipe, name, script, folder)
    for (one, a), (other, b) in itertools.combinations(zip(played.labels, played.images, strict=True), 2):
        assert bool((a - b).abs().max() < 1e-5) == (one == other), (one, other)
    return played, left(pipe)


def check(name: str, script: Script, budget: str, folder: Path) -> None:
    """Play the script on a streamed pipeline, and compare everything with the resident one."""
    wanted, wanted_left = resident(name, script, folder)
    pipe, device = build_tiny(name), adversary(copies="random" if budget == "middle" else "late")
    limit = middle(name) if budget == "middle" else budget
    with layerstream.offload(pipe, vram_budget=limit, device=device) as streamer, device.checking():
        played = play(pipe, name, script, folder)
        stats = streamer.stats()
    for label, now, then in zip(wanted.labels, played.images, wanted.images, strict=True):
        assert torch.equal(now, then), label
    for label, now_kinds, then_kinds in zip(wanted.labels, played.kinds, wanted.kinds, strict=True):
        assert now_kinds == then_kinds, label
    assert torch.equal(played.random, wanted.random), "streaming drew random numbers"
    assert stats.num_relaid > 0
    assert budget != "middle" or stats.peak_reserved_bytes <= limit
    assert_same(left(pipe), wanted_left)
    assert torch.equal(image(pipe, name), wanted.images[-1])
    assert device.buffer_bytes == 0
    assert not device.registered


# ---- what users call


def config(*targets: str, **kwargs: Any) -> Any:
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": list(targets), **kwargs}
    return peft.LoraConfig(**options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@functools.cache
def weights(folder: Path, name: str, number: int) -> Path:
    """LoRA weights for the denoiser and the first text encoder, in a file as users have them."""
    with torch.random.fork_rng(devices=[]):  # also around the building: models of transformers 4 draw numbers in it
        donor = build_tiny(name)
        of = {"unet" if "unet" in donor.components else "transformer": denoiser(donor)}
        of["text_encoder"] = donor.text_encoder
        denoiser(donor).add_adapter(config("to_q", "to_v", "to_out.0"))
        donor.text_encoder.add_adapter(config("q_proj", "v_proj", "fc1"))
    generator = torch.Generator().manual_seed(number)
    layers = {
        f"{key}_lora_layers": {
            k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in peft.get_peft_model_state_dict(m).items()
        }
        for key, m in of.items()
    }
    path = folder / f"{name}-{number}"
    donor.save_lora_weights(path, **layers)
    return path


def fused_projections(pipe: Any, name: str, folder: Path) -> Iterator[str]:
    owner = pipe if hasattr(pipe, "fuse_qkv_projections") else denoiser(pipe)
    owner.fuse_qkv_projections()  # the image is the same; the kinds of weights are not
    yield "plain"
    owner.unfuse_qkv_projections()
    yield "plain"


@functools.cache
def another(name: str, seed: int) -> Any:
    """A pipeline to take weights from; built before the device counts what is made."""
    with torch.random.fork_rng(devices=[]):  # as in `weights`
        return build_tiny(name, seed=seed)


def loaded_states(pipe: Any, name: str, folder: Path) -> Iterator[str]:
    first, other = another(name, 0), another(name, 3)
    denoiser(pipe).load_state_dict(denoiser(other).state_dict())
    pipe.text_encoder.load_state_dict(other.text_encoder.state_dict(), assign=True)
    yield "another denoiser and text encoder"
    pipe.vae.load_state_dict(other.vae.state_dict())
    denoiser(pipe).load_state_dict(denoiser(first).state_dict())
    yield "another text encoder and vae"


def casts(pipe: Any, name: str, folder: Path) -> Iterator[str]:
    """Rounded weights give another image, so a cast and back shows."""
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
    for path in ("text_encoder", "vae.post_quant_conv", "unet.conv_in", f"{block}.ff", block):
        module = functools.reduce(getattr, path.split("."), pipe)
        assert module.to(torch.bfloat16) is module
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        module.float()
        if path != "unet.conv_in":
            yield f"rounded up to {path}"
    pipe.to(torch.bfloat16)
    yield "all in bfloat16"


def one_adapter(pipe: Any, name: str, folder: Path) -> Iterator[str]:
    pipe.load_lora_weights(weights(folder, name, 0), adapter_name="a")
    yield "a"
    pipe.set_adapters("a", 0.4)
    pipe.fuse_lora()
    yield "a at 0.4"
    pipe.unfuse_lora()
    yield "a at 0.4"
    pipe.disable_lora()
    pipe.unload_lora_weights()
    yield "plain"


def two_adapters(pipe: Any, name: str, folder: Path) -> Iterator[str]:
    pipe.load_lora_weights(weights(folder, name, 0), adapter_name="a")
    pipe.load_lora_weights(weights(folder, name, 1), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.3, 0.6])
    yield "a and b"
    pipe.delete_adapters("a")
    yield "b"
    pipe.fuse_lora(components=["unet" if name == "sd15" else "transformer", "text_encoder"], lora_scale=0.5)
    yield "half of b"
    pipe.unload_lora_weights()  # what is fused stays
    yield "half of b"


def by_component(pipe: Any, name: str, folder: Path) -> Iterator[str]:
    """The methods of the components, which pipelines and users call as well."""
    main, encoder = denoiser(pipe), pipe.text_encoder
    main.add_adapter(config("to_k", "to_out.0", use_dora=True), adapter_name="c")
    main.save_lora_adapter(folder / f"{name}-saved", adapter_name="c")
    main.fuse_lora(lora_scale=0.5)
    yield "c fused"
    main.unfuse_lora()
    main.unload_lora()
    main.load_lora_adapter(folder / f"{name}-saved", prefix=None, adapter_name="c", use_safetensors=True)
    encoder.add_adapter(config("q_proj", "fc2"), adapter_name="d")
    yield "c and d"
    encoder.disable_adapters()
    main.delete_adapters("c")
    yield "plain"
    encoder.delete_adapter("d")


def textual_inversion(pipe: Any, name: str, folder: Path) -> Iterator[str]:
    """New rows for the text encoder's embedding; no LoRA, and loaded the same way."""
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion({"<fox>": torch.full((2, width), 0.3)}, token="<fox>")
    yield "plain"  # no prompt has the word; the rows are compared at the end


@pytest.mark.parametrize(
    ("name", "script", "budget"),
    [
        ("flux", fused_projections, "min"),
        ("sd15", fused_projections, "auto"),
        ("sd3", loaded_states, "min"),
        ("sd15", loaded_states, "middle"),
        ("sd15", casts, "min"),
        *[("sd3", one_adapter, budget) for budget in ("min", "auto", "middle")],
        ("sd15", one_adapter, "min"),
        ("sd15", one_adapter, "middle"),
        ("flux", two_adapters, "auto"),
        ("sd3", by_component, "min"),
        ("sd15", textual_inversion, "min"),
    ],
)
def test_the_usual_calls(name: str, script: Script, budget: str, folder: Path) -> None:
    check(name, script, budget, folder)


def test_layers_that_are_cast_inside_each_forward() -> None:
    """What diffusers calls layerwise casting: every layer is kept in 8 bits, and cast up while it runs."""

    def build() -> Any:
        pipe = build_tiny("flux", dtype=torch.bfloat16)
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        return pipe

    expected = image(build(), "flux")
    pipe, device = build(), adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        for _ in range(2):
            assert torch.equal(image(pipe, "flux"), expected)


@pytest.mark.parametrize("path", ["vae.decoder.conv_in", "transformer.proj_out"])
def test_a_layer_that_a_call_casts_and_leaves_so(path: str) -> None:
    def build() -> Any:
        pipe = build_tiny("sd3")
        layer = functools.reduce(getattr, path.split("."), pipe)

        def cast(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (args[0].to(module.bfloat16().weight.dtype),)

        layer.register_forward_pre_hook(cast)
        layer.register_forward_hook(lambda module, args, output: output.float())
        return pipe

    wanted, pipe, device = build(), build(), adversary()
    expected = [image(wanted), image(wanted)]
    assert not torch.equal(expected[0], image(build_tiny("sd3")))
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        assert_equal([image(pipe), image(pipe)], expected)
    assert kinds(pipe) == kinds(wanted)


def test_a_scale_for_one_call(folder: Path) -> None:
    """Pipelines scale the layers of text encoder and denoiser inside the call, and back."""
    scaled = {"joint_attention_kwargs": {"scale": 0.3}}

    def images(pipe: Any) -> list[torch.Tensor]:
        pipe.load_lora_weights(weights(folder, "sd3", 0))
        return [image(pipe, **scaled), image(pipe)]

    expected = images(build_tiny("sd3"))
    assert not torch.equal(expected[0], expected[1])
    pipe, device = build_tiny("sd3"), adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        assert_equal(images(pipe), expected)


def test_between_two_steps_of_a_call(folder: Path) -> None:
    """The callback of a step runs between two forwards of the denoiser, in the middle of the pipeline's call."""

    def change(pipe: Any, step: int, time: object, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe.load_lora_weights(weights(folder, "sd3", 0), adapter_name="a")
        elif step == 1:
            pipe.fuse_lora()
        else:
            pipe.unfuse_lora()
            pipe.unload_lora_weights()
        return kwargs

    def images(pipe: Any) -> list[torch.Tensor]:
        return [run_tiny(pipe, "sd3", num_inference_steps=3, callback_on_step_end=call) for call in (change, None)]

    expected = images(build_tiny("sd3"))
    assert not torch.equal(expected[0], expected[1])
    pipe, device = build_tiny("sd3"), adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        assert_equal(images(pipe), expected)


def test_a_decorated_function_that_loads_an_adapter(folder: Path) -> None:
    device = adversary()

    @layerstream.offload(vram_budget="min", device=device)
    def paint(pipe: Any) -> list[torch.Tensor]:
        before = image(pipe)
        pipe.load_lora_weights(weights(folder, "sd3", 0), adapter_name="a")
        return [before, image(pipe)]

    pipe, wanted = build_tiny("sd3"), build_tiny("sd3")
    expected = paint.__wrapped__(wanted)
    assert not torch.equal(*expected)
    with device.checking():
        assert_equal(paint(pipe), expected)
    assert_same(left(pipe), left(wanted))
    assert torch.equal(image(pipe), expected[1])


def test_an_adapter_that_does_not_load(folder: Path) -> None:
    """The error of diffusers comes through, and the pipeline streams on."""
    bad = {f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    pipe, device = build_tiny("sd3"), adversary()
    expected = image(pipe)
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        with pytest.raises(RuntimeError, match="size mismatch"):
            pipe.load_lora_weights(bad, adapter_name="bad")
        loads = streamer.stats().num_loads
        assert torch.equal(image(pipe), expected)
        assert streamer.stats().num_loads > loads


def test_an_adapter_that_does_not_fit_the_budget(folder: Path) -> None:
    pipe = build_tiny("sd3")
    expected = image(pipe)
    streamer = layerstream.offload(pipe, vram_budget=middle("sd3"), device=adversary()).start()
    with pytest.raises(layerstream.BudgetError):
        pipe.transformer.add_adapter(config("to_q", "to_v", r=2000), adapter_name="large")
    assert not streamer.is_active
    pipe.transformer.delete_adapters("large")
    assert torch.equal(image(pipe), expected)


def test_calls_of_another_pipeline_of_the_same_components(folder: Path) -> None:
    """As `from_pipe` makes one; it merges the text encoder's adapters without calling the text encoder."""

    def images(pipe: Any) -> list[torch.Tensor]:
        other = type(pipe)(**pipe.components)
        other.load_lora_weights(weights(folder, "sd3", 0), adapter_name="a")
        other.fuse_lora()
        other.unload_lora_weights()  # what is fused stays
        return [image(pipe)]

    pipe, wanted, device = build_tiny("sd3"), build_tiny("sd3"), adversary()
    plain, expected = image(wanted), images(wanted)
    assert not torch.equal(plain, expected[0])
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        assert torch.equal(image(pipe), plain)
        assert_equal(images(pipe), expected)
    assert_same(left(pipe), left(wanted))


def test_adapters_are_merged_on_the_device_layer_by_layer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU rounds other than a CPU. Here there is none, so that lending is only counted."""
    pipe, other = build_tiny("sd3"), build_tiny("sd3")
    for each in (pipe, other):
        each.transformer.add_adapter(config("to_q", "to_v"))
    layer = type(pipe.transformer.transformer_blocks[0].attn.to_q)
    merge, unmerge, lent = layer.merge, layer.unmerge, []

    @contextlib.contextmanager
    def lend(device: torch.device, tensors: list[torch.Tensor]) -> Iterator[None]:
        lent.append({id(t) for t in tensors})
        yield

    monkeypatch.setattr(changes, "lent_to", lend)
    layers = [m for m in pipe.transformer.modules() if isinstance(m, layer)]
    with changes.merging_on(torch.device("cuda"), [pipe.transformer]):
        other.transformer.fuse_lora()
        assert not lent
        pipe.transformer.fuse_lora()
        pipe.transformer.unfuse_lora()
    assert lent == 2 * [{id(t) for t in m.parameters()} for m in layers]
    assert (layer.merge, layer.unmerge) == (merge, unmerge)
