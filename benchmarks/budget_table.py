"""The tables of docs/choosing-a-budget.md: well-known pipelines against cards and links, by the project's own planner.

`python -m benchmarks.budget_table` (or `make budget-table`) writes them again. Nothing is measured here: what a pass
computes is counted, what a card computes and copies a second is stated, and the page says both.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import layerstream
from benchmarks.counting import OUTSIDE, Counts, count
from benchmarks.pages import write_parts
from benchmarks.plots import read
from benchmarks.records import Record, tensors_of, time_of
from benchmarks.true_size import Model, models
from layerstream.arguments import Parser
from layerstream.blocks import Placement, UnitSpec
from layerstream.errors import BudgetError
from layerstream.planning.costs import Costs
from layerstream.planning.packed_choice import worth_packing
from layerstream.planning.plan import Plan, make_plan

PAGE = Path("docs/choosing-a-budget.md")
RESULTS = Path("benchmarks/results")
LINKS_GB_PER_S = (12, 25, 55)
_MIDDLE = LINKS_GB_PER_S[1]
_GIB = 2**30
_SEGMENT_BYTES = 2**21  # CUDA's allocator takes memory in steps of this
# Of a card's memory: the CUDA context, a desktop, and what "auto" leaves free.
_TAKEN_BYTES = 2**30
# Tensors by the count, against what passes were measured to reserve (H100; sd35m, ovis, longcat): 348, 643 and 461 MiB
# against 528 to 576, 792 to 840 and 624 to 648. Convolutions take workspaces: 1.5 GiB of a VAE against 2.8 to 2.9.
_BESIDE_BYTES = 200 * 2**20
_CONVOLUTIONS = 2
_ENCODER_BYTES = 2**29  # 120 to 456 MiB measured
_HIDDEN = 1.02  # times resident, within which copies count as hidden
_LEAST_GB_PER_S, _MOST_GB_PER_S = 1.0, 200.0
_DECODE_SHARE = 0.45  # of what memory moves: 2.18 TB/s of 4.8 measured on an H200
_TILE = 32  # latents to a side, of the VAEs that decode in tiles


@dataclass(frozen=True)
class Card:
    """A size of GPU, and how much one of that size computes.

    Attributes:
        tflops: 10^12 operations a second that passes reach, about 70 % of what is published for dense bfloat16.
        memory_gb_per_s: of its own memory, as published.
    """

    memory_gib: int
    tflops: float
    memory_gb_per_s: float
    like: str

    @property
    def decode_gb_per_s(self) -> float:
        """Of packed weights, in bytes that come of it."""
        return _DECODE_SHARE * self.memory_gb_per_s

    @property
    def budget_bytes(self) -> int:
        return self.memory_gib * _GIB - _TAKEN_BYTES


CARDS = (
    Card(8, 25, 272, "RTX 4060, 5060"),
    Card(12, 40, 504, "RTX 4070, 5070"),
    Card(16, 70, 717, "RTX 4080, 5080"),
    Card(24, 115, 1008, "RTX 4090"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.budget_table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options: argparse.Namespace = parser.parse_args(arguments)
    # All on the meta device, whatever the machine has.
    cases = [Case(model) for model in models()]
    tables: dict[str, list[str]] = {"models": _models_table(cases)}
    for card in CARDS:
        tables[f"a card of {card.memory_gib} GB"] = _card_table(cases, card)
    tables["token loops"] = _token_table(cases)
    tables["check"] = _check_table(cases, read(options.results))
    write_parts(options.page, tables, "budget-table")
    return 0


class Case:
    """A model, what a call of it computes and takes, and the plans made for it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.modules = model.build()
        first = layerstream.plan(self.modules, vram_budget="min", device="cpu")
        self.units: Sequence[UnitSpec] = first.units
        packed = layerstream.plan(self.modules, vram_budget="min", device="cpu", packing="ahead").units
        self._packed = {unit.index: unit for unit in packed if unit.packed is not None}
        self._phases = [each.phase for each in first.phases]
        self.counts = {name: self._counted(name) for name in model.num_passes}

    def _counted(self, name: str) -> Counts:
        module = self.modules[name]
        blocks = sorted({u.block_name[len(name) + 1 :] for u in self.units if u.component == name and u.is_block})
        return count(module, lambda: module(**self.model.inputs(module)), blocks)

    @property
    def weights_bytes(self) -> int:
        return sum(t.nbytes for t in tensors_of(list(self.modules.values())))

    def bytes_of(self, names: Sequence[str]) -> int:
        return sum(t.nbytes for t in tensors_of([self.modules[name] for name in names]))

    @property
    def encoders(self) -> list[str]:
        return [name for name in self.modules if name != "vae" and name not in self.counts]

    # ---- what phases take beside the weights

    @cached_property
    def _decode_bytes(self) -> int:
        return _CONVOLUTIONS * self._decoded(self.model.latents)

    @cached_property
    def _tiled_bytes(self) -> int | None:
        """One tile of the decode at a time, and the whole picture twice; None where a VAE's tile is the whole image."""
        if not hasattr(self.modules["vae"], "tile_sample_min_height"):
            return None
        *outer, height, width = self.model.latents
        frames = 4 * outer[-1] if len(outer) == 3 else 1
        picture = 2 * 3 * frames * 64 * height * width
        return _CONVOLUTIONS * self._decoded((*outer, min(_TILE, height), min(_TILE, width))) + 2 * picture

    def _decoded(self, shape: Sequence[int]) -> int:
        vae: Any = self.modules["vae"]
        latents = torch.empty(tuple(shape), dtype=next(vae.parameters()).dtype, device="meta")
        return count(vae, lambda: vae.decode(latents, return_dict=False)).peak_bytes

    def _reserve(self, name: str, *, is_tiled: bool) -> int:
        if name == "vae":
            return self._tiled_bytes if is_tiled and self._tiled_bytes is not None else self._decode_bytes
        if name in self.counts:
            factor = _CONVOLUTIONS if name == "unet" else 1
            return factor * self.counts[name].peak_bytes + _BESIDE_BYTES
        return _ENCODER_BYTES

    # ---- plans

    def plan(
        self, budget_bytes: int | None, link_gb_per_s: float, ms_per_tflop: float, *, is_tiled: bool = False
    ) -> Plan:
        """What streaming would settle on, had it measured these speeds.

        Raises:
            BudgetError: it does not fit.
        """
        phases = [replace(p, reserve_bytes=self._reserve(p.name, is_tiled=is_tiled)) for p in self._phases]
        costs = Costs(link_gb_per_s, {index: tflop * ms_per_tflop for index, tflop in self._tflop.items()})
        return make_plan(self.units, phases, budget_bytes, costs=costs, granularity=_SEGMENT_BYTES)

    def fitting(self, budget_bytes: int, link_gb_per_s: float, ms_per_tflop: float) -> tuple[Plan, bool]:
        """The same; with the VAE decoding in tiles, where it does not fit otherwise. Says whether it does."""
        try:
            return self.plan(budget_bytes, link_gb_per_s, ms_per_tflop), False
        except BudgetError:
            if self._tiled_bytes is None:
                raise
            return self.plan(budget_bytes, link_gb_per_s, ms_per_tflop, is_tiled=True), True

    def packed_ratio(self, card: Card, tflops: float, link_gb_per_s: float) -> float:
        """Of passes to resident ones, where as many blocks are packed as pay (`packing="auto"`)."""
        raw, is_tiled = self.fitting(card.budget_bytes, link_gb_per_s, 1e3 / tflops)
        before = _call(self, raw)
        assert raw.costs is not None
        costs = replace(raw.costs, decode_gb_per_s=card.decode_gb_per_s)
        units = list(self.units)
        for each in replace(raw, costs=costs).phases:
            if each.phase.is_repeated:
                for index in worth_packing(replace(raw, costs=costs), each, self._packed.keys()):
                    units[[unit.index for unit in units].index(index)] = self._packed[index]
        phases = [replace(p, reserve_bytes=self._reserve(p.name, is_tiled=is_tiled)) for p in self._phases]
        try:
            plan = make_plan(units, phases, card.budget_bytes, costs=costs, granularity=_SEGMENT_BYTES)
        except BudgetError:  # no room for wire buffers
            return before.ratio
        # To resident passes, which decode nothing.
        spent = sum(n * plan.phase_of(name).prediction.ms_per_pass for name, n in self.model.num_passes.items())  # type: ignore[union-attr]
        computed = sum(n * raw.phase_of(name).prediction.compute_ms for name, n in self.model.num_passes.items())  # type: ignore[union-attr]
        return min(before.ratio, spent / computed)

    @cached_property
    def _tflop(self) -> Mapping[int, float]:
        """Of each unit of the denoisers in a pass; a block's pieces share what it computes by their bytes."""
        found = {}
        for name, counts in self.counts.items():
            own = [u for u in self.units if u.component == name]
            num_bytes: Counter[str] = Counter()
            for unit in own:
                num_bytes[unit.block_name] += unit.num_bytes
            for unit in own:
                flops = counts.flops.get(unit.block_name[len(name) + 1 :] if unit.is_block else OUTSIDE, 0)
                found[unit.index] = flops / 1e12 * unit.num_bytes / num_bytes[unit.block_name]
        return found


