"""Replays passes: one that runs as an earlier one did is not worked out again.

While a pass is worked out (`residency.py`), what it does with units is written down as a schedule. When another begins
with the same units in the ring and the same ones expected, the schedule is followed: at each block a few comparisons,
then the same verbs on the same objects. Whatever is out of the ordinary (another block, another stream or thread, an
edit, somebody who looks at a slot, a new plan) ends the replay at that block, and the pass goes on being worked out
where it is.

Guards, once a pass: the main lane alone, no gradients, nothing timed or profiled. Once a block: the block's identity,
that the component's call is still on the stack (an interrupt skips hooks), the session's epoch, thread, stream and
grad mode. Once a unit that is let go of: its flags, and its tensors' versions and addresses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import nn

from layerstream.device.base import Device, Stream, engine_tensors
from layerstream.engine.lane import Lane, Lanes
from layerstream.engine.residency import LOOK_AHEAD, Residency
from layerstream.engine.session import Session
from layerstream.planning.schedule import Schedule, ScheduleRecorder
from layerstream.transfer.profiling import Ranges
from layerstream.transfer.timing import PassTimer
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import StreamedUnit, kept_out_of_slots

_MOST_SCHEDULES = 64  # of one epoch; a pass of a language model has some ten kilobytes of it
_MOST_USES = 1 << 14  # of one pass; longer ones are worked out each time

# Component, entry, units in the ring, and units that are expected.
_Key = tuple[str, str, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _BoundStep:
    """A step with the objects that it names.

    Attributes:
        block: whose forward begins.
        exchanges: units let go of (None: a slot is empty), each with the unit loaded then.
        has_casts: autocast may keep casts of its weights.
        next: the step after it; None: it is the last.
    """

    block: nn.Module
    units: tuple[StreamedUnit, ...]
    exchanges: tuple[tuple[StreamedUnit | None, StreamedUnit], ...]
    has_casts: bool
    next: _BoundStep | None


@dataclass(frozen=True, eq=False)
class _Bound:
    """A schedule with its objects."""

    schedule: Schedule
    steps: Sequence[_BoundStep]


class Replay:
    """Follows schedules, and has them written down.

    Attributes:
        bound: the schedule that is followed; None: the pass is worked out.
        step: its next step; None: there is none.
    """

    def __init__(
        self,
        device: Device,
        transfer: TransferEngine,
        residency: Residency,
        lanes: Lanes,
        session: Session,
        timer: PassTimer,
        ranges: Ranges,
    ) -> None:
        self.bound: _Bound | None = None
        self.step: _BoundStep | None = None
        self._device = device
        self._transfer = transfer
        self._residency = residency
        self._lanes = lanes
        self._session = session
        self._timer = timer
        self._ranges = ranges
        self._known: dict[_Key, _Bound] = session.known()
        self._epoch = -1  # in which the pass began
        self._num_uses: dict[tuple[str, str], int] = {}  # of a pass, by component and entry
        self._at = 0  # steps done
        self._thread = self._stream_number = 0
        self._stream: Stream = None
        self._caller: FrameType | None = None
        self._key: _Key | None = None  # of the pass that is written down
        self._blocks: list[nn.Module] = []

    # ---- once a pass

    def begin(self, lane: Lane, component: str, entry: str, *, is_grad: bool) -> None:
        """A pass begins, after `stop`: follow the schedule that there is for it, or have one written down."""
        self._epoch = self._session.epoch
        is_alone = lane is self._lanes.main and not self._lanes.others_run(lane)
        if is_grad or not is_alone or self._timer.is_timing or self._ranges.is_on or self._transfer.extra:
            return
        ahead = LOOK_AHEAD + 4 * len(self._transfer.ring)
        expected = self._residency.order.predict(self._num_uses.get((component, entry), 0) + ahead)
        key = (component, entry, self._transfer.ring_units, tuple(expected))
        bound = self._known.get(key)
        if bound is not None:
            lane.run_here()
            self._caller = lane.caller
            self._thread, self._stream_number = get_ident(), self._device.stream_number()
            self._stream = self._device.compute_stream()
            self.bound, self._at, self.step = bound, 0, bound.steps[0]
            return
        self._key, self._blocks = key, []
        self._residency.recorder = ScheduleRecorder(expected, ahead)

    def end(self) -> None:
        """The pass ended."""
        recorder, key = self._residency.recorder, self._key
        schedule = None if recorder is None or self._epoch != self._session.epoch else recorder.schedule()
        self.stop()
        if recorder is None or key is None:
            return
        self._num_uses[key[:2]] = min(recorder.num_uses, _MOST_USES)
        if schedule is not None and len(schedule.steps) == len(self._blocks):
            if len(self._known) >= _MOST_SCHEDULES:
                self._known.clear()
            self._known[key] = self._bind(schedule)

    def deviate(self) -> None:
        """What happens now is in no schedule: the pass goes on being worked out. One that is written down goes on
        being that."""
        if self.bound is not None:
            self.stop()

    def stop(self) -> None:
        """Follow the schedule no further, nor write one down. What was used meanwhile has been used."""
        bound, done = self.bound, self._at
        self.step = self.bound = self._key = self._caller = None
        if self._residency.recorder is not None:
            self._residency.recorder.spoil()
            self._residency.recorder = None
        if bound is not None:
            self._residency.order.observe_expected([u for step in bound.schedule.steps[:done] for u in step.uses])

    def note(self, block: nn.Module, units: Sequence[StreamedUnit]) -> None:
        """A block's units were made present by working it out."""
        if self._residency.recorder is not None:
            self._residency.recorder.used([unit.index for unit in units])
            self._blocks.append(block)

    def _bind(self, schedule: Schedule) -> _Bound:
        units = self._residency.units
        steps: list[_BoundStep] = []  # from the last to the first
        for block, step in zip(reversed(self._blocks), reversed(schedule.steps), strict=True):
            used = tuple(units[index] for index in step.uses)
            exchanges = tuple(
                (None if each.let_go is None else units[each.let_go], units[each.load]) for each in step.exchanges
            )
            has_casts = any(unit.of_32_bits for unit in used)
            steps.append(_BoundStep(block, used, exchanges, has_casts, next=steps[-1] if steps else None))
        return _Bound(schedule, steps[::-1])

    # ---- once a block

    def enter(self, step: _BoundStep) -> bool:
        """The block of the next step begins, under the streamer's locks. Returns whether that was all there is to do;
        else it is to be worked out."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._caller:
            frame = frame.f_back
        if (
            frame is None
            or self._session.epoch != self._epoch
            or get_ident() != self._thread
            or self._device.stream_number() != self._stream_number
            or torch.is_grad_enabled()
        ):
            self.stop()
            return False
        if torch.is_inference_mode_enabled():
            with engine_tensors():
                is_done = self._do(step)
        else:
            is_done = self._do(step)
        if not is_done:
            self.stop()
            return False
        self._lanes.main.running.append((step.block, False))
        self._at += 1
        self.step = step.next
        return True

    def _do(self, step: _BoundStep) -> bool:
        transfer, stream = self._transfer, self._stream
        for let_go, unit in step.exchanges:
            if let_go is None:
                slot = transfer.empty_slot(unit)
            else:
                slot = let_go.slot
                if slot is None or not self._is_free(let_go):
                    return False
                if let_go.is_present:
                    let_go.unbind()
                if slot.readers and slot.is_aliased():
                    return False
                transfer.vacate(let_go, stream)
            if slot is None or unit.slot is not None:
                return False
            transfer.load(unit, slot)
        for unit in step.units:
            if unit.slot is None:
                return False
            views = transfer.wait(unit, stream)
            if not unit.is_present:
                unit.bind(views)
            elif unit.binding.is_guarded:
                return False
        return True

    def _is_free(self, unit: StreamedUnit) -> bool:
        """Whether a unit can be let go of without anything to write back, keep or refuse."""
        if unit.own_slot is not None or unit.is_lent or unit.may_be_saved or unit.is_quiet:
            return False
        for running, _ in self._lanes.main.running:
            if running in unit.called:
                return False
        if not unit.is_present:
            return True
        binding = unit.binding
        return not (unit.is_cloned or binding.is_guarded or binding.statistics or binding.is_changed())

    def leave(self, block: nn.Module, output: Any) -> tuple[bool, Any]:
        """A block ends that may have begun by `enter`. Returns whether that was all, and the output to use instead."""
        running, at = self._lanes.main.running, self._at - 1
        bound = self.bound
        if bound is None or not running or running[-1][0] is not block or get_ident() != self._thread:
            return False, None
        step = bound.steps[at]
        if step.block is not block or (step.has_casts and torch.is_autocast_enabled(self._device.torch_device.type)):
            return False, None
        running.pop()
        replaced = kept_out_of_slots(output, step.units)
        return True, None if replaced is output else replaced
