"""Every device operation may fail, at any moment; the pipeline is whole afterwards."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

import layerstream
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
