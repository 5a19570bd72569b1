"""Pairing: the two passes of a step of guidance run side by side, so that each load serves both.

A pipeline calls its denoiser for the prompt, and again for the negative one, with the same latents and another text.
From the second call of a few steps it is learned where each of its arguments comes from: the first call of the same
step, or the second one of the step before. So when the first call comes the second is known, and both run in lockstep
(`lockstep.py`). When the pipeline's second call comes, its arguments are compared byte by byte with those that the
second pass ran with. Equal: the result is there, and the call is answered with it. Not equal: it is dropped, and the
call runs.

Who may pair: no gradients, nobody's modes or hooks, a forward that leaves its model as it found it and draws no random
numbers, arguments and results that are tensors and plain values. Before the first paired step of a kind of call, a step
that has run is run once more, in lockstep, and must give the same bits (*probation*).

What is found out too late (random numbers were drawn, memory was refused) is mended: the second pass is dropped, and
the first runs again from its arguments, alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from layerstream.device.base import Device
from layerstream.engine.attachments import Attachments
from layerstream.engine.foresight import Call, Foresight, Mark
from layerstream.engine.gate import Gate, Ticket
from layerstream.engine.lane import Lanes
from layerstream.engine.lockstep import Lockstep
from layerstream.engine.model_state import ModelState
from layerstream.engine.snapshots import (
    MOST_BYTES,
    Given,
    UnknownValueError,
    copy_of,
    leaves_of_output,
    put_back,
    same,
    tensors_of,
)
from layerstream.engine.thread_state import (
    Surroundings,
    ThreadState,
    Variables,
    are_same,
    context_variables,
    refusal,
    runner,
)
from layerstream.engine.ties import differ
from layerstream.host.home import RawHome
from layerstream.saying import warn
from layerstream.stats import Stats

_log = logging.getLogger("layerstream.pairing")

_MOST_MISSES = 2  # foreseen calls that came otherwise, until the pipeline's call is over
_MOST_CHANGES = 4  # of the model's own state, until it is taken to change at each call
_MOST_IDLE_USES = 3  # calls of the pipeline in which nothing could be foreseen
_NO_ROOM = "the budget has no room for it"


class FindNoGain(Protocol):
    """Why two passes of a component would not be faster side by side; "": they would."""

    def __call__(self, component: str, *, is_proven: bool) -> str: ...


@dataclass
class _Pending:
    """A second pass that has run before its call came.

    Attributes:
        given: what it was given.
        left: the same arguments when it had ended, to which it may have written.
        output: what the forward returned.
        mark: what would be another had weights or modes changed since.
    """

    given: Given
    left: Given
    output: Any
    variables: Variables
    mark: Mark


@dataclass
class _Track:
    """What is known of one component's calls.

    Attributes:
        component: its name.
        use: the pipeline's call that goes on; None: the component is called by itself.
        foresight: what comes next.
        state: the model, as it is between passes; None: to be looked at.
        proven: kinds of calls that have passed probation, with the modes under which they did.
        off: why its passes are not paired any more; "": they may be.
        idle: why they are not, as it is now.
        rests: nothing is foreseen until the pipeline's call is over.
    """

    component: str
    use: Ticket | None = None
    foresight: Foresight = field(default_factory=Foresight)
    num_misses: int = 0
    num_changes: int = 0
    num_idle_uses: int = 0
    state: ModelState | None = None
    proven: set[tuple[object, ...]] = field(default_factory=set)
    pending: _Pending | None = None
    off: str = ""
    idle: str = ""
    rests: bool = False

    def forget_calls(self) -> None:
        self.foresight.forget()
        self.pending = None

    def end(self, why: str) -> None:
        """Its passes are paired no more."""
        self.off = why
        self.forget_calls()


@dataclass
class _Pair:
    """Two passes that are about to run.

    Attributes:
        first: arguments of the first pass, each tensor with a copy.
        second: arguments of the second one, in copies.
    """

    track: _Track
    root: nn.Module
    first: list[tuple[Any, Any]]
    second: Given
    before: Surroundings
    is_trial: bool = False
    outputs: tuple[Any, Any] | None = None  # of a trial
    failure: str = ""


@dataclass
class Decision:
    """What a call that arrives is to be: run, run beside a second one, or answered.

    Attributes:
        pair: with a second pass; None: alone.
        learned: a call whose output is wanted.
        is_answer: `output` is its result, and nothing runs.
    """

    pair: _Pair | None = None
    learned: tuple[_Track, Call, Surroundings] | None = None
    is_answer: bool = False
    output: Any = None

    @property
    def second(self) -> Given | None:
        """The arguments of the second pass."""
        return None if self.pair is None else self.pair.second


_ALONE = Decision()


class Pairing:
    """Foresees second passes, runs them beside the first ones, and answers their calls.

    Attributes:
        is_on: the user allows it.

    Args:
        find_no_gain: why two passes of a component would not be faster side by side; "": they would.
        is_edited: whether code outside has its hands on weights.
        forgive: so many allocations were refused to passes whose results are not used.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        lanes: Lanes,
        gate: Gate,
        stats: Stats,
        *,
        is_on: bool,
        find_no_gain: FindNoGain,
        is_edited: Callable[[], bool],
        forgive: Callable[[int], None],
    ) -> None:
        self.is_on = is_on
        self.lockstep = Lockstep()
        self._device = device
        self._attached = attached
        self._lanes = lanes
        self._gate = gate
        self._stats = stats
        self._find_no_gain = find_no_gain
        self._is_edited = is_edited
        self._forgive = forgive
        self._tracks: dict[str, _Track] = {}
        self._decision: Decision = _ALONE
        self._root: nn.Module | None = None  # whose call it is of, until its forward begins
        self._trial: Decision | None = None  # runs now

    def reasons(self) -> dict[str, str]:
        """Why passes of a component are not paired, by its name; "" where they are."""
        return {name: track.off or track.idle for name, track in self._tracks.items()}

    def forget(self) -> None:
        """Components were laid out anew."""
        for name in list(self._tracks):
            if not self._tracks[name].off:
                del self._tracks[name]

    def close(self) -> None:
        """End the second thread; what is told stays."""
        self.lockstep.close()
        self._decision = _ALONE
        self._tracks = {name: _Track(name, off=track.off, idle=track.idle) for name, track in self._tracks.items()}

    def make_room(self) -> list[str]:
        """The budget has no room for what a pass takes beside what is kept here, or for two passes: keep nothing, and
        pair no more. Returns the components of which there was something."""
        found = []
        for name, track in self._tracks.items():
            if not track.off and (track.proven or track.pending or track.foresight.holds_calls):
                track.end(_NO_ROOM)
                found.append(name)
        if found:
            self._decision = _ALONE
        return found

    # ---- a call arrives

    def arrive(
        self,
        root: nn.Module,
        component: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        settle: Callable[[], None],
    ) -> Decision:
        """An outermost call of a component begins in the main lane, and nothing of it has been done. No lock is held.

        Args:
            settle: has what was edited outside take effect, as it would when the call runs.
        """
        self._decision, self._root = _ALONE, root
        if self._trial is not None:
            self._decision = self._trial
        elif self.is_on and not self.lockstep.is_lost:
            track = self._tracks.setdefault(component, _Track(component))
            try:
                decision = self._decide(track, root, args, kwargs, settle)
                self._decision, self._root = decision, root  # of this call again: a trial may have run in it
            except torch.OutOfMemoryError:
                self._no_memory(track)
            except Exception as exc:  # of values that nobody thought of: the call runs as it is
                track.end(f"its arguments cannot be looked at: {exc!r}")
        return self._decision

    def take(self, root: nn.Module) -> Decision:
        """What the call of `root` whose forward begins now is to be."""
        if self._root is not root:
            return _ALONE
        decision, self._decision, self._root = self._decision, _ALONE, None
        return decision

    def _decide(
        self,
        track: _Track,
        root: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settle: Callable[[], None],
    ) -> Decision:
        pending, track.pending = track.pending, None
        use = self._gate.running if self._gate.is_inside_call else None
        is_new_use = not track.off and use is not track.use
        if is_new_use:
            self._begin_use(track, use)
        given = self._given(track, args, kwargs)
        if pending is not None:
            if given is not None and not is_new_use:
                settle()
                if self._is_as_foreseen(track, pending, given):
                    self._stats.num_paired_passes += 1
                    track.foresight.came_true()
                    track.num_misses = 0
                    return Decision(is_answer=True, output=pending.output)
            self._missed(track)
        if given is None or track.rests:
            return _ALONE
        if track.foresight.is_second_known and track.state is not None:
            return self._foresee(track, root, given)
        return self._learn(track, root, given)

    def _given(self, track: _Track, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        """What a call is given; None: it runs alone, and nothing is learned of it."""
        if track.off or track.rests:
            return None
        track.idle = self._idle(track)
        if track.idle:
            track.forget_calls()
            return None
        try:
            return Given.of(args, kwargs)
        except UnknownValueError as exc:
            track.end(f"it is given {exc}")
            return None

    def _missed(self, track: _Track) -> None:
        """A second pass has run, and its call has not come, or otherwise."""
        self._stats.num_discarded_passes += 1
        track.num_misses += 1
        track.forget_calls()
        if track.num_misses >= _MOST_MISSES:
            track.rests, track.idle = True, "second calls came otherwise than foreseen"

    def _begin_use(self, track: _Track, use: Ticket | None) -> None:
        """Another call of the pipeline has begun."""
        is_idle = use is not None and not track.foresight.has_been_right
        track.num_idle_uses = track.num_idle_uses + 1 if is_idle else 0
        track.use, track.rests, track.num_misses = use, False, 0
        track.forget_calls()
        track.foresight.begin()
        if track.num_idle_uses > _MOST_IDLE_USES:
            track.off = track.idle or "its calls are not foreseen"

    def _idle(self, track: _Track) -> str:
        """Why no passes of a component are paired now; "": they may be."""
        why = refusal(self._device) or self._find_no_gain(track.component, is_proven=bool(track.proven))
        return why or ("code outside looks at weights" if self._is_edited() else "")

    def _is_as_foreseen(self, track: _Track, pending: _Pending, given: Given) -> bool:
        """Whether the call that has come is the one that has run: see `ModelState`, `ThreadState`, `same`."""
        ran, left = pending.given.leaves, pending.left.leaves
        if not list(ran) == list(left) == list(given.leaves):
            return False
        if pending.mark != self._mark() or self._is_edited() or track.state is None or track.state.difference():
            return False
        if not are_same(pending.variables, context_variables()):
            return False
        arguments = [(given.leaves[path], each[path]) for path in ran for each in (ran, left)]
        return all(same([*arguments, *track.state.tensors()]))

    def _mark(self) -> Mark:
        """Another one where weights have changed, since what is found to be written comes home first, and what has
        another form is laid out anew; or where this thread has other modes."""
        return Mark(self._stats.num_written_back, self._stats.num_relaid, ThreadState.here(self._device))

    # ---- learning

    def _learn(self, track: _Track, root: nn.Module, given: Given) -> Decision:
        """This call runs alone; what it is to the ones before is noted."""
        if track.state is None:
            track.state = ModelState(root, lambda tensor: id(tensor) in self._attached.records)
        difference = track.state.difference()
        if difference:
            self._changes(track, difference)
            return _ALONE
        call = track.foresight.note(given, self._mark())
        if track.foresight.is_in_vain:
            track.rests, track.idle = True, "no call repeats what the one before was given"
            track.forget_calls()
            return _ALONE
        return Decision(learned=(track, call, Surroundings.here(self._device)))

    def learn(
        self,
        learned: tuple[_Track, Call, Surroundings],
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a call alone, and see what it does. Called as its forward."""
        track, call, before = learned
        try:
            output = original(*args, **kwargs)
        except torch.OutOfMemoryError:  # perhaps because of the copies: once more without them
            given = Given.of(args, kwargs).leaves
            put_back([(given[path], leaf) for path, leaf in call.given.leaves.items() if path in given])
            self._no_memory(track)
            call.given = call.given.with_leaves({})
            before.restore_random(self._device)
        else:
            self._see(track, call, before, output)
            return output
        return original(*args, **kwargs)

    def _see(self, track: _Track, call: Call, before: Surroundings, output: Any) -> None:
        """A call that ran alone has ended."""
        if difference := before.difference(Surroundings.here(self._device)):
            track.off = difference
        elif track.state is not None and (difference := track.state.difference()):
            self._changes(track, difference)
        elif track.state is not None and not all(same(track.state.tensors())):
            self._changes(track, "a tensor that is no weight")
        elif self._writes_weights() or self._writes_buffers_unseen():
            track.off = "it writes its buffers"
        else:
            try:
                call.output = {path: copy_of(leaf) for path, leaf in leaves_of_output(output).items()}
            except UnknownValueError as exc:
                track.off = f"it returns {exc}"
            except torch.OutOfMemoryError:
                self._no_memory(track)

    def _no_memory(self, track: _Track) -> None:
        """There is none for copies: nobody hears of that, and nothing is copied any more."""
        track.end(_NO_ROOM)
        self._decision = _ALONE
        self._forgive(1)

    def _writes_weights(self) -> bool:
        units = self._attached.units.values()
        return any(u.is_present and not u.binding.is_guarded and u.binding.is_changed() for u in units)

    def _writes_buffers_unseen(self) -> bool:
        """Whether buffers on the device are not what they are at home: a write through `.data` counts no version. Asked
        only while calls are learned: it waits for the device."""
        buffers = [
            bound
            for unit in self._attached.units.values()
            if unit.is_present and not unit.binding.is_guarded and isinstance(unit.home, RawHome)
            for bound in unit.binding.tensors
            if not isinstance(bound.tensor, nn.Parameter)
        ]
        few = sum(bound.num_bytes for bound in buffers) <= MOST_BYTES
        return few and any(differ(bound.tensor.data, bound.master) for bound in buffers)

    def _take_back_buffers(self) -> None:
        """Both passes may have written to buffers that none had written to before: they are at home still as they were.
        Not those of a unit that has left since."""
        for unit in self._attached.units.values():
            if unit.is_present and not unit.binding.is_guarded and isinstance(unit.home, RawHome):
                pointed_elsewhere = unit.binding.replaced()
                for bound in unit.binding.written():
                    if bound not in pointed_elsewhere:
                        bound.tensor.data.copy_(bound.master)

    def _changes(self, track: _Track, difference: str) -> None:
        """The model is not what it was: what was found of it may not be so any more."""
        track.idle, track.state = difference, None
        track.proven.clear()
        track.forget_calls()
        track.num_changes += 1
        if track.num_changes >= _MOST_CHANGES:
            track.off = difference

    # ---- two passes

    def _foresee(self, track: _Track, root: nn.Module, given: Given) -> Decision:
        """This is the first call of a step, and the second one is known."""
        second = track.foresight.second_after(given)
        if second is None:
            track.forget_calls()
            return _ALONE
        kind = (given.form, second.form)
        proof = (*kind, self._mark().thread)
        if proof not in track.proven:
            if not self._is_proven(track, root, kind):
                return _ALONE
            track.proven.add(proof)
            track.foresight.drop_calls()
        first = [(leaf, copy_of(leaf)) for leaf in tensors_of(given.leaves)]
        return Decision(_Pair(track, root, first, second, Surroundings.here(self._device)))

    def _is_proven(self, track: _Track, root: nn.Module, kind: tuple[object, ...]) -> bool:
        """Run the last step, which was of this kind, once more, in lockstep, and compare."""
        calls = track.foresight.last_step(kind, self._mark())
        if calls is None:
            track.forget_calls()
            return False
        pair = _Pair(track, root, [], calls[1].given.copied(), Surroundings.here(self._device), is_trial=True)
        try:
            self._trial = Decision(pair)
            args, kwargs = calls[0].given.copied().arguments()
            root(*args, **kwargs)
        except Exception as exc:
            pair.failure = pair.failure or repr(exc)
        finally:
            self._trial, self._decision = None, _ALONE
        if pair.outputs is not None and not pair.failure:
            found = [leaves_of_output(output) for output in pair.outputs]
            expected = [call.output or {} for call in calls]
            if all(list(a) == list(b) for a, b in zip(expected, found, strict=True)) and all(
                same([(a[path], b[path]) for a, b in zip(expected, found, strict=True) for path in a])
            ):
                return True
            pair.failure = "passes that run side by side differ"
        track.off = pair.failure or "no second pass could run"
        _log.info("passes are not paired: %s", track.off)
        return False

    def run(self, pair: _Pair, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Both passes; returns the first one's result. Called as the forward of the first."""
        track = pair.track
        # Of its own: what a forward writes to its arguments is found by comparing with those that nobody has.
        second_args, second_kwargs = pair.second.copied().arguments()
        num_ooms, mark, left = self._device.num_ooms(), self._mark(), pair.second

        def second() -> Any:
            with self._lanes.beside() as lane:
                pair.root(*second_args, **second_kwargs)
                return lane.output  # of its forward: what is around that is around the call that is answered, too

        try:
            self.lockstep.prepare(runner(self._device, second), lambda: self._may_begin(pair))
            output = original(*args, **kwargs)
            found, error = self.lockstep.finish()
        except BaseException as exc:
            self.lockstep.abandon()
            if not isinstance(exc, torch.OutOfMemoryError) or not self.lockstep.has_begun:
                raise
            output = None
        else:
            if error is not None:
                pair.failure = f"the second pass ended by {error!r}"
            elif self.lockstep.is_lost:
                pair.failure = "the second pass did not come back"
                self._lanes.forget_beside()
                warn("the second pass of a step did not come back in time; passes run one by one from now on.")
            elif not pair.failure and found is not None and track.state is not None:
                pair.failure = track.state.difference() or _sharing((second_args, second_kwargs), found)
                try:
                    left = Given.of(second_args, second_kwargs)
                except UnknownValueError as exc:
                    pair.failure = pair.failure or f"it puts {exc} into its arguments"
                if mark != self._mark() or self._writes_weights():
                    pair.failure = "it writes its buffers, or changes modes of torch"
        if not self.lockstep.has_begun:  # the first ran alone
            if track.state is not None:  # else it has changed since its calls were looked at
                track.rests, track.idle = True, pair.failure or "the second pass could not begin"
            track.forget_calls()
            return output
        now = Surroundings.here(self._device)
        pair.failure = pair.failure or pair.before.difference(now)
        if pair.before.is_drawn(now):
            pair.failure = "it draws random numbers"
            pair.before.restore_random(self._device)
        # An operator that is refused memory may raise nothing, and take another way.
        num_refused = self._device.num_ooms() - num_ooms
        if num_refused or output is None:
            pair.failure, output = "memory is refused to two passes", None
            self._forgive(num_refused)
        if pair.failure:
            self._stats.num_discarded_passes += not pair.is_trial
            track.end(pair.failure)
            _log.info("passes are not paired any more: %s", track.off)
            if track.state is not None:
                track.state.restore()
            self._take_back_buffers()
            if pair.is_trial:
                return output
            # Once more, alone: whatever the two have done to each other may be in what the first returned.
            put_back(pair.first)
            return original(*args, **kwargs)
        if pair.is_trial:
            pair.outputs = (output, found)
        elif found is not None:
            track.pending = _Pending(pair.second, left, found, now.variables, mark)
        else:
            track.forget_calls()
        return output

    def _may_begin(self, pair: _Pair) -> bool:
        """A block of the first pass has run: what came before it has left everything as it was."""
        track = pair.track
        difference = "the model changes" if track.state is None else track.state.difference()
        if difference:
            self._changes(track, difference)
            return False
        difference = pair.before.difference(Surroundings.here(self._device))
        if not difference and self._writes_weights():
            difference = "it writes its buffers"
        if difference:
            pair.failure = f"before its first block {difference}"
        return not difference


def _sharing(given: Any, output: Any) -> str:
    """Whether what a forward returns lies in memory that it was given: its caller would see its own tensor change."""
    try:
        places = [
            {t.untyped_storage().data_ptr() for t in tensors_of(leaves_of_output(each))} for each in (given, output)
        ]
    except UnknownValueError as exc:
        return f"it returns {exc}"
    return "it returns what it is given" if places[0] & places[1] - {0} else ""
