"""How the engine changes phases: what makes way for what, and what it says when there is no room."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.simulated import SimulatedDevice
from layerstream.engine.residency import Residency
from layerstream.model.adapters import registry
from tests.fakes import SizedBlock, adversary, assert_equal, assert_restored, describe, run, toy, toy_input, twin


class Decoder(nn.Module):
    """Like a VAE: one unit, a buffer that pipelines read before they decode."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 2000)
        self.back = nn.Linear(2000, 4)
        self.register_buffer("mean", torch.randn(4))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.encode(x))


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"net": toy(), "vae": Decoder().eval()}


def image(pipe: dict[str, nn.Module]) -> torch.Tensor:
    with torch.no_grad():
        x = toy_input()
        for _ in range(4):
            x = pipe["net"](x)
        return pipe["vae"].decode(x * 0.5 + pipe["vae"].mean.view(1, -1))


def test_weights_read_between_calls_begin_their_phase() -> None:
    """They may not fit beside what ran before, and are loaded once for the reading and the call after it."""
    pipe = parts()
    before = {name: describe(part) for name, part in pipe.items()}
    expected = image(pipe)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        assert torch.equal(image(pipe), expected)
        least = streamer.stats().peak_reserved_bytes
        loaded = streamer._last.phase_stats["vae"].loaded_bytes
        decoder = sum(t.numel() * t.element_size() for t in [*pipe["vae"].parameters(), *pipe["vae"].buffers()])
        assert decoder <= loaded < 1.2 * decoder
        assert streamer.stats().num_touch_loads == 0
    device = adversary()
    with layerstream.offload(pipe, vram_budget=least + 2**11, device=device) as streamer, device.checking():
        for _ in range(3):
            assert torch.equal(image(pipe), expected)
        assert streamer.stats().num_extra_slots == 0
    for name, part in pipe.items():
        assert_restored(part, before[name])


def test_weights_read_inside_another_call_take_a_slot_for_the_moment() -> None:
    pipe = parts()
    handle = pipe["net"].blocks[2].register_forward_hook(lambda m, a, out: out + pipe["vae"].mean.sum())
    expected = image(pipe)
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        for _ in range(2):
            assert torch.equal(image(pipe), expected)
        assert streamer.stats().num_extra_slots > 0
        used = device.buffer_bytes
        pipe["net"](toy_input())  # the next call begins without what the last one needed for the moment
        assert device.buffer_bytes <= used
        assert len(streamer._streamer._transfer.extra) <= 1
    handle.remove()


def test_a_layer_of_a_component_is_cast_between_calls() -> None:
    """AnimateDiff SDXL casts three layers of its VAE, which decodes in float32, before it decodes."""
    pipe, resident = parts(), parts()

    def cast(model: nn.Module) -> None:
        model.back.to(torch.float64)
        model.back.register_forward_pre_hook(lambda m, args: args[0].double())

    cast(resident["vae"])
    expected = image(resident)
    assert expected.dtype == torch.float64
    device = adversary()
    with layerstream.offload(pipe, vram_budget="min", device=device) as streamer, device.checking():
        image(pipe)
        cast(pipe["vae"])
        assert streamer.stats().num_relaid == 1
        for _ in range(2):
            assert torch.equal(image(pipe), expected)
        with pytest.raises(layerstream.MovedWhileStreamingError, match=r"`vae\.back` \(Linear\) cannot be moved"):
            pipe["vae"].back.to("meta")
    assert pipe["vae"].back.weight.dtype == torch.float64
    assert torch.equal(image(pipe), expected)
    assert all("_apply" not in vars(module) for part in pipe.values() for module in part.modules())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes on exceptions")
