"""Passes begin and end: which phase runs, what was edited before it, what it took, and how long.

`begin` is where phases change: a component is entered, what it takes beside the weights is looked up or measured, and
the plan for that is applied: units that give up their room are evicted, slots are laid out, its base is loaded. A call
that enters as one before it did, with nothing changed in between, finds all of that done.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from layerstream.calls import require_grad, shapes_of
from layerstream.device.base import Device, engine_tensors
from layerstream.engine.attachments import Attachments
from layerstream.engine.edits import Edits
from layerstream.engine.gate import Gate, Ticket
from layerstream.engine.homes import Homes
from layerstream.engine.lane import Lane, Lanes
from layerstream.engine.ledger import Ledger
from layerstream.engine.phase_changes import PhaseChanges
from layerstream.engine.replay import Replay
from layerstream.engine.residency import LOOK_AHEAD_AT_END, Residency
from layerstream.engine.session import Session
from layerstream.engine.snapshots import Given, tensors_of
from layerstream.errors import BudgetError, StreamerStateError
from layerstream.planning.phase_plan import PhasePlan
from layerstream.planning.phases import BESIDE, READ, CallKind
from layerstream.report import predicted_line, slow_loop_line
from layerstream.transfer.profiling import Ranges
from layerstream.transfer.timeline import PASSES, Timeline
from layerstream.transfer.timing import PassTimer
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import StreamedUnit

_log = logging.getLogger("layerstream.streamer")


class Passes:
    """Begins and ends outermost calls of components.

    Attributes:
        last_use: the use of the pipeline in which a pass began last.

    Args:
        find_replaced: names a component that is another module than it was.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        transfer: TransferEngine,
        residency: Residency,
        phase_changes: PhaseChanges,
        edits: Edits,
        ledger: Ledger,
        lanes: Lanes,
        session: Session,
        gate: Gate,
        timer: PassTimer,
        homes: Homes,
        replay: Replay,
        ranges: Ranges,
        find_replaced: Callable[[], str | None],
    ) -> None:
        self.last_use: Ticket | None = None
        self._device = device
        self._attached = attached
        self._units = attached.units
        self._transfer = transfer
        self._residency = residency
        self._phase_changes = phase_changes
        self._edits = edits
        self._ledger = ledger
        self._lanes = lanes
        self._session = session
        self._gate = gate
        self._timer = timer
        self._homes = homes
        self._replay = replay
        self._ranges = ranges
        self._find_replaced = find_replaced
        self._begun: dict[tuple[object, ...], CallKind] = session.known()  # how calls entered that changed nothing
        self._told: set[str] = set()  # phases whose predicted time is in the log
        self._num_tokens: dict[str, int] = {}  # by phase, in the last use
        self._num_tokens_before: dict[str, int] = {}  # when it ended, in all

    def begin(
        self,
        lane: Lane,
        component: str,
        entry: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_grad: bool,
        *,
        reads: Collection[StreamedUnit] | None = None,
        is_block: bool = False,
        part: str = "",
        second: Given | None = None,
    ) -> None:
        """A component is entered from outside: make its phase the current one, and its base present.

        Args:
            entry: the method by which it is entered; "": its forward.
            reads: the units that it may use; None: all of the component's.
            is_block: it is entered by a block, of which `entry` is the stack.
            part: the method that reads weights, and was not known before; the entry is READ.
            second: what a second pass is given that is to run beside this one.
        """
        lane.handled = sys.exc_info()[1]
        self._replay.stop()  # of a pass that was interrupted: nobody has told of its end
        self._ranges.ask()
        if self.timeline is not None:
            self.timeline.enter(PASSES, id(lane), f"{component}.{entry}" if entry else component)
            self._residency.listen_to(self._residency.quiet())
        used = self._attached.units_of_component(component)
        makes_graphs = is_grad and (
            require_grad(args, kwargs) or any(b.requires_grad for unit in used for b in unit.binding.tensors)
        )
        others_run = self._lanes.others_run(lane)
        if not others_run:
            self._residency.notice_interrupt()
        self._residency.unguard_for_call(used if reads is None else reads)
        self._residency.wait_on_this_stream()
        self._residency.listen_under_autocast()
        if others_run:
            # What runs beside another pass runs under its plan: nothing may be laid out anew while that one computes.
            self._residency.makes_graphs |= makes_graphs
            return
        self._residency.makes_graphs = makes_graphs
        if self._edits:
            self._settle_edits()
        self._note_use()
        if self._transfer.extra:  # what the plan has no room for
            with engine_tensors():
                self._residency.drop_extra_slots(held=[])
        shapes = ((part, ()),) if part else shapes_of(args, kwargs)
        if second is not None:
            shapes = (*shapes, (BESIDE, ()), *((t.dtype, t.shape) for t in tensors_of(second.leaves)))
        begun = (component, entry, shapes, is_grad)
        self._timer.end()
        if not self._is_as_before(begun):
            # When weights are read no block runs, and beside the main lane two passes do.
            self._begin_phase(begun, may_time=entry != READ and lane is self._lanes.main)
        if not is_block and entry != READ and second is None:
            self._replay.begin(lane, component, entry, is_grad=is_grad)

    def _begin_phase(self, begun: tuple[str, str, tuple[Any, ...], bool], *, may_time: bool) -> None:
        """A call enters that is not as one before it, or something has changed: look up what it takes, and apply the
        plan for that.

        Args:
            begun: component, entry, shapes of the arguments, and whether gradients are wanted.
            may_time: what blocks take may be measured.
        """
        replaced = self._find_replaced()
        if replaced is not None:
            raise StreamerStateError(
                f"`{replaced}` was replaced by another module while it is streamed; the new one would not be. Put the "
                "old one back, or replace it inside `with streamer.paused():` (or before entering)."
            )
        with engine_tensors():
            self._read_times()
            self._begun.pop(begun, None)  # until it has worked
            phase_plan = self._ledger.begin(*begun, self._transfer.weights_bytes)
            self._tell_prediction(phase_plan)
            self._transfer.phase = self._ledger.phase_stats
            self._phase_changes.apply(phase_plan)
            residents = [self._units[index] for index in sorted(phase_plan.resident)]
            bases = [unit for unit in residents if not unit.spec.is_block]
            self._residency.use(bases, is_touch=False, is_grad=begun[-1])
            self._ledger.start_interval(self._transfer.weights_bytes)
        self._begun[begun] = self._ledger.kind
        self._phase_changes.mark_staying(phase_plan)
        if self._ledger.wants_times and may_time:
            self._residency.listen_to(
                [unit for unit in self._residency.quiet() if self._session.is_laid_out_for(unit.spec)]
            )
            self._timer.begin(self._ledger.starts_timing())
        elif self._ledger.is_settled:
            self._phase_changes.quieten(phase_plan)

    def forget(self, component: str) -> None:
        """What the calls of a component took says nothing of what follows: copies that were made meanwhile are gone."""
        self._ledger.planner.tracker.forget(component)
        self._session.changed()

    def settle_before_reading(self, units: Sequence[StreamedUnit]) -> None:
        """Code between two calls reads weights: what was written elsewhere to these is there."""
        self._residency.notice_interrupt()
        if self._edits:
            with self._ledger.forgiving(), engine_tensors():
                self._residency.discard(self._edits.settle_of(units))

    def begin_by_touch(
        self, lane: Lane, units: Sequence[StreamedUnit], parts: Mapping[str, str], is_grad: bool
    ) -> None:
        """Code between two calls reads weights: of a VAE that is to decode next, say (`vae.latents_mean`). That begins
        its phase, because a VAE and a denoiser may not fit beside each other.

        Args:
            parts: of a component that is being called, the method that reads its own weights; it begins a phase also
                where these are there, kept beside another one. Who looks at what is there begins none.
        """
        missing = {unit.spec.component for unit in units if not unit.is_present}
        for component in dict.fromkeys(unit.spec.component for unit in units):
            applied = self._session.applied
            is_other = applied is None or component not in applied.phase.components
            if is_other and (component in missing or component in parts):
                self.begin(lane, component, READ, (), {}, is_grad, part=parts.get(component, ""))

    def end(self, lane: Lane) -> None:
        """An outermost call ended, perhaps by an exception."""
        if lane is self._lanes.main:
            self._replay.end()
        self._transfer.count_stalls()
        if self.timeline is not None:
            self.timeline.leave(PASSES, id(lane))
        error, handled = sys.exc_info()[1], lane.handled
        lane.handled = None
        if error is handled:  # the caller's: it calls us while it handles one
            error = None
        if isinstance(error, torch.OutOfMemoryError):
            add_note = getattr(error, "add_note", None)  # before Python 3.11 only leaving the `with` block says it
            if add_note is not None:
                add_note(f"layerstream: {self.explain(error)}")
            self._ledger.did_not_fit()
            self._session.forget_plan()
        elif error is None:
            self._ledger.check_operators()
        if not self._lanes.others_run(lane):
            if self._edits:
                with engine_tensors():
                    self._edits.pass_ended()
            self._homes.at_rest()
            self._residency.prefetch([], LOOK_AHEAD_AT_END)
            self._residency.guard()

    @property
    def timeline(self) -> Timeline | None:
        """What wants to know of passes and blocks; None: nobody does."""
        return self._ranges.timeline

    def drop_times(self) -> None:
        """Forget what is being timed."""
        for kind in self._timer.drop():
            kind.not_timed()

    def explain(self, error: BaseException, *, is_for_weights: bool = False) -> BudgetError:
        """What an out-of-memory error under the budget means, with numbers and what to do."""
        return self._ledger.explain(error, self._transfer.weights_bytes, is_for_weights=is_for_weights)

    # ---- inside

    def _note_use(self) -> None:
        """Perhaps another use of the pipeline than when a pass began last."""
        if self.last_use is self._gate.running:
            return
        self.last_use = self._gate.running
        if self._gate.is_inside_call:
            for name, counted in self._ledger.stats_of.items():
                self._num_tokens[name] = counted.num_tokens - self._num_tokens_before.get(name, 0)
                self._num_tokens_before[name] = counted.num_tokens
        self._ledger.begin_use(is_call=self._gate.is_inside_call)

    def _is_as_before(self, begun: tuple[object, ...]) -> bool:
        """Whether a call has entered so before, and all is as it was then."""
        known = self._begun.get(begun)
        if known is None or self._timer.is_ready or not self._ledger.again(known, self._transfer.weights_bytes):
            return False
        applied = self._session.applied
        if applied is not None:
            self._phase_changes.mark_staying(applied)  # the pass before has loaded its blocks
            self._phase_changes.quieten(applied)
        return True

    def _tell_prediction(self, phase_plan: PhasePlan) -> None:
        """Once a phase: how long its passes will take."""
        name = phase_plan.phase.name
        if phase_plan.prediction is not None and name not in self._told:
            self._told.add(name)
            line = predicted_line(self._ledger.plan)
            if line is not None:
                _log.info("%s", line)
            slow = slow_loop_line(self._ledger.plan, phase_plan.phase.components[0], self._num_tokens.get(name, 0))
            if slow is not None:
                _log.warning("%s", slow)

    def _settle_edits(self) -> None:
        """What code outside has edited since the last call takes effect now."""
        is_new_use = self._gate.running is not self.last_use
        with self._ledger.forgiving(), engine_tensors():
            self._residency.discard(self._edits.settle(is_new_use=is_new_use))
            self._edits.pass_begins()
            # Discarded only once all are at home: one's weight may have been pointed at another's memory.
            stale: list[StreamedUnit] = []
            for unit in self._edits.lent:
                self._residency.unguard([unit])
                if not unit.is_present:
                    unit.is_lent = False
                elif unit.is_cloned:
                    self._residency.evict(unit)
                elif self._residency.write_back(unit, may_replace=False):
                    stale.append(unit)
                elif not unit.holding().is_aliased(num_bound=len(unit.binding.tensors)):
                    unit.is_lent = False
            self._residency.discard(stale)

    def _read_times(self) -> None:
        """What timed passes took, as far as the device is through with them."""
        for kind, by_block in self._timer.take():
            times: dict[int, float] = {}
            for units, elapsed in by_block.items():
                sizes = [self._units[unit].spec.num_bytes for unit in units]
                for unit, size in zip(units, sizes, strict=True):  # only the sum of a block's pieces means anything
                    times[unit] = elapsed * size / (sum(sizes) or 1)
            self._ledger.timed(kind, times)
