"""What `check_adapter` returns: findings, components and loads as plain data, and their text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from layerstream.budget import format_bytes
from layerstream.tables import Page, Table

MOST_NAMED = 4  # of a kind of thing, in one text


@dataclass(frozen=True)
class Finding:
    """Something to change.

    Attributes:
        kind: "wrong": another output, an error, or something that was not given back. "slow": right, and costs time in
            each call. "hint": better said than found out.
    """

    kind: Literal["wrong", "slow", "hint"]
    text: str


@dataclass(frozen=True)
class ComponentSummary:
    """What streams of one component.

    Attributes:
        num_bytes: all of it; of that, `block_bytes` are in blocks, which can stream.
        largest_unit: name of the unit that takes most, and its bytes.
        unused: names of blocks that no call used.
    """

    name: str
    class_name: str
    num_bytes: int
    block_bytes: int
    num_blocks: int
    largest_unit: str
    largest_unit_bytes: int
    unused: tuple[str, ...] = ()

    @property
    def share_in_blocks(self) -> float:
        """Of its bytes, 0 to 1."""
        return self.block_bytes / self.num_bytes if self.num_bytes else 0.0


@dataclass(frozen=True)
class BudgetRun:
    """What the calls under one budget loaded, call by call: all loads, those that nothing had foreseen, and those
    because a weight was read outside of its block."""

    budget: int | str
    loads: tuple[int, ...]
    demand_loads: tuple[int, ...]
    touch_loads: tuple[int, ...]


@dataclass(frozen=True)
class AdapterReport:
    """What `check_adapter` found. Prints what to change.

    Attributes:
        least_bytes: the least budget for the weights alone.
        adapters: lines that register adapters which say what was found out; none where nothing is to be said.
    """

    components: tuple[ComponentSummary, ...]
    runs: tuple[BudgetRun, ...]
    findings: tuple[Finding, ...]
    least_bytes: int
    adapters: tuple[str, ...] = ()
    errors: tuple[BaseException, ...] = field(default=(), compare=False, repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, and nothing costs time that need not."""
        return not any(finding.kind != "hint" for finding in self.findings)

    def texts(self, kind: str) -> tuple[str, ...]:
        """What was found of a kind: "wrong", "slow" or "hint"."""
        return tuple(finding.text for finding in self.findings if finding.kind == kind)

    def check(self) -> AdapterReport:
        """Itself, if it is `ok`.

        Raises:
            AssertionError: with all of the report's text.
        """
        if not self.ok:
            raise AssertionError(str(self)) from (self.errors[0] if self.errors else None)
        return self

    def __str__(self) -> str:
        counts = Counter(finding.kind for finding in self.findings)
        verdict = "ok" if self.ok else f"{counts['wrong']} wrong, {counts['slow']} slow"
        parts: list[str | Table] = [f"{verdict}; the least budget for the weights is {format_bytes(self.least_bytes)}"]
        if self.components:
            parts += ["", _component_table(self.components)]
        if self.runs:
            parts += ["", _run_table(self.runs)]
        titles: dict[Literal["wrong", "slow", "hint"], str] = {
            "wrong": "Wrong:",
            "slow": "Right, and slower than it need be:",
            "hint": "Worth saying:",
        }
        for kind, title in titles.items():
            if counts[kind]:
                parts += ["", title, *(f"- {text}" for text in self.texts(kind))]
        if self.adapters:
            parts += ["", "An adapter that says so:", *(f"    {line}" for line in self.adapters)]
        return Page(tuple(parts)).text()


def _component_table(components: tuple[ComponentSummary, ...]) -> Table:
    rows = [
        (
            c.name,
            c.class_name,
            format_bytes(c.num_bytes),
            f"{c.num_blocks}",
            f"{c.share_in_blocks:.0%}",
            f"{c.largest_unit}, {format_bytes(c.largest_unit_bytes)}",
            _unused_cell(c),
        )
        for c in components
    ]
    return Table(("component", "class", "weights", "blocks", "in blocks", "largest unit", "never used"), tuple(rows))


def _unused_cell(component: ComponentSummary) -> str:
    names = [name.removeprefix(f"{component.name}.") for name in component.unused]
    shown = ", ".join(names[:MOST_NAMED])
    return f"{shown}, ..." if len(names) > MOST_NAMED else shown or "-"


def _run_table(runs: tuple[BudgetRun, ...]) -> Table:
    def cells(run: BudgetRun) -> tuple[str, ...]:
        budget = run.budget if isinstance(run.budget, str) else format_bytes(run.budget)
        return budget, *(" ".join(map(str, c)) or "-" for c in (run.loads, run.demand_loads, run.touch_loads))

    return Table(("budget", "loads by call", "not foreseen", "read outside"), tuple(map(cells, runs)))
