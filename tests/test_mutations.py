"""Engines broken on purpose. Each must be caught, or the adversarial device proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream import absent, binding, host_store, intercept, streamer, transfer
from layerstream.simulated import SimulatedDevice
from tests.fakes import adversary, assert_equal, assert_restored, describe, run, toy, twin


class CaughtError(AssertionError):
    """The checks below found the fault."""


def check(copies: str = "late", *, is_checked: bool = True, writes_buffer: bool = False) -> None:
    """What the whole test suite does to an engine, in small: equality, races, hooks, values, memory."""
    model = toy(writes_buffer=writes_buffer)
    model.order = [0, 1, 2, 3, 4, 5, 2]  # odd, so that units change slots from pass to pass
    seen: list[float] = []
    handle = model.blocks[2].register_forward_hook(lambda m, a, o: seen.append(float(m.scale.detach().sum())))
    truth = float(model.blocks[2].scale.detach().sum())
    twin_model = twin(model)
    expected = run(twin_model)
    seen.clear()
    before = describe(model)
    device = adversary(copies=copies)
    try:
        with layerstream.offload(model, vram_budget="min", device=device), checked(device, is_checked):
            assert_equal(run(model), expected)
            kept = model.blocks[1].scale.detach()
            run(model)
            assert torch.equal(kept, twin_model.blocks[1].scale) or writes_buffer
        assert seen == [truth] * len(seen)
        assert_restored(model, before, changed=["count"])
        if writes_buffer:
            run(twin_model)
            assert [float(b.count) for b in model.blocks] == [float(b.count) for b in twin_model.blocks]
        assert device.buffer_bytes == 0
        assert not device.registered
        model.blocks[0](torch.ones(2, 16))
    except Exception as exc:  # whatever it is: the engine itself passes
        raise CaughtError(repr(exc)) from exc
    finally:
        handle.remove()


@contextmanager
def checked(device: SimulatedDevice, is_checked: bool) -> Iterator[None]:
    if is_checked:
        with device.checking():
            yield
    else:
        yield


@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
@pytest.mark.parametrize("writes_buffer", [False, True])
def test_the_engine_itself_passes(copies: str, writes_buffer: bool) -> None:
    check(copies, writes_buffer=writes_buffer)


Mutation = Callable[[pytest.MonkeyPatch], None]


def missing_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transfer.TransferEngine, "wait", lambda self, unit: self.slot_of(unit).views[unit])


def no_release_event(patch: pytest.MonkeyPatch) -> None:
    def vacate(self: Any, unit: int) -> None:
        slot = self.slot_of(unit)
        slot.unit, slot.after = None, []
        if slot.is_extra:
            self.slots.remove(slot)
            self._free(slot.buffer)

    patch.setattr(transfer.TransferEngine, "vacate", vacate)


def release_too_early(patch: pytest.MonkeyPatch) -> None:
    """The event is recorded when the block starts, not when its slot is taken."""
    wait, vacate = transfer.TransferEngine.wait, transfer.TransferEngine.vacate

    def early(self: Any, unit: int) -> Any:
        views = wait(self, unit)
        self.slot_of(unit).early = self._device.record(self._device.compute_stream())
        return views

    def late(self: Any, unit: int) -> None:
        slot = self.slot_of(unit)
        vacate(self, unit)
        slot.after = [slot.early] if hasattr(slot, "early") else slot.after

    patch.setattr(transfer.TransferEngine, "wait", early)
    patch.setattr(transfer.TransferEngine, "vacate", late)


def slot_reused_early(patch: pytest.MonkeyPatch) -> None:
    """A slot is loaded with another unit while its own is bound and about to run."""
    original = streamer.Streamer._use

    def use(self: Any, units: Any, **kwargs: Any) -> None:
        original(self, units, **kwargs)
        slot = self._transfer.slot_of(units[-1])
        others = [u for u in self._order.predict(6) if self._transfer.slot_of(u) is None]
        if others:
            self._transfer.vacate(units[-1])
            self._transfer.load(others[0], slot)

    patch.setattr(streamer.Streamer, "_use", use)


def evicted_without_absent(patch: pytest.MonkeyPatch) -> None:
    """Parameters still point at a slot that is being loaded with another block, and nobody notices the alias."""
    patch.setattr(transfer.Slot, "is_aliased", lambda self: False)
    absent_at_first = binding.UnitBinding.absent

    def absent(self: Any) -> None:
        if not self._addresses:  # when entering, as it should be
            absent_at_first(self)

    patch.setattr(binding.UnitBinding, "absent", absent)


def lost_buffer_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(binding.UnitBinding, "written", lambda self: [])


def hook_left_behind(patch: pytest.MonkeyPatch) -> None:
    def remove(self: Any) -> None:
        for undo in [*self._undo[1:], *self._compile_undo]:
            undo()
        self._undo = []

    patch.setattr(intercept.Interception, "remove", remove)


def guard_left_behind(patch: pytest.MonkeyPatch) -> None:
    def guard(self: Any, component: nn.Module, *args: Any, **kwargs: Any) -> None:
        component.__dict__["_apply"] = None

    patch.setattr(intercept.Interception, "guard_moves", guard)


def wrong_class_order(patch: pytest.MonkeyPatch) -> None:
    """Data before class: the setter goes through the absent class."""

    def make_present(tensors: Iterable[torch.Tensor], data: Iterable[torch.Tensor]) -> None:
        for tensor, view in zip(tensors, data, strict=True):
            is_absent = absent.is_absent(tensor)
            tensor.data = view
            if is_absent:
                tensor.__class__ = nn.Parameter if isinstance(tensor, nn.Parameter) else torch.Tensor

    patch.setattr(binding, "make_present", make_present)


def class_left_absent(patch: pytest.MonkeyPatch) -> None:
    def make_present(tensors: Iterable[torch.Tensor], data: Iterable[torch.Tensor]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for tensor, view in zip(tensors, data, strict=True):
                tensor.data = view

    patch.setattr(binding, "make_present", make_present)


def views_of_another_layout(patch: pytest.MonkeyPatch) -> None:
    original = host_store.StoredUnit.views

    def views(self: Any, bound: Any, buffer: torch.Tensor) -> list[torch.Tensor]:
        found = original(self, bound, buffer)
        number = next(i for i, b in enumerate(bound.tensors) if b.shape == (16,) and b.name.endswith("scale"))
        other = next(i for i, b in enumerate(bound.tensors) if b.shape == (16,) and b.name.endswith("norm.bias"))
        found[number], found[other] = found[other], found[number]
        return found

    patch.setattr(host_store.StoredUnit, "views", views)


def page_locks_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(host_store, "_release_locks", lambda *args: None)


def device_memory_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transfer.TransferEngine, "close", lambda self: None)


@pytest.mark.parametrize(
    "mutate",
    [
        missing_wait,
        no_release_event,
        release_too_early,
        slot_reused_early,
        evicted_without_absent,
        hook_left_behind,
        guard_left_behind,
        wrong_class_order,
        class_left_absent,
        views_of_another_layout,
        page_locks_left,
        device_memory_left,
    ],
)
def test_caught(mutate: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        mutate(patch)
        with pytest.raises(CaughtError):
            check()


@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
def test_a_lost_buffer_write_is_caught(copies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost_buffer_write(monkeypatch)
    with pytest.raises(CaughtError):
        check(copies, writes_buffer=True)


def test_ignored_aliases_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    truth = model.blocks[1].scale.detach().clone()
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(transfer.Slot, "is_aliased", lambda self: False)
        kept: list[torch.Tensor] = []
        handle = model.blocks[1].register_forward_hook(lambda m, a, o: kept.append(m.scale.detach()))
        with layerstream.offload(model, vram_budget="min", device=adversary()):
            run(model)
            assert not torch.equal(kept[0], truth)
        handle.remove()


def test_without_waits_the_values_alone_give_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a slot whose copy has not run: caught without the race detector too."""
    missing_wait(monkeypatch)
    with pytest.raises(CaughtError):
        check("late", is_checked=False)


def test_a_copy_in_flight_at_close_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    device = adversary()
    model = toy()
    with (
        pytest.warns(layerstream.LayerstreamWarning, match="memory given back with copy .* on its way|in flight"),
        layerstream.offload(model, vram_budget="min", device=device),
    ):
        run(model)
        monkeypatch.setattr(SimulatedDevice, "synchronize", lambda self: None)
