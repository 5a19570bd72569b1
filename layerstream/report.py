"""Plan and Stats as text."""

from __future__ import annotations

from collections.abc import Mapping

from layerstream.budget import format_bytes
from layerstream.plan import Plan, next_gib
from layerstream.stats import PhaseStats, Stats
from layerstream.tables import table

_LEAST_TOLD_MS = 0.05
_LEAST_TOLD_SHARE = 0.02


def report(plan: Plan, stats: Stats, phases: Mapping[str, PhaseStats]) -> str:
    """What happened, phase by phase, under which plan, and what more memory would buy."""
    budget = f"budget {format_bytes(stats.budget_bytes)}" if stats.budget_bytes else "no budget, the least of weights"
    lines = [
        f"{budget}; peak reserved {format_bytes(stats.peak_reserved_bytes)}, weights at most "
        f"{format_bytes(stats.peak_device_bytes)}; {format_bytes(stats.pinned_bytes)} page-locked in host memory",
        f"{stats.num_loads} loads, {format_bytes(stats.loaded_bytes)} over the bus, {stats.num_demand_loads} not "
        f"foreseen; {stats.num_stalls} stalls, {stats.stall_ms:.1f} ms; {stats.num_evicted} residents gave their "
        "room to another phase",
    ]
    rows = []
    predictions = {phase_plan.phase.name: phase_plan.prediction for phase_plan in plan.phases}
    # First by the plan; then phases that are no more, since components came to share one: what they did counts.
    for name in dict.fromkeys([*predictions, *phases]):
        done = phases.get(name)
        if done is None:
            continue
        prediction = predictions.get(name)
        rows.append(
            [
                name,
                str(done.num_passes),
                format_bytes(done.loaded_bytes),
                f"{done.num_stalls} ({done.stall_ms:.1f} ms)",
                "not measured" if done.reserve_bytes is None else format_bytes(done.reserve_bytes),
                format_bytes(done.peak_reserved_bytes),
                "" if prediction is None else f"{prediction.ms_per_pass:.1f} ms, {prediction.bound}",
            ]
        )
    headers = ["phase", "passes", "loaded", "stalls", "beside weights", "peak reserved", "predicted pass"]
    lines += ["", *table(headers, rows).splitlines()] if rows else ["nothing has run yet"]
    lines += [line for name, done in phases.items() if (line := _waits(plan, name, done)) is not None]
    gains = next_gib(plan)
    for name, gain_ms in (gains or {}).items():
        if gain_ms >= 0.05:
            lines.append(f"1 GiB more would take {gain_ms:.1f} ms off a pass of `{name}`")
    return "\n".join(lines)


def _waits(plan: Plan, name: str, done: PhaseStats) -> str | None:
    """Where a phase's compute waited: by stack, and the block that it waited for longest."""
    units = {unit.index: unit for unit in plan.units}
    known = {units[index]: ms for index, ms in done.stall_ms_by_unit.items() if index in units}
    stacks: dict[str, float] = {}
    for unit, ms in known.items():
        place = f"{unit.component}.{unit.stack}" if unit.stack else unit.name
        stacks[place] = stacks.get(place, 0.0) + ms
    least = max(_LEAST_TOLD_MS, _LEAST_TOLD_SHARE * done.stall_ms)
    parts = [
        f"{ms:.1f} ms for `{place}`" for place, ms in sorted(stacks.items(), key=lambda item: -item[1]) if ms >= least
    ]
    if not parts:
        return None  # too short to tell, or for units that are no more
    longest = max(known, key=lambda unit: known[unit], default=None)
    told = "" if longest is None or len(known) == 1 else f"; longest for `{longest.name}`, {known[longest]:.1f} ms"
    return f"`{name}` waited {', '.join(parts)}{told}"
