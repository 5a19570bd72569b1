"""The engine between start and close: the one owner of what state each unit is in.

What is true of a unit is in `transfer/unit.py`. `residency.py` brings units to the device and takes them away,
`phase_changes.py` lays out the slots that a plan asks for, `listener.py` is told by hooks, `passes.py` begins and ends
what they tell of. Here is the rest: entering, leaving, pauses, and changes between calls.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from layerstream.device.base import Device, engine_tensors
from layerstream.engine.attaching import Attaching
from layerstream.engine.attachments import Attachments
from layerstream.engine.edits import Edits
from layerstream.engine.gate import Gate
from layerstream.engine.homes import Elsewhere, Homes
from layerstream.engine.lane import Lanes
from layerstream.engine.ledger import Ledger
from layerstream.engine.listener import EngineListener
from layerstream.engine.pairing import Pairing
from layerstream.engine.passes import Passes
from layerstream.engine.phase_changes import PhaseChanges
from layerstream.engine.replay import Replay
from layerstream.engine.residency import Residency
from layerstream.engine.session import Session
from layerstream.engine.standstill import standstill
from layerstream.errors import BudgetError, StreamerStateError, WeightsLostError
from layerstream.finalisers import Birthplace
from layerstream.hooks import compiled
from layerstream.interrupts import twice_if_interrupted
from layerstream.model.units import ComponentLayout, Division, divide
from layerstream.planning.plan import Plan
from layerstream.saying import warn
from layerstream.stats import PhaseStats, Stats
from layerstream.torch_private import without_subclasses
from layerstream.transfer.profiling import Ranges
from layerstream.transfer.timeline import Timeline
from layerstream.transfer.timing import PassTimer
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import StreamedUnit
from layerstream.weights.absent import keep_out_of_graphs

Describe = Callable[[], Sequence[ComponentLayout]]
_NOWHERE = Elsewhere()


class Streamer:
    """Streams the units of one pipeline within a budget, from `open` to `close`.

    Args:
        describe: gives the components as adapters describe them; asked again when streaming resumes after a pause.
        budget_bytes: of reserved device memory; None: as little as works, and no limit for the rest.
        call_timeout: seconds that a caller waits for another's call to end; None: as long as it takes.
        num_slots: fixes the number of slots of every phase; the plan chooses otherwise.
        find_replaced: names a component that is another module than it was.
        let_go: lets go of components that the pipeline has no longer; called between two calls.
        is_pairing: the two passes of a step of guidance may run side by side.
        packing: see `Packing`.
        elsewhere: other GPUs and ranks that take part.
    """

    def __init__(
        self,
        describe: Describe,
        device: Device,
        budget_bytes: int | None,
        *,
        call_timeout: float | None = None,
        num_slots: int | None = None,
        find_replaced: Callable[[], str | None] = lambda: None,
        let_go: Callable[[], None] = lambda: None,
        is_pairing: bool = False,
        packing: str = "off",
        elsewhere: Elsewhere = _NOWHERE,
    ) -> None:
        self.stats = Stats(budget_bytes=budget_bytes or 0)
        self.gate = Gate(call_timeout)
        self.owner: object = None
        self._is_opened = self.is_closed = False
        self._birthplace = Birthplace()
        self.is_paused = False
        self._describe = describe
        self._let_go = let_go
        self.device = device
        self._mutex = threading.RLock()
        self._attached = Attachments(
            device, self._reading, self._unit_home, self._mutex, self.gate.number, elsewhere.devices
        )
        self._units = self._attached.units
        self._ranges = Ranges()
        self._transfer = TransferEngine(device, self._units, self.stats, self._ranges, elsewhere.helpers)
        self.edits = Edits(device, self._units, self._attached.records, self.stats, self._transfer.wait)
        self._ledger = Ledger(device, self.stats, budget_bytes, num_slots)
        self._lanes = Lanes()
        self._session = Session()
        self._residency = Residency(
            device,
            self._attached,
            self._transfer,
            self.edits,
            self._ledger,
            self._lanes,
            self._session,
            self.stats,
        )
        self._attaching = Attaching(
            device,
            self._attached,
            self._transfer,
            self._residency,
            self.edits,
            self._ledger,
            self._session,
            self.stats,
        )
        self._phase_changes = PhaseChanges(
            device,
            self._attached,
            self._transfer,
            self._residency,
            self._ledger.planner,
            self._session,
            self._ranges,
            self._attaching.count_placements,
        )
        self._timer = PassTimer(device)
        self.homes = Homes(
            device,
            self._attached,
            self._transfer,
            self.edits,
            self._ledger,
            self._session,
            self.stats,
            self._mutex,
            packing,
            elsewhere,
        )
        self._replay = Replay(
            device, self._transfer, self._residency, self._lanes, self._session, self._timer, self._ranges
        )
        self._passes = Passes(
            device,
            self._attached,
            self._transfer,
            self._residency,
            self._phase_changes,
            self.edits,
            self._ledger,
            self._lanes,
            self._session,
            self.gate,
            self._timer,
            self.homes,
            self._replay,
            self._ranges,
            find_replaced,
        )
        self.pairing = Pairing(
            device,
            self._attached,
            self._lanes,
            self.gate,
            self.stats,
            is_on=is_pairing,
            find_no_gain=self._find_no_gain,
            is_edited=lambda: bool(self.edits),
            forgive=self._ledger.forgive,
        )
        self.listener = EngineListener(
            device,
            self._attached,
            self._residency,
            self._passes,
            self.edits,
            self._lanes,
            self._session,
            self.gate,
            self._timer,
            self._replay,
            self.pairing,
            self._mutex,
            self._catch_up,
            self._changing,
        )
        self._taken_in: set[str] = set()  # components whose weights at home have another form now
        self._changed_inside: set[str] = set()  # components of which a running call has cast something

    @property
    def plan(self) -> Plan:
        """The plan of the phase that runs, or ran last."""
        return self._ledger.plan

    @property
    def links(self) -> dict[str, float]:
        """Measured speeds in GB/s, from host memory ("") and from other GPUs, by name."""
        return self._ledger.planner.links

    @property
    def has_shown_progress(self) -> bool:
        """Whether a bar was shown."""
        return self._attaching.has_shown_progress

    @property
    def phase_stats(self) -> dict[str, PhaseStats]:
        """Counters by the name of the phase."""
        return self._ledger.stats_of

    @property
    def is_idle(self) -> bool:
        """Whether no component is in the middle of a call, as far as this thread can tell."""
        return self._lanes.are_idle()

    @property
    def is_paused_here(self) -> bool:
        """Whether it is paused, by this thread."""
        return self.is_paused and self.gate.is_inside

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in the middle of a call, of a pipeline or of a component."""
        return self.listener.is_inside

    @contextlib.contextmanager
    def traced(self, file: IO[str]) -> Iterator[None]:
        """Write to `file` what was done inside, when it is left.

        Raises:
            StreamerStateError: it is traced already.
        """
        if self._ranges.timeline is not None:
            raise StreamerStateError("it is traced already: one trace at a time.")
        self._ranges.timeline = timeline = Timeline(self.device)
        try:
            yield
        finally:
            self._ranges.timeline = None
            self._ranges.is_on = False
            timeline.write(file)

    def look(self) -> Stats:
        """The counters, with the device's memory as it is now."""
        if self.gate.running is None and not self.is_closed:
            self._ledger.end_interval()  # all that was to be seen of the last call was seen
        self._ledger.look()
        return self.stats

    @property
    def least_bytes(self) -> int | None:
        """The smallest budget in which all that has run would run again; None: that is not known."""
        return self._ledger.least_bytes

    # ---- entering and leaving

    def open(self, layouts: Sequence[ComponentLayout]) -> None:
        """Start streaming. Whatever fails, the pipeline is as it was before the error leaves.

        Args:
            layouts: the components as `describe` gives them now.
        """
        started = time.perf_counter()
        division = divide(layouts)
        _refuse_compiled_wholes(layouts)
        self._attaching.check_budget(layouts, division)
        self.homes.check([unit.spec for unit in division.units])
        keep_out_of_graphs(compiled.compile_safe)
        with self.gate.entered("entering"), self._standstill(layouts, division):
            self._open(layouts, division)
        self.stats.enter_s = time.perf_counter() - started

    def _standstill(
        self, layouts: Sequence[ComponentLayout], division: Division
    ) -> contextlib.AbstractContextManager[None]:
        """Calls in other threads meet our hooks as soon as these are on, and wait until the rest is ready for them.
        Those that have begun without are waited for."""
        modules = [module for layout in layouts for _, module in layout.modules()]
        stops = [
            *(layout.outermost for layout in layouts),
            *(block for unit in division.units for block in unit.called),
        ]
        return standstill(self.gate, modules, stops, self.listener.enter_late)

    def _open(self, layouts: Sequence[ComponentLayout], division: Division) -> None:
        self._is_opened = True
        try:
            self.homes.prepare()
            self._attaching.attach(layouts, division, self.listener, [c.name for c in layouts], changed=())
            self._ledger.open(self._transfer.weights_bytes)
            self._attaching.move_others()  # under the limit
            self._attaching.load_fixed()
            self.homes.attached()
        except BaseException:
            twice_if_interrupted(self.close)
            raise

    def close(self) -> None:
        """Give everything back, from any state; what the device can no longer do is said, not raised. What was never
        opened has nothing to give, and in a forked child all there is to give is its parent's: nothing is done then.

        An interrupt while it waits for the device is raised once all is given back.

        Raises:
            HostMemoryError: weights that are in another GPU's memory do not fit in that of the host; nothing has
                changed.
            WeightsLostError: some could not be brought back; all else is given back.
        """
        if not self._is_opened or not self._birthplace.is_here:
            self.is_closed = True
            return
        self.homes.check_way_back()
        started = time.perf_counter()
        with self.gate.reading_lock, self._mutex, engine_tensors(), contextlib.ExitStack() as afterwards:
            attempt = functools.partial(_attempt, afterwards)
            attempt(self._ledger.end_interval, "read the device's memory counters")
            self._passes.drop_times()
            with self.homes.leaving():
                try:
                    self._attaching.detach(self._attached.all, attempt, goes_on=False)
                except WeightsLostError as error:  # raised once all else is given back
                    afterwards.callback(_raise, error)
            self._replay.stop()
            self.pairing.close()
            self._lanes.main.caller = None  # an interrupted call's frame, which holds what it was given
            attempt(self._transfer.close, "free device memory")
            attempt(self._ledger.close, "give back the limit on device memory")
            attempt(self.homes.close, "give back what was asked of other GPUs and ranks")
            attempt(self.device.empty_cache, "free cached device memory")
            self.stats.exit_s = time.perf_counter() - started
            self.is_closed = True

    @contextlib.contextmanager
    def paused(self, component: str | None = None) -> Iterator[None]:
        """Inside, the weights are at home and the hooks are off; afterwards streaming resumes with what is there then.

        Args:
            component: only this one, and those that share weights with it; None: all.
        Raises:
            StreamerStateError: a call is running.
        """
        with self.gate.entered("a pause", is_pause=True):
            if self.is_paused or self.is_closed:  # the outer one resumes
                yield
                return
            names = self._pause(component)
            try:
                yield  # without a lock: code here may start threads that read other components' weights
            finally:
                self._resume(names, component is None)

    def _reading(self, units: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        return self.listener.reading(units)

    def _pause(self, component: str | None) -> set[str]:
        """Take a component's weights home, or all; returns the names of the components that this concerns."""
        with self.gate.reading_lock, self._mutex:
            if not self._lanes.are_idle():
                raise StreamerStateError(
                    "a component is in the middle of its forward: weights cannot be changed or handed back now. Do it "
                    "between two calls."
                )
            taken = [a for a in self._attached.all if component is None or component in a.names]
            try:
                with engine_tensors(), contextlib.ExitStack() as afterwards:
                    self._ledger.end_interval()
                    self._passes.drop_times()  # perhaps of units that will be others
                    self.pairing.forget()
                    self.edits.pause_begins()
                    with self.homes.leaving():
                        self._attaching.detach(taken, functools.partial(_attempt, afterwards), goes_on=True)
                    self.homes.forget([unit for a in taken for unit in a.units])
                    self.edits.before_pause()
            except BaseException:
                twice_if_interrupted(self.close)
                raise
            self.is_paused = True
            return {name for a in taken for name in a.names}

    def _resume(self, names: set[str], is_all: bool) -> None:
        """Attach what was detached for a pause, as it is now; where that fails, nothing stays streamed."""
        try:
            self.is_paused = False
            if self.is_closed:
                return
            with self.gate.reading_lock, self._mutex:
                described = self._describe()
                layouts = [layout for layout in described if is_all or layout.name in names]
                division = divide(layouts)
                _refuse_compiled_wholes(layouts)
            # A call may have begun when there were no hooks. It is waited for without a lock: it may itself wait to
            # read a weight that it found absent.
            with self._standstill(layouts, division), self.gate.reading_lock, self._mutex:
                names_now = [c.name for c in described]
                self.edits.pause_ends()
                self._attaching.attach(layouts, division, self.listener, names_now, changed=names)
                self._attaching.move_others()
                self._attaching.load_fixed()
                self.homes.attached()
                with engine_tensors():
                    self.edits.after_pause()
            self.stats.num_relaid += len(layouts)
        except BaseException:
            twice_if_interrupted(self.close)
            raise

    def _unit_home(self, unit: StreamedUnit) -> None:
        """Copy home what was written to a unit on the device, which stays as it is."""
        with self._mutex, engine_tensors():
            if self._lanes.are_idle():
                self._passes.settle_before_reading([unit])
            if unit.is_present:
                is_guarded = unit.binding.is_guarded
                if is_guarded:
                    unit.binding.unguard()
                self._residency.lend_if_looked_at(unit)
                self._residency.write_back(unit, may_replace=False)
                if is_guarded:
                    unit.binding.guard()
            elif not self._residency.take_in(unit):  # `set_` asks no class
                self._taken_in.add(unit.spec.component)

    def explain(self, error: BaseException, *, is_for_weights: bool = False) -> BudgetError:
        """What an out-of-memory error under the budget means, with numbers and what to do."""
        return self._passes.explain(error, is_for_weights=is_for_weights)

    def _find_no_gain(self, component: str, *, is_proven: bool) -> str:
        """Why two passes of a component would not be faster side by side; "": they would.

        Args:
            is_proven: they have run so: what is predicted now is of both.
        """
        phase_plan = self._ledger.plan.phase_of(component)
        if not phase_plan.num_slots:
            return "nothing streams"
        if is_proven:
            return ""
        if phase_plan.prediction is None:
            return "what a pass takes is not known yet"
        return "compute hides all loads" if phase_plan.prediction.bound == "compute" else ""

    # ---- changes

    def _changing(self, component: str) -> contextlib.AbstractContextManager[None]:
        """A component, or a part of it, is about to be cast: at home, and laid out anew afterwards.

        In the middle of a call it is cast where it is (layerwise casting keeps layers in 8 bits, and casts each while
        it runs), and laid out anew before the next call if it stayed so. A block that leaves its slot as it was not
        found cannot be: its host bytes have another form.
        """
        if self._lanes.are_idle():
            return self.paused(component)
        self._changed_inside.add(component)
        return contextlib.nullcontext()

    def _catch_up(self, component: str | None = None) -> None:
        """Between two calls: what was cast, reshaped or exchanged is laid out anew, what was dropped is let go of.

        Args:
            component: is about to be entered.
        """
        self._let_go()
        taken, self._taken_in = self._taken_in, set()
        is_new_use = self.gate.running is not self._passes.last_use
        units = self._units.values() if is_new_use else self._attached.units_of_component(component or "")
        with without_subclasses():
            changed = [unit for unit in units if not unit.is_present and unit.binding.is_changed_while_absent()]
            if is_new_use:  # the same of those that are there, of which there may be many
                moved = [unit for unit in units if unit.binding.is_moved_while_guarded()]
                taken |= {unit.spec.component for unit in moved if self._residency.has_left_home(unit)}
        for unit in changed:
            if not self._residency.take_in(unit):
                taken.add(unit.spec.component)
        for name in taken | self._components_of_another_form():
            if name in self._attached.of_component:  # it may share weights with one before it
                with self.paused(name):
                    pass
        self._changed_inside.clear()

    def _components_of_another_form(self) -> set[str]:
        """Components that must be laid out anew, since a weight has another dtype, shape or strides, or since whoever
        pointed it at other memory has an entry of a `state_dict` that is its memory at home."""
        units: set[StreamedUnit] = set()
        for name in self._changed_inside:
            units.update(self._attached.of_component[name].units)
        found = set()
        for unit in units.union(self.edits.lent):
            if unit.is_present and self._residency.has_left_home(unit):
                found.add(unit.spec.component)
        return found


def _attempt(afterwards: contextlib.ExitStack, step: Callable[[], object], what: str) -> None:
    """Leaving must go on when the device has failed: the weights are on the host, and come back without it."""
    try:
        step()
    except Exception as exc:
        # Said at the end too: where warnings are errors, saying it raises.
        message = f"leaving the offload context could not {what}: {exc!r}"
        afterwards.callback(warn, message)
    except BaseException as exc:
        afterwards.callback(_raise, exc)


def _refuse_compiled_wholes(layouts: Sequence[ComponentLayout]) -> None:
    for layout in layouts:
        if any(stack.blocks for stack in layout.stacks):
            compiled.refuse_fullgraph(layout.outermost, layout.name)


def _raise(error: BaseException) -> None:
    raise error
