"""What layouts say before anything runs: which parts of a model can stream, and how an adapter would say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from layerstream.budget import format_bytes
from layerstream.model.adapters.registry import adapter_for
from layerstream.model.units import ComponentLayout
from layerstream.planning.plan import Plan
from layerstream.testing.findings import Findings
from layerstream.testing.report import MOST_NAMED, ComponentSummary

# A part of less than this share of all weights is not worth a word.
_LEAST_SHARE = 0.05


def say_sizes(layouts: Iterable[ComponentLayout], plan: Plan, findings: Findings) -> None:
    """Which components are on the device for the most part whenever they run."""
    total = sum(unit.num_bytes for unit in plan.units) or 1
    for layout in layouts:
        summary = summary_of(layout, plan)
        outside = summary.num_bytes - summary.block_bytes
        if outside <= _LEAST_SHARE * total or summary.share_in_blocks >= 0.5 or "decode" in layout.entry_points:
            continue
        if 2 * _shared_bytes(layout) > outside:
            findings.add(
                "hint",
                f"{1 - summary.share_in_blocks:.0%} of `{layout.name}` ({format_bytes(outside)}) is shared by "
                "blocks, belongs to none, and is on the device whenever it runs. No adapter changes that",
            )
            continue
        largest = _largest_lists(layout)
        if not largest:
            continue
        findings.add(
            "hint",
            f"{1 - summary.share_in_blocks:.0%} of `{layout.name}` ({format_bytes(outside)}) is in no block, and "
            f"on the device whenever it runs. Name what holds its blocks in stacks. Its largest "
            f"lists of modules are {largest}",
        )


def summary_of(layout: ComponentLayout, plan: Plan, used: Collection[str] | None = None) -> ComponentSummary:
    """What streams of a component.

    Args:
        used: names of blocks that calls used; None: nothing has run.
    """
    units = [unit for unit in plan.units if unit.component == layout.name]
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
        unused=() if used is None else tuple(name for name in names if name not in used),
    )


def adapter_lines(layouts: Iterable[ComponentLayout], findings: Findings) -> Iterator[str]:
    """Lines that register adapters which say what was found out."""
    for layout in layouts:
        entrances, resident = findings.entrances.get(layout.name, []), findings.resident.get(layout.name, [])
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
    largest = sorted((path for path, size in sizes.items() if size), key=lambda path: -sizes[path])[:MOST_NAMED]
    return ", ".join(f"`{path}` ({format_bytes(sizes[path])})" for path in largest)
