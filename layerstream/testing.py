"""For authors of models and adapters: does this model stream well, and what should be changed?

    from layerstream.testing import check_adapter

    print(check_adapter(model, lambda model: model(torch.ones(1, 16))))

Everything runs on the simulated device, in host memory, so a small build of the model is enough, and the best to take.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn

import layerstream.api as api
from layerstream.budget import format_bytes
from layerstream.comparing import (
    assert_restored,
    describe,
    output_differences,
    recorded,
    same_bytes,
    state_differences,
    tensors_in,
)
from layerstream.device.simulated import SimulatedDevice
from layerstream.engine.streamer import Streamer
from layerstream.errors import ArgumentError, LayerstreamWarning, brief
from layerstream.hooks.compiled import uncompiled
from layerstream.model.adapters.registry import adapter_for
from layerstream.model.components import held_modules, is_plain, layouts_of, some_components_of
from layerstream.model.units import ComponentLayout, divide
from layerstream.tables import Page, Table
from layerstream.torch_private import tree_leaves
from layerstream.transfer.unit import StreamedUnit

__all__ = [
    "AdapterReport",
    "BudgetRun",
    "ComponentSummary",
    "Finding",
    "assert_restored",
    "check_adapter",
    "describe",
    "harsh_device",
]

# From this call on all of a call is foreseen.
_SETTLED = 3
# A part of less than this share of all weights is not worth a word.
_LEAST_SHARE = 0.05
_MOST_NAMED = 4


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


def harsh_device(**kwargs: Any) -> SimulatedDevice:
    """The harshest device: copies as late as is legal, slots NaN until then, and told apart from the host.

    Args:
        **kwargs: of `SimulatedDevice`.
    """
    options: dict[str, Any] = {"copies": "late", "is_poisoned": True, "is_named_apart": True}
    return SimulatedDevice(**options | kwargs)


def check_adapter(pipe: Any, call: Callable[[Any], Any], *, num_calls: int = 5, raises: bool = True) -> AdapterReport:
    """Run a pipeline or module resident and streamed, compare, and say what its author should change.

        report = check_adapter(pipe, lambda pipe: pipe("a fox", generator=torch.manual_seed(0)).images)

    It is streamed on the simulated device at its harshest, under "min", a budget in the middle, and "auto". Compared
    are outputs (bit for bit, in nested lists, mappings and dataclasses), the order (all is foreseen from the third call
    on), and, after leaving, every parameter, hook and attribute. Weights that are read outside of their block are named
    with the code that reads them.

    Args:
        pipe: what `offload` takes, in host memory.
        call: one call of it, which gives the same output each time: seed its generators. Runs without gradients.
        num_calls: under each budget, at least 4. Whether it settles under "auto" is seen in the last one.
        raises: raise where it is not ok; else only return what was found.

    Raises:
        AssertionError: it is not ok; the text is that of the report.
        ArgumentError: too few calls, or no call.
        LayerstreamError: it cannot be streamed at all, or is streamed already; see `offload`.
    """
    if not callable(call):
        raise ArgumentError(f"call must be a function of the pipeline, not {brief(call)}: `lambda pipe: pipe(...)`.")
    if not isinstance(num_calls, int) or num_calls < _SETTLED + 1:
        raise ArgumentError(
            f"num_calls must be an int of at least {_SETTLED + 1}, since calls settle in the third, not "
            f"{brief(num_calls)}."
        )
    api.refuse_active(some_components_of(pipe))
    divide(layouts_of(pipe))  # what cannot be streamed raises before anything runs
    report = _Check(pipe, call, num_calls).report()
    return report.check() if raises else report


class _Check:
    """One check, from the first resident call to the report."""

    def __init__(self, pipe: Any, call: Callable[[Any], Any], num_calls: int) -> None:
        self.pipe, self.call, self.num_calls = pipe, call, num_calls
        self.findings: dict[Finding, None] = {}
        self.errors: list[BaseException] = []
        self.runs: list[BudgetRun] = []
        self.layouts = {layout.name: layout for layout in layouts_of(pipe)}
        self.plan = api.plan(pipe, vram_budget="min", device=harsh_device())
        self.used: set[str] = set()
        self.has_one_order = True
        self.outside: Counter[tuple[str, str, bool]] = Counter()  # by component, code, and whether that is a method
        self.entrances: dict[str, list[str]] = {}  # by component, found by themselves or wanted
        self.resident: dict[str, list[str]] = {}  # by component, blocks whose weights are read from outside

    def report(self) -> AdapterReport:
        with torch.no_grad():
            self._run_all()
        self._look_at_sizes()
        return AdapterReport(
            components=tuple(self._summary(layout) for layout in self.layouts.values()),
            runs=tuple(self.runs),
            findings=tuple(self.findings),
            least_bytes=self.plan.least_bytes,
            adapters=tuple(self._adapter_lines()),
            errors=tuple(self.errors),
        )

    def add(self, kind: Literal["wrong", "slow", "hint"], text: str) -> None:
        self.findings.setdefault(Finding(kind, text))

    # ---- running

    def _run_all(self) -> None:
        # The first call may change what is there: libraries mark modules that have run, models make caches.
        expected = recorded(self.call(self.pipe))
        first = self._state()
        with self._order_noted() as orders:
            outputs = [self.call(self.pipe) for _ in range(2)]
            self.has_one_order = orders[: len(orders) // 2] == orders[len(orders) // 2 :]
        again = [difference for output in outputs for difference in output_differences(output, expected)]
        del outputs
        if again:
            self.add("wrong", f"two calls without streaming differ: {again[0]}. Seed what the call draws")
            return
        if next(tensors_in(expected), None) is None and not list(_images(expected)):
            self.add("hint", "the output holds no tensor, array or image: that it is equal says little")
        if any(t.is_floating_point() and t.isnan().any() for t in tensors_in(expected)):
            self.add("hint", "the output holds NaN without streaming: that it is equal says little")
        before = self._state()
        written = [name for name, was in before.items() if name in first and _has_other_values(first[name], was)]
        total = sum(unit.num_bytes for unit in self.plan.units)
        middle = (self.plan.least_bytes + max(self.plan.least_bytes, total)) // 2
        for budget in ("min", middle, "auto"):
            self._run(budget, expected)
            for difference in state_differences(before, self._state(), changed=written):
                self.add("wrong", f"after leaving {_named_budget(budget)}, {difference}")
        for difference in output_differences(self.call(self.pipe), expected):
            self.add("wrong", f"after all, without streaming, {difference}")

    def _run(self, budget: int | str, expected: Any) -> None:
        where = _named_budget(budget)
        loads: list[tuple[int, int, int]] = []
        try:
            with self._warnings_noted(), api.offload(self.pipe, vram_budget=budget, device=harsh_device()) as streamer:
                engine = streamer._streamer
                assert engine is not None
                watch = _Watch(engine, self, streams_all=budget == "min")
                for number in range(1, self.num_calls + 1):
                    watch.is_settled = number >= _SETTLED
                    output = self.call(self.pipe)
                    for difference in output_differences(output, expected):
                        self.add("wrong", f"call {number} under {where}: {difference}")
                    del output  # an alias of a slot would keep it
                    stats = streamer.stats()
                    loads.append((stats.num_loads, stats.num_demand_loads, stats.num_touch_loads))
                watch.remove()
        except Exception as error:
            self.errors.append(error)
            self.add("wrong", f"call {len(loads) + 1} under {where} raised {type(error).__name__}: {error}")
        self._say_what_is_outside()
        by_call = [tuple(a - b for a, b in zip(now, was, strict=True)) for was, now in pairwise([(0, 0, 0), *loads])]
        columns = list(zip(*by_call, strict=True)) or [(), (), ()]
        self.runs.append(BudgetRun(budget, *columns))
        if budget == "auto" and len(by_call) == self.num_calls and by_call[-1][0]:
            self.add(
                "slow",
                f'where everything fits ("auto"), call {self.num_calls} still loads {by_call[-1][0]} units: it does '
                "not settle",
            )

    @contextlib.contextmanager
    def _warnings_noted(self) -> Iterator[None]:
        """Our own warnings become findings; those of others go where they went."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", LayerstreamWarning)
            show = warnings.showwarning

            def noted(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
                if issubclass(category, LayerstreamWarning):
                    self.add("hint", str(message))
                else:
                    show(message, category, *args, **kwargs)

            warnings.showwarning = noted
            yield

    @contextlib.contextmanager
    def _order_noted(self) -> Iterator[list[int]]:
        """Which blocks run, by hooks of our own."""
        order: list[int] = []
        blocks = {
            block: None for layout in self.layouts.values() for stack in layout.stacks for _, block in stack.blocks
        }
        handles = [block.register_forward_pre_hook(lambda module, args: order.append(id(module))) for block in blocks]
        try:
            yield order
        finally:
            for handle in handles:
                handle.remove()

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, module in held_modules(self.pipe).items():
            state |= {f"{name}.{key}".replace("..", "."): value for key, value in describe(uncompiled(module)).items()}
        if is_plain(self.pipe):
            devices = [(k, v) for k, v in vars(self.pipe).items() if isinstance(v, torch.device | str)]
            state["pipeline instance"] = (set(vars(self.pipe)), devices, None)
        return state

    # ---- what was seen

    def read_outside(self, engine: Streamer, unit: int) -> None:
        """A weight of `unit` is read outside of its block's forward, in a call that should be settled."""
        spec = engine._units[unit].spec
        weights = _weights_read(engine)
        reader = _reader()
        what = ", ".join(f"`{name}`" for name in weights[:_MOST_NAMED]) or f"weights of `{spec.name}`"
        if not spec.is_block:
            self.add("hint", f"{what}, outside of blocks, is read by {reader} between two calls of `{spec.component}`")
            return
        block = spec.block_name.removeprefix(f"{spec.component}.")
        _note(self.resident, spec.component, block)
        self.add(
            "slow",
            f"weights of `{spec.block_name}` are read outside of its block's forward, by {reader}: {what}. Each time "
            f'all of it is loaded. Name it in resident ("{block}"), or read them inside the forward',
        )

    def not_foreseen(self, unit: StreamedUnit) -> None:
        """A block is needed that was not expected, in a call that should be settled."""
        why = (
            "although blocks run in the same order in each call. This is a fault of layerstream"
            if self.has_one_order
            else "since blocks run in another order in each call; if what runs depends on the input, so it must be"
        )
        self.add("slow", f"`{unit.spec.block_name}` was not foreseen from call {_SETTLED} on, {why}")

    def found_entrance(self, component: str, entrance: str) -> None:
        _note(self.entrances, component, entrance)
        path, _, method = entrance.rpartition(".")
        owner = f"{component}.{path}" if path else component
        self.add(
            "hint",
            f'`{owner}` was entered by `{method}`, which was found by itself; name it in entry_points ("{entrance}")',
        )

    def entered_from_outside(self, engine: Streamer, component: str) -> None:
        """A block runs, or a weight is read, in a settled call, and no method that is watched has led there."""
        method = _outermost_method(engine, component)
        self.outside[component, _reader() if method is None else f"`{method}`", method is not None] += 1

    def _say_what_is_outside(self) -> None:
        """Of one budget's calls."""
        for (component, reader, is_method), count in self.outside.items():
            if is_method:
                self.add(
                    "hint",
                    f"`{component}` is used in {reader}, which is not watched: each block that it calls is a phase by "
                    "itself. Name it in entry_points if each call of it is one pass (not a loop of them)",
                )
            elif count > 2 * (self.num_calls - _SETTLED + 1):  # once or twice a call, an embedding say, costs little
                self.add(
                    "slow",
                    f"blocks or weights of `{component}` are used by {reader}, which is no method of it: each use is a "
                    "phase by itself. Call them in a method of the model, and name that in entry_points",
                )
        self.outside.clear()

    # ---- what the layout says

    def _look_at_sizes(self) -> None:
        total = sum(unit.num_bytes for unit in self.plan.units) or 1
        for layout in self.layouts.values():
            summary = self._summary(layout)
            outside = summary.num_bytes - summary.block_bytes
            if outside <= _LEAST_SHARE * total or summary.share_in_blocks >= 0.5 or "decode" in layout.entry_points:
                continue
            if 2 * _shared_bytes(layout) > outside:
                self.add(
                    "hint",
                    f"{1 - summary.share_in_blocks:.0%} of `{layout.name}` ({format_bytes(outside)}) is shared by "
                    "blocks, belongs to none, and is on the device whenever it runs. No adapter changes that",
                )
                continue
            largest = _largest_lists(layout)
            if not largest:
                continue
            self.add(
                "hint",
                f"{1 - summary.share_in_blocks:.0%} of `{layout.name}` ({format_bytes(outside)}) is in no block, and "
                f"on the device whenever it runs. Name what holds its blocks in stacks. Its largest "
                f"lists of modules are {largest}",
            )

    def _summary(self, layout: ComponentLayout) -> ComponentSummary:
        units = [unit for unit in self.plan.units if unit.component == layout.name]
        blocks = [unit for unit in units if unit.is_block]
        largest = max(units, key=lambda unit: unit.num_bytes, default=None)
        names = dict.fromkeys(unit.block_name for unit in blocks)
        return ComponentSummary(
            name=layout.name,
            class_name=type(layout.root).__name__,
            num_bytes=sum(unit.num_bytes for unit in units),
            block_bytes=sum(unit.num_bytes for unit in blocks),
            num_blocks=len(names),
            largest_unit=largest.name if largest else "-",
            largest_unit_bytes=largest.num_bytes if largest else 0,
            unused=tuple(name for name in names if name not in self.used) if self.runs else (),
        )

    def _adapter_lines(self) -> Iterator[str]:
        for name, layout in self.layouts.items():
            entrances, resident = self.entrances.get(name, []), self.resident.get(name, [])
            if not entrances and not resident:
                continue
            adapter = adapter_for(layout.root)
            # Large single layers are found in any case.
            stacks = [stack.name for stack in layout.stacks if [n for n, _ in stack.blocks] != [stack.name]]
            said = {
                "stacks": stacks,
                "is_repeated": layout.is_repeated,
                "resident": [*adapter.resident, *resident],
                "entry_points": [*adapter.entry_points, *entrances],
            }
            arguments = ", ".join(f"{key}={_quoted(value)}" for key, value in said.items() if value)
            yield f'layerstream.register_adapter("{type(layout.root).__name__}", layerstream.Adapter({arguments}))'


class _Watch:
    """Notes what a streamer does that an adapter could have spared it. `remove` lets go of it."""

    def __init__(self, engine: Streamer, check: _Check, *, streams_all: bool) -> None:
        self.is_settled = False
        self.streams_all = streams_all  # else blocks that come back when their phase begins may be waited for
        self._engine, self._check = engine, check
        self._make_room, self._make_present = engine._residency.make_room, engine.listener.make_present
        self._look = engine.listener.look_for_entrance
        self._watch_entrance = engine._attached.watch_entrance
        self._counts = (0, 0)
        engine._residency.make_room = self._noting_room  # type: ignore[method-assign]
        engine.listener.make_present = self._noting_reading  # type: ignore[method-assign]
        engine.listener.look_for_entrance = self._noting_search  # type: ignore[method-assign]
        engine._attached.watch_entrance = self._noting_entrance  # type: ignore[method-assign]

    def remove(self) -> None:
        """The engine is as it was."""
        engine = self._engine
        self._check.used |= {
            engine._units[unit].spec.block_name for unit in engine._residency.order.seen if unit in engine._units
        }
        for owner, name in (
            (engine._residency, "make_room"),
            (engine.listener, "make_present"),
            (engine.listener, "look_for_entrance"),
            (engine._attached, "watch_entrance"),
        ):
            vars(owner).pop(name, None)

    def _noting_room(self, unit: StreamedUnit, held: Any) -> Any:
        """A unit that is not there is needed now; the counters say why."""
        stats = self._engine.stats
        counts = stats.num_demand_loads, stats.num_touch_loads
        is_read = counts[1] > self._counts[1]
        if self.is_settled and self.streams_all and not is_read and counts[0] > self._counts[0]:
            self._check.not_foreseen(unit)
        self._counts = counts
        return self._make_room(unit, held)

    def _noting_reading(self, indices: Sequence[int], is_grad: bool) -> None:
        """Something looks at weights that are not bound to the device, be they on their way or not."""
        if self.is_settled:
            for unit in indices:
                if not self._engine._units[unit].is_present:
                    self._check.read_outside(self._engine, unit)
        self._make_present(indices, is_grad)

    def _noting_search(self, component: str) -> bool:
        if self.is_settled:
            self._check.entered_from_outside(self._engine, component)
        return self._look(component)

    def _noting_entrance(self, entrance: Any, component: str, listener: Any) -> None:
        self._check.found_entrance(component, str(entrance))
        self._watch_entrance(entrance, component, listener)


# ---- who reads


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_of_others(frame: FrameType) -> bool:
    """Whether code is neither ours nor torch's."""
    name = str(frame.f_globals.get("__name__", ""))
    is_ours = name.startswith("layerstream.") and not name.startswith("layerstream.standins")
    return not is_ours and name.partition(".")[0] not in ("torch", "contextlib", "functools")


def _reader() -> str:
    """The code that reads a weight, or calls a block: the innermost that is neither ours nor torch's."""
    for frame in _frames():
        if _is_of_others(frame):
            owner = frame.f_locals.get("self")
            cls = f"{type(owner).__name__}." if owner is not None and frame.f_code.co_varnames[:1] == ("self",) else ""
            file = frame.f_code.co_filename.rpartition("/")[2]
            return f"`{cls}{frame.f_code.co_name}` ({file}:{frame.f_lineno})"
    return "code that is not known"


def _weights_read(engine: Streamer) -> list[str]:
    """The absent weights that the operation at hand was given."""
    for frame in _frames():
        if frame.f_code.co_name in ("__torch_function__", "__deepcopy__", "__reduce_ex__"):
            given = frame.f_locals.get("args", ()), frame.f_locals.get("kwargs"), frame.f_locals.get("self")
            ids = {id(leaf) for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)}
            bound = [b for unit in engine._units.values() for b in unit.binding.tensors if id(b.tensor) in ids]
            if bound:
                return [b.name for b in bound]
    return []