@dataclass(frozen=True)
class Call:
    """What a plan says of one call.

    Attributes:
        ratio: of the passes, to passes that wait for nothing.
        pass_s: what a pass computes.
        streamed_bytes: of a pass.
        seconds: of the passes and of what is loaded beside them; the text encoders' and the VAE's compute is left out.
    """

    ratio: float
    pass_s: float
    streamed_bytes: float
    seconds: float


def _call(case: Case, plan: Plan) -> Call:
    assert plan.costs is not None
    spent_ms = computed_ms = streamed = 0.0
    for name, passes in case.model.num_passes.items():
        prediction = plan.phase_of(name).prediction
        assert prediction is not None
        spent_ms += passes * prediction.ms_per_pass
        computed_ms += passes * prediction.compute_ms
        streamed = max(streamed, prediction.bus_ms * plan.costs.link_gb_per_s * 1e6)
    seconds = spent_ms / 1e3 + _once(case, plan) / plan.costs.link_gb_per_s / 1e9
    passes = sum(case.model.num_passes.values())
    return Call(spent_ms / computed_ms, computed_ms / 1e3 / passes, streamed, seconds)


def _once(case: Case, plan: Plan) -> int:
    """Bytes: a unit that gives way to another phase is loaded once a call; text encoders read what streams twice."""
    total = 0
    for unit in plan.units:
        placement = plan.placement(unit.index)
        if placement is Placement.BY_PHASE:
            total += unit.num_bytes
        elif placement is Placement.STREAMED and unit.component not in case.counts:
            total += 2 * unit.num_bytes
    return total


