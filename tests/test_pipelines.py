"""Tiny pipelines of real classes: equal twice in one context, after it, and after an exception in mid-step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.standins import TINY_PIPELINES, build_tiny, run_tiny
from tests.fakes import adversary, assert_restored, describe


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}


def weights_bytes(pipe: Any) -> int:
    return sum(p.numel() * p.element_size() for m in modules(pipe).values() for p in m.parameters())


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
        assert streamer.stats().num_demand_loads == demanded
        streamed = {u.spec.component for u in streamer._streamer._units if u.spec.is_block}
        assert {"transformer", "text_encoder"} <= streamed
        assert not any(component.startswith("vae") for component in streamed)
        denoiser = streamer._streamer._units[-1].module
        handle = denoiser.register_forward_hook(stop)
        with pytest.raises(StopError):
            run_tiny(pipe, name)
        handle.remove()
        assert torch.equal(run_tiny(pipe, name), expected)
    for n, m in modules(pipe).items():
        assert_restored(m, before[n])
    assert torch.equal(run_tiny(pipe, name), expected)
    assert device.buffer_bytes == 0
    assert not device.registered


def test_an_exception_leaves_the_context(named: tuple[Any, str]) -> None:
    pipe, name = named
    expected = run_tiny(pipe, name)
    before = {n: describe(m) for n, m in modules(pipe).items()}
    calls = 0

    def interrupt(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    block = next(m for n, m in pipe.transformer.named_modules() if n.endswith("blocks.1"))
    with (
        pytest.raises(KeyboardInterrupt),
        layerstream.offload(pipe, vram_budget="min", device=adversary()),
    ):
        handle = block.register_forward_pre_hook(interrupt)
        run_tiny(pipe, name)
    handle.remove()
    for n, m in modules(pipe).items():
        assert_restored(m, before[n])
    assert torch.equal(run_tiny(pipe, name), expected)


@pytest.mark.parametrize("copies", ["at_once", "random"])
def test_a_budget_in_the_middle(named: tuple[Any, str], copies: str) -> None:
    pipe, name = named
    expected = run_tiny(pipe, name)
    device = adversary(copies=copies)
    with pytest.raises(layerstream.BudgetError) as refused:
        layerstream.offload(pipe, vram_budget=1000, device=device).start()
    least, total = refused.value.needed_bytes, weights_bytes(pipe)
    assert least is not None
    assert least < total
    budget = (least + total) // 2
    with layerstream.offload(pipe, vram_budget=budget, device=device) as streamer, device.checking():
        assert torch.equal(run_tiny(pipe, name), expected)
        assert streamer.stats().num_resident_blocks > 0
        assert streamer.stats().num_streamed_blocks > 0
        assert device.peak_buffer_bytes <= budget
        assert streamer.stats().peak_device_bytes == device.peak_buffer_bytes


def test_low_precision(named: tuple[Any, str]) -> None:
    """bfloat16 with float32 islands (Wan keeps some in one block with the others)."""
    _, name = named
    pipe = build_tiny(name, dtype=torch.bfloat16)
    expected = run_tiny(pipe, name)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device), device.checking():
        assert torch.equal(run_tiny(pipe, name), expected)


def test_what_pipelines_ask_their_components(named: tuple[Any, str]) -> None:
    pipe, _ = named
    want = {n: (getattr(m, "dtype", None), str(getattr(m, "device", None))) for n, m in modules(pipe).items()}
    with layerstream.offload(pipe, vram_budget="min", device="cpu") as streamer:
        assert str(pipe.device) == "cpu"
        assert str(pipe._execution_device) == "cpu"
        got = {n: (getattr(m, "dtype", None), str(getattr(m, "device", None))) for n, m in modules(pipe).items()}
        assert got == want
        assert streamer.stats().num_touch_loads == 0


def test_two_denoisers_share_the_slots() -> None:
    try:
        pipe = build_tiny("wan22")
    except ImportError as exc:
        pytest.skip(str(exc))
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        run_tiny(pipe, "wan22")
        assert streamer.stats().num_slots == 2
        run_tiny(pipe, "wan22")
        used = {streamer._streamer._units[u].spec.component for u in streamer._streamer._order._history}
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
