"""What streaming did, for people: the report, as text, HTML and plain values, and lines for the log. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from layerstream.blocks import UnitSpec
from layerstream.budget import format_budget, format_bytes
from layerstream.planning.plan import Plan
from layerstream.planning.summary import PlanSummary, gain_lines
from layerstream.stats import PhaseStats, Stats
from layerstream.tables import Page, Table

_LEAST_SLOW_SHARE = 1.25  # a loop that takes this many times its compute is told of
_LEAST_SLOW_LOOP_MS = 5_000
_USUAL_TOKENS = 1000  # where nothing is known of how many will come
_LEAST_TOLD_MS = 0.05
_LEAST_TOLD_SHARE = 0.02


@dataclass(frozen=True)
class PhaseReport:
    """What happened in one phase of the calls.

    Attributes:
        num_tokens: passes of token loops; where there are any, parts that were entered by themselves count as passes.
        reserve_bytes: what it takes on the device beside the weights; None: not measured yet.
        predicted_ms_per_pass, predicted_bound: of the present plan; None where it predicts nothing.
        stall_ms_by_stack, stall_ms_by_unit: `stall_ms` by what was waited for, by name. What a change of the pipeline
            took away has no name, and is in neither.
    """

    name: str
    num_passes: int
    num_tokens: int
    num_loads: int
    loaded_bytes: int
    num_stalls: int
    stall_ms: float
    reserve_bytes: int | None
    peak_reserved_bytes: int
    peak_weights_bytes: int
    predicted_ms_per_pass: float | None
    predicted_bound: str | None
    stall_ms_by_stack: Mapping[str, float]
    stall_ms_by_unit: Mapping[str, float]

    def cells(self) -> tuple[str, ...]:
        predicted = self.predicted_ms_per_pass
        return (
            self.name,
            f"{self.num_tokens} tokens" if self.num_tokens else str(self.num_passes),
            format_bytes(self.loaded_bytes),
            f"{self.num_stalls} ({self.stall_ms:.1f} ms)",
            "not measured" if self.reserve_bytes is None else format_bytes(self.reserve_bytes),
            format_bytes(self.peak_reserved_bytes),
            "" if predicted is None else f"{predicted:.1f} ms, {self.predicted_bound}",
        )

    def waits(self) -> str | None:
        """Where its compute waited: by stack, and the block that it waited for longest; None if not worth a line."""
        least = max(_LEAST_TOLD_MS, _LEAST_TOLD_SHARE * self.stall_ms)
        stacks = sorted(self.stall_ms_by_stack.items(), key=lambda item: -item[1])
        parts = [f"{ms:.1f} ms for `{stack}`" for stack, ms in stacks if ms >= least]
        if not parts:
            return None
        longest = max(self.stall_ms_by_unit, key=lambda name: self.stall_ms_by_unit[name])
        is_all = len(self.stall_ms_by_unit) == 1
        told = "" if is_all else f"; longest for `{longest}`, {self.stall_ms_by_unit[longest]:.1f} ms"
        return f"`{self.name}` waited {', '.join(parts)}{told}"


@dataclass(frozen=True)
class Report:
    """What happened since streaming started: prints as text, shows as a table in notebooks, and has plain values.

    Attributes:
        stats: the counters of all phases together.
        phases: those that ran, in the order of the plan; then those that components have left to share another.
        next_gib_ms: what one GiB more would take off a pass, by phase, as far as known.
        least_bytes: the smallest budget in which all that has run so far would run; None: not known yet.
        copied_by: the call that copies to the device; "": not known.
        pairing: why the two passes of a step of guidance do not run side by side, by component; "": they do, or nothing
            is known yet. Empty where they were not to.
        packing: why nothing is packed, or how many blocks that were to be are not, and why; "": all are.
        storing: how many units stay on the host that were to be on another GPU, and why; "": none.
        links: measured speeds in GB/s from host memory ("") and from other GPUs, by name.
        sharing: which ranks share host memory with this one; "": nothing is shared.
    """

    stats: Stats
    phases: tuple[PhaseReport, ...]
    next_gib_ms: Mapping[str, float]
    least_bytes: int | None = None
    copied_by: str = ""
    pairing: Mapping[str, str] = field(default_factory=dict)
    packing: str = ""
    storing: str = ""
    links: Mapping[str, float] = field(default_factory=dict)
    sharing: str = ""

    @staticmethod
    def of(
        plan: Plan,
        stats: Stats,
        phases: Mapping[str, PhaseStats],
        least_bytes: int | None = None,
        copied_by: str = "",
        pairing: Mapping[str, str] | None = None,
        packing: str = "",
        storing: str = "",
        links: Mapping[str, float] | None = None,
        sharing: str = "",
    ) -> Report:
        """The report of these counters under this plan, which does not change when they do.

        Args:
            phases: counters by the name of the phase.
        """
        units = {unit.index: unit for unit in plan.units}
        predictions = {phase_plan.phase.name: phase_plan.prediction for phase_plan in plan.phases}
        reports = []
        for name in dict.fromkeys([*predictions, *phases]):
            done = phases.get(name)
            if done is None:
                continue
            waits = {units[index]: ms for index, ms in done.stall_ms_by_unit.items() if index in units}
            prediction = predictions.get(name)
            reports.append(
                PhaseReport(
                    name=name,
                    num_passes=done.num_passes,
                    num_tokens=done.num_tokens,
                    num_loads=done.num_loads,
                    loaded_bytes=done.loaded_bytes,
                    num_stalls=done.num_stalls,
                    stall_ms=done.stall_ms,
                    reserve_bytes=done.reserve_bytes,
                    peak_reserved_bytes=done.peak_reserved_bytes,
                    peak_weights_bytes=done.peak_weights_bytes,
                    predicted_ms_per_pass=None if prediction is None else prediction.ms_per_pass,
                    predicted_bound=None if prediction is None else prediction.bound,
                    stall_ms_by_stack=_by_stack(waits),
                    stall_ms_by_unit={unit.name: ms for unit, ms in waits.items()},
                )
            )
        repeated = {c for p in plan.phases if p.phase.is_repeated for c in p.phase.components}
        why = {name: reason for name, reason in (pairing or {}).items() if name in repeated}
        next_gib_ms = plan.summary().next_gib_ms
        return Report(
            replace(stats),
            tuple(reports),
            next_gib_ms,
            least_bytes,
            copied_by,
            why,
            packing,
            storing,
            dict(links or {}),
            sharing,
        )

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts, for JSON: "stats", "phases", "next_gib_ms", "least_bytes", "copied_by",
        "pairing", "packing", "storing", "links" and "sharing"."""
        return {
            "stats": self.stats.as_dict(),
            "phases": [asdict(phase) for phase in self.phases],
            "next_gib_ms": dict(self.next_gib_ms),
            "least_bytes": self.least_bytes,
            "copied_by": self.copied_by,
            "pairing": dict(self.pairing),
            "packing": self.packing,
            "storing": self.storing,
            "links": dict(self.links),
            "sharing": self.sharing,
        }

    def __str__(self) -> str:
        return self.page().text()

    def __repr__(self) -> str:  # what a terminal shows
        return str(self)

    def _repr_html_(self) -> str:
        return self.page().html()

    def page(self) -> Page:
        """Totals, a table of phases, and where compute waited."""
        stats = self.stats
        budget = format_budget(stats.budget_bytes) if stats.budget_bytes else "no budget, the least of weights"
        whole = f" ({format_bytes(stats.whole_bytes)} of them whole)" if stats.whole_bytes else ""
        bus = f"the bus by {self.copied_by}" if self.copied_by else "the bus"
        totals = (
            f"{budget}; peak reserved {format_bytes(stats.peak_reserved_bytes)}, weights at most "
            f"{format_bytes(stats.peak_device_bytes)}{whole}; {format_bytes(stats.pinned_bytes)} page-locked in host "
            "memory",
            f"{stats.num_loads} loads, {format_bytes(stats.loaded_bytes)} over {bus}, {stats.num_demand_loads} not "
            f"foreseen; {stats.num_stalls} stalls, {stats.stall_ms:.1f} ms; {stats.num_evicted} residents gave their "
            "room to another phase",
        )
        told = *totals, *self._stored(), *self._packed(), *self._pairs()
        if not self.phases:
            return Page((*told, "nothing has run yet"))
        headers = ("phase", "passes", "loaded", "stalls", "beside weights", "peak reserved", "predicted pass")
        table = Table(headers, tuple(phase.cells() for phase in self.phases))
        waits = [line for phase in self.phases if (line := phase.waits()) is not None]
        least = () if self.least_bytes is None else (_least_line(self.least_bytes),)
        return Page((*told, "", table, *waits, *least, *gain_lines(self.next_gib_ms)))

    def _stored(self) -> list[str]:
        """Of weights that are in other GPUs' memory, or in memory that processes share."""
        stats = self.stats
        lines = []
        if stats.num_stored_units:
            speeds = ", ".join(f"{name} at {speed:.1f} GB/s" for name, speed in self.links.items() if name)
            lines.append(
                f"{stats.num_stored_units} blocks, pieces or bases, {format_bytes(stats.stored_bytes)}, are in another "
                f"GPU's memory{f': loads come from {speeds}' if speeds else ''}"
            )
        on_host = [f"not on another GPU: {self.storing}"] if self.storing else []
        return [*lines, *on_host, *([self.sharing] if self.sharing else [])]

    def _packed(self) -> list[str]:
        """Of weights that are packed."""
        stats = self.stats
        lines = []
        if stats.num_packed_units:
            share = stats.packed_bytes / stats.unpacked_bytes
            lines.append(
                f"{stats.num_packed_units} blocks, or pieces of them, are packed: "
                f"{format_bytes(stats.unpacked_bytes)} in {format_bytes(stats.packed_bytes)} ({share:.3f})"
            )
        if stats.num_own_wires:
            lines.append(
                f"{stats.num_own_wires} of them at most stayed on the device packed, in "
                f"{format_bytes(stats.own_wires_bytes)}: {stats.num_loads_without_copy} loads took nothing of the bus"
            )
        return [*lines, *([f"not packed: {self.packing}"] if self.packing else [])]

    def _pairs(self) -> list[str]:
        """Of passes that run side by side."""
        stats = self.stats
        lines = []
        if stats.num_paired_passes or stats.num_discarded_passes:
            lines.append(
                f"{stats.num_paired_passes} passes ran beside another, whose loads served both; "
                f"{stats.num_discarded_passes} did so for nothing"
            )
        return [*lines, *(f"passes of `{name}` are not paired: {why}" for name, why in self.pairing.items() if why)]