def _hides_from(case: Case, card: Card) -> float | None:
    """The slowest link, in GB/s, over which the planner hides all copies of the denoiser; None: none does."""
    low, high = _LEAST_GB_PER_S, _MOST_GB_PER_S
    if _ratio(case, card, card.tflops, high) > _HIDDEN:
        return None
    while high > 1.05 * low:
        middle = (low * high) ** 0.5
        if _ratio(case, card, card.tflops, middle) <= _HIDDEN:
            high = middle
        else:
            low = middle
    return high


# ---- tables


def _models_table(cases: Sequence[Case]) -> list[str]:
    lines = [
        "| model | makes | steps x passes | denoiser, GB | text encoders, GB | all weights, GB | least budget, GiB "
        "| a pass computes, TFLOP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        cells = [
            case.model.name,
            case.model.size,
            f"{case.model.num_steps} x {sum(case.model.passes_per_step.values()):.0f}",
            " + ".join(f"{case.bytes_of([name]) / 1e9:.1f}" for name in case.counts),
            f"{case.bytes_of(case.encoders) / 1e9:.1f}",
            f"{case.weights_bytes / 1e9:.0f}",
            _least(case),
            f"{max(c.total_flops for c in case.counts.values()) / 1e12:.0f}",
        ]
        lines.append(table_row(cells))
    return lines


def _least(case: Case) -> str:
    whole = case.plan(None, LINKS_GB_PER_S[0], 1.0).needed_bytes
    tiled = case.plan(None, LINKS_GB_PER_S[0], 1.0, is_tiled=True).needed_bytes
    return f"{whole / _GIB:.1f}" + (f" ({tiled / _GIB:.1f} in tiles)" if tiled < whole else "")


