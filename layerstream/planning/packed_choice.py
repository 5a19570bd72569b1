"""Which units of a phase are worth packing: those that make its passes faster, and no more, since decoding takes its
time from compute. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace

from layerstream.blocks import Sizes, UnitSpec
from layerstream.planning.draft import Draft, pace_of
from layerstream.planning.packed_stay import spread
from layerstream.planning.phase_plan import PhasePlan
from layerstream.planning.plan import Plan

PACKED_SHARE = 0.68  # of weights of bfloat16: 0.656 to 0.70, measured
_MOST_COUNTS = 12  # numbers of units that are compared
_NEARLY = 1.003  # a pass that takes so little longer is as good
_WORTH_ALL = 0.97  # of the time of a pass, for which what is resident raw is packed, too


def may_pack(units: Iterable[UnitSpec], least_bytes: int) -> frozenset[int]:
    """The units that may be packed, by index: blocks of so many bytes or more, of stacks of several; and a block that
    is alone in its stack, such as an embedding, if it is no larger. Wire buffers are as large as the largest packed
    unit, in all phases: with Ovis-Image's embedding they took 0.52 GiB more in every pass, for 7 ms of a call.
    """
    blocks = [unit for unit in units if unit.is_block and unit.num_bytes >= least_bytes]
    names = {(u.component, u.stack, u.block_name) for u in blocks}
    counts = Counter((component, stack) for component, stack, _ in names)
    in_turns = [u.num_bytes for u in blocks if counts[u.component, u.stack] > 1]
    most_bytes = max(in_turns or [u.num_bytes for u in blocks], default=0)
    return frozenset(unit.index for unit in blocks if unit.num_bytes <= most_bytes)


def worth_packing(plan: Plan, phase_plan: PhasePlan, can_be: Collection[int]) -> list[int]:
    """The units of a phase to be packed beside those that are, by index, in their order.

    Of a phase that is repeated: of those that stream as few, evenly spread, as give passes nearly their least time; or
    all blocks, if passes are faster still once many stay on the device packed. Of what runs once a call: all whose
    copies it waits for, those included that are loaded for it and stay meanwhile.

    Args:
        can_be: units that can be packed.
    """
    phase, prediction = phase_plan.phase, phase_plan.prediction
    if prediction is None or prediction.bound == "compute":
        return []
    units = [unit for unit in plan.units if phase.involves(unit)]
    if not phase.is_repeated:
        everywhere = frozenset.intersection(*(p.resident | p.kept for p in plan.phases))
        return [u.index for u in units if u.index in can_be and u.index not in everywhere]
    streamed = [i for i, unit in enumerate(units) if unit.is_block and unit.index not in phase_plan.resident]
    raw = [units[i].index for i in streamed if units[i].packed is None and units[i].index in can_be]
    counts = sorted({round(len(raw) * n / _MOST_COUNTS) for n in range(_MOST_COUNTS + 1)})
    times = [(_pass_ms(plan, phase_plan, units, streamed, set(spread(raw, count))), count) for count in counts]
    least = min(ms for ms, _ in times)
    uses = plan.costs.uses if plan.costs is not None else {}
    all_raw = {u.index for u in units if u.is_block and u.packed is None and u.index in can_be and uses.get(u.index, 1)}
    if all_raw and _ms_if_kept(plan, phase_plan, all_raw) < _WORTH_ALL * least:
        return sorted(all_raw, key=lambda index: (index in phase_plan.resident, index))
    return spread(raw, next(count for ms, count in times if ms <= _NEARLY * least))


def as_packed(unit: UnitSpec) -> UnitSpec:
    """The unit as it is taken to be once it is packed."""
    wire = int(PACKED_SHARE * unit.num_bytes)
    return replace(unit, packed=Sizes(unit.num_bytes, wire, wire))


def _ms_if_kept(plan: Plan, phase_plan: PhasePlan, packed: Collection[int]) -> float:
    """Of a pass in which these are packed, too, and as many as pay stay on the device so."""
    units = [as_packed(unit) if unit.index in packed else unit for unit in plan.units]
    draft = Draft(units, phase_plan.phase, plan.costs, plan.granularity)
    draft.kept = {unit.index: draft.size(unit) for unit in units if unit.index in phase_plan.kept}
    return draft.ms_with_packed(phase_plan)


def _pass_ms(
    plan: Plan, phase_plan: PhasePlan, units: list[UnitSpec], streamed: list[int], packed: Collection[int]
) -> float:
    """Of a pass in which these are packed, too."""
    uses = plan.costs.uses if plan.costs is not None else {}
    pace = pace_of([as_packed(unit) if unit.index in packed else unit for unit in units], plan.costs, uses)
    pace = pace.keeping_packed({i for i, unit in enumerate(units) if unit.index in phase_plan.packed})
    return pace.pass_ms([i for i in streamed if uses.get(units[i].index, 1)], phase_plan.num_slots)
