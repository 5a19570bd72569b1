"""Keeps the budget: measures what each phase takes beside the weights, and asks the planner what fits.

Everything on the device counts: our weights, activations, and what others hold through torch's allocator. The limit is
held by the allocator itself (`Device.set_cap`); the ledger's part is that it is never hit. It cuts a call into
*intervals*, from one entering of a component to the next, and reads the peak of reserved memory at the end of those in
which there is something to learn.

    reserved peak of the interval = weights (known exactly) + what others had before it + what it took itself

The last term is the key's reserve. In steady state nothing is read and nothing is planned.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence

from layerstream.blocks import UnitSpec, WholeSpec
from layerstream.budget import auto_bytes, format_bytes, is_unlimited, parse_bytes
from layerstream.device.base import Device
from layerstream.engine.planner import Planner
from layerstream.errors import BudgetError
from layerstream.finalisers import only_here
from layerstream.planning.order import OrderLearner
from layerstream.planning.phase_plan import Phase, PhasePlan
from layerstream.planning.phases import CallKind, Key
from layerstream.planning.plan import Plan
from layerstream.stats import PhaseStats, Stats

# Of a measurement: the allocator may cut its segments otherwise the next time. In units of its granularity (2 MiB).
_MARGIN_GRAINS = 8
# With this part of the budget free, what others allocate in the middle of a phase is looked at every few passes only.
_AMPLE_SHARE = 8
_WATCHED_PASSES = 8
# What errors of allocators say, torch's and the simulated one's: what was asked for, and what there was by then.
_SIZE = r"([0-9.]+ (?:[KMGT]?i?B|bytes))"
_TRIED = re.compile(rf"[Tt]ried to allocate {_SIZE}|{_SIZE} asked for")
_HELD = re.compile(rf"{_SIZE} is allocated")


class Ledger:
    """What is known of one streamer's device memory, and the plan that follows from it.

    Args:
        budget_bytes: of reserved memory; None: no limit, and the least of weights.
        num_slots: fixes the number of slots of every phase.
    """

    def __init__(self, device: Device, stats: Stats, budget_bytes: int | None, num_slots: int | None) -> None:
        self.budget_bytes = budget_bytes
        self.phase_stats = PhaseStats()
        self.stats_of: dict[str, PhaseStats] = {}
        self._device = device
        self._stats = stats
        self._grain = device.rounded_bytes(1)
        self.planner = Planner(budget_bytes, num_slots, self._grain)
        self._kind: CallKind | None = None  # of the call that runs, or ran last
        self._outside_bytes = 0  # what others had when it began
        self._interval_weights: int | None = None  # our weights in the running interval; None: none runs
        self._is_open = False
        self._claim: object = object()  # on the limit, which the process keeps for whoever asked
        self._release: Callable[[], object] = lambda: None
        self._num_ooms = 0
        self._is_unchecked = False  # passes have run since `_num_ooms` was read
        self._num_unwatched = 0  # passes since somebody looked at what others have

    # ---- from open to close

    def open(self, weights_bytes: int) -> None:
        """Hold the allocator to the budget, and note what is on the device before anything of ours."""
        self._stats.context_bytes = self._device.context_bytes()
        self._stats.foreign_bytes = max(0, self._device.allocated_bytes() - weights_bytes)
        self._outside_bytes = self._stats.foreign_bytes
        self._num_ooms = self._device.num_ooms()
        self._device.reset_peaks()
        self._is_open = True
        # A pipeline dropped without closing gives them back, too, when it is collected.
        self._release = weakref.finalize(self, only_here(_give_back), self._device, self._claim)
        self._device.grow_segments(self._claim, is_on=True)
        if self.budget_bytes is not None:
            self._device.set_cap(self.budget_bytes, owner=self._claim)

    def close(self) -> None:
        """Give the allocator back the limit and the ways it had; idempotent."""
        self._is_open = False
        self._release()

    def components(
        self,
        components: Sequence[tuple[str, bool]],
        units: Sequence[UnitSpec],
        whole: Sequence[WholeSpec],
        changed: Collection[str],
        order: OrderLearner,
    ) -> None:
        """The pipeline has these components (name, is_repeated) and units now, used in this order; what was measured of
        `changed` ones is forgotten."""
        self.planner.components(components, units, whole, changed, order)
        self._kind = None

    def check(
        self,
        components: Sequence[tuple[str, bool]],
        units: Sequence[UnitSpec],
        whole: Sequence[WholeSpec],
        outside_bytes: int,
    ) -> None:
        """Raise BudgetError if the budget cannot hold the least beside `outside_bytes` of others."""
        phases = [
            Phase((name,), is_repeated, outside_bytes or None, is_of_others=True) for name, is_repeated in components
        ]
        limit = self._device.total_bytes() if self.budget_bytes is None else self.budget_bytes
        try:
            self.planner.check(units, phases, limit, whole)
        except BudgetError as exc:
            certain = self._certain_bytes(exc.least_bytes or 0)
            raise BudgetError(
                f"{exc} What a call takes beside that is not known before it has run: {_certain(certain)}",
                budget_bytes=exc.budget_bytes,
                least_bytes=exc.least_bytes,
                needed_bytes=certain,
            ) from None

    def _certain_bytes(self, least_bytes: int) -> int:
        """A budget that does if any does: all there is, but for what else needs memory on the device."""
        return max(least_bytes, auto_bytes(self._device.total_bytes() - self._device.context_bytes()))

    @property
    def plan(self) -> Plan:
        """The plan of the phase that runs, or ran last; before the first, what is certain."""
        return self.planner.plan

    @property
    def least_bytes(self) -> int | None:
        """The smallest budget in which all that has run would run again; None: that is not known yet."""
        ran = [p for p in self.plan.phases if p.phase.name in self.stats_of]
        beside = [self.stats_of[p.phase.name].most_beside_bytes for p in ran]
        known = [p.least_bytes + most for p, most in zip(ran, beside, strict=True) if most is not None]
        return max(known) + self.plan.whole_bytes if known and len(known) == len(ran) else None

    # ---- entering components

    def begin(
        self,
        component: str,
        entry: str,
        shapes: tuple[tuple[Hashable, tuple[int, ...]], ...],
        is_grad: bool,
        weights_bytes: int,
    ) -> PhasePlan:
        """A component is entered: the plan of its phase, with what is known of such a call.

        Args:
            weights_bytes: what our weights take on the device now.
        Raises:
            BudgetError: it is known not to fit, whatever else is given up.
        """
        kind = self.planner.tracker.enter(Key(component, entry, shapes, is_grad))
        if self._kind is not None and self.planner.serves(kind):
            phase_plan = self.plan.phase_of(component)
            is_same_phase = self._kind.key.component in phase_plan.phase.components
            # The next token: its shapes have grown, and what is kept for them is enough.
            if is_same_phase and self._goes_on(kind, weights_bytes):
                return phase_plan
        self._check_passes()
        self.end_interval()
        self._outside_bytes = max(0, self._device.allocated_bytes() - weights_bytes)
        self._stats.num_plans += self.planner.replan(kind, self._outside_bytes)
        phase_plan = self.plan.phase_of(component)
        self._kind = kind
        self._num_ooms = self._device.num_ooms()  # what was refused before is not this call's
        self.phase_stats = self.stats_of.setdefault(phase_plan.phase.name, PhaseStats())
        self._count_pass(kind)
        if kind.over_bytes is not None:
            self.phase_stats.reserve_bytes = kind.over_bytes + self._outside_bytes
        return phase_plan

    def begin_use(self, *, is_call: bool) -> None:
        """Somebody begins to use the components: a call of a pipeline, or of a bare component."""
        self.planner.tracker.begin_use(is_call)

    def again(self, kind: CallKind, weights_bytes: int) -> bool:
        """A call begins that is like one before under the present plan; returns whether there is nothing to learn or to
        change: else it is to `begin`."""
        if not self._goes_on(kind, weights_bytes):
            return False
        self.planner.tracker.again(kind.key.component)
        return True

    def _goes_on(self, kind: CallKind, weights_bytes: int) -> bool:
        is_settled = self.is_settled and self._is_settled(kind)
        if not is_settled or self.planner.is_due or self.has_grown(weights_bytes):
            return False
        self._kind = kind
        self._count_pass(kind)
        return True

    def _count_pass(self, kind: CallKind) -> None:
        self.phase_stats.num_passes += 1
        self.phase_stats.num_tokens += kind.is_growing

    @property
    def kind(self) -> CallKind:
        """Of the call that runs."""
        assert self._kind is not None
        return self._kind

    def has_grown(self, weights_bytes: int) -> bool:
        """Whether others hold more than when the phase began: a scheduler's history, say, or another library."""
        plan = self.planner.present
        if self.budget_bytes is None or plan is None:
            return False
        if self.budget_bytes - plan.peak_bytes > self.budget_bytes // _AMPLE_SHARE:
            self._num_unwatched += 1  # there is room for that, and reading takes time
            if self._num_unwatched < _WATCHED_PASSES:
                return False
        has_grown = self._device.allocated_bytes() - weights_bytes > self._outside_bytes
        if not has_grown:
            self._num_unwatched = 0
        return has_grown

    @property
    def is_settled(self) -> bool:
        """Whether the running call's reserve and times are known, so that the next like it changes nothing."""
        return self._kind is not None and self._is_settled(self._kind)

    def _is_settled(self, kind: CallKind) -> bool:
        return kind.is_measured and not self._wants_times(kind)

    def start_interval(self, weights_bytes: int) -> None:
        """All that the running call needs of us is on the device; the rest that appears is its own."""
        assert self._kind is not None
        if self._interval_weights is not None:
            return  # it goes on
        if not self._kind.is_measured:
            self._device.empty_cache()  # what earlier phases left cached is not this one's
        self._device.reset_peaks()
        self._interval_weights = weights_bytes

    def look(self) -> int:
        """Note the peak so far, for whoever asks in the middle of an interval; returns it."""
        peak = self._device.peak_reserved_bytes() if self._is_open else 0
        self._stats.peak_reserved_bytes = max(self._stats.peak_reserved_bytes, peak)
        self.phase_stats.peak_reserved_bytes = max(self.phase_stats.peak_reserved_bytes, peak)
        return peak

    def end_interval(self) -> None:
        """Something else begins, or streaming ends: read the peak."""
        weights, self._interval_weights = self._interval_weights, None
        if weights is None or self._kind is None:
            return
        peak = self.look()
        self.phase_stats.peak_weights_bytes = max(self.phase_stats.peak_weights_bytes, weights)
        self.phase_stats.most_beside_bytes = max(self.phase_stats.most_beside_bytes or 0, peak - weights)
        if not self._kind.is_measured:
            over = max(0, peak - weights - self._outside_bytes)
            margin = _MARGIN_GRAINS * self._grain + self._device.page_bytes()
            if self.budget_bytes is not None:  # it has just run in what there was
                margin = min(margin, max(0, self.budget_bytes - weights - self._outside_bytes - over))
            self._kind.measured(over, margin)
            self.phase_stats.reserve_bytes = self._outside_bytes + over

    # ---- time

    @property
    def wants_times(self) -> bool:
        """Whether the running pass should be timed, block by block."""
        return self._kind is not None and self._wants_times(self._kind)

    def _wants_times(self, kind: CallKind) -> bool:
        plan = self.planner.present
        if plan is None or not kind.is_measured or kind.num_untimed <= 0:
            return False
        phase_plan = plan.phase_of(kind.key.component)
        if phase_plan.num_slots:
            return True
        # A denoiser that fits by itself may have to make way for a text encoder: its times tell what that costs.
        may_make_way = phase_plan.phase.is_repeated and not plan.is_all_resident
        return may_make_way and any(u.is_block for u in plan.units if u.index in phase_plan.resident)

    def starts_timing(self) -> CallKind:
        """The running pass is timed: of the key that this returns."""
        assert self._kind is not None
        self._kind.starts_timing()
        return self._kind

    def timed(self, kind: CallKind, compute_ms: Mapping[int, float]) -> None:
        """A timed pass of that key took so much, by unit."""
        kind.timed(compute_ms)
        self.planner.timed(kind)

    # ---- what does not fit

    def spoil_interval(self) -> None:
        """Memory of our own is taken for a moment: what the running interval takes is not known by its peak."""
        self._interval_weights = None

    def did_not_fit(self) -> None:
        """The running call ran out of memory: the next like it gets all the room there is."""
        self.look()
        self._interval_weights = None
        self._num_ooms, self._is_unchecked = self._device.num_ooms(), False
        if self._kind is not None:
            self._kind.forget()
        self.planner.did_not_fit()

    def check_operators(self) -> None:
        """Raise if an operator was refused memory and went another way, whose result may differ.

        cuDNN tries its algorithms in turn and takes the next one when there is no room for a workspace.
        """
        plan = self.planner.present
        if self._kind is None or plan is None:
            return
        # In the steady state of a phase that runs many times that waits for the next component: reading takes time.
        self._is_unchecked = True
        if not (self.is_settled and plan.phase_of(self._kind.key.component).phase.is_repeated):
            self._check_passes()

    @contextlib.contextmanager
    def forgiving(self) -> Iterator[None]:
        """Allocations of our own inside may be refused, and done without."""
        num_ooms = self._device.num_ooms()
        yield
        self.forgive(self._device.num_ooms() - num_ooms)

    def forgive(self, num_ooms: int) -> None:
        """So many allocations were refused to what nobody uses the results of."""
        self._num_ooms += num_ooms

    def _check_passes(self) -> None:
        if not self._is_unchecked:
            return
        self._is_unchecked = False
        count = self._device.num_ooms()
        if count > self._num_ooms:
            self._num_ooms = count
            self.did_not_fit()
            raise self._error(
                "an operator was refused memory and took another way, so that the result may differ from the resident "
                "pipeline's",
                0,
                self._device.allocated_bytes(),
            )

    def explain(self, error: BaseException, weights_bytes: int, *, is_for_weights: bool) -> BudgetError:
        """The error for an allocation that was refused.

        Args:
            is_for_weights: what was asked for is part of the least that weights take.
        """
        self._num_ooms, self._is_unchecked = self._device.num_ooms(), False
        tried_bytes, held_bytes = _found(_TRIED, error), _found(_HELD, error)
        size = f" of {format_bytes(tried_bytes)}" if tried_bytes else ""
        # Beside the weights, when it was refused; the peak may have been at another moment.
        wanted_bytes = max(0, held_bytes - weights_bytes) + (0 if is_for_weights else tried_bytes)
        return self._error(f"an allocation{size} was refused", wanted_bytes, weights_bytes)

    def _error(self, what: str, wanted_bytes: int, weights_bytes: int) -> BudgetError:
        peak = max(self._device.peak_reserved_bytes(), self._device.reserved_bytes())
        others = max(0, peak - weights_bytes)
        component = self._kind.key.component if self._kind is not None else None
        where = f" in `{component}`" if component else ""
        plan = self.plan
        least = plan.phase_of(component).least_bytes + plan.whole_bytes if component else plan.least_bytes
        reached = least + max(others, wanted_bytes)
        is_known = self._kind is not None and self._kind.is_measured
        needed = reached if is_known else self._certain_bytes(reached)
        is_limited = self.budget_bytes is not None and not is_unlimited(self.budget_bytes)
        budget = f"vram_budget {format_bytes(self.budget_bytes or 0)}" if is_limited else "the device"
        if self.budget_bytes is not None and reached <= self.budget_bytes:
            advice = "The next call gets all the room there is: call again, or make"
        elif is_known:
            advice = f"Raise vram_budget to at least {needed} bytes ({format_bytes(needed)}), or make"
        else:
            advice = (
                f"It needs more than {reached} bytes ({format_bytes(reached)}), which it had reached: "
                f"{_certain(needed)} Or make"
            )
        foreign = ""
        if self._outside_bytes:
            foreign = (
                f", of which {format_bytes(self._outside_bytes)} were there before this component was entered "
                f"({format_bytes(self._stats.foreign_bytes)} before streaming began)"
            )
        return BudgetError(
            f"{budget} is too small{where}: {what}. The peak was {format_bytes(peak)}: {format_bytes(weights_bytes)} "
            f"of weights, {format_bytes(others)} of activations and other tensors{foreign}. {advice} images or batches "
            "smaller; a VAE takes less with enable_tiling() or enable_slicing().",
            budget_bytes=self.budget_bytes,
            least_bytes=reached,
            needed_bytes=needed,
        )


def _found(pattern: re.Pattern[str], error: BaseException) -> int:
    """Bytes in an error's text; 0 if it does not say."""
    match = pattern.search(str(error))
    return 0 if match is None else parse_bytes(next(filter(None, match.groups())).replace("bytes", "B"))


def _give_back(device: Device, claim: object) -> None:
    try:
        device.set_cap(None, owner=claim)
    finally:
        device.grow_segments(claim, is_on=False)


def _certain(num_bytes: int) -> str:
    size = "" if is_unlimited(num_bytes) else f": {num_bytes} bytes ({format_bytes(num_bytes)}) here"
    return f'vram_budget="auto", all that is free{size}, does if anything does, and report() then names the least.'
