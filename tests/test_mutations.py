"""Engines broken on purpose. Each must be caught, or the adversarial device proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import layerstream
from layerstream.device.simulated import RaceError, SimulatedDevice
from layerstream.engine import listener, passes, residency
from layerstream.errors import TransferError
from layerstream.hooks import intercept
from layerstream.host import home, page_locks
from layerstream.host.memory import PAGE_BYTES
from layerstream.transfer import transfer
from layerstream.transfer.unit import Slot
from layerstream.weights import binding
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
        with layerstream.offload(model, vram_budget="min", device=device) as streaming, checked(device, is_checked):
            assert_equal(run(model), expected)
            kept = model.blocks[1].scale.detach()
            run(model)
            assert torch.equal(kept, twin_model.blocks[1].scale) or writes_buffer
            assert streaming._streamer.gate.running is None, "a use goes on"
            if not writes_buffer:
                for each in (model, twin_model):
                    each.blocks[4].scale.data += 1
                assert torch.equal(run(model)[0], run(twin_model)[0]), "an edit is lost"
        assert seen == [truth] * len(seen)
        assert_restored(model, before, changed=["count", "blocks.4.scale"])
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
    patch.setattr(transfer.TransferEngine, "wait", lambda self, unit: unit.slot.views(unit))


def no_release_event(patch: pytest.MonkeyPatch) -> None:
    def vacate(self: Any, unit: Any) -> None:
        slot = unit.left()
        slot.after = []
        if slot.is_extra:
            self.drop_extra(slot)

    patch.setattr(transfer.TransferEngine, "vacate", vacate)


def release_too_early(patch: pytest.MonkeyPatch) -> None:
    """The event is recorded when the block starts, not when its slot is taken."""
    wait, vacate = transfer.TransferEngine.wait, transfer.TransferEngine.vacate

    def early(self: Any, unit: Any) -> Any:
        views = wait(self, unit)
        unit.slot.early = self._device.record(self._device.compute_stream())
        return views

    def late(self: Any, unit: Any) -> None:
        slot = unit.slot
        vacate(self, unit)
        slot.after = [slot.early] if hasattr(slot, "early") else slot.after

    patch.setattr(transfer.TransferEngine, "wait", early)
    patch.setattr(transfer.TransferEngine, "vacate", late)


def slot_reused_early(patch: pytest.MonkeyPatch) -> None:
    """A slot is loaded with another unit while its own is bound and about to run."""
    original = residency.Residency.use

    def use(self: Any, units: Any, **kwargs: Any) -> None:
        original(self, units, **kwargs)
        transfer = self._transfer
        slot = units[-1].slot if len(units) == 1 else None
        others = [unit for unit in self.ahead(6) if unit.slot is None and unit.own_slot is None]
        if slot in transfer.ring and others:
            units[-1].is_present = False  # or it would be refused
            transfer.vacate(units[-1])
            transfer.load(others[0], slot)

    patch.setattr(residency.Residency, "use", use)


def evicted_without_absent(patch: pytest.MonkeyPatch) -> None:
    """Parameters still point at a slot that is being loaded with another block, and nobody notices the alias."""
    patch.setattr(Slot, "is_aliased", lambda self, num_bound=0: False)
    absent_at_first = binding.UnitBinding.absent

    def absent(self: Any) -> None:
        if self._addresses:
            self.is_present = False
        else:  # when entering, as it should be
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
    original = intercept.Interception.guard_moves

    def guard(self: Any, listener: Any, root: nn.Module, *args: Any, **kwargs: Any) -> None:
        before = len(self._undo)
        original(self, listener, root, *args, **kwargs)
        del self._undo[before]

    patch.setattr(intercept.Interception, "guard_moves", guard)


def wrong_class_order(patch: pytest.MonkeyPatch) -> None:
    """Data before class: the setter goes through the absent class."""

    def make_present(tensors: Iterable[torch.Tensor], data: Iterable[torch.Tensor], classes: Iterable[Any]) -> None:
        for tensor, view, cls in zip(tensors, data, classes, strict=True):
            tensor.data = view
            tensor.__class__ = cls

    patch.setattr(binding, "make_present", make_present)


def class_left_absent(patch: pytest.MonkeyPatch) -> None:
    def make_present(tensors: Iterable[torch.Tensor], data: Iterable[torch.Tensor], classes: Iterable[Any]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for tensor, view in zip(tensors, data, strict=True):
                tensor.data = view

    patch.setattr(binding, "make_present", make_present)


def views_of_another_layout(patch: pytest.MonkeyPatch) -> None:
    original = home.RawHome.views

    def views(self: Any, bound: Any, buffer: torch.Tensor) -> list[torch.Tensor]:
        found = original(self, bound, buffer)
        places = {".".join(b.name.split(".")[-2:]): i for i, b in enumerate(bound.tensors) if b.shape == (16,)}
        if "norm.bias" in places:  # a block, no base
            number, other = places["norm.weight"], places["norm.bias"]
            found[number], found[other] = found[other], found[number]
        return found

    patch.setattr(home.RawHome, "views", views)


def page_locks_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(page_locks.PageLocks, "release_all", lambda *args: None)


def device_memory_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transfer.TransferEngine, "close", lambda self: None)


def nobody_is_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(residency.Residency, "guard", lambda self: None)
    patch.setattr(residency.Residency, "notice_interrupt", lambda self: None)


def what_is_lent_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    def forget(self: Any) -> None:
        for unit in self._edits.lent:
            unit.is_lent = False

    patch.setattr(passes.Passes, "_settle_edits", forget)


def a_use_without_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(listener.EngineListener, "_go_out", lambda self, lane: None)


def too_few_pages_locked(patch: pytest.MonkeyPatch) -> None:
    """A registration that ends inside a tensor."""
    register = SimulatedDevice.register
    patch.setattr(SimulatedDevice, "register", lambda self, start, size: register(self, start, size - PAGE_BYTES))


# What must catch each: the exception, and words of it. A torch that swallows what a hook raises warns with its text.
CAUGHT: dict[Mutation, tuple[type[BaseException] | tuple[type[BaseException], ...], str]] = {
    missing_wait: (RaceError, "slot read without waiting for its load"),
    no_release_event: ((RaceError, UserWarning), "copy into a slot does not wait for its reader"),
    release_too_early: ((RaceError, UserWarning), "copy into a slot does not wait for its reader"),
    slot_reused_early: (RaceError, "slot read without waiting for its load"),
    evicted_without_absent: (RaceError, "slot read without waiting for its load"),
    hook_left_behind: (AssertionError, " instance"),
    guard_left_behind: (AssertionError, " instance"),
    wrong_class_order: (RecursionError, "maximum recursion depth"),
    class_left_absent: (RecursionError, "maximum recursion depth"),
    views_of_another_layout: (AssertionError, "output 0 differs"),
    page_locks_left: (AssertionError, ".registered"),
    device_memory_left: (AssertionError, ".buffer_bytes"),
    what_is_lent_is_forgotten: (AssertionError, "an edit is lost"),
    a_use_without_end: (AssertionError, "a use goes on"),
    too_few_pages_locked: (TransferError, "invalid argument"),
}


@pytest.mark.parametrize("mutate", CAUGHT)
def test_caught(mutate: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, words = CAUGHT[mutate]
    with monkeypatch.context() as patch:
        mutate(patch)
        with pytest.raises(CaughtError) as caught:
            check()
    assert isinstance(caught.value.__cause__, kind)
    assert words in str(caught.value.__cause__)


@pytest.mark.parametrize("copies", ["at_once", "late", "random"])
def test_a_lost_buffer_write_is_caught(copies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost_buffer_write(monkeypatch)
    with pytest.raises(CaughtError) as caught:
        check(copies, writes_buffer=True)
    assert isinstance(caught.value.__cause__, AssertionError)
    assert "output 0 differs" in str(caught.value.__cause__)


def test_an_edit_of_a_resident_that_nobody_notices_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_kept() -> bool:
        model = toy()
        before = model.blocks[4].scale.detach().clone()
        with layerstream.offload(model, vram_budget=10**8, device=adversary()):
            for _ in range(3):
                run(model)
            model.blocks[4].scale.data += 1
            run(model)
        return torch.equal(model.blocks[4].scale, before + 1)

    assert is_kept()
    nobody_is_noticed(monkeypatch)
    assert not is_kept()


def test_ignored_aliases_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    truth = model.blocks[1].scale.detach().clone()
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Slot, "is_aliased", lambda self, num_bound=0: False)
        kept: list[torch.Tensor] = []
        handle = model.blocks[1].register_forward_hook(lambda m, a, o: kept.append(m.scale.detach()))
        with layerstream.offload(model, vram_budget="min", device=adversary()):
            run(model)
            assert not torch.equal(kept[0], truth)
        handle.remove()


def test_without_waits_the_values_alone_give_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a slot whose copy has not run: caught without the race detector too."""
    missing_wait(monkeypatch)
    with pytest.raises(CaughtError) as caught:
        check("late", is_checked=False)
    assert isinstance(caught.value.__cause__, AssertionError)
    assert "output 0 differs" in str(caught.value.__cause__)


def test_a_copy_in_flight_at_close_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    device = adversary()
    model = toy()
    with (
        pytest.warns(layerstream.LayerstreamWarning, match="memory given back with copy .* on its way|in flight"),
        layerstream.offload(model, vram_budget="min", device=device),
    ):
        run(model)
        monkeypatch.setattr(SimulatedDevice, "synchronize", lambda self: None)
