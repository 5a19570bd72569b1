"""`check_adapter`: a model run resident, and streamed under three budgets, and what of it must be equal."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch

import layerstream.api as api
from layerstream.budget import format_bytes
from layerstream.comparing import describe, output_differences, recorded, same_bytes, state_differences, tensors_in
from layerstream.device.simulated import SimulatedDevice
from layerstream.errors import ArgumentError, LayerstreamWarning, brief
from layerstream.hooks.compiled import uncompiled
from layerstream.model.components import held_modules, is_plain, layouts_of, some_components_of
from layerstream.model.units import divide
from layerstream.pipeline.owners import refuse_active
from layerstream.testing.findings import SETTLED, Findings
from layerstream.testing.layouts import adapter_lines, say_sizes, summary_of
from layerstream.testing.report import AdapterReport, BudgetRun
from layerstream.testing.watch import EngineWatch


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
    if not isinstance(num_calls, int) or num_calls < SETTLED + 1:
        raise ArgumentError(
            f"num_calls must be an int of at least {SETTLED + 1}, since calls settle in the third, not "
            f"{brief(num_calls)}."
        )
    refuse_active(some_components_of(pipe))
    divide(layouts_of(pipe))  # what cannot be streamed raises before anything runs
    report = _Check(pipe, call, num_calls).report()
    return report.check() if raises else report


class _Check:
    """One check, from the first resident call to the report."""

    def __init__(self, pipe: Any, call: Callable[[Any], Any], num_calls: int) -> None:
        self.pipe, self.call, self.num_calls = pipe, call, num_calls
        self.findings = Findings(num_calls)
        self.errors: list[BaseException] = []
        self.runs: list[BudgetRun] = []
        self.layouts = layouts_of(pipe)
        self.plan = api.plan(pipe, vram_budget="min", device=harsh_device())

    def report(self) -> AdapterReport:
        with torch.no_grad():
            self._run_all()
        say_sizes(self.layouts, self.plan, self.findings)
        used = self.findings.used if self.runs else None
        return AdapterReport(
            components=tuple(summary_of(layout, self.plan, used) for layout in self.layouts),
            runs=tuple(self.runs),
            findings=self.findings.all,
            least_bytes=self.plan.least_bytes,
            adapters=tuple(adapter_lines(self.layouts, self.findings)),
            errors=tuple(self.errors),
        )

    def _run_all(self) -> None:
        # The first call may change what is there: libraries mark modules that have run, models make caches.
        expected = recorded(self.call(self.pipe))
        first = self._state()
        with self._order_noted() as orders:
            outputs = [self.call(self.pipe) for _ in range(2)]
            self.findings.has_one_order = orders[: len(orders) // 2] == orders[len(orders) // 2 :]
        again = [difference for output in outputs for difference in output_differences(output, expected)]
        del outputs
        if again:
            self.findings.add("wrong", f"two calls without streaming differ: {again[0]}. Seed what the call draws")
            return
        if next(tensors_in(expected), None) is None and not list(_images(expected)):
            self.findings.add("hint", "the output holds no tensor, array or image: that it is equal says little")
        if any(t.is_floating_point() and t.isnan().any() for t in tensors_in(expected)):
            self.findings.add("hint", "the output holds NaN without streaming: that it is equal says little")
        before = self._state()
        written = [name for name, was in before.items() if name in first and _has_other_values(first[name], was)]
        total = sum(unit.num_bytes for unit in self.plan.units)
        middle = (self.plan.least_bytes + max(self.plan.least_bytes, total)) // 2
        for budget in ("min", middle, "auto"):
            self._run(budget, expected)
            for difference in state_differences(before, self._state(), changed=written):
                self.findings.add("wrong", f"after leaving {_named_budget(budget)}, {difference}")
        for difference in output_differences(self.call(self.pipe), expected):
            self.findings.add("wrong", f"after all, without streaming, {difference}")

    def _run(self, budget: int | str, expected: Any) -> None:
        where = _named_budget(budget)
        loads: list[tuple[int, int, int]] = []
        try:
            with self._warnings_noted(), api.offload(self.pipe, vram_budget=budget, device=harsh_device()) as streamer:
                engine = streamer._streamer
                assert engine is not None
                watch = EngineWatch(engine, self.findings, streams_all=budget == "min")
                for number in range(1, self.num_calls + 1):
                    watch.is_settled = number >= SETTLED
                    output = self.call(self.pipe)
                    for difference in output_differences(output, expected):
                        self.findings.add("wrong", f"call {number} under {where}: {difference}")
                    del output  # an alias of a slot would keep it
                    stats = streamer.stats()
                    loads.append((stats.num_loads, stats.num_demand_loads, stats.num_touch_loads))
                watch.remove()
        except Exception as error:
            self.errors.append(error)
            self.findings.add("wrong", f"call {len(loads) + 1} under {where} raised {type(error).__name__}: {error}")
        self.findings.say_what_is_outside()
        by_call = [tuple(a - b for a, b in zip(now, was, strict=True)) for was, now in pairwise([(0, 0, 0), *loads])]
        columns = list(zip(*by_call, strict=True)) or [(), (), ()]
        self.runs.append(BudgetRun(budget, *columns))
        if budget == "auto" and len(by_call) == self.num_calls and by_call[-1][0]:
            self.findings.add(
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
                    self.findings.add("hint", str(message))
                else:
                    show(message, category, *args, **kwargs)

            warnings.showwarning = noted
            yield

    @contextlib.contextmanager
    def _order_noted(self) -> Iterator[list[int]]:
        """Which blocks run, by hooks of our own."""
        order: list[int] = []
        blocks = {block: None for layout in self.layouts for stack in layout.stacks for _, block in stack.blocks}
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


def _named_budget(budget: int | str) -> str:
    return f'"{budget}"' if isinstance(budget, str) else f"{format_bytes(budget)}"


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
