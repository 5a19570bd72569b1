"""What a plan says, as plain values, and how people read them: a line, a table, HTML. Pure.

`Plan.summary()` fills it. Text, HTML and JSON are made of the same values, so that they cannot differ; nothing here
plans or measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerstream.blocks import Placement, UnitSpec, WholeSpec
from layerstream.budget import format_budget, format_bytes
from layerstream.tables import Page, Table

PARTLY_STREAMED = "partly streamed"  # of a block: some of its pieces stream

_LEAST_GAIN_MS = 0.05  # less is told as 0.0


@dataclass(frozen=True)
class StackSummary:
    """The blocks of one stack, or a component's base as one block.

    Attributes:
        stack: its dotted name in the component; None of a base.
        smallest_bytes, largest_bytes: of its blocks, on the device.
        streamed_bytes: of all blocks and pieces that stream.
        num_placed: blocks by placement: "resident", "by phase", "resident packed", "streamed", "partly streamed".
        num_slots: of the phase, if any of its blocks passes through them; else 0.
    """

    component: str
    stack: str | None
    num_blocks: int
    smallest_bytes: int
    largest_bytes: int
    total_bytes: int
    streamed_bytes: int
    num_placed: Mapping[str, int]
    num_slots: int
    slot_bytes: int

    @property
    def num_streamed(self) -> int:
        """Blocks of which something streams."""
        return self.num_placed.get(Placement.STREAMED.value, 0) + self.num_placed.get(PARTLY_STREAMED, 0)

    def cells(self) -> tuple[str, ...]:
        is_even = self.smallest_bytes == self.largest_bytes
        return (
            self.component,
            self.stack or "base",
            str(self.num_blocks),
            format_bytes(self.smallest_bytes) + ("" if is_even else f" to {format_bytes(self.largest_bytes)}"),
            ", ".join(f"{count} {placement}" for placement, count in self.num_placed.items()),
            f"{self.num_slots} x {format_bytes(self.slot_bytes)}" if self.num_slots else "",
        )


def stacks_of(
    units: Sequence[UnitSpec], placement: Callable[[int], Placement], num_slots: int, slot_bytes: int
) -> Iterator[StackSummary]:
    """The stacks and bases of one phase, in the order of its units.

    Args:
        units: of the phase.
        placement: of a unit, by its index.
        num_slots, slot_bytes: of the phase.
    """
    groups: dict[tuple[str, str | None], list[UnitSpec]] = {}
    for unit in units:
        groups.setdefault((unit.component, unit.stack), []).append(unit)
    for (component, stack), members in groups.items():
        sizes: Counter[str] = Counter()  # by block, with its pieces
        placements: dict[str, set[Placement]] = {}
        for unit in members:
            sizes[unit.block_name] += unit.num_bytes
            placements.setdefault(unit.block_name, set()).add(placement(unit.index))
        streamed_bytes = sum(u.num_bytes for u in members if placement(u.index) is Placement.STREAMED)
        streams = any(found & {Placement.STREAMED, Placement.PACKED} for found in placements.values())
        yield StackSummary(
            component=component,
            stack=stack,
            num_blocks=len(sizes),
            smallest_bytes=min(sizes.values()),
            largest_bytes=max(sizes.values()),
            total_bytes=sum(sizes.values()),
            streamed_bytes=streamed_bytes,
            num_placed=dict(Counter(_placed(found) for found in placements.values())),
            num_slots=num_slots if streams else 0,
            slot_bytes=slot_bytes if streams else 0,
        )


def _placed(pieces: set[Placement]) -> str:
    """Where a block is, of which pieces are here and there."""
    if len(pieces) == 1:
        return next(iter(pieces)).value
    if Placement.STREAMED in pieces:
        return PARTLY_STREAMED
    return Placement.PACKED.value if Placement.PACKED in pieces else Placement.BY_PHASE.value


@dataclass(frozen=True)
class PhaseSummary:
    """One phase of the call.

    Attributes:
        weights_bytes: the most that weights take on the device while it runs.
        reserve_bytes: what is there beside them; None: not measured yet.
        is_assumed: `reserve_bytes` was given rather than measured.
        ms_per_pass, bound: predicted; None until every block was measured.
        is_loop: its passes are tokens.
    """

    name: str
    is_repeated: bool
    weights_bytes: int
    reserve_bytes: int | None
    is_assumed: bool
    ms_per_pass: float | None
    bound: str | None
    is_loop: bool = False

    @property
    def counts_reserve(self) -> bool:
        """Whether anything is known, or assumed, of what is there beside the weights."""
        return self.reserve_bytes is not None and (self.reserve_bytes > 0 or not self.is_assumed)

    @property
    def pass_name(self) -> str:
        """What people call a pass of it."""
        return "token" if self.is_loop else "pass"

    def line(self) -> str:
        text = f"{self.name}: {format_bytes(self.weights_bytes)} of weights"
        if self.reserve_bytes is None:
            text += " + what it takes beside them, not measured yet"
        elif self.counts_reserve:
            assumed = " assumed" if self.is_assumed else ""
            peak = format_bytes(self.weights_bytes + self.reserve_bytes)
            text += f" + {format_bytes(self.reserve_bytes)}{assumed} beside them = {peak}"
        if self.ms_per_pass is not None:
            text += f"; {self.ms_per_pass:.1f} ms a {self.pass_name} predicted, {self.bound}-bound"
        return text


@dataclass(frozen=True)
class PlanSummary:
    """A plan as plain values.

    Attributes:
        budget_bytes: None for "the least".
        needed_bytes: the smallest budget that would do, as far as reserves are known.
        peak_bytes: predicted, with the reserves that are known.
        whole: weights that are no plain tensors, and stay on the device as they are.
        next_gib_ms: what one GiB more would take off a pass, by phase; empty where nobody has asked for it.
    """

    budget_bytes: int | None
    needed_bytes: int
    peak_bytes: int
    stacks: tuple[StackSummary, ...]
    whole: tuple[WholeSpec, ...]
    phases: tuple[PhaseSummary, ...]
    next_gib_ms: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts, for JSON."""
        return {
            **asdict(self),
            "stacks": [asdict(stack) for stack in self.stacks],
            "whole": [asdict(spec) for spec in self.whole],
            "phases": [asdict(phase) for phase in self.phases],
        }

    def head(self) -> str:
        """Budget, least and peak."""
        before = "" if any(phase.counts_reserve for phase in self.phases) else " before activations"
        return (
            f"{format_budget(self.budget_bytes)}, least {format_bytes(self.needed_bytes)}, predicted peak "
            f"{format_bytes(self.peak_bytes)}{before}"
        )

    def line(self) -> str:
        """Budget, least and peak, and how many blocks are where."""
        placed: Counter[str] = Counter()
        for stack in self.stacks:
            if stack.stack is not None:
                placed.update(stack.num_placed)
        counts = [f"{placed[p]} {p}" for p in (*(p.value for p in Placement), PARTLY_STREAMED) if placed[p]]
        return f"{self.head()}{'; blocks: ' if counts else ''}{', '.join(counts)}"

    def page(self) -> Page:
        """The table of stacks, and a line for each phase."""
        headers = ("component", "stack", "blocks", "each", "placement", "slots")
        rows = [stack.cells() for stack in self.stacks]
        for spec in self.whole:
            kinds = ", ".join(spec.kinds)
            rows.append((spec.component, kinds, str(spec.num_tensors), format_bytes(spec.num_bytes), "whole", ""))
        table = Table(headers, tuple(rows))
        lines = [phase.line() for phase in self.phases]
        return Page((self.head(), "", table, "", *lines, *gain_lines(self.next_gib_ms)))


def gain_lines(next_gib_ms: Mapping[str, float]) -> Iterator[str]:
    """What one GiB more would buy, where it is worth a line."""
    for name, gain_ms in next_gib_ms.items():
        if gain_ms >= _LEAST_GAIN_MS:
            yield f"1 GiB more would take {gain_ms:.1f} ms off a pass of `{name}`"
