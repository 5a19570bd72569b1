"""Tiny pipelines of real classes: equal twice in one context, after it, and after an exception in mid-step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import layerstream
from layerstream.standins import TINY_PIPELINES, build_tiny, run_tiny
from tests.fakes import adversary, assert_restored, describe


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}


def weights_bytes(pipe: Any) -> int:
    return sum(p.numel() * p.element_size() for m in modules(pipe).values() for p in m.parameters())


SKIPPED_WARNINGS = [
    "ignore:.*upcast_vae.*:FutureWarning",
    "ignore:Mismatch dtype between input and weight:UserWarning",
]
pytestmark = [pytest.mark.filterwarnings(w) for w in SKIPPED_WARNINGS]


@pytest.fixture(params=TINY_PIPELINES)
def named(request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    try:
        yield build_tiny(request.param), request.param
    except ImportError as exc:
        pytest.skip(str(exc))  # a pipeline that the installed diffusers does not have yet


def test_equal_restored_and_whole_after_an_exception(named: tuple[Any, str]) -> None:
    pipe, name = named
    expected = run_tiny(pipe, name)  # first: transformers keeps notes on its modules from the first call on
    before = {n: describe(m) for n, m in modules(pipe).items()}
    device = adversary()

    class StopError(Exception):
        pass

    def stop(module: nn.Module, args: object, output: object) -> None:
        raise StopError

    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        assert torch.equal(run_tiny(pipe, name), expected)
        assert torch.equal(run_tiny(pipe, name), expected)
        demanded = streamer.stats().num_demand_loads
        assert torch.equal(run_tiny(pipe, name), expected)
        # Where a call ends, and that another follows, is known from the second on.
        assert streamer.stats().num_demand_loads <= demanded + 1
        engine = streamer._streamer
        assert engine is not None
        streamed = {unit.spec.component for unit in engine._units.values() if unit.spec.is_block}
        assert any(component.startswith(("text_encoder", "prior_text", "vision_lang")) for component in streamed)
        assert {"transformer", "unet", "decoder"} & streamed
        denoiser = next(u.called[0] for u in engine._units.values() if u.spec.is_block and u.spec.is_repeated)
        assert denoiser is not None
        handle = denoiser.register_forward_hook(stop)
        with pytest.raises(StopError):
            run_tiny(pipe, name)
        handle.remove()
        assert torch.equal(run_tiny(pipe, name), expected)
        stats = streamer.stats()
        phases = engine.phase_stats.values()
        assert sum(phase.num_loads for phase in phases) == stats.num_loads
        assert sum(phase.loaded_bytes for phase in phases) == stats.loaded_bytes
        assert stats.peak_device_bytes < weights_bytes(pipe)
        for phase in engine.phase_stats:
            assert phase in str(streamer.report())
    for n, m in modules(pipe).items():
        assert_restored(m, before[n])
    assert torch.equal(run_tiny(pipe, name), expected)
    assert device.buffer_bytes == 0
    assert not device.registered


def test_an_interrupt_leaves_the_context(named: tuple[Any, str]) -> None:
    pipe, name = named
    expected = run_tiny(pipe, name)
    before = {n: describe(m) for n, m in modules(pipe).items()}
    calls = 0

    def interrupt(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    handle = None
    with (
        pytest.raises(KeyboardInterrupt),
        layerstream.offload(pipe, vram_budget="min", device=adversary()) as streamer,
    ):
        engine = streamer._streamer
        assert engine is not None
        # Not the first: the encoders of a ControlNet pipeline may run once only.
        block = [u.called[0] for u in engine._units.values() if u.spec.is_block and u.spec.is_repeated][1]
        assert block is not None
        handle = block.register_forward_pre_hook(interrupt)
        run_tiny(pipe, name)
    assert handle is not None
    handle.remove()
    for n, m in modules(pipe).items():
        assert_restored(m, before[n])
    assert torch.equal(run_tiny(pipe, name), expected)


def test_the_budget_holds(named: tuple[Any, str]) -> None:
    """Everything fits, and two budgets between that and the least: activations are part of them."""
    pipe, name = named
    expected = run_tiny(pipe, name)
    peaks = []
    for budget, num_calls in (("min", 1), ("auto", 2)):
        device = adversary(copies="at_once")
        with layerstream.offload(pipe, vram_budget=budget, device=device) as streamer, device.checking():
            for _ in range(num_calls):
                assert torch.equal(run_tiny(pipe, name), expected)
            peaks.append(streamer.stats().peak_reserved_bytes)
        assert device.num_ooms() == device.buffer_bytes == 0
    for share, num_calls in ((0.3, 3), (0.7, 2)):
        limit = int(peaks[0] + share * (peaks[1] - peaks[0])) + 2**14
        device = adversary(copies="random")
        with layerstream.offload(pipe, vram_budget=limit, device=device) as streamer, device.checking():
            for _ in range(num_calls):
                assert torch.equal(run_tiny(pipe, name), expected)
                assert device.reserved_bytes() <= limit
            stats = streamer.stats()
            assert stats.peak_reserved_bytes <= limit
            assert streamer.plan.peak_bytes <= limit
            assert device.num_ooms() == 0
        assert device.buffer_bytes == 0


def test_low_precision(named: tuple[Any, str]) -> None:
    """bfloat16 with float32 islands (Wan keeps some in one block with the others)."""
    _, name = named
    pipe = build_tiny(name, dtype=torch.bfloat16)
    expected = run_tiny(pipe, name)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        assert torch.equal(run_tiny(pipe, name), expected)


def test_a_component_cast_inside_the_call() -> None:
    """SDXL casts its VAE up to float32, and back, while it runs."""
    for dtype in (torch.bfloat16, torch.float16):
        pipe = build_tiny("sdxl_img2img", dtype=dtype)
        expected = run_tiny(pipe, "sdxl_img2img")
        device = adversary()
        with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
            for _ in range(2):
                assert torch.equal(run_tiny(pipe, "sdxl_img2img"), expected)
            assert streamer.stats().num_relaid > 0
        assert pipe.vae.dtype == dtype
        assert torch.equal(run_tiny(pipe, "sdxl_img2img"), expected)


def test_components_that_take_turns_share_a_phase() -> None:
    pipe = build_tiny("sd15_controlnet")
    expected = run_tiny(pipe, "sd15_controlnet")
    device = adversary()
    with layerstream.offload(pipe, vram_budget="auto", device=device) as streamer, device.checking():
        for _ in range(2):
            assert torch.equal(run_tiny(pipe, "sd15_controlnet"), expected)
        assert any({"unet", "controlnet"} <= set(p.phase.components) for p in streamer.plan.phases)


def test_what_pipelines_ask_their_components(named: tuple[Any, str]) -> None:
    pipe, _ = named
    want = {n: (getattr(m, "dtype", None), str(getattr(m, "device", None))) for n, m in modules(pipe).items()}
    with layerstream.offload(pipe, vram_budget="min", device="cpu") as streamer:
        assert str(pipe.device) == "cpu"
        assert str(pipe._execution_device) == "cpu"
        got = {n: (getattr(m, "dtype", None), str(getattr(m, "device", None))) for n, m in modules(pipe).items()}
        assert got == want
        assert streamer.stats().num_touch_loads == 0


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(
    share=st.floats(0.02, 1.2),
    calls=st.lists(st.tuples(st.sampled_from([16, 32, 48]), st.integers(1, 2)), min_size=2, max_size=4),
)
def test_any_budget_any_sizes_in_one_context(share: float, calls: list[tuple[int, int]]) -> None:
    pipe = build_tiny("sd3")
    options = [
        {"height": size, "width": size, "num_images_per_prompt": batch, "num_inference_steps": 2}
        for size, batch in calls
    ]
    expected = [run_tiny(pipe, "sd3", **option) for option in options]
    device = adversary(copies="at_once")
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        for option, image in zip(options, expected, strict=True):
            assert torch.equal(run_tiny(pipe, "sd3", **option), image)
        least = streamer.stats().peak_reserved_bytes
    limit = int(least + share * weights_bytes(pipe)) + 2**15
    device = adversary(copies="random")
    with layerstream.offload(pipe, vram_budget=limit, device=device) as streamer, device.checking():
        for option, image in zip([*options, *options], [*expected, *expected], strict=True):
            assert torch.equal(run_tiny(pipe, "sd3", **option), image)
        assert streamer.stats().peak_reserved_bytes <= limit


def test_two_denoisers_share_the_slots() -> None:
    try:
        pipe = build_tiny("wan22")
    except ImportError as exc:
        pytest.skip(str(exc))
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        run_tiny(pipe, "wan22")
        run_tiny(pipe, "wan22")
        assert streamer.stats().num_extra_slots == 0
        used = {streamer._streamer._units[u].spec.component for u in streamer._streamer._residency.order._history}
        assert used == {"text_encoder", "transformer", "transformer_2"}


def test_generate_token_by_token() -> None:
    """A text encoder's `generate` enters by its own method and runs many short passes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    tokens = torch.randint(1, 64, (2, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    device = adversary()
    with layerstream.offload(model, vram_budget="min", device=device) as streamer, device.checking():
        assert torch.equal(model.generate(tokens, **options), expected)
        first = streamer.stats().num_demand_loads
        assert torch.equal(model.generate(tokens, **options), expected)
        assert streamer.stats().num_demand_loads == first


def test_lora_loaded_before_entering_and_rescaled_while_streaming() -> None:
    peft = pytest.importorskip("peft")
    pipe = build_tiny("sd3")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="style")

    def images() -> list[torch.Tensor]:
        found = []
        for weight in (1.0, 0.3):
            pipe.transformer.set_adapters("style", weight)
            found.append(run_tiny(pipe, "sd3"))
        pipe.transformer.disable_adapters()
        found.append(run_tiny(pipe, "sd3"))
        pipe.transformer.enable_adapters()
        return found

    expected = images()
    assert not torch.equal(expected[0], expected[1])
    before = describe(pipe.transformer)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        for streamed, resident in zip(images(), expected, strict=True):
            assert torch.equal(streamed, resident)
    assert_restored(pipe.transformer, before)
