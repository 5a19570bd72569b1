"""The engine between start and close: the one owner of what state each unit is in.

What is true of a unit is in `unit.py`. `residency.py` brings units to the device and takes them away,
`phase_changes.py` lays out the slots that a plan asks for. Here is when: what hooks say, phases, pauses, leaving.

`_begin` is where phases change: a component is entered, what it takes beside the weights is looked up or measured, and
the plan for that is applied: units that give up their room are evicted, slots are laid out, its base is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layerstream import compiled
from layerstream.absent import keep_out_of_graphs
from layerstream.attachments import Attachment, Attachments, is_hookable
from layerstream.blocks import Placement
from layerstream.calls import RunningCalls, require_grad, shapes_of
from layerstream.device import Device, engine_tensors
from layerstream.edits import Edits
from layerstream.errors import BudgetError, StreamerStateError
from layerstream.gate import Gate, Ticket
from layerstream.interrupts import twice_if_interrupted
from layerstream.ledger import Ledger
from layerstream.order import OrderLearner
from layerstream.outputs import refuse_backward, without_aliases
from layerstream.phase_changes import PhaseChanges
from layerstream.phases import READ, Reserve
from layerstream.plan import PhasePlan, Plan
from layerstream.profiling import Ranges
from layerstream.progress import Progress
from layerstream.report import predicted_line, slow_loop_line
from layerstream.residency import Residency
from layerstream.saying import warn
from layerstream.standstill import standstill
from layerstream.stats import PhaseStats, Stats
from layerstream.timing import PassTimer
from layerstream.transfer import TransferEngine
from layerstream.unit import StreamedUnit
from layerstream.units import ComponentLayout, Division, divide, whole_bytes

Describe = Callable[[], Sequence[ComponentLayout]]

_log = logging.getLogger("layerstream.streamer")


class Streamer:
    """Streams the units of one pipeline within a budget, from `open` to `close`.

    Args:
        describe: gives the components as adapters describe them; asked again when streaming resumes after a pause.
        budget_bytes: of reserved device memory; None: as little as works, and no limit for the rest.
        call_timeout: seconds that a caller waits for another's call to end; None: as long as it takes.
        num_slots: fixes the number of slots of every phase; the plan chooses otherwise.
        find_replaced: names a component that is another module than it was.
        let_go: lets go of components that the pipeline has no longer; called between two calls.
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
    ) -> None:
        self.stats = Stats(budget_bytes=budget_bytes or 0)
        self.gate = Gate(call_timeout)
        self.owner: object = None
        self._is_opened = self.is_closed = False
        self.has_shown_progress = False
        self.device = device
        self.is_paused = False
        self._describe = describe
        self._find_replaced = find_replaced
        self._let_go = let_go
        self._device = device
        self._attached = Attachments(device, self.reading, self._unit_home, self.gate.number)
        self._units = self._attached.units
        self._ranges = Ranges()
        self._transfer = TransferEngine(device, self._units, self.stats, self._ranges)
        self.edits = Edits(device, self._units, self._attached.records, self.stats)
        self._ledger = Ledger(device, self.stats, budget_bytes, num_slots)
        self._calls = RunningCalls()
        self._stacks: list[tuple[list[int], bool]] = []
        self._residency = Residency(
            device,
            self._attached,
            self._transfer,
            self.edits,
            self._ledger,
            self._calls,
            self.stats,
            self._is_outermost,
        )
        self._phase_changes = PhaseChanges(
            device,
            self._attached,
            self._transfer,
            self._residency,
            self._ledger,
            self._ranges,
            self._count_placements,
        )
        self._begun: dict[tuple[object, ...], Reserve] = {}  # how calls entered that changed nothing in this epoch
        self._epoch = 0  # of the residency
        self._told: set[str] = set()  # phases whose predicted time is in the log
        self._num_tokens: dict[str, int] = {}  # by phase, in the last use
        self._num_tokens_before: dict[str, int] = {}  # when it ended, in all
        self._in_method: int | None = None  # the id of a component whose method runs
        self._ticket: Ticket | None = None  # of a bare component that runs, or of a weight that is read
        self._last_use: Ticket | None = None
        self._handled: BaseException | None = None  # what the caller was handling when the running call began
        self._timer = PassTimer(device)
        self._changed_inside: set[str] = set()  # components of which a running call has cast something
        # Touches may come from any thread, hooks from one; both end here.
        self._mutex = threading.RLock()

    @property
    def plan(self) -> Plan:
        """The plan of the phase that runs, or ran last."""
        return self._ledger.plan

    @property
    def phase_stats(self) -> dict[str, PhaseStats]:
        """Counters by the name of the phase."""
        return self._ledger.stats_of

    @property
    def is_idle(self) -> bool:
        """Whether no component is in the middle of a call, as far as this thread can tell."""
        return self._is_outermost()

    @property
    def is_paused_here(self) -> bool:
        """Whether it is paused, by this thread."""
        return self.is_paused and self.gate.is_inside

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in the middle of a call, of a pipeline or of a component."""
        return self.gate.is_inside and (self.gate.is_inside_call or not self._is_outermost())

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
        self._check_budget(layouts, division)
        keep_out_of_graphs(compiled.compile_safe)
        # Calls in other threads meet our hooks as soon as these are on, and wait until the rest is ready for them.
        modules = [module for layout in layouts for _, module in layout.modules()]
        stops = [
            *(layout.outermost for layout in layouts),
            *(block for unit in division.units for block in unit.called),
        ]
        with self.gate.entered("entering"), standstill(self.gate, modules, stops, self._enter_late):
            self._open(layouts, division)
        self.stats.enter_s = time.perf_counter() - started

    def _open(self, layouts: Sequence[ComponentLayout], division: Division) -> None:
        self._is_opened = True
        try:
            self._attach(layouts, division, all_names=[c.name for c in layouts], changed=())
            self._ledger.open(self._transfer.weights_bytes)
            self._move_others()  # under the limit
            self._load_fixed()
        except BaseException:
            twice_if_interrupted(self.close)
            raise

    def close(self) -> None:
        """Give everything back, from any state; what the device can no longer do is said, not raised. What was never
        opened has nothing to give.

        An interrupt while it waits for the device is raised once all is given back.
        """
        if not self._is_opened:
            self.is_closed = True
            return
        started = time.perf_counter()
        with self.gate.reading_lock, self._mutex, engine_tensors(), contextlib.ExitStack() as afterwards:
            attempt = functools.partial(_attempt, afterwards)
            attempt(self._ledger.end_interval, "read the device's memory counters")
            self._detach(self._attached.all, attempt)
            attempt(self._transfer.close, "free device memory")
            attempt(self._ledger.close, "give back the limit on device memory")
            attempt(self._device.empty_cache, "free cached device memory")
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
                with self.gate.reading_lock, self._mutex:
                    self.is_paused = False
                    if not self.is_closed:
                        self._resume(names, component is None)

    def _pause(self, component: str | None) -> set[str]:
        """Take a component's weights home, or all; returns the names of the components that this concerns."""
        with self.gate.reading_lock, self._mutex:
            if not self._is_outermost():
                raise StreamerStateError(
                    "a component is in the middle of its forward: weights cannot be changed or handed back now. Do it "
                    "between two calls."
                )
            taken = [a for a in self._attached.all if component is None or component in a.names]
            try:
                with engine_tensors(), contextlib.ExitStack() as afterwards:
                    self._ledger.end_interval()
                    self._detach(taken, functools.partial(_attempt, afterwards))
            except BaseException:
                twice_if_interrupted(self.close)
                raise
            self._residency.forget_plan()
            self.is_paused = True
            return {name for a in taken for name in a.names}

    def _resume(self, names: set[str], is_all: bool) -> None:
        """Attach what was detached for a pause, as it is now; where that fails, nothing stays streamed."""
        try:
            described = self._describe()
            layouts = [layout for layout in described if is_all or layout.name in names]
            division = divide(layouts)
            _refuse_compiled_wholes(layouts)
            self._attach(layouts, division, all_names=[c.name for c in described], changed=names)
            self._move_others()
            self._load_fixed()
            with engine_tensors():
                self.edits.after_pause()
            self.stats.num_relaid += len(layouts)
        except BaseException:
            twice_if_interrupted(self.close)
            raise

    def _attach(
        self,
        layouts: Sequence[ComponentLayout],
        division: Division,
        *,
        all_names: Sequence[str],
        changed: Collection[str],
    ) -> None:
        """Take hold of components. Failing half-way leaves it to `close`.

        Args:
            all_names: the pipeline's components, these among them, in its order.
        """
        # Everything is looked at, and then page-locked.
        progress = Progress(2 * sum(unit.spec.num_bytes for unit in division.units))
        try:
            with engine_tensors():
                self._attached.attach(layouts, division, self, progress)
        finally:
            self.has_shown_progress |= progress.close()
        self._device.empty_cache()  # what the components had on the device is given up
        self._note_components(all_names, changed)

    def _note_components(self, all_names: Sequence[str], changed: Collection[str]) -> None:
        """Units came or went: order, ledger and stats go by what there is now."""
        by_name = {layout.name: layout for a in self._attached.all for layout in a.layouts}
        # In the order of the pipeline, in which its components usually run; what it has dropped is yet to be let go of.
        layouts = [by_name[name] for name in dict.fromkeys([*all_names, *by_name]) if name in by_name]
        names = tuple(by_name)
        specs = [
            # What no hook can bring to the device when it is needed is there always.
            replace(spec, also=names) if not is_hookable(by_name[spec.component]) else spec
            for spec in self._attached.specs()
        ]
        blocks = {
            layout.name: [s.index for s in specs if s.component == layout.name and s.is_block] for layout in layouts
        }
        stacks = [(blocks[c.name], c.is_repeated) for c in layouts if blocks[c.name]]
        if stacks != self._stacks:  # what was only cast is used in the same order
            self._stacks, self._residency.order = stacks, OrderLearner(stacks)
        whole = [spec for a in self._attached.all for spec in a.division.whole()]
        self._ledger.components(
            [(c.name, c.is_repeated) for c in layouts], specs, whole, changed, self._residency.order
        )
        self.stats.pinned_bytes = sum(a.store.pinned_bytes for a in self._attached.all)
        self.stats.pin_s = sum(a.store.pin_s for a in self._attached.all)
        self._count_placements()

    def _move_others(self) -> None:
        """Bring to the device what cannot stream."""
        with engine_tensors():
            self._attached.move_others(self._residency.allocating)
        self._transfer.whole_bytes = self.stats.whole_bytes = self._attached.whole_bytes
        self.stats.peak_device_bytes = max(self.stats.peak_device_bytes, self._transfer.weights_bytes)

    def _load_fixed(self) -> None:
        """Bring to the device what no hook can bring there when it is needed."""
        with engine_tensors():
            for attachment in self._attached.all:
                for layout in attachment.layouts:
                    if not is_hookable(layout):
                        for unit in attachment.units:
                            self._residency.allocating(functools.partial(self._transfer.give_own, unit))
                        self._residency.use(attachment.units, is_touch=False, is_grad=False)

    def _detach(self, attachments: Sequence[Attachment], attempt: Callable[..., None]) -> None:
        """Let go of components: hooks off, written tensors home, everything as it was found."""
        taken = list(attachments)
        self._drop_times()  # perhaps of units that will be others
        for attachment in taken:
            attachment.interception.remove()
        attempt(functools.partial(self._bring_home, taken), "copy back weights that were written")
        attempt(self._device.synchronize, "wait for the device")
        self._attached.detach(taken, self._forget_slots, attempt)

    def _forget_slots(self, unit: StreamedUnit) -> None:
        """A unit that is let go of leaves its slot; its tensors are at home already."""
        if unit.slot is not None:
            self._transfer.vacate(unit)
        self._transfer.drop_own(unit)
        self._transfer.forget(unit)
        if unit.is_quiet:
            unit.is_quiet = False
            self._residency.order.take_in([unit.index])

    def _bring_home(self, attachments: Sequence[Attachment]) -> None:
        """What was written on the device, or edited elsewhere, goes where it is handed back from."""
        self._residency.unguard(self._transfer.loaded)
        if self.edits:
            self._residency.discard(self.edits.settle(is_new_use=True))
        for unit in [unit for a in attachments for unit in a.units]:
            if not unit.is_present:
                self._residency.take_in(unit)
            else:
                self._residency.write_back(unit, may_replace=True)
                # Graphs may hold what they saved of weights that stayed resident, too.
                unit.binding.forbid_backward()

    def _unit_home(self, unit: StreamedUnit) -> None:
        """Copy home what was written to a unit on the device, which stays as it is."""
        with self._mutex, engine_tensors():
            if unit.is_present:
                is_guarded = unit.binding.is_guarded
                if is_guarded:
                    unit.binding.unguard()
                self._residency.write_back(unit, may_replace=False)
                if is_guarded:
                    unit.binding.guard()

    # ---- phases

    def _check_budget(self, layouts: Sequence[ComponentLayout], division: Division) -> None:
        """Refuse a budget that cannot do before anything has moved."""
        target = self._device.torch_device
        tensors = [b for unit in division.units for b in unit.binding.tensors]
        places = [p for places in division.others.values() for p in places]
        own = 0
        if not self._device.is_simulated:
            own = sum(b.num_bytes for b in tensors if b.home_device == target)
            own += sum({id(p.tensor): whole_bytes(p.tensor) for p in places if p.tensor.device == target}.values())
        outside = max(0, self._device.allocated_bytes() - own)
        components = [(layout.name, layout.is_repeated) for layout in layouts]
        self._ledger.check(components, [unit.spec for unit in division.units], division.whole(), outside)

    def _count_placements(self) -> None:
        blocks = {s.whole for s in self._attached.specs() if s.is_block}
        streamed = {s.whole for s in self._attached.specs() if self.plan.placement(s.index) is Placement.STREAMED}
        self.stats.num_streamed_blocks = len(streamed)
        self.stats.num_resident_blocks = len(blocks) - len(streamed)

    def _begin(
        self,
        component: str,
        entry: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_grad: bool,
        *,
        reads: Collection[StreamedUnit] | None = None,
    ) -> None:
        """A component is entered from outside: make its phase the current one, and its base present.

        Args:
            reads: the units that it may use; None: all of the component's.
        """
        self._handled = sys.exc_info()[1]
        self._ranges.ask()
        used = self._attached.units_of_component(component)
        self._residency.makes_graphs = is_grad and (
            require_grad(args, kwargs) or any(b.requires_grad for unit in used for b in unit.binding.tensors)
        )
        self._residency.unguard(used if reads is None else reads)
        self._residency.wait_on_this_stream()
        if self.edits:
            self._settle_edits()
        if self._last_use is not self.gate.running:
            self._last_use = self.gate.running
            if self.gate.is_inside_call:
                for name, counted in self._ledger.stats_of.items():
                    self._num_tokens[name] = counted.num_tokens - self._num_tokens_before.get(name, 0)
                    self._num_tokens_before[name] = counted.num_tokens
            self._ledger.begin_use(is_call=self.gate.is_inside_call)
        if self._transfer.extra:  # what the plan has no room for
            with engine_tensors():
                self._residency.drop_extra_slots(held=[])
        self._residency.listen_under_autocast()
        begun = (component, entry, shapes_of(args, kwargs), is_grad)
        self._timer.end()
        known = self._begun_before().get(begun)
        if known is not None and not self._timer.is_ready and self._ledger.again(known, self._transfer.weights_bytes):
            if self._residency.applied is not None:
                self._phase_changes.mark_whole(self._residency.applied)  # the pass before has loaded its blocks
                self._phase_changes.quieten(self._residency.applied)
            return
        replaced = self._find_replaced()
        if replaced is not None:
            raise StreamerStateError(
                f"`{replaced}` was replaced by another module while it is streamed; the new one would not be. Put the "
                "old one back, or replace it inside `with streamer.paused():` (or before entering)."
            )
        with engine_tensors():
            self._read_times()
            self._begun_before().pop(begun, None)  # until it has worked
            phase_plan = self._ledger.begin(*begun, self._transfer.weights_bytes)
            self._tell_prediction(phase_plan)
            self._transfer.phase = self._ledger.phase_stats
            self._phase_changes.apply(phase_plan)
            residents = [self._units[index] for index in sorted(phase_plan.resident)]
            bases = [unit for unit in residents if not unit.spec.is_block]
            self._residency.use(bases, is_touch=False, is_grad=is_grad)
            self._ledger.start_interval(self._transfer.weights_bytes)
        self._begun_before()[begun] = self._ledger.reserve
        self._phase_changes.mark_whole(phase_plan)
        if self._ledger.wants_times and entry != READ:  # then no block runs
            self._residency.listen_to(self._residency.quiet())
            self._timer.begin(self._ledger.starts_timing())
        elif self._ledger.is_settled:
            self._phase_changes.quieten(phase_plan)

    def _begun_before(self) -> dict[tuple[object, ...], Reserve]:
        """How calls entered since all is as it is now, and the key of each."""
        if self._epoch != self._residency.epoch:
            self._epoch = self._residency.epoch
            self._begun.clear()
        return self._begun

    def _tell_prediction(self, phase_plan: PhasePlan) -> None:
        """Once a phase: how long its passes will take."""
        name = phase_plan.phase.name
        if phase_plan.prediction is not None and name not in self._told:
            self._told.add(name)
            line = predicted_line(self.plan)
            if line is not None:
                _log.info("%s", line)
            slow = slow_loop_line(self.plan, phase_plan.phase.components[0], self._num_tokens.get(name, 0))
            if slow is not None:
                _log.warning("%s", slow)

    def _begin_by_touch(self, units: Sequence[StreamedUnit], is_grad: bool) -> None:
        """Code between two calls reads weights: of a VAE that is to decode next, say (`vae.latents_mean`). That begins
        its phase, because a VAE and a denoiser may not fit beside each other."""
        for component in dict.fromkeys(unit.spec.component for unit in units):
            if self._residency.applied is None or component not in self._residency.applied.phase.components:
                self._begin(component, READ, (), {}, is_grad)

    def _settle_edits(self) -> None:
        """What code outside has edited since the last call takes effect now."""
        is_new_use = self.gate.running is not self._last_use
        num_ooms = self._device.num_ooms()
        with engine_tensors():
            self._residency.discard(self.edits.settle(is_new_use=is_new_use))
            # Discarded only once all are at home: one's weight may have been pointed at another's memory.
            stale: list[StreamedUnit] = []
            for unit in self.edits.lent:
                if not unit.is_present:
                    unit.is_lent = False
                elif unit.is_cloned:
                    self._residency.evict(unit)
                elif self._residency.write_back(unit, may_replace=False):
                    stale.append(unit)
                elif not unit.holding().is_aliased(num_bound=len(unit.binding.tensors)):
                    unit.is_lent = False
            self._residency.discard(stale)
        self._ledger.forgive(self._device.num_ooms() - num_ooms)

    def _read_times(self) -> None:
        """What timed passes took, as far as the device is through with them."""
        for reserve, by_block in self._timer.take():
            times: dict[int, float] = {}
            for units, elapsed in by_block.items():
                sizes = [self._units[unit].spec.num_bytes for unit in units]
                for unit, size in zip(units, sizes, strict=True):  # only the sum of a block's pieces means anything
                    times[unit] = elapsed * size / (sum(sizes) or 1)
            self._ledger.timed(reserve, times)

    def _drop_times(self) -> None:
        for reserve in self._timer.drop():
            reserve.not_timed()

    def explain(self, error: BaseException, *, is_for_weights: bool = False) -> BudgetError:
        """What an out-of-memory error under the budget means, with numbers and what to do."""
        return self._ledger.explain(error, self._transfer.weights_bytes, is_for_weights=is_for_weights)

    # ---- what the hooks say

    def _enter_late(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call that began before there were hooks, and has waited until there are."""
        if id(module) in self._attached.units_of:
            self.enter_block(module, args, kwargs)
        else:
            self.enter_root(module, args, kwargs)

    def enter_root(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """A component's forward begins. A hook that another thread takes off just then is called without kwargs."""
        name = self._attached.root_of.get(id(root))
        if name is None:
            return  # a copy of a component, which carries the hook along
        compiled.refuse_fullgraph(root, name)
        is_grad = _is_grad_enabled()
        self._come_in(f"`{name}`")
        with self.gate.reading_lock, self._mutex:
            if id(root) not in self._attached.root_of:  # streaming ended while this thread waited for its turn
                self._go_out()
                return
            is_outermost = self._is_outermost(root)
            if is_outermost:
                self._catch_up(name)
                if id(root) not in self._attached.root_of:  # it was dropped, and is nobody's to stream
                    self._go_out()
                    return
            else:
                self._residency.unguard(self._attached.units_of_component(name))
            self._calls.enter(root, is_root=True)
            if is_outermost:
                try:
                    self._begin(name, "", args, kwargs or {}, is_grad)
                except BaseException:
                    self._calls.leave(root)
                    self._go_out()
                    raise
            self._residency.order.begin_pass()

    def leave_root(self, root: nn.Module) -> None:
        """A component's forward ended; the slots of its last blocks are free for what comes next."""
        with self.gate.reading_lock, self._mutex:
            if not self._calls.leave(root) or not self._is_outermost():
                return
            try:
                self._ended()
            finally:
                self._go_out()

    def enter_method(self, root: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A component is entered by a method; inside a running call that says nothing new."""
        place = self._attached.entrances.modules.get(id(root))
        if place is None:
            return False
        component, path = place
        entry = f"{path}.{name}" if path else name
        is_grad = _is_grad_enabled()
        self._come_in(f"`{component}.{entry}`", is_guarded=True)
        with self.gate.reading_lock, self._mutex:
            if id(root) not in self._attached.entrances.modules:
                self._go_out()
                return False
            self._calls.check_thread()
            if not self._is_outermost():
                return False
            try:
                self._catch_up(component)
                if id(root) not in self._attached.entrances.modules:
                    self._go_out()
                    return False
                # In tiles and slices a VAE takes less.
                ways = [way for way in ("use_tiling", "use_slicing") if getattr(root, way, False)]
                self._in_method = id(root)
                entry = " ".join([entry, *ways])
                self._begin(component, entry, args, kwargs, is_grad, reads=self._attached.units_below(root))
                self._residency.order.begin_pass()
            except BaseException:
                self._in_method = None
                self._go_out()
                raise
        return True

    def _look_for_entrance(self, component: str) -> bool:
        """A block runs, or a weight is read, outside of what is watched: watch what has called it from now on. Returns
        whether there is such."""
        entrance, is_new = self._attached.entrances.find(component)
        if entrance is not None and is_new:
            _log.debug("`%s` is entered by `%s`, which is watched from now on", component, entrance)
            self._attached.watch_entrance(entrance, component, self)
        return entrance is not None

    def leave_method(self, root: nn.Module) -> None:
        with self.gate.reading_lock, self._mutex:
            self._in_method = None
            try:
                self._ended()
            finally:
                self._go_out()

    def _come_in(self, what: str, *, is_guarded: bool = False) -> None:
        """Wait until it is this thread's turn, unless it is inside already.

        Args:
            is_guarded: the end is told whatever happens; that of a forward is not, if it is interrupted.
        """
        if not self.gate.is_inside:
            thread = threading.get_ident()
            is_over = None if is_guarded else functools.partial(self._calls.are_over, thread)
            self._ticket = self.gate.enter(what, is_over=is_over)

    def _go_out(self) -> None:
        """End the use that a bare component began."""
        ticket, self._ticket = self._ticket, None
        self.gate.leave(ticket)

    def _is_outermost(self, entering: nn.Module | None = None) -> bool:
        is_outermost = self._calls.is_outermost(entering)
        return is_outermost and self._in_method is None

    def _ended(self) -> None:
        """An outermost call ended, perhaps by an exception."""
        error, handled = sys.exc_info()[1], self._handled
        self._handled = None
        if error is handled:  # the caller's: it calls us while it handles one
            error = None
        if isinstance(error, torch.OutOfMemoryError):
            add_note = getattr(error, "add_note", None)  # before Python 3.11 only leaving the `with` block says it
            if add_note is not None:
                add_note(f"layerstream: {self.explain(error)}")
            self._ledger.did_not_fit()
            self._residency.forget_plan()
        elif error is None:
            self._ledger.check_operators()
        self._residency.prefetch(held=[])
        self._residency.guard()

    def enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """A block is about to run: make its weights present, and start loading what follows."""
        units = self._attached.units_of.get(id(block))
        if units is None:
            return  # a copy of a block, which carries the hook along
        component = units[0].spec.component
        is_inside = self._calls.is_running_here or self._in_method is not None
        is_whole = self._attached.of_component[component].is_whole and is_inside
        if is_whole and self._device.stream_number() == self._residency.stream_number:
            return
        is_grad = _is_grad_enabled()  # of the caller: it is off in what follows
        self._come_in(f"a block of `{component}`")
        with self.gate.reading_lock, self._mutex:
            if id(block) not in self._attached.units_of:
                self._go_out()
                return
            if is_whole:
                self._residency.wait_on_this_stream()
                return
            is_outermost = self._is_outermost(block)
            if is_outermost:
                self._catch_up(component)
                if id(block) not in self._attached.units_of:
                    self._go_out()
                    return
            self._calls.enter(block, is_root=False)
            if is_outermost:  # by a method that nobody watches
                try:
                    if not self._look_for_entrance(component):
                        for unit in units:
                            unit.is_called_alone = True
                    self._begin(component, units[0].spec.stack or "", args, kwargs or {}, is_grad)
                except BaseException:
                    self._calls.leave(block)
                    self._go_out()
                    raise
            with engine_tensors():
                self._residency.use(units, is_touch=False, is_grad=is_grad)
            self._timer.enter_block(tuple(unit.index for unit in units))

    def leave_block(self, block: nn.Module, output: Any) -> Any:
        """A block ended. Returns an output to use instead, or None to keep it."""
        units = self._attached.units_of.get(id(block))
        if units is None:
            return None
        self._residency.forget_autocast(units)
        if not self._calls.is_running(block):
            return None  # all of its component is here to stay: entering it did nothing
        with self.gate.reading_lock, self._mutex:
            if not self._calls.leave(block):
                return None
            self._timer.leave_block(tuple(unit.index for unit in units))
            replaced = output
            for unit in units:
                if unit.slot is not None:
                    replaced = without_aliases(replaced, unit.slot.buffer)
            if any(unit.may_be_saved for unit in units):
                refuse_backward(replaced, units[0].spec.whole)
            if self._calls.is_empty and self._in_method is None:
                try:
                    self._ended()
                finally:
                    self._go_out()
            return None if replaced is output else replaced

    @contextlib.contextmanager
    def reading(self, units: Sequence[int]) -> Iterator[None]:
        """Something looks at weights that are not there, or that nobody was to look at unseen: make these units
        present, all at once. No other thread evicts them before the `with` block is left."""
        is_grad = _is_grad_enabled()
        with self.gate.reading():
            self._make_present(units, is_grad)
            yield

    def _make_present(self, indices: Sequence[int], is_grad: bool) -> None:
        with self._mutex:
            # Else streaming ended meanwhile, and all is plain.
            units = [self._units[index] for index in indices if index in self._units]
            self._calls.check_thread()
            if not self._is_outermost():
                self._residency.unguard(units)
                with engine_tensors():
                    self._residency.use(units, is_touch=True, is_grad=is_grad)
                return
            if self.gate.is_inside_call:
                for component in {unit.spec.component for unit in units}:
                    self._look_for_entrance(component)
            if not all(unit.is_present for unit in units) and self.gate.is_inside:
                self._catch_up()  # not in another thread's pause, which that thread may be about to end
                units = [self._units[index] for index in indices if index in self._units]
            self._residency.unguard(units)
            missing = [unit for unit in units if not unit.is_present]
            if missing:
                self._begin_by_touch(missing, is_grad)
            self.edits.lend(units)  # first: what is cloned is lent, and goes when the next call begins
            if missing:
                with engine_tensors():
                    self._residency.use(missing, is_touch=True, is_grad=is_grad)
            self._residency.guard()

    def changing(self, component: str) -> contextlib.AbstractContextManager[None]:
        """A component, or a part of it, is about to be cast: at home, and laid out anew afterwards.

        In the middle of a call it is cast where it is (layerwise casting keeps layers in 8 bits, and casts each while
        it runs), and laid out anew before the next call if it stayed so. A block that leaves its slot as it was not
        found cannot be: its host bytes have another form.
        """
        if self._is_outermost():
            return self.paused(component)
        self._changed_inside.add(component)
        return contextlib.nullcontext()

    def _catch_up(self, component: str | None = None) -> None:
        """Between two calls: what was cast, reshaped or exchanged is laid out anew, what was dropped is let go of.

        Args:
            component: is about to be entered.
        """
        self._let_go()
        taken: set[str] = set()
        is_new_use = self.gate.running is not self._last_use
        units = self._units.values() if is_new_use else self._attached.units_of_component(component or "")
        for unit in list(units):
            if not unit.is_present and not self._residency.take_in(unit):
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
            if not unit.is_present:
                continue
            binding = unit.binding
            has_other_form = not all(bound.has_form_of(bound.tensor) for bound in binding.tensors)
            replaced = () if binding.is_guarded else binding.replaced()  # guarded, nobody has looked at them
            if has_other_form or any(map(self.edits.has_entry, replaced)):
                found.add(unit.spec.component)
        return found

    # ---- up and down


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


def _is_grad_enabled() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