def _least_line(least_bytes: int) -> str:
    return f"what has run so far needs a budget of {format_bytes(least_bytes)} ({least_bytes} bytes) at least"


def _by_stack(waits: Mapping[UnitSpec, float]) -> dict[str, float]:
    stacks: dict[str, float] = {}
    for unit, ms in waits.items():
        place = f"{unit.component}.{unit.stack}" if unit.stack else unit.name
        stacks[place] = stacks.get(place, 0.0) + ms
    return stacks


def streamer_html(state: str, plan: Plan, report: Report) -> str:
    """A streamer in a notebook: its state in a line, its plan, and what it did, if something ran."""
    parts = [Page((state,)).html(), _folded("plan", plan.summary().page())]
    if report.phases:
        parts.append(_folded("report", report.page()))
    return f"<div>{''.join(parts)}</div>"


def _folded(title: str, page: Page) -> str:
    return f"<details open><summary>{title}</summary>{page.html()}</details>"


def entered_line(plan: Plan, stats: Stats) -> str:
    """What streams and what stays, in a line for the log when streaming has begun."""
    summary = plan.summary()
    streamed = [(c, *_streamed(summary, c)) for c in dict.fromkeys(stack.component for stack in summary.stacks)]
    parts = [f"{n} of {of} blocks of `{c}` ({format_bytes(size)})" for c, n, of, size in streamed if n]
    total = sum(stack.total_bytes for stack in summary.stacks)
    staying = total - sum(size for *_, size in streamed)
    locked = f"{format_bytes(stats.pinned_bytes)} page-locked, ready after {stats.enter_s:.1f} s"
    is_new = any(phase.reserve_bytes is None for phase in summary.phases)
    measured = "more stays once activations have been measured" if is_new and parts and plan.budget_bytes else None
    told = [
        f"{', '.join(parts)} stream" if parts else "nothing streams",
        f"{format_bytes(staying)} of weights stay while in use",
        locked,
        predicted_line(plan) or measured,
    ]
    return f"{format_budget(plan.budget_bytes)}: {'; '.join(text for text in told if text)}"


