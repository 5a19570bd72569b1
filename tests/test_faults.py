"""Every device operation may fail, at any moment; the pipeline is whole afterwards."""

from __future__ import annotations

import contextlib
import itertools
import warnings

import pytest
import torch
from torch import nn

import layerstream
from layerstream.host.memory import PageMapping
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, twin


class DeviceLostError(RuntimeError):
    pass


@pytest.mark.parametrize("error", [DeviceLostError("lost"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failing_enter_restores_everything(error: BaseException) -> None:
    model = toy(num_blocks=4)
    before, expected = describe(model), run(twin(model))
    for operation in itertools.count():
        device = adversary()
        device.fail_at(operation, error)
        streamer = layerstream.offload(model, vram_budget="min", device=device)
        try:
            streamer.start()
        except type(error) as exc:
            assert exc is error
        else:
            device.fail_at(10**9, error)  # entering takes fewer operations than that
            break
        assert not streamer.is_active
        assert_restored(model, before)
        assert device.buffer_bytes == 0, operation
        assert not device.registered, operation
    streamer.close()
    assert operation >= 1  # page locks, of which neighbours are one; weights are loaded when they are used
    assert_equal(run(model), expected)


@pytest.mark.parametrize("error", [DeviceLostError("lost"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_in_a_call_restores_everything(error: BaseException) -> None:
    for operation in range(60):
        device = adversary()
        model = toy(num_blocks=4)
        before, expected = describe(model), run(twin(model), 1)
        with (
            pytest.raises(type(error)),
            layerstream.offload(model, vram_budget="min", device=device),
        ):
            device.fail_at(operation, error)
            for _ in range(8):
                assert_equal(run(model, 1), expected)
        assert_restored(model, before)
        assert device.buffer_bytes == 0, operation
        assert not device.registered, operation
        assert_equal(run(model, 1), expected)


class Parts(nn.Module):
    """A block whose weights are loaded in several copies, since each has its pages to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(PageMapping(2**20).cut(0, 2**20).view(torch.float32).normal_() for _ in range(3))
        self.small = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.stack([part[:100].sum() for part in self.parts]).sum() + self.small.sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Parts() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("error", [DeviceLostError("lost"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_interrupt_between_two_copies_of_a_load(error: BaseException) -> None:
    """Some of the copies are on their way to a slot that nobody holds; its memory is given back behind them."""
    torch.manual_seed(0)
    model = Net()
    x = torch.ones(3)
    with torch.no_grad():
        expected = model(x)
    num_between = 0
    for operation in range(60):
        device = adversary()
        with (
            # Slots come and go: in the first passes everything streams, then all of it stays.
            layerstream.offload(model, vram_budget=10**8, device=device),
            device.checking(),
            torch.no_grad(),
        ):
            device.fail_at(operation, error)
            with contextlib.suppress(type(error)):
                for _ in range(3):
                    model(x)
            num_between += device.operations[-1] == "piece"
            device.fail_at(10**9, error)
            for _ in range(3):
                assert torch.equal(model(x), expected)
        assert device.buffer_bytes == 0
    assert num_between > 3


def test_the_context_is_still_good_after_a_failed_call() -> None:
    for operation in range(0, 40):
        device = adversary(copies="random", seed=operation)
        model = toy(num_blocks=4)
        expected = run(twin(model))
        with layerstream.offload(model, vram_budget="min", device=device), device.checking():
            run(model, 1)
            device.fail_at(operation, DeviceLostError("lost"))
            with pytest.raises(DeviceLostError):
                run(model, 8)
            assert_equal(run(model), expected)


def test_a_dead_device_gives_the_weights_back() -> None:
    """After the device has failed for good, leaving says what it could not do and restores all the same."""
    model = toy(num_blocks=4)
    before, expected = describe(model), run(twin(model))
    device = adversary()
    streamer = layerstream.offload(model, vram_budget="min", device=device).start()
    run(model)

    def dead(*args: object, **kwargs: object) -> None:
        raise DeviceLostError("device-side assert")

    for name in ("synchronize", "copy_back", "unregister", "free", "empty_cache", "record", "wait", "copy"):
        setattr(device, name, dead)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        streamer.close()
    assert any("could not wait for the device" in str(w.message) for w in said)
    assert_restored(model, before)
    assert_equal(run(model), expected)


def test_the_users_error_is_not_masked_by_leaving() -> None:
    model = toy(num_blocks=4)
    device = adversary()
    with (
        pytest.warns(layerstream.LayerstreamWarning, match="could not"),
        pytest.raises(ValueError, match="mine"),
        layerstream.offload(model, vram_budget="min", device=device),
    ):
        run(model)
        device.free = None  # type: ignore[assignment]
        raise ValueError("mine")


@pytest.mark.parametrize("operation", range(0, 30, 3))
def test_a_full_device(operation: int) -> None:
    model = toy(num_blocks=4)
    before = describe(model)
    device = adversary()
    with (
        pytest.raises((torch.OutOfMemoryError, layerstream.BudgetError)),
        layerstream.offload(model, vram_budget="min", device=device),
    ):
        device.fail_at(operation, torch.OutOfMemoryError("simulated device full"))
        run(model, 20)
    assert_restored(model, before)
    assert device.buffer_bytes == 0


def test_a_device_too_small_for_the_plan() -> None:
    model = toy(num_blocks=4)
    before = describe(model)
    device = adversary(memory_bytes=10_000)
    with pytest.raises((torch.OutOfMemoryError, layerstream.BudgetError)):
        layerstream.offload(model, vram_budget="min", device=device).start()
    assert_restored(model, before)
    assert device.buffer_bytes == 0


@pytest.mark.parametrize("operation", range(6))
def test_an_interrupt_while_leaving_is_raised_after_all_is_given_back(operation: int) -> None:
    model = toy(num_blocks=4)
    before, expected = describe(model), run(twin(model))
    device = adversary()
    streamer = layerstream.offload(model, vram_budget="min", device=device).start()
    run(model)
    device.fail_at(operation, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        streamer.close()
    assert_restored(model, before)
    assert_equal(run(model), expected)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not streamer.is_active
    assert device.buffer_bytes == 0
    assert not device.registered


def test_warnings_as_errors_do_not_stop_the_leaving() -> None:
    model = toy(num_blocks=4)
    before, expected = describe(model), run(twin(model))
    device = adversary()
    streamer = layerstream.offload(model, vram_budget="min", device=device).start()
    run(model)
    device.fail_at(0, DeviceLostError("lost"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(layerstream.LayerstreamWarning, match="could not wait for the device"):
            streamer.close()
    assert_restored(model, before)
    assert_equal(run(model), expected)
    assert device.buffer_bytes == 0
    assert not streamer.is_active
