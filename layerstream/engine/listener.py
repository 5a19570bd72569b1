"""What hooks and wrappers of methods say, in the thread and stream of the forward: who comes in, and who goes out.

A block's units are made present when it begins; when it ends nothing is moved, since its slot is taken from it only
when another unit needs it. The order of locks is: a turn at the gate, its lock of readers, and `mutex`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from layerstream.device.base import Device, engine_tensors
from layerstream.engine.attachments import Attachments
from layerstream.engine.edits import Edits
from layerstream.engine.gate import Gate
from layerstream.engine.lane import Lane, Lanes
from layerstream.engine.pairing import Decision, Pairing
from layerstream.engine.passes import Passes
from layerstream.engine.replay import Replay
from layerstream.engine.residency import Residency
from layerstream.engine.session import Session
from layerstream.engine.snapshots import Given
from layerstream.errors import BudgetError
from layerstream.hooks import compiled
from layerstream.hooks.entrances import Entrance
from layerstream.hooks.outputs import refuse_backward
from layerstream.transfer.timeline import BLOCKS
from layerstream.transfer.timing import PassTimer
from layerstream.transfer.unit import StreamedUnit, kept_out_of_slots

_FRAMES_TO_CALLER = 2  # a method of the listener, and what keeps dynamo out of it

_log = logging.getLogger("layerstream.streamer")


class EngineListener:
    """Implements `intercept.Listener`.

    Args:
        mutex: of the streamer: touches may come from any thread, hooks from one, and both end here.
        catch_up: called between two calls: lays out anew what was cast, reshaped or exchanged.
        change: a component is about to be cast: gives what to do that inside of.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        residency: Residency,
        passes: Passes,
        edits: Edits,
        lanes: Lanes,
        session: Session,
        gate: Gate,
        timer: PassTimer,
        replay: Replay,
        pairing: Pairing,
        mutex: threading.RLock,
        catch_up: Callable[[str | None], None],
        change: Callable[[str], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._device = device
        self._attached = attached
        self._units = attached.units
        self._residency = residency
        self._passes = passes
        self._edits = edits
        self._lanes = lanes
        self._session = session
        self._gate = gate
        self._timer = timer
        self._replay = replay
        self._pairing = pairing
        self._mutex = mutex
        self._catch_up = catch_up
        self._change = change

    @property
    def is_inside(self) -> bool:
        """Whether this thread is in the middle of a call, of a pipeline or of a component."""
        return self._gate.is_inside and (self._gate.is_inside_call or not self._lanes.here.is_idle)

    @property
    def is_pairing(self) -> bool:
        """Whether the two passes of a step of guidance may run side by side."""
        return self._pairing.is_on

    def enter_late(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        lane = self._lanes.here
        self._come_in(lane, f"`{name}`")
        decision = self._arrive(lane, root, name, args, kwargs or {})
        with self._gate.reading_lock, self._mutex:
            if id(root) not in self._attached.root_of:  # streaming ended while this thread waited for its turn
                self._go_out(lane)
                return
            lane.is_answered = decision is not None and decision.is_answer
            if lane.is_answered:
                lane.enter(root, is_root=True)
                lane.caller = sys._getframe(_FRAMES_TO_CALLER)
                return
            is_outermost = lane.is_outermost(root)
            if is_outermost:
                self._catch_up_unless_others_run(lane, name)
                if id(root) not in self._attached.root_of:  # it was dropped, and is nobody's to stream
                    self._go_out(lane)
                    return
            else:
                self._residency.unguard(self._attached.units_of_component(name))
            lane.enter(root, is_root=True)
            if is_outermost:
                lane.caller = sys._getframe(_FRAMES_TO_CALLER)
                try:
                    second = None if decision is None else decision.second
                    self._begin(lane, name, "", args, kwargs or {}, is_grad, second=second)
                except BaseException:
                    lane.leave(root)
                    self._go_out(lane)
                    raise
            if lane is self._lanes.main:
                self._residency.order.begin_pass()

    def run_forward(self, root: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of a component's forward, where its passes may be paired."""
        lane = self._lanes.here
        if lane is not self._lanes.main:
            lane.output = original(*args, **kwargs)
            return lane.output
        decision = self._pairing.take(root)
        if decision.is_answer:
            return decision.output
        if decision.pair is not None:
            return self._pairing.run(decision.pair, original, args, kwargs)
        if decision.learned is not None:
            return self._pairing.learn(decision.learned, original, args, kwargs)
        return original(*args, **kwargs)

    def leave_root(self, root: nn.Module) -> None:
        """A component's forward ended; the slots of its last blocks are free for what comes next."""
        lane = self._lanes.here
        with self._gate.reading_lock, self._mutex:
            if lane.leave(root) and lane.is_idle:
                if lane.is_answered:
                    lane.is_answered = False
                    self._go_out(lane)
                else:
                    self._end(lane)

    def enter_method(self, root: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A component is entered by a method; inside a running call that says nothing new."""
        place = self._attached.entrances.modules.get(id(root))
        if place is None:
            return False
        component, path = place
        entry = f"{path}.{name}" if path else name
        is_grad = _is_grad_enabled()
        lane = self._lanes.here
        self._come_in(lane, f"`{component}.{entry}`", is_guarded=True)
        with self._gate.reading_lock, self._mutex:
            if id(root) not in self._attached.entrances.modules:
                self._go_out(lane)
                return False
            lane.check_thread()
            if not lane.is_idle:
                return False
            try:
                self._catch_up_unless_others_run(lane, component)
                if id(root) not in self._attached.entrances.modules:
                    self._go_out(lane)
                    return False
                # In tiles and slices a VAE takes less.
                ways = [way for way in ("use_tiling", "use_slicing") if getattr(root, way, False)]
                lane.method = id(root)
                lane.caller = sys._getframe(_FRAMES_TO_CALLER)
                entry = " ".join([entry, *ways])
                reads = self._attached.units_below(root)
                self._begin(lane, component, entry, args, kwargs, is_grad, reads=reads)
                self._residency.order.begin_pass()
            except BaseException:
                lane.method = None
                self._go_out(lane)
                raise
        return True

    def leave_method(self, root: nn.Module) -> None:
        """The method of which `enter_method` has said that it is outermost ended."""
        lane = self._lanes.here
        with self._gate.reading_lock, self._mutex:
            lane.method = None
            self._end(lane)

    def enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """A block is about to run: make its weights present, and start loading what follows."""
        step = self._replay.step
        if step is not None and step.block is block:
            with self._gate.reading_lock, self._mutex:
                if self._replay.enter(step):
                    return
        units = self._attached.units_of.get(id(block))
        if units is None:
            return  # a copy of a block, which carries the hook along
        component = units[0].spec.component
        lane = self._lanes.here
        all_stays = self._attached.of_component[component] in self._session.staying and lane.is_running_here
        timeline = self._passes.timeline
        if timeline is not None:
            all_stays = False  # each block is told of
        if all_stays and self._device.stream_number() == self._session.stream_number:
            return
        is_grad = _is_grad_enabled()  # of the caller: it is off in what follows
        self._come_in(lane, f"a block of `{component}`")
        with self._gate.reading_lock, self._mutex:
            if id(block) not in self._attached.units_of:
                self._go_out(lane)
                return
            if all_stays:
                self._residency.wait_on_this_stream()
                return
            self._replay.deviate()
            is_outermost = lane.is_outermost(block)
            if is_outermost:
                self._catch_up_unless_others_run(lane, component)
            units = self._attached.units_of.get(id(block), ())  # it may have been laid out anew, here or meanwhile
            if not units:
                self._go_out(lane)
                return
            lane.enter(block, is_root=False)
            if is_outermost:  # by a method that nobody watches
                try:
                    if not self.look_for_entrance(component):
                        for unit in units:
                            unit.is_called_alone = True
                    stack = units[0].spec.stack or ""
                    self._begin(lane, component, stack, args, kwargs or {}, is_grad, is_block=True)
                except BaseException:
                    lane.leave(block)
                    self._go_out(lane)
                    raise
            with engine_tensors():
                self._residency.use(units, is_touch=False, is_grad=is_grad)
            self._replay.note(block, units)
            if lane is self._lanes.main:
                self._timer.enter_block(tuple(unit.index for unit in units))
            if timeline is not None:
                timeline.enter(BLOCKS, (id(lane), id(block)), units[0].spec.block_name)

    def leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A block ended. Returns an output to use instead, or None to keep it."""
        if self._replay.bound is not None:  # then the pass is alone
            with self._gate.reading_lock, self._mutex:
                is_done, replaced = self._replay.leave(block, output)
            if is_done:
                return replaced
        lockstep = self._pairing.lockstep
        if not lockstep.is_on:
            return self._leave_block(block, output)
        lane = self._lanes.here
        if lane is self._lanes.main:
            if sys.exc_info()[1] is lane.handled:  # else it has failed
                lockstep.first_hands_over()
            return self._leave_block(block, output)
        replaced = self._leave_block(block, output)
        lockstep.second_hands_over()
        return replaced

    def _leave_block(self, block: nn.Module, output: Any) -> Any:
        """The same, of a block that was entered by working it out."""
        units = self._attached.units_of.get(id(block))
        if units is None:
            return None
        self._residency.forget_autocast(units)
        lane = self._lanes.here
        if not lane.is_running(block):
            return None  # all of its component is here to stay: entering it did nothing
        with self._gate.reading_lock, self._mutex:
            if not lane.leave(block):
                return None
            if lane is self._lanes.main:
                self._timer.leave_block(tuple(unit.index for unit in units))
            if self._passes.timeline is not None:
                self._passes.timeline.leave(BLOCKS, (id(lane), id(block)))
            replaced = kept_out_of_slots(output, units)
            if any(unit.may_be_saved for unit in units):
                refuse_backward(replaced, units[0].spec.block_name)
            if lane.is_empty:
                self._end(lane)
            return None if replaced is output else replaced

    @contextlib.contextmanager
    def reading(self, units: Sequence[int]) -> Iterator[None]:
        """Something looks at weights that are not there, or that nobody was to look at unseen: make these units
        present, all at once. No other thread evicts them before the `with` block is left."""
        is_grad = _is_grad_enabled()
        with self._gate.reading():
            looked_at = self.make_present(units, is_grad)
            try:
                yield
            finally:
                if looked_at:
                    with self._mutex:
                        self._residency.guard_again(looked_at)

    def make_present(self, indices: Sequence[int], is_grad: bool) -> Sequence[StreamedUnit]:
        """Load units for code that reads them outside of their blocks; in the middle of a call or between two.

        Returns: those of another phase that are kept on the device, and that somebody looks at without calling a part
            of their component. The next who looks at them may do that, which needs room.
        """
        lane = self._lanes.here
        with self._mutex:
            # Else streaming ended meanwhile, and all is plain.
            units = [self._units[index] for index in indices if index in self._units]
            lane.check_thread()
            if not lane.is_idle:
                self._replay.deviate()
                self._residency.unguard(units)
                with engine_tensors():
                    self._residency.use(units, is_touch=True, is_grad=is_grad)
                return ()
            kept = [unit for unit in units if unit.is_present and not self._session.is_laid_out_for(unit.spec)]
            parts = {}
            for component in dict.fromkeys(unit.spec.component for unit in units):
                entrance = self.look_for_entrance(component, is_between_calls=not self._gate.is_inside_call)
                if entrance is not None:
                    parts[component] = str(entrance)
            if not all(unit.is_present for unit in units) and self._gate.is_inside:
                # Not in another thread's pause, which that thread may be about to end.
                self._catch_up_unless_others_run(lane, None)
                units = [self._units[index] for index in indices if index in self._units]
            if not self._lanes.others_run(lane):
                self._passes.settle_before_reading(units)
            self._residency.unguard(units)
            self._residency.wait_on_this_stream()
            self._passes.begin_by_touch(lane, units, parts, is_grad)
            self._edits.lend(units)  # first: what is cloned is lent, and goes when the next call begins
            missing = [unit for unit in units if not unit.is_present]  # what was kept may have made way
            if missing:
                with engine_tensors():
                    self._residency.use(missing, is_touch=True, is_grad=is_grad)
            if self._lanes.others_run(lane):
                return ()
            self._residency.guard()
            return [unit for unit in kept if unit.spec.component not in parts]

    def changing(self, component: str) -> contextlib.AbstractContextManager[None]:
        """A component, or a part of it, is about to be cast."""
        return self._change(component)

    def look_for_entrance(self, component: str, *, is_between_calls: bool = False) -> Entrance | None:
        """A block runs, or a weight is read, outside of what is watched: watch what has called it from now on. Returns
        that, where there is such.

        Args:
            is_between_calls: no call of a pipeline runs: it may be somebody who just looks.
        """
        entrance, is_new = self._attached.entrances.find(component, is_between_calls=is_between_calls)
        if entrance is not None and is_new:
            _log.debug("`%s` is entered by `%s`, which is watched from now on", component, entrance)
            self._attached.watch_entrance(entrance, component, self)
        return entrance

    # ---- inside

    def _arrive(
        self, lane: Lane, root: nn.Module, component: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Decision | None:
        """What an outermost call of a component is to be; None: nothing but what it is. Without a lock: a second pass
        may run in it."""
        if not self._pairing.is_on or lane is not self._lanes.main or lane.running or lane.method is not None:
            return None

        def settle() -> None:
            with self._gate.reading_lock, self._mutex:
                self._catch_up(component)

        ticket, lane.ticket = lane.ticket, None  # whoever runs in it ends a use of its own
        try:
            return self._pairing.arrive(root, component, args, kwargs, settle=settle)
        finally:
            lane.ticket = ticket

    def _begin(self, *call: Any, second: Given | None = None, **more: Any) -> None:
        """A pass begins, as in `Passes.begin`. Pairing is never why there is no room: what it keeps is given up then,
        the second pass, too."""
        try:
            self._passes.begin(*call, second=second, **more)
        except BudgetError:
            given_up = self._pairing.make_room()
            if not given_up:
                raise
            for name in given_up:
                self._passes.forget(name)
            self._passes.begin(*call, **more)

    def _catch_up_unless_others_run(self, lane: Lane, component: str | None) -> None:
        if not self._lanes.others_run(lane):
            self._catch_up(component)

    def _come_in(self, lane: Lane, what: str, *, is_guarded: bool = False) -> None:
        """Wait until it is this thread's turn, unless it is inside already.

        Args:
            is_guarded: the end is told whatever happens; that of a forward is not, if it is interrupted.
        """
        if not self._gate.is_inside:
            thread = threading.get_ident()
            is_over = None if is_guarded else functools.partial(lane.are_over, thread)
            lane.ticket = self._gate.enter(what, is_over=is_over)

    def _go_out(self, lane: Lane) -> None:
        """End the use that a bare component began."""
        ticket, lane.ticket, lane.caller = lane.ticket, None, None
        self._gate.leave(ticket)

    def _end(self, lane: Lane) -> None:
        """What was outermost in a lane ended."""
        try:
            self._passes.end(lane)
        finally:
            self._go_out(lane)


def _is_grad_enabled() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
