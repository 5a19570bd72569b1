"""The states of a unit, and the steps between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import layerstream
from layerstream.errors import TransferError
from layerstream.transfer.unit import StreamedUnit, UnitState
from tests.fakes import adversary, run, toy


@pytest.fixture
def engine() -> Iterator[Any]:
    with layerstream.offload(toy(), vram_budget="min", device=adversary()) as streamer:
        run(streamer._pipe)
        yield streamer._streamer


def unit_in(engine: Any, state: UnitState) -> StreamedUnit:
    """A block of the engine's in this state."""
    unit: StreamedUnit = next(u for u in engine._units.values() if u.spec.is_block and u.state is UnitState.LOADED)
    if state is UnitState.PRESENT:
        unit.bind(engine._transfer.wait(unit))
    elif state is UnitState.ABSENT:
        engine._transfer.vacate(unit)
    return unit


def test_the_way_up_and_down(engine: Any) -> None:
    unit = unit_in(engine, UnitState.ABSENT)
    slot = engine._transfer.empty_slot(unit)
    assert (unit.state, unit.slot, slot.unit) == (UnitState.ABSENT, None, None)
    engine._transfer.load(unit, slot)
    assert (unit.state, unit.slot, slot.unit) == (UnitState.LOADED, slot, unit)
    assert not unit.is_present
    unit.bind(engine._transfer.wait(unit))
    assert unit.state is UnitState.PRESENT
    assert all(torch.isfinite(b.tensor.double()).all() for b in unit.binding.tensors)
    unit.may_be_saved = unit.is_lent = unit.is_cloned = True
    unit.unbind()
    assert (unit.state, unit.is_cloned) == (UnitState.LOADED, False)
    engine._transfer.vacate(unit)
    assert (unit.state, slot.unit, unit.may_be_saved, unit.is_lent) == (UnitState.ABSENT, None, False, False)


STEPS: dict[str, tuple[Callable[[Any, StreamedUnit], Any], UnitState]] = {
    "load": (lambda engine, unit: engine._transfer.load(unit, engine._transfer.ring[0]), UnitState.ABSENT),
    "bind": (lambda engine, unit: unit.bind([]), UnitState.LOADED),
    "unbind": (lambda engine, unit: unit.unbind(), UnitState.PRESENT),
    "vacate": (lambda engine, unit: engine._transfer.vacate(unit), UnitState.LOADED),
}


@pytest.mark.parametrize("state", UnitState)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_refuses_other_states(engine: Any, step: str, state: UnitState) -> None:
    take, allowed = STEPS[step]
    if state is allowed:
        return
    unit = unit_in(engine, state)
    with pytest.raises(TransferError, match=rf"`{unit.spec.name}` is {state.name}, where it should be"):
        take(engine, unit)
    assert unit.state is state


def test_a_slot_refuses_a_second_unit(engine: Any) -> None:
    unit = unit_in(engine, UnitState.ABSENT)
    taken = next(slot for slot in engine._transfer.ring if slot.unit is not None)
    with pytest.raises(TransferError, match=f"loaded into a slot that holds `{taken.unit.spec.name}`"):
        engine._transfer.load(unit, taken)


def test_it_prints_its_name_and_state(engine: Any) -> None:
    unit = unit_in(engine, UnitState.ABSENT)
    assert repr(unit) == f"StreamedUnit({unit.spec.name!r}, ABSENT)"