def _outermost_method(engine: Streamer, component: str) -> str | None:
    """The outermost running method of a module of the component."""
    modules = engine._attached.entrances.modules
    found = None
    for frame in _frames():
        if frame.f_code.co_varnames[:1] == ("self",) and _is_of_others(frame):
            place = modules.get(id(frame.f_locals.get("self")))
            if place is not None and place[0] == component:
                found = f"{place[1]}.{frame.f_code.co_name}" if place[1] else frame.f_code.co_name
    return found


# ---- text


def _note(found: dict[str, list[str]], component: str, name: str) -> None:
    names = found.setdefault(component, [])
    if name not in names:
        names.append(name)


def _named_budget(budget: int | str) -> str:
    return f'"{budget}"' if isinstance(budget, str) else f"{format_bytes(budget)}"


def _quoted(value: Any) -> str:
    return "[" + ", ".join(f'"{v}"' for v in value) + "]" if isinstance(value, list) else repr(value)


def _shared_bytes(layout: ComponentLayout) -> int:
    """Of parameters that more than one block uses."""
    blocks = [module for stack in layout.stacks for _, module in stack.blocks]
    uses = Counter(parameter for block in blocks for parameter in block.parameters())
    return sum(p.numel() * p.element_size() for p, count in uses.items() if count > 1)


