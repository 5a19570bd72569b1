"""Decides what is on the device while each phase runs: residents, slots, and what is kept for other phases. Pure.

The budget is of everything on the device: our weights, and beside them what a phase was measured to take (its reserve).
A phase whose reserve is not known takes the least and keeps nothing of others. The phases that run many times a call
choose first: which blocks stay, and how many slots the others pass through, so that a pass takes the least predicted
time. What is then left in all phases goes to what they would load again once a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from layerstream.blocks import Placement, UnitSpec, WholeSpec
from layerstream.errors import BudgetError
from layerstream.planning.claims import fill
from layerstream.planning.costs import Costs
from layerstream.planning.draft import Draft, too_small
from layerstream.planning.phase_plan import AssumedReserve, Phase, PhasePlan
from layerstream.planning.summary import PlanSummary, StackSummary, stacks_of


@dataclass(frozen=True)
class Plan:
    """What is on the device in every phase of the call. `print` shows a table, and so do notebooks.

    Attributes:
        budget_bytes: what is allowed; None for "the least".
        least_bytes: the least weights under which every phase runs, those that stay whole included.
        needed_bytes: the smallest budget that would do, as far as reserves are known.
        granularity: every buffer takes a multiple of it.
        whole: what stays on the device as it is, in every phase.
    """

    units: tuple[UnitSpec, ...]
    phases: tuple[PhasePlan, ...]
    budget_bytes: int | None
    least_bytes: int
    needed_bytes: int
    costs: Costs | None = None
    granularity: int = 1
    num_slots: int | None = None
    whole: tuple[WholeSpec, ...] = ()

    @property
    def whole_bytes(self) -> int:
        """Of what stays on the device as it is."""
        return sum(spec.num_bytes for spec in self.whole)

    @property
    def peak_bytes(self) -> int:
        """The most that is on the device in any phase, as far as reserves are known."""
        most = max((p.weights_bytes + (p.phase.reserve_bytes or 0) for p in self.phases), default=0)
        return most + self.whole_bytes

    def phase_of(self, component: str) -> PhasePlan:
        """The phase in which a component runs."""
        return self._phase_by_component[component]

    @cached_property
    def _phase_by_component(self) -> Mapping[str, PhasePlan]:
        return {component: p for p in self.phases for component in p.phase.components}

    def placement(self, unit_index: int) -> Placement:
        """Where a unit lives."""
        component = next(u.component for u in self.units if u.index == unit_index)
        own = self.phase_of(component)
        if unit_index in own.packed:
            return Placement.PACKED
        if unit_index not in own.resident:
            return Placement.STREAMED
        everywhere = all(unit_index in p.resident or unit_index in p.kept for p in self.phases)
        return Placement.RESIDENT if everywhere else Placement.BY_PHASE

    @cached_property
    def is_all_resident(self) -> bool:
        """Whether everything stays on the device throughout."""
        return all(p.resident | p.kept >= {unit.index for unit in self.units} for p in self.phases)

    def bytes_without_streaming(self, component: str) -> int:
        """The budget in which all that a pass of the component's phase uses would stay on the device, beside what it
        was measured to take."""
        phase = self.phase_of(component).phase
        uses = self.costs.uses if self.costs is not None else {}
        used = [u for u in self.units if phase.involves(u) and uses.get(u.index, 1)]
        weights = sum(-(-u.num_bytes // self.granularity) * self.granularity for u in used)
        return max(weights + (phase.reserve_bytes or 0) + self.whole_bytes, self.needed_bytes)

    @cached_property
    def next_gib_ms(self) -> Mapping[str, float]:
        """Milliseconds that one GiB more would take off a pass, by phase that is repeated; empty where not known.

        Takes a second plan, made once, when somebody asks. Texts never plan: they say it if it was asked for before.
        """
        now = {p.phase.name: p.prediction for p in self.phases if p.prediction is not None and p.phase.is_repeated}
        if self.budget_bytes is None:
            return {}
        if all(prediction.ms_per_pass <= prediction.compute_ms + 1e-6 for prediction in now.values()):
            return dict.fromkeys(now, 0.0)  # nothing is faster than compute alone
        more = {p.phase.name: p.prediction for p in self.under(self.budget_bytes + 2**30).phases}
        gains = ((name, prediction.ms_per_pass, more[name]) for name, prediction in now.items())
        return {name: ms - its.ms_per_pass for name, ms, its in gains if its is not None}

    def with_next_gib(self) -> Plan:
        """The same plan, whose texts say what one GiB more would buy."""
        _ = self.next_gib_ms
        return self

    def under(self, budget_bytes: int | None, *, assumed: AssumedReserve | None = None) -> Plan:
        """The plan for another budget, with the times and reserves of this one.

        Args:
            assumed: of every phase, in the place of what was measured.
        Raises:
            BudgetError: a phase does not fit even with all that can stream streaming.
        """
        phases = [p.phase for p in self.phases]
        if assumed is not None:
            phases = [assumed.of(phase) for phase in phases]
        return make_plan(
            self.units,
            phases,
            budget_bytes,
            costs=self.costs,
            num_slots=self.num_slots,
            granularity=self.granularity,
            whole=self.whole,
        )

    def summary(self) -> PlanSummary:
        """What the plan says, as plain values."""
        return PlanSummary(
            budget_bytes=self.budget_bytes,
            needed_bytes=self.needed_bytes,
            peak_bytes=self.peak_bytes,
            stacks=tuple(stack for p in self.phases for stack in self._stacks(p)),
            whole=self.whole,
            phases=tuple(phase_plan.summary() for phase_plan in self.phases),
            next_gib_ms=dict(vars(self).get("next_gib_ms", {})),  # what was not asked for is not worked out here
        )

    def _stacks(self, phase_plan: PhasePlan) -> Iterator[StackSummary]:
        units = [u for u in self.units if u.component in phase_plan.phase.components]
        return stacks_of(units, self.placement, phase_plan.num_slots, phase_plan.slot_bytes)

    def as_dict(self) -> dict[str, Any]:
        """What the plan says as numbers, strings, lists and dicts, for JSON."""
        return self.summary().as_dict()

    def __str__(self) -> str:
        return self.summary().page().text()

    def __repr__(self) -> str:
        return f"Plan({self.summary().line()})"

    def _repr_html_(self) -> str:
        return self.summary().page().html()


def make_plan(
    units: Sequence[UnitSpec],
    phases: Sequence[Phase],
    budget_bytes: int | None,
    *,
    costs: Costs | None = None,
    num_slots: int | None = None,
    granularity: int = 1,
    whole: Sequence[WholeSpec] = (),
) -> Plan:
    """Decide for every phase what is on the device while it runs.

    Args:
        phases: every component is in exactly one.
        budget_bytes: device memory for weights and reserves; None: the least weights.
        costs: assumed where not measured.
        num_slots: fix the number of slots (at least 2), where so many fit.
        granularity: every buffer is rounded up to a multiple of it.
        whole: weights that are on the device as they are throughout.
    Raises:
        BudgetError: a phase does not fit even with all that can stream streaming.
    """
    drafts, needed = _drafts_within(units, phases, budget_bytes, costs, granularity, whole)
    whole_bytes = sum(spec.num_bytes for spec in whole)
    for draft in drafts:
        draft.take_least(num_slots if budget_bytes is None else None)
        if budget_bytes is not None and draft.phase.reserve_bytes is not None:
            draft.capacity_bytes = budget_bytes - whole_bytes - draft.phase.reserve_bytes
    known = [d for d in drafts if d.capacity_bytes is not None]
    if known:
        fill(drafts, known, num_slots)
    return Plan(
        units=tuple(units),
        phases=tuple(d.plan() for d in drafts),
        budget_bytes=budget_bytes,
        least_bytes=max((d.least_bytes for d in drafts), default=0) + whole_bytes,
        needed_bytes=needed,
        costs=costs,
        granularity=granularity,
        num_slots=num_slots,
        whole=tuple(whole),
    )


def check_budget(
    units: Sequence[UnitSpec],
    phases: Sequence[Phase],
    budget_bytes: int | None,
    *,
    granularity: int = 1,
    whole: Sequence[WholeSpec] = (),
) -> None:
    """Raise the BudgetError that `make_plan` would, without making a plan; none if there is no budget."""
    _drafts_within(units, phases, budget_bytes, None, granularity, whole)


def _drafts_within(
    units: Sequence[UnitSpec],
    phases: Sequence[Phase],
    budget_bytes: int | None,
    costs: Costs | None,
    granularity: int,
    whole: Sequence[WholeSpec],
) -> tuple[list[Draft], int]:
    """A draft of each phase, and the smallest budget that holds the least of all."""
    for unit in units:
        assert sum(unit.component in p.components for p in phases) == 1, unit.name
    drafts = [Draft(units, phase, costs, granularity) for phase in phases]
    needed = max((d.needed_bytes for d in drafts), default=0) + sum(spec.num_bytes for spec in whole)
    if budget_bytes is not None and budget_bytes < needed:
        worst = max(drafts, key=lambda d: d.needed_bytes)
        is_known = all(phase.reserve_bytes is not None and not phase.is_of_others for phase in phases)
        raise BudgetError(
            too_small(worst, budget_bytes, whole),
            budget_bytes=budget_bytes,
            least_bytes=needed,
            needed_bytes=needed if is_known else None,
        )
    return drafts, needed
