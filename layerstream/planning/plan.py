"""Decides what is on the device while each phase runs: residents, slots, and what is kept for other phases. Pure.

The budget is of everything on the device: our weights, and beside them what a phase was measured to take (its reserve).
A phase whose reserve is not known takes the least and keeps nothing of others. The phases that run many times a call
choose first: which blocks stay, and how many slots the others pass through, so that a pass takes the least predicted
time. What is then left in all phases goes to what they would load again once a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

from layerstream.blocks import Placement, UnitSpec, WholeSpec
from layerstream.budget import format_bytes
from layerstream.errors import BudgetError
from layerstream.planning.pace import Pace, Prediction, Search, predict_pass
from layerstream.planning.summary import PhaseSummary, PlanSummary, StackSummary, stacks_of

__all__ = [
    "LEAST_SLOTS",
    "Costs",
    "Phase",
    "PhasePlan",
    "Plan",
    "Prediction",
    "check_budget",
    "make_plan",
    "predict_pass",
]

LEAST_SLOTS = 2  # one that compute reads, one that is loaded meanwhile
_MOST_SLOTS = 4  # more slots even out blocks of unlike compute; beyond that residents do more
_MOST_COUNTS = 8  # numbers of slots to choose from
_SLOTS_PER_PIECE = 2  # that many more for each piece beyond the first of the block that has most
_LEAST_PASSES_COUNTED = 8  # fewer do not tell what is used seldom
_SELDOM = 8  # what is used once in so many passes is loaded when it is needed
# The link wanders by a few percent: of placements that just hide their copies, one that hides them with this to spare.
_CAREFUL_SHARE = 0.95
# Blocks of one stack and size take about as long as each other. What one took beyond so many times their median counts
# as a host that was late: planned with, it gets slots to fill a gap that other passes do not have.
_MOST_TIMES_MEDIAN = 4
_LEAST_ALIKE = 4  # of fewer, none is the odd one out
# Assumed until measured: a link of PCIe 5 at 16 lanes, and a denoiser that computes 2.5 times faster than it loads.
_LINK_GB_PER_S = 50.0
_COMPUTE_MS_PER_GB = 8.0


@dataclass(frozen=True)
class Phase:
    """A stretch of the pipeline's call that uses the same components.

    Attributes:
        is_repeated: its components run many times a call.
        reserve_bytes: what is on the device beside our weights while it runs, measured; None: not measured yet.
        is_assumed: `reserve_bytes` was given by somebody who plans ahead, rather than measured.
        is_of_others: `reserve_bytes` is what others hold; what the phase takes itself is not known.
        is_loop: it was seen to be entered with shapes that grow step by step: a pass is a token.
    """

    components: tuple[str, ...]
    is_repeated: bool
    reserve_bytes: int | None = None
    is_assumed: bool = False
    is_of_others: bool = False
    is_loop: bool = False

    @property
    def name(self) -> str:
        return " + ".join(self.components)


@dataclass(frozen=True)
class Costs:
    """Measured speeds.

    Attributes:
        compute_ms: of one use, by unit index; may lack some units.
        uses: how often a pass uses a unit, by unit index, where that is not once: see `uses_per_pass`.
        seldom: of the units that hardly any pass uses, those that were used at all.
        decode_gb_per_s: of bytes on the device, made of what has another form at home; None: nothing has.
    """

    link_gb_per_s: float
    compute_ms: Mapping[int, float]
    uses: Mapping[int, int] = field(default_factory=dict)
    seldom: frozenset[int] = frozenset()
    decode_gb_per_s: float | None = None


@dataclass(frozen=True)
class PhasePlan:
    """What is on the device while a phase runs.

    Attributes:
        resident: units of the phase in buffers of their own: its bases, and the blocks that do not stream.
        kept: units of other phases that may stay meanwhile.
        slot_bytes: the largest streamed block.
        weights_bytes: the most that our weights take: residents, kept units and slots.
        least_bytes: the least weights under which the phase runs.
        prediction: of one pass, once every block was measured.
    """

    phase: Phase
    resident: frozenset[int]
    kept: frozenset[int]
    num_slots: int
    slot_bytes: int
    weights_bytes: int
    least_bytes: int
    prediction: Prediction | None = None

    @property
    def peak_bytes(self) -> int | None:
        reserve = self.phase.reserve_bytes
        return None if reserve is None else self.weights_bytes + reserve

    def summary(self) -> PhaseSummary:
        """What it says, as plain values."""
        return PhaseSummary(
            name=self.phase.name,
            is_repeated=self.phase.is_repeated,
            weights_bytes=self.weights_bytes,
            reserve_bytes=self.phase.reserve_bytes,
            is_assumed=self.phase.is_assumed,
            ms_per_pass=None if self.prediction is None else self.prediction.ms_per_pass,
            bound=None if self.prediction is None else self.prediction.bound,
            is_loop=self.phase.is_loop,
        )


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
        return next(p for p in self.phases if component in p.phase.components)

    def placement(self, unit_index: int) -> Placement:
        """Where a unit lives."""
        component = next(u.component for u in self.units if u.index == unit_index)
        own = self.phase_of(component)
        if unit_index not in own.resident:
            return Placement.STREAMED
        everywhere = all(unit_index in p.resident or unit_index in p.kept for p in self.phases)
        return Placement.RESIDENT if everywhere else Placement.BY_PHASE

    def bytes_without_streaming(self, component: str) -> int:
        """The budget in which all that a pass of the component's phase uses would stay on the device, beside what it
        was measured to take."""
        phase = self.phase_of(component).phase
        uses = self.costs.uses if self.costs is not None else {}
        used = [u for u in self.units if {u.component, *u.also} & set(phase.components) and uses.get(u.index, 1)]
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

    def under(self, budget_bytes: int | None, *, reserve_bytes: int | None = None) -> Plan:
        """The plan for another budget, with the times and reserves of this one.

        Args:
            reserve_bytes: assumed of every phase, in the place of what was measured.
        Raises:
            BudgetError: a phase does not fit even with all that can stream streaming.
        """
        phases = [p.phase for p in self.phases]
        if reserve_bytes is not None:
            phases = [replace(phase, reserve_bytes=reserve_bytes, is_assumed=True) for phase in phases]
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


def uses_per_pass(units: Sequence[UnitSpec], counts: Mapping[int, int]) -> dict[int, int] | None:
    """How often units are used while what most bytes lie in is used once: a token of a language model, say.

    A head that runs 28 steps for a token is used 28 times, an embedding that only a prompt needs, never. Told in powers
    of two, and only where it is not about once, so that counts that waver change nothing.

    Args:
        units: blocks of one phase.
        counts: uses of late, by unit index.
    Returns: None where there were too few passes to tell.
    """
    used = sorted((counts.get(u.index, 0), u.num_bytes) for u in units if counts.get(u.index, 0))
    half = sum(num_bytes for _, num_bytes in used) / 2
    usual = 0
    for count, num_bytes in used:
        usual, half = count, half - num_bytes
        if half <= 0:
            break
    if usual < _LEAST_PASSES_COUNTED:
        return None
    found: dict[int, int] = {}
    for unit in units:
        count = counts.get(unit.index, 0)
        if count * _SELDOM <= usual:
            found[unit.index] = 0
        elif count >= 2 * usual:
            found[unit.index] = 1 << (count // usual).bit_length() - 1
    return found


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
        _fill(drafts, known, num_slots)
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
) -> tuple[list[_Draft], int]:
    """A draft of each phase, and the smallest budget that holds the least of all."""
    for unit in units:
        assert sum(unit.component in p.components for p in phases) == 1, unit.name
    drafts = [_Draft(units, phase, costs, granularity) for phase in phases]
    needed = max((d.needed_bytes for d in drafts), default=0) + sum(spec.num_bytes for spec in whole)
    if budget_bytes is not None and budget_bytes < needed:
        worst = max(drafts, key=lambda d: d.needed_bytes)
        is_known = all(phase.reserve_bytes is not None and not phase.is_of_others for phase in phases)
        raise BudgetError(
            worst.too_small(budget_bytes, whole),
            budget_bytes=budget_bytes,
            least_bytes=needed,
            needed_bytes=needed if is_known else None,
        )
    return drafts, needed


@dataclass(frozen=True)
class _Claim:
    """Units that somebody would have on the device in some phases: in its own they are resident, in others kept.

    Attributes:
        where: the phases; it is granted in all of them or in none.
        chain: claims of one chain are granted until one is refused. So nobody is served before all that come earlier
            are, and more budget never takes from one to give to another.
    """

    units: tuple[UnitSpec, ...]
    where: tuple[_Draft, ...]
    chain: str


class _Grants:
    """Gives out room, claim by claim."""

    def __init__(self) -> None:
        self.refused: set[str] = set()  # chains

    def give_out(self, claims: Iterable[_Claim]) -> None:
        """Grant claims, in their order, where there is room. Each is asked for after those before are granted."""
        for claim in claims:
            if claim.chain in self.refused:
                continue
            if all(draft.has_room_for(claim.units) for draft in claim.where):
                for draft in claim.where:
                    draft.add(claim.units)
            else:
                self.refused.add(claim.chain)


def _fill(drafts: Sequence[_Draft], known: Sequence[_Draft], num_slots: int | None) -> None:
    """Give out what the reserves leave: phases that are repeated choose first, the rest goes by claims.

    They choose the least room that gives them their fastest pass: copies that compute hides cost nothing, and what
    would spare them is worth more to a text encoder, whose loads nothing hides. What is left in the end is theirs.
    """
    everything = {u.index for d in known for u in d.units}.union(*(d.resident for d in drafts))
    units = {u.index: u for d in drafts for u in d.units}
    if all(sum(d.size(units[i]) for i in everything) <= (d.capacity_bytes or 0) for d in known):
        for draft in known:
            draft.num_slots = 0
            draft.add([units[i] for i in sorted(everything)])
            draft.resident = {u.index for u in draft.units}
        return
    for draft in known:
        if draft.phase.is_repeated:
            draft.choose(num_slots, is_frugal=len(known) > 1)
        else:
            draft.take_least(num_slots)
    grants = _Grants()
    grants.give_out(_claims(drafts, known, num_slots, grants))
    shared = {unit for draft in known for unit in draft.kept}
    for draft in known:
        if draft.phase.is_repeated and draft.num_slots:
            draft.spend(num_slots, shared)
        grants.give_out(_Claim((block,), (draft,), f"seldom {block.index}") for block in draft.seldom)


def _claims(
    drafts: Sequence[_Draft], known: Sequence[_Draft], num_slots: int | None, grants: _Grants
) -> Iterator[_Claim]:
    """What every phase would have beside what it needs, the most urgent first."""
    # Between two uses of a unit every other phase runs, so keeping it in some of them but not in all saves nothing.
    everywhere = tuple(known)
    order = _by_urgency(drafts)
    for unit in order:
        yield _Claim((unit,), everywhere, "once loaded")
    if "once loaded" not in grants.refused:
        yield from _claims_of_blocks_used_once(known, everywhere, grants)
    # What no other phase can use goes to a phase's own blocks while it runs, spread: a loaded block that stays costs
    # nothing more, and a text encoder often runs twice a call, a language model once per token.
    once = [draft for draft in known if not draft.phase.is_repeated]
    served = {unit for draft in known for unit in draft.kept}
    for draft in once:
        chain = f"its own of {draft.phase.name}"
        yield _Claim(tuple(b for b in draft.blocks if b.index not in draft.resident), (draft,), chain)
        if chain in grants.refused and not draft.shares_blocks:
            draft.choose(num_slots)
    others = [u for d in once for u in d.units if u.index in d.resident and u.index not in served]
    for draft in once:
        for unit in others:
            if unit.index not in draft.kept and unit not in draft.units:
                yield _Claim((unit,), (draft,), f"of others, while {draft.phase.name} runs")


def _by_urgency(drafts: Sequence[_Draft]) -> list[UnitSpec]:
    """What is resident while its own phase runs: bases of phases that are repeated, their blocks, and the rest."""
    return [
        u
        for is_repeated in (True, False)
        for is_block in ((False, True) if is_repeated else (None,))
        for d in drafts
        if d.phase.is_repeated is is_repeated
        for u in d.units
        if u.index in d.resident and is_block in (None, u.is_block)
    ]


def _claims_of_blocks_used_once(
    known: Sequence[_Draft], everywhere: tuple[_Draft, ...], grants: _Grants
) -> Iterator[_Claim]:
    """Blocks of phases that are not repeated, for the next call: small stacks first, and of the first that does not fit
    as many as do, spread."""
    stacks = [(d, c) for d in known if not d.phase.is_repeated for c in d.phase.components]
    groups = [(d, c, [b for b in d.blocks if b.component == c and b.index not in d.resident]) for d, c in stacks]
    for owner, component, blocks in sorted(groups, key=lambda g: sum(b.num_bytes for b in g[2])):
        chain = f"all of {component}"
        yield _Claim(tuple(blocks), everywhere, chain)
        if chain in grants.refused:
            for position in sorted(range(len(blocks)), key=_reversed_bits):  # spread: halves, quarters, eighths
                yield _Claim((blocks[position],), everywhere, f"some of {component}")
        owner.shares_blocks |= any(b.index in owner.resident for b in blocks)
        if chain in grants.refused:
            return


def _decode_ms(unit: UnitSpec, costs: Costs | None) -> float:
    """To make of a unit's bytes at home those of the device; 0: they are the same."""
    if unit.packed is None or costs is None or costs.decode_gb_per_s is None:
        return 0.0
    return unit.num_bytes / costs.decode_gb_per_s / 1e6


