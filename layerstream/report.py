"""Plan and Stats as text."""

from __future__ import annotations

from collections.abc import Mapping

from layerstream.budget import format_bytes
from layerstream.plan import Plan, next_gib
from layerstream.stats import PhaseStats, Stats
from layerstream.tables import table


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
    for phase_plan in plan.phases:
        done = phases.get(phase_plan.phase.name)
        if done is None:
            continue
        prediction = phase_plan.prediction
        rows.append(
            [
                phase_plan.phase.name,
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
    gains = next_gib(plan)
    for name, gain_ms in (gains or {}).items():
        if gain_ms >= 0.05:
            lines.append(f"1 GiB more would take {gain_ms:.1f} ms off a pass of `{name}`")
    return "\n".join(lines)