def test_a_refused_allocation_explains_itself_where_no_context_is_left() -> None:
    model = toy()
    expected = run(twin(model))
    device = adversary()
    with layerstream.offload(model, vram_budget="min", device=device) as streamer, device.checking():
        run(model)
        budget = streamer.stats().peak_reserved_bytes + 2**13
    streamer = layerstream.offload(model, vram_budget=budget, device=device).start()
    large = torch.randn(400, 4)
    with contextlib.closing(streamer), device.checking(), torch.no_grad():
        assert_equal(run(model), expected)
        with pytest.raises(torch.OutOfMemoryError) as refused:
            model(large)
        assert any("It needs more than" in note for note in refused.value.__notes__)
        assert_equal(run(model), expected)
    assert device.buffer_bytes == 0


def test_two_streamers_on_one_device_share_the_smallest_budget_and_end_in_any_order() -> None:
    first, second = toy(), toy(1)
    expected = run(twin(first)), run(twin(second))
    device = adversary(memory_bytes=2**30)
    one = layerstream.offload(first, vram_budget=2**20, device=device).start()
    two = layerstream.offload(second, vram_budget=2**21, device=device).start()
    with device.checking():
        assert_equal(run(second), expected[1])
        one.close()
        assert device.free_bytes() <= 2**21
        assert_equal(run(second), expected[1])
        one.start()
        two.close()
        assert_equal(run(first), expected[0])
        assert device.free_bytes() <= 2**20
        one.close()
    assert device.free_bytes() > 2**29


def test_a_kept_view_of_a_slot_that_nobody_has_room_for_is_said() -> None:
    """The slot's memory is its keeper's, and a new slot does not fit."""
    model = toy()
    device = adversary()
    with layerstream.offload(model, vram_budget="min", device=device) as streamer, device.checking():
        run(model)
        budget = streamer.stats().peak_reserved_bytes + 2**10
    before = describe(model)
    kept: list[torch.Tensor] = []
    with (
        pytest.raises(layerstream.BudgetError, match="was refused"),
        layerstream.offload(model, vram_budget=budget, device=device),
        device.checking(),
        torch.no_grad(),
    ):
        hooks = [b.register_forward_hook(lambda m, a, o: kept.append(m.scale.detach())) for b in model.blocks]
        try:
            run(model)
        finally:
            for hook in hooks:
                hook.remove()
    assert_restored(model, before)
    truth = [block.scale for block in model.blocks]
    assert all(torch.equal(view, scale) for view, scale in zip(kept, truth, strict=False))


# ---- an encoder that runs twice in a call, on the simulated clock