def _reversed_bits(number: int) -> str:
    return f"{number:032b}"[::-1]


@dataclass(frozen=True)
class _SlotSize:
    """One size of slot: larger blocks must be resident, the others may stream.

    The slots are smaller for it, which pays where a few blocks are far larger than the rest.

    Attributes:
        num_pieces: the most of one block that may stream: all of them are there while it runs.
    """

    slot_bytes: int
    forced: tuple[UnitSpec, ...]
    others: tuple[UnitSpec, ...]
    forced_bytes: int
    num_pieces: int

    def bytes_with(self, wanted: int) -> int:
        """Device memory of the larger blocks and so many slots."""
        return self.forced_bytes + self.num_slots(wanted) * self.slot_bytes

    def num_slots(self, wanted: int) -> int:
        """More slots than blocks that stream would stay empty; one must be free while a block runs."""
        return min(len(self.others), max(wanted, self.num_pieces + 1))


class _Draft:
    """The plan of one phase while it is made."""

    def __init__(self, units: Sequence[UnitSpec], phase: Phase, costs: Costs | None, granularity: int) -> None:
        self.phase = phase
        self.granularity = granularity
        self.units = [u for u in units if any(c in phase.components for c in (u.component, *u.also))]
        self.own = {u.index for u in self.units}
        self.bases = [u for u in self.units if not u.is_block]
        self.blocks = [u for u in self.units if u.is_block]
        self.uses = costs.uses if costs is not None and phase.is_repeated else {}
        # What hardly any pass uses has no part in it: it is loaded beyond the plan, for which residents make room, or
        # stays where room is left in the end.
        self.on_demand = {b.index for b in self.blocks if self.uses.get(b.index) == 0}
        self.looped = [b for b in self.blocks if b.index not in self.on_demand]
        self.seldom = [b for b in self.blocks if costs is not None and b.index in self.on_demand & costs.seldom]
        self.base_bytes = sum(self.size(u) for u in self.bases)
        self.slot_sizes = [self._slot_size(size) for size in sorted({self.size(b) for b in self.blocks} | {0})]
        self.least_slot_size = min(self.slot_sizes, key=lambda s: s.bytes_with(LEAST_SLOTS))
        self.least_bytes = self.base_bytes + self.least_slot_size.bytes_with(LEAST_SLOTS)
        self.needed_bytes = self.least_bytes + (phase.reserve_bytes or 0)
        self.is_measured = (
            bool(self.looped) and costs is not None and all(b.index in costs.compute_ms for b in self.looped)
        )
        often = [self.uses.get(u.index, 1) for u in self.units]
        each_ms = self._compute_ms(costs)
        times = [(n * u.sizes.wire, n * ms) for n, u, ms in zip(often, self.units, each_ms, strict=True)]
        decode_ms = [n * _decode_ms(u, costs) for n, u in zip(often, self.units, strict=True)]
        link = costs.link_gb_per_s if costs else _LINK_GB_PER_S
        wholes = [u.block_name for u in self.units]
        self.pace = Pace(times, link, wholes, decode_ms)
        self.careful_pace = Pace(times, _CAREFUL_SHARE * link, wholes, decode_ms)
        self.capacity_bytes: int | None = None  # for weights; None: not known
        self.resident: set[int] = set()
        self.kept: dict[int, int] = {}  # bytes by unit
        self.shares_blocks = False  # other phases keep some of its blocks
        self.num_slots = 0
        self.takes_least = True  # nothing is known of what it takes: all blocks pass through the slots

    def size(self, unit: UnitSpec) -> int:
        return -(-unit.num_bytes // self.granularity) * self.granularity

    @property
    def streamed(self) -> list[UnitSpec]:
        """Blocks that pass through the slots."""
        through = self.blocks if self.takes_least else self.looped
        return [b for b in through if b.index not in self.resident]

    @property
    def slot_bytes(self) -> int:
        return max((u.num_bytes for u in self.streamed), default=0)

    @property
    def weights_bytes(self) -> int:
        slots = self.num_slots * max((self.size(u) for u in self.streamed), default=0)
        return sum(self.size(u) for u in self.units if u.index in self.resident) + sum(self.kept.values()) + slots

    @property
    def room_bytes(self) -> int:
        assert self.capacity_bytes is not None
        return self.capacity_bytes - self.weights_bytes

    # ---- the phase by itself

    def take_least(self, num_slots: int | None) -> None:
        """What can stream streams; with as many slots as asked for, where they fit."""
        slot_size = self.least_slot_size
        if num_slots is not None:
            wanted = num_slots
            asked = min(self.slot_sizes, key=lambda s: s.bytes_with(wanted))
            if self.capacity_bytes is None or self.base_bytes + asked.bytes_with(num_slots) <= self.capacity_bytes:
                slot_size = asked
            else:
                num_slots = None
        self.resident = {u.index for u in (*self.bases, *slot_size.forced)}
        self.num_slots = slot_size.num_slots(num_slots or LEAST_SLOTS)
        self.takes_least = True

    def choose(self, num_slots: int | None, *, is_frugal: bool = False, stay: Collection[int] = ()) -> None:
        """The fastest pass that fits, with as few copies as all the room allows; frugally: in no more room than hiding
        all copies takes, where that is possible.

        Args:
            stay: blocks that are resident whatever is chosen.
        """
        assert self.capacity_bytes is not None
        room = self.capacity_bytes - self.base_bytes - sum(self.kept.values())
        stay = self._with_often_used(stay, room)
        room -= sum(self.size(u) for u in self.blocks if u.index in stay)
        looped = {b.index for b in self.looped if b.index not in stay}
        sizes = [self.size(u) if u.index in looped else 0 for u in self.units]
        asked = [range(n, n + 1) for n in range(num_slots, LEAST_SLOTS, -1)] if num_slots is not None else []
        most = (_MOST_SLOTS if num_slots is None else LEAST_SLOTS) + _SLOTS_PER_PIECE * (self.pace.most_pieces - 1)
        usual = {*range(LEAST_SLOTS, most + 1, -(-most // _MOST_COUNTS)), self.least_slot_size.num_slots(LEAST_SLOTS)}
        for counts in (*asked, sorted(n for n in usual if n >= LEAST_SLOTS)):
            choice = Search(self.pace, sizes, counts).fastest(room)
            if choice is not None:
                if is_frugal and choice.ms_per_pass <= self.pace.total_ms + 1e-6:
                    careful = Search(self.careful_pace, sizes, counts).smallest(room)
                    if careful is not None and careful.ms_per_pass <= self.pace.total_ms + 1e-6:
                        choice = careful
                break
        assert choice is not None  # the least fits, or the budget would have been refused
        self.num_slots = choice.num_slots
        self.resident = {u.index for i, u in enumerate(self.units) if not choice.is_streamed(i)} - self.on_demand
        self.takes_least = False

    def spend(self, num_slots: int | None, shared: Collection[int]) -> None:
        """Give what is left to blocks of its own, if that makes no pass slower; what other phases keep stays."""
        before = self.resident, self.num_slots
        self.choose(num_slots, stay=self.resident & set(shared))
        if self._pass_ms(*before) < self._pass_ms(self.resident, self.num_slots):
            self.resident, self.num_slots = before

    def _pass_ms(self, resident: Collection[int], num_slots: int) -> float:
        streamed = [i for i, u in enumerate(self.units) if u.index not in resident and u.index not in self.on_demand]
        return round(self.pace.pass_ms(streamed, num_slots), 6)

    def plan(self) -> PhasePlan:
        through = {b.index for b in self.streamed}
        streamed = [i for i, u in enumerate(self.units) if u.index in through]
        return PhasePlan(
            phase=self.phase,
            resident=frozenset(self.resident),
            kept=frozenset(self.kept),
            num_slots=self.num_slots,
            slot_bytes=self.slot_bytes,
            weights_bytes=self.weights_bytes,
            least_bytes=self.least_bytes,
            prediction=self.pace.prediction(streamed, self.num_slots, self.phase.is_repeated)
            if self.is_measured
            else None,
        )

    # ---- beside the others

    def has_room_for(self, units: Sequence[UnitSpec]) -> bool:
        """Whether these may be there beside what is: its own as residents, with the smaller or fewer slots that this
        allows, others kept."""
        before = set(self.resident), dict(self.kept), self.num_slots
        self.add(units)
        fits = self.room_bytes >= 0
        self.resident, self.kept, self.num_slots = before
        return fits

    def add(self, units: Sequence[UnitSpec]) -> None:
        """Have these, too."""
        own = [unit for unit in units if unit.index in self.own]
        self.resident.update(unit.index for unit in own)
        self.kept.update((unit.index, self.size(unit)) for unit in units if unit.index not in self.own)
        if own:
            self.num_slots = min(self.num_slots, len(self.streamed))

    # ---- inside

    def _with_often_used(self, stay: Collection[int], room: int) -> set[int]:
        """What is used several times a pass stays first, the most used before all, as far as the least of the others
        leaves room: each byte of it spares as many copies."""
        chosen = set(stay)
        often = [b for b in self.looped if self.uses.get(b.index, 1) > 1 and b.index not in chosen]
        for block in sorted(often, key=lambda b: (-self.uses[b.index], self.size(b))):
            others = [b for b in self.looped if b.index not in chosen and b is not block]
            pieces = max(Counter(b.block_name for b in others).values(), default=0)
            slots = min(len(others), max(LEAST_SLOTS, pieces + 1)) * max((self.size(b) for b in others), default=0)
            taken = sum(self.size(b) for b in self.blocks if b.index in chosen) + self.size(block)
            if taken + slots > room:
                break
            chosen.add(block.index)
        return chosen

    def _slot_size(self, slot_bytes: int) -> _SlotSize:
        # What has no bytes needs no slot.
        others = tuple(b for b in self.blocks if 0 < self.size(b) <= slot_bytes)
        forced = tuple(b for b in self.blocks if not 0 < self.size(b) <= slot_bytes)
        pieces = Counter(b.block_name for b in others)
        num_pieces = max(pieces.values(), default=1)
        return _SlotSize(slot_bytes, forced, others, sum(self.size(b) for b in forced), num_pieces)

    def _compute_ms(self, costs: Costs | None) -> list[float]:
        """Of each unit; what was not measured is assumed to be like what was."""
        measured = self._without_odd_ones(costs.compute_ms) if costs is not None else {}
        known = [b for b in self.blocks if b.index in measured]
        num_bytes = sum(b.num_bytes for b in known)
        ms_per_byte = sum(measured[b.index] for b in known) / num_bytes if num_bytes else _COMPUTE_MS_PER_GB / 1e9
        return [measured.get(u.index, u.num_bytes * ms_per_byte if u.is_block else 0.0) for u in self.units]

    def _without_odd_ones(self, measured: Mapping[int, float]) -> dict[int, float]:
        alike: dict[tuple[str, str | None, int], list[int]] = {}
        for block in self.blocks:
            if block.index in measured:
                alike.setdefault((block.component, block.stack, block.num_bytes), []).append(block.index)
        found = dict(measured)
        for units in alike.values():
            if len(units) >= _LEAST_ALIKE:
                most = _MOST_TIMES_MEDIAN * median(measured[u] for u in units)
                found.update((u, min(measured[u], most)) for u in units)
        return found

    def too_small(self, budget_bytes: int, whole: Sequence[WholeSpec]) -> str:
        whole_bytes, reserve = sum(spec.num_bytes for spec in whole), self.phase.reserve_bytes
        needed = self.needed_bytes + whole_bytes
        slot_size, name = self.least_slot_size, " and ".join(f"`{c}`" for c in self.phase.components)
        parts = []
        if slot_size.others:
            largest = max(slot_size.others, key=lambda b: b.num_bytes)
            each = format_bytes(self.size(largest))
            parts.append(f"{slot_size.num_slots(LEAST_SLOTS)} slot(s) for `{largest.name}` ({each} each)")
        if slot_size.forced:
            larger = "larger " if slot_size.others else ""
            most = max(slot_size.forced, key=lambda b: b.num_bytes)
            named = f", `{most.name}` alone {format_bytes(self.size(most))}" if self.size(most) > budget_bytes else ""
            parts.append(f"{len(slot_size.forced)} {larger}block(s) ({format_bytes(slot_size.forced_bytes)}{named})")
        if self.bases:
            largest = max(self.bases, key=lambda b: b.num_bytes)
            named = (
                f", `{largest.name}` alone {format_bytes(self.size(largest))}"
                if self.size(largest) > budget_bytes
                else ""
            )
            parts.append(f"the weights outside stacks ({format_bytes(self.base_bytes)}{named})")
        if whole:
            kinds = ", ".join(sorted({kind for spec in whole for kind in spec.kinds}))
            parts.append(f"the weights that stay on the device whole ({format_bytes(whole_bytes)} of {kinds})")
        if reserve and self.phase.is_assumed:
            parts.append(f"activations ({format_bytes(reserve)}, assumed)")
        elif reserve and self.phase.is_of_others:
            parts.append(f"what others hold ({format_bytes(reserve)})")
        elif reserve:
            parts.append(f"activations and other tensors ({format_bytes(reserve)}, measured)")
        before = "" if reserve and not self.phase.is_of_others else " before activations"
        listed = ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + parts[-1] if parts else "it"
        return (
            f"vram_budget {format_bytes(budget_bytes)} is too small: while {name} runs, {listed} need "
            f"{format_bytes(needed)}{before}. Raise vram_budget to at least {needed} bytes ({format_bytes(needed)})."
        )