def _largest_lists(layout: ComponentLayout) -> str:
    """Containers of modules, by what is in them."""
    sizes = {
        path: sum(p.numel() * p.element_size() for p in module.parameters())
        for path, module in layout.modules()
        if path and isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict) and len(module) >= 2
    }
    largest = sorted((path for path, size in sizes.items() if size), key=lambda path: -sizes[path])[:_MOST_NAMED]
    return ", ".join(f"`{path}` ({format_bytes(sizes[path])})" for path in largest)


def _images(output: Any) -> Iterator[Any]:
    pending = [output]
    while pending:
        value = pending.pop()
        if callable(getattr(value, "tobytes", None)):
            yield value
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value


def _has_other_values(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    is_tensor = isinstance(first[1], torch.Tensor) and first[0] == second[0]
    return is_tensor and not same_bytes(first[1], second[1])


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
    shown = ", ".join(names[:_MOST_NAMED])
    return f"{shown}, ..." if len(names) > _MOST_NAMED else shown or "-"


def _run_table(runs: tuple[BudgetRun, ...]) -> Table:
    def cells(run: BudgetRun) -> tuple[str, ...]:
        budget = run.budget if isinstance(run.budget, str) else format_bytes(run.budget)
        return budget, *(" ".join(map(str, c)) or "-" for c in (run.loads, run.demand_loads, run.touch_loads))

    return Table(("budget", "loads by call", "not foreseen", "read outside"), tuple(map(cells, runs)))