class Blocks(nn.Module):
    """`count` blocks of so many bytes and milliseconds, and a base."""

    def __init__(self, device: SimulatedDevice, count: int, num_bytes: int, ms: float, base_bytes: int) -> None:
        super().__init__()
        self.base = SizedBlock(device, base_bytes, 0.0)
        self.blocks = nn.ModuleList(SizedBlock(device, num_bytes, ms) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.base(x)
        for block in self.blocks:
            x = block(x)
        return x


class Encoder(Blocks):
    pass


class Denoiser(Blocks):
    pass


class Vae(nn.Module):
    def __init__(self, device: SimulatedDevice, num_bytes: int, ms: float, activations: int) -> None:
        super().__init__()
        self.block, self.ms, self.activations = SizedBlock(device, num_bytes, ms), ms, activations

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        large = torch.zeros(self.activations // 4)
        return self.block(x) + large[:1]


class LikeSD35(dict[str, nn.Module]):
    """The sizes of SD3.5-medium (`docs/models.md`) a thousandth, and milliseconds that an H200 takes about: three
    encoders that run for the prompt and again for the negative one, 28 steps, a VAE."""

    def __init__(self, device: SimulatedDevice) -> None:
        ms, mb = 1e-3, 1024
        super().__init__(
            text_encoder=Encoder(device, 12, 14 * mb, 0.3 * ms, 80 * mb),
            text_encoder_2=Encoder(device, 32, 40 * mb, 0.5 * ms, 110 * mb),
            text_encoder_3=Encoder(device, 24, 386 * mb, 0.8 * ms, 263 * mb),
            transformer=Denoiser(device, 24, 185 * mb, 3.6 * ms, 60 * mb),
            vae=Vae(device, 168 * mb, 80 * ms, 3000 * mb),
        )

    @torch.no_grad()
    def run(self) -> None:
        x = torch.zeros(1)
        for name in ["text_encoder", "text_encoder_2", "text_encoder_3"] * 2 + ["transformer"] * 28:
            x = self[name](x)
        self["vae"].decode(x)


@pytest.fixture
def sd35(monkeypatch: pytest.MonkeyPatch) -> tuple[LikeSD35, SimulatedDevice]:
    """A pipeline of those sizes, and the device that it is to stream to."""
    for cls, is_repeated in ((Encoder, False), (Denoiser, True), (Vae, False)):
        adapter = layerstream.Adapter(stacks=["blocks"] if cls is not Vae else [], is_repeated=is_repeated)
        monkeypatch.setitem(registry._REGISTERED, cls, adapter)
    device = SimulatedDevice(copies="late", link_gb_per_s=55.0)
    return LikeSD35(device), device


@pytest.mark.parametrize(
    ("budget_gib", "most_times", "most_gib"), [(4, 1.12, 17), (6, 1.085, 15), (10, 1.026, 6), (12, 1.004, 3.5)]
)
def test_an_encoder_that_runs_twice_stays_as_far_as_the_denoiser_needs_no_room(
    budget_gib: int, most_times: float, most_gib: int, sd35: tuple[LikeSD35, SimulatedDevice]
) -> None:
    """Text encoders' loads are hidden by nothing. They keep what they can between the two runs, and of that until the
    next call what the denoiser leaves; during the VAE, which streams nothing, as much comes back as its activations let
    stay. From the third call on; the bounds are those of the whole call, beside a device that holds everything.

    The denoiser's blocks make way for theirs: it computes for as long as its weights take to cross the bus."""
    pipe, device = sd35

    def call_ms() -> float:
        device.synchronize()
        started = device.time_ms
        pipe.run()
        device.synchronize()
        return device.time_ms - started

    resident = call_ms()
    with layerstream.offload(pipe, vram_budget=budget_gib * 2**20, device=device) as streamer, device.checking():
        for _ in range(3):
            call_ms()
        encoder, denoiser = (streamer._last.phase_stats[name] for name in ("text_encoder_3", "transformer"))
        before = encoder.loaded_bytes
        took = call_ms()
        assert took <= most_times * resident
        assert encoder.loaded_bytes - before <= most_gib * 2**20  # of twice 9.3; others come before
        assert denoiser.num_stalls < denoiser.num_loads / 4


def test_memory_that_is_refused_to_what_is_not_needed_yet(
    sd35: tuple[LikeSD35, SimulatedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots for what a later phase needs are laid out then; nobody hears of it, and as much is loaded."""
    pipe, device = sd35
    refused: list[object] = []
    may_allocate = Residency.may_allocate

    def refuse(self: Residency, allocate: Any, *args: Any) -> bool:
        def out_of_memory(*_: Any) -> None:
            refused.append(allocate)
            raise torch.OutOfMemoryError("refused")

        return may_allocate(self, out_of_memory, *args)

    with layerstream.offload(pipe, vram_budget=10 * 2**20, device=device) as streamer, device.checking():
        for _ in range(4):
            pipe.run()
        ahead = streamer._last.phase_stats["vae"].loaded_bytes
        assert ahead > 0
        monkeypatch.setattr(Residency, "may_allocate", refuse)
        for _ in range(2):
            pipe.run()
        assert refused
        assert streamer._last.phase_stats["vae"].loaded_bytes == ahead, "nothing of a later phase was loaded"
        monkeypatch.setattr(Residency, "may_allocate", may_allocate)
        pipe.run()
        assert streamer._last.phase_stats["vae"].loaded_bytes > ahead
