"""Has plans made of what is known of the kinds of call, and knows when another one is due.

A plan stays as long as reserves and times are about what it was made with: laying out anew costs loads. Reserves are
rounded, what others hold may change a little, and how often units are used is counted now and then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from layerstream.blocks import Sizes, UnitSpec, WholeSpec
from layerstream.errors import BudgetError
from layerstream.planning.costs import DECODE_GB_PER_S, LINK_GB_PER_S, Costs, uses_per_pass
from layerstream.planning.order import OrderLearner
from layerstream.planning.phase_plan import Phase, PhasePlan
from layerstream.planning.phases import CallKind, PhaseTracker
from layerstream.planning.plan import Plan, check_budget, make_plan

# Reserves are rounded up to this part of the budget, so that a few bytes more or less plan nothing anew.
_QUANTA_PER_BUDGET = 256
_MOST_QUANTUM_BYTES = 2**26


class Planner:
    """The present plan of one streamer.

    Attributes:
        tracker: which phase runs, and what is known of each kind of call.
        links: measured speeds in GB/s, from the host ("") and from other GPUs, by name.
        decode_gb_per_s: of what is packed, in bytes on the device; measured, or assumed.
        make_all_raw: has what is packed made raw, since the budget has no room for wire buffers.

    Args:
        budget_bytes: of reserved memory; None: no limit, and the least of weights.
        num_slots: fixes the number of slots of every phase.
        granularity: every buffer takes a multiple of it.
    """

    def __init__(self, budget_bytes: int | None, num_slots: int | None, granularity: int) -> None:
        self.tracker = PhaseTracker([])
        self.links: dict[str, float] = {}
        self.decode_gb_per_s = DECODE_GB_PER_S
        self.make_all_raw: Callable[[], object] = lambda: None
        self._budget_bytes = budget_bytes
        self._num_slots = num_slots
        self._granularity = granularity
        self._quantum = max(granularity, min(_MOST_QUANTUM_BYTES, (budget_bytes or 0) // _QUANTA_PER_BUDGET))
        self._units: Sequence[UnitSpec] = ()
        self._packed: dict[int, Sizes] = {}  # by unit: of those that are packed, or are to be
        self._keepers: dict[int, str] = {}  # by unit: of those that are in another GPU's memory
        self._has_other_sizes = False  # or other keepers, than were planned with
        self._is_short = False  # of memory, although what is packed could be raw
        self._whole: Sequence[WholeSpec] = ()
        self._uses = _Uses()
        self._plan: Plan | None = None
        self._planned_costs: Costs | None = None
        # The kinds that the present plan was found to do for, each with whether room for its growth was looked for.
        self._planned_with: set[tuple[CallKind, bool]] = set()
        self._has_new_times = False  # not planned with yet
        self._planned_brief: frozenset[str] = frozenset()  # of `PhaseTracker.brief`
        self._refused: set[tuple[str, ...]] = set()  # components that cannot share a phase within the budget

    def components(
        self,
        components: Sequence[tuple[str, bool]],
        units: Sequence[UnitSpec],
        whole: Sequence[WholeSpec],
        changed: Collection[str],
        order: OrderLearner,
    ) -> None:
        """See `Ledger.components`."""
        if order is not self._uses.order:
            self._uses = _Uses(order)
        self.tracker = self.tracker.successor(components, changed)
        self._whole = whole
        self._set_units(units)
        self._plan = None
        self._planned_with = set()

    def pack(self, sizes: Mapping[int, Sizes]) -> None:
        """These units take so much at home and over the bus from now on; the others what they take on the device. The
        next call is planned anew."""
        self._packed = dict(sizes)
        self._set_units(self._units)
        self._has_other_sizes = True
        self._planned_with = set()

    def keep(self, keepers: Mapping[int, str]) -> None:
        """These units come from the memory of these GPUs from now on, the others from that of the host. The next call
        is planned anew."""
        self._keepers = dict(keepers)
        self._set_units(self._units)
        self._has_other_sizes = True
        self._planned_with = set()

    def has_room_to_pack(self, sizes: Mapping[int, Sizes]) -> bool:
        """Whether the budget would hold the least of these sizes, as far as reserves are known."""
        try:
            self.check(_sized(self._units, sizes), [p.phase for p in self.plan.phases], self._budget_bytes, self._whole)
        except BudgetError:
            return False
        return True

    def did_not_fit(self) -> None:
        """A call was refused memory: the next one gets that of wire buffers, too."""
        self._is_short = self._has_other_sizes = bool(self._packed)

    def _unpack(self) -> None:
        self.make_all_raw()
        self.pack({})
        self._is_short = False

    def _set_units(self, units: Sequence[UnitSpec]) -> None:
        self._units = [replace(u, keeper=self._keepers.get(u.index, "")) for u in _sized(units, self._packed)]

    def check(
        self, units: Sequence[UnitSpec], phases: Sequence[Phase], limit: int | None, whole: Sequence[WholeSpec]
    ) -> None:
        """Raise BudgetError if a limit cannot hold the least of these."""
        check_budget(units, phases, limit, granularity=self._granularity, whole=whole)

    # ---- the present plan

    @property
    def present(self) -> Plan | None:
        """None: none was asked for since the components are what they are."""
        return self._plan

    @property
    def plan(self) -> Plan:
        """The plan of the phase that runs, or ran last; before the first, what is certain."""
        if self._plan is None:
            self._plan = self._make(self.tracker.phases(0), None)
        return self._plan

    def serves(self, kind: CallKind) -> bool:
        """Whether the present plan was found to do for such a call."""
        return self._plan is not None and (kind, kind.is_growing) in self._planned_with

    @property
    def is_due(self) -> bool:
        """Whether there are times, or counts of uses or passes, that another plan may follow from."""
        is_other = self._has_new_times or self._has_other_sizes
        return is_other or self.tracker.brief != self._planned_brief or self._uses_differ()

    def timed(self, kind: CallKind) -> None:
        """A pass of that kind was timed."""
        self._has_new_times |= kind.is_timed

    def knows_uses(self, phase_plan: PhasePlan) -> bool:
        """Whether enough was seen of a phase to tell what it uses never or often, or that does not matter."""
        phase = phase_plan.phase
        return not phase.is_repeated or not phase_plan.num_slots or phase.components in self._uses.counted

    # ---- another plan

    def replan(self, kind: CallKind, outside_bytes: int) -> bool:
        """A call of that kind is entered: make another plan, if that is due. Returns whether there is another.

        Args:
            outside_bytes: what others than our weights have on the device.
        Raises:
            BudgetError: it is known not to fit, whatever else is given up.
        """
        before = self._plan
        if self._is_short:
            self._unpack()
        self._merge_partners(outside_bytes)
        phases = self.tracker.phases(outside_bytes)
        costs = self._costs()
        self._has_new_times, self._planned_brief = False, self.tracker.brief
        is_as_planned = costs == self._planned_costs and not self._has_other_sizes
        if before is None or not is_as_planned or not self._still_holds(before, phases, outside_bytes):
            try:
                self._plan = self._make_for(kind, phases, costs, outside_bytes)
            except BudgetError:
                if not self._packed:
                    raise
                self._unpack()
                self._plan = self._make_for(kind, phases, costs, outside_bytes)
            self._planned_costs, self._has_other_sizes = costs, False
        is_new = self._plan is not before
        self._planned_with = {*(() if is_new else self._planned_with), (kind, kind.is_growing)}
        return is_new

    def _make_for(self, kind: CallKind, phases: Sequence[Phase], costs: Costs | None, outside_bytes: int) -> Plan:
        attempts = (
            [self._rounded(p) for p in phases],
            phases,
            # What another phase took the last time may not be what it takes the next time.
            [self._unknown(p, is_current=False) for p in phases],
        )
        for attempt in attempts:
            with contextlib.suppress(BudgetError):
                return self._make(attempt, costs)
        return self._make_with_all_the_room(kind, phases, outside_bytes)

    def _make_with_all_the_room(self, kind: CallKind, phases: Sequence[Phase], outside_bytes: int) -> Plan:
        """Margins and room to grow are no reason to refuse a call, nor is what a larger call took: only what this one
        took itself."""
        if kind.is_measured and kind.over_bytes is not None:
            certain = kind.over_bytes + outside_bytes
            current = self.tracker.current
            for phase in phases:
                if phase.components == current:
                    units = [u for u in self._units if phase.involves(u)]
                    units = [replace(u, component=phase.components[0], also=()) for u in units]
                    alone = replace(phase, components=phase.components[:1], reserve_bytes=certain)
                    self.check(units, [alone], self._budget_bytes, self._whole)
        unknown = [self._unknown(self._unknown(p, is_current=False), is_current=True) for p in phases]
        return self._make(unknown, None)

    def _unknown(self, phase: Phase, *, is_current: bool) -> Phase:
        """The phase without its reserve, if it is the current one, or if it is another."""
        is_meant = (phase.components == self.tracker.current) is is_current
        return replace(phase, reserve_bytes=None) if is_meant else phase

    def _still_holds(self, plan: Plan, phases: Sequence[Phase], outside_bytes: int) -> bool:
        """Whether a plan was made for these reserves, or for little more."""
        old = [p.phase for p in plan.phases]
        if [_kind_of(phase) for phase in old] != [_kind_of(phase) for phase in phases]:
            return False
        needed = self.tracker.needed_bytes(outside_bytes)
        for before, now, least in zip(old, phases, needed, strict=True):
            if before.reserve_bytes is None or now.reserve_bytes is None or least is None:
                if before.reserve_bytes is not now.reserve_bytes:
                    return False
            elif not (least <= before.reserve_bytes and before.reserve_bytes - 4 * self._quantum <= now.reserve_bytes):
                return False
        return True

    def _rounded(self, phase: Phase) -> Phase:
        if phase.reserve_bytes is None:
            return phase
        return replace(phase, reserve_bytes=-(-phase.reserve_bytes // self._quantum) * self._quantum)

    def _make(self, phases: Sequence[Phase], costs: Costs | None) -> Plan:
        return make_plan(
            self._units,
            phases,
            self._budget_bytes,
            costs=costs,
            num_slots=self._num_slots,
            granularity=self._granularity,
            whole=self._whole,
        )

    def _merge_partners(self, outside_bytes: int) -> None:
        """Components that take turns share a phase, if the budget holds the least of all of them together."""
        partners = self.tracker.partners()
        if partners is None or partners in self._refused:
            return
        sharing = [p for p in self.tracker.phases(outside_bytes) if set(p.components) & set(partners)]
        reserve = max((p.reserve_bytes or 0 for p in sharing), default=0)
        units = [u for u in self._units if u.component in partners]
        try:
            self.check(units, [Phase(partners, True, reserve)], self._budget_bytes, self._whole)
        except BudgetError:
            self._refused.add(partners)
            return
        self.tracker.merge(partners)

    # ---- times and uses

    def _costs(self) -> Costs | None:
        compute_ms = self.tracker.compute_ms()
        if not self.links or not compute_ms:
            return None
        keepers = {name: speed for name, speed in self.links.items() if name}
        return Costs(
            self.links.get("", LINK_GB_PER_S),
            compute_ms,
            self._uses_per_pass(),
            self._uses.seldom,
            self.decode_gb_per_s,
            keepers,
        )

    def _uses_differ(self) -> bool:
        """Whether units are used more or less often than was planned with."""
        planned = self._planned_costs
        return self._uses.has_new and planned is not None and self._uses_per_pass() != planned.uses

    def _uses_per_pass(self) -> Mapping[int, int]:
        """Counted when there are new times, and again whenever as much again has been seen."""
        if self._has_new_times or self._uses.has_new:
            self._uses.count(self._units, [p for p in self.tracker.phases(0) if p.is_repeated])
        return self._uses.per_pass


class _Uses:
    """How often a pass uses each unit.

    Attributes:
        order: which has seen the uses.
        per_pass: of units that a pass uses never or often.
        seldom: of these, what most passes never use, and some do.
        counted: components of phases whose uses were counted.
    """

    def __init__(self, order: OrderLearner | None = None) -> None:
        self.order = order
        self.per_pass: Mapping[int, int] = {}
        self.seldom: frozenset[int] = frozenset()
        self.counted: set[tuple[str, ...]] = set()
        self._num_counted = 0

    @property
    def has_new(self) -> bool:
        """Whether as much again was seen as when uses were counted last."""
        return self.order is not None and self.order.num_uses >= max(2 * self._num_counted, 1)

    def count(self, units: Sequence[UnitSpec], phases: Sequence[Phase]) -> None:
        """Count what was seen of these phases."""
        if self.order is None:
            return
        self._num_counted = self.order.num_uses
        counts = self.order.uses()
        for phase in phases:
            blocks = [u for u in units if u.is_block and u.component in phase.components]
            found = uses_per_pass(blocks, counts)
            if found is not None:
                self.counted.add(phase.components)
                others = {u: n for u, n in self.per_pass.items() if u not in {b.index for b in blocks}}
                self.per_pass = {**others, **found}
                self.seldom = self.seldom - set(found) | {u for u, n in found.items() if not n and counts[u]}


def _sized(units: Sequence[UnitSpec], packed: Mapping[int, Sizes]) -> list[UnitSpec]:
    """The units, of which these are packed, by index."""
    return [replace(unit, packed=packed.get(unit.index)) for unit in units]


def _kind_of(phase: Phase) -> tuple[object, ...]:
    return phase.components, phase.is_repeated, phase.is_brief