def slow_loop_line(plan: Plan, component: str, num_tokens: int) -> str | None:
    """What a token loop that streams will take, and what would help; None if it is about as fast as without streaming.

    Args:
        num_tokens: of such a loop the last time; 0: it is the first.
    """
    phase_plan = plan.phase_of(component)
    prediction = phase_plan.prediction
    if prediction is None or not phase_plan.phase.is_loop:
        return None
    if prediction.ms_per_pass < _LEAST_SLOW_SHARE * prediction.compute_ms:
        return None
    in_all = num_tokens or _USUAL_TOKENS
    if in_all * prediction.ms_per_pass < _LEAST_SLOW_LOOP_MS:
        return None
    as_before = ", as the last time," if num_tokens else ""
    return (
        f"`{phase_plan.phase.name}` runs once for each token, and loads "
        f"{format_bytes(_streamed_bytes(plan, component))} each time: {_seconds(prediction.ms_per_pass)} a token, "
        f"{_seconds(prediction.compute_ms)} of them compute. {in_all} tokens{as_before} take "
        f"{_seconds(in_all * prediction.ms_per_pass)}. A budget of "
        f"{format_bytes(plan.bytes_without_streaming(component))} would keep all of it on the device."
    )


def _streamed_bytes(plan: Plan, component: str) -> int:
    """Of what is loaded in a pass, as it is on the device."""
    phase_plan = plan.phase_of(component)
    uses = plan.costs.uses if plan.costs is not None else {}
    return sum(
        u.num_bytes * uses.get(u.index, 1)
        for u in plan.units
        if u.component in phase_plan.phase.components and u.index not in phase_plan.resident | phase_plan.packed
    )


def predicted_line(plan: Plan) -> str | None:
    """The time that a pass of each phase is predicted to take, in a line for the log; None until that is known."""
    summary = plan.summary()
    known = [(phase, phase.ms_per_pass) for phase in summary.phases if phase.ms_per_pass is not None]
    if not known:
        return None
    return "; ".join(
        [
            "predicted: "
            + ", ".join(
                f"{_seconds(ms)} a {phase.pass_name} of `{phase.name}` ({phase.bound}-bound)" for phase, ms in known
            ),
            *gain_lines(summary.next_gib_ms),
        ]
    )


def _seconds(ms: float) -> str:
    return f"{ms / 1000:.3f} s" if ms >= 1 else "under a millisecond"


def _streamed(summary: PlanSummary, component: str) -> tuple[int, int, int]:
    """Blocks of which something streams, all blocks, and bytes that stream, of one component."""
    stacks = [stack for stack in summary.stacks if stack.component == component and stack.stack is not None]
    return (
        sum(stack.num_streamed for stack in stacks),
        sum(stack.num_blocks for stack in stacks),
        sum(stack.streamed_bytes for stack in stacks),
    )