def _card_table(cases: Sequence[Case], card: Card) -> list[str]:
    links = " / ".join(map(str, LINKS_GB_PER_S))
    lines = [
        f"Budget {card.budget_bytes / _GIB:.0f} GiB; {card.tflops:.0f} TFLOP/s (about {card.like}).",
        "",
        "| model | a pass computes, s | must stream a pass, GB | copies hide from, GB/s "
        f"| x resident at {links} GB/s | packed | bound by | a quarter of the compute | packed "
        f"| a call at {_MIDDLE} GB/s, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        try:
            plan, is_tiled = case.fitting(card.budget_bytes, _MIDDLE, 1e3 / card.tflops)
        except BudgetError:
            lines.append(table_row([case.model.name, f"does not fit: {_least(case)} GiB are the least"]))
            continue
        # Over a link as slow as this, nothing streams that could stay.
        most = _call(case, case.fitting(card.budget_bytes, _LEAST_GB_PER_S / 10, 1e3 / card.tflops)[0])
        ratios = [_ratio(case, card, card.tflops, link) for link in LINKS_GB_PER_S]
        quick = [_ratio(case, card, 4 * card.tflops, link) for link in LINKS_GB_PER_S]
        slow = [link for link, ratio in zip(LINKS_GB_PER_S, ratios, strict=True) if ratio > _HIDDEN]
        from_ = _hides_from(case, card)
        cells = [
            case.model.name + (", VAE in tiles" if is_tiled else ""),
            _seconds(most.pass_s),
            f"{most.streamed_bytes / 1e9:.1f}",
            "" if not most.streamed_bytes else "none" if from_ is None else f"{from_:.0f}",
            " / ".join(f"{ratio:.2f}" for ratio in ratios),
            _packed(case, card, card.tflops, ratios),
            f"bus at {' and '.join(map(str, slow))} GB/s" if slow else "compute",
            " / ".join(f"{ratio:.2f}" for ratio in quick),
            _packed(case, card, 4 * card.tflops, quick),
            f"{_call(case, plan).seconds:.0f}",
        ]
        lines.append(table_row(cells))
    return lines


def _packed(case: Case, card: Card, tflops: float, ratios: Sequence[float]) -> str:
    """The same with what pays packed; "": nothing does, since copies are hidden."""
    if max(ratios) <= _HIDDEN:
        return ""
    return " / ".join(f"{case.packed_ratio(card, tflops, link):.2f}" for link in LINKS_GB_PER_S)


def _ratio(case: Case, card: Card, tflops: float, link_gb_per_s: float) -> float:
    return _call(case, case.fitting(card.budget_bytes, link_gb_per_s, 1e3 / tflops)[0]).ratio


def _token_table(cases: Sequence[Case]) -> list[str]:
    """Of what is read once a token: what streams of it, by card."""
    lines = [
        "| model | component, GB | tokens | " + " | ".join(f"{card.memory_gib} GB card" for card in CARDS) + " |",
        "|---|---|---|" + "---|" * len(CARDS),
    ]
    for case in cases:
        for name, tokens in case.model.num_tokens.items():
            cells = [case.model.name, f"`{name}`, {case.bytes_of([name]) / 1e9:.1f}", str(tokens)]
            for card in CARDS:
                plan, _ = case.fitting(card.budget_bytes, _MIDDLE, 1e3 / card.tflops)
                streamed = [
                    u.num_bytes
                    for u in case.units
                    if u.component == name and plan.placement(u.index) is Placement.STREAMED
                ]
                cells.append(" / ".join(f"{tokens * sum(streamed) / link / 1e9:.0f}" for link in LINKS_GB_PER_S) + " s")
            lines.append(table_row(cells))
    return lines


_CASE_NAMES: Mapping[str, str] = {"sd35m": "SD3.5-medium", "ovis": "Ovis-Image-7B", "longcat": "LongCat-Image"}


def _check_table(cases: Sequence[Case], records: Sequence[Record]) -> list[str]:
    """The same script given the link and the resident pass that were measured, beside what then was measured."""
    lines = [
        "| denoiser, budget | link, GB/s | resident pass, ms | streams a pass, GB | predicted | measured |",
        "|---|---|---|---|---|---|",
    ]
    by_name = {case.model.name: case for case in cases}
    for short, name in _CASE_NAMES.items():
        case = by_name[name]
        found = [r for r in records if (r["case"], r["form"], r["method"]) == (short, "denoiser", "layerstream")]
        for record in sorted(found, key=lambda r: r["vram_budget_bytes"] or 0):
            time, ratio = time_of(record), record["ratio_to_resident"]
            if not record["vram_budget_bytes"] or record["vram_budget"] == "auto" or time is None or not ratio:
                continue
            # A denoiser alone: its budget is all for one phase.
            own = alone(case, "transformer")
            ms_per_tflop = time / ratio / (case.counts["transformer"].total_flops / 1e12)
            plan = own.plan(record["vram_budget_bytes"], record["link_gb_per_s"], ms_per_tflop)
            cells = [
                f"{name}, {record['vram_budget']}",
                f"{record['link_gb_per_s']:.1f}",
                f"{time / ratio:.0f}",
                f"{(record['loaded_bytes_per_pass'] or 0) / 1e9:.1f}",
                f"{_call(own, plan).ratio:.2f} x",
                f"{ratio:.2f} x",
            ]
            lines.append(table_row(cells))
    return lines


def alone(case: Case, component: str) -> Case:
    """A case of one component alone."""
    return Case(replace(case.model, build=lambda: {component: case.modules[component]}, num_tokens={}))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
