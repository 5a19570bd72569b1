"""Plans that are only looked at: of a pipeline that does not stream, or of one that does, under other arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from layerstream.blocks import UnitSpec
from layerstream.budget import resolve_budget
from layerstream.device.base import Device
from layerstream.engine.packing import LEAST_BYTES
from layerstream.engine.streamer import Streamer
from layerstream.model.components import layouts_of
from layerstream.model.units import Unit, divide
from layerstream.pipeline.options import budget_bytes_on, device_of
from layerstream.planning.packed_choice import as_packed, may_pack
from layerstream.planning.phase_plan import AssumedReserve, Phase
from layerstream.planning.plan import Plan, make_plan


def plan_of(
    pipe: Any,
    vram_budget: int | str | None,
    device: torch.device | str | int | Device | None,
    assumed: AssumedReserve | None,
    *,
    is_packed: bool = False,
) -> Plan:
    """The plan of a pipeline that nobody streams; moves nothing.

    Args:
        is_packed: blocks of 16-bit floats with eight bits of exponent are taken to be packed.
    """
    found = device_of(device)
    layouts = layouts_of(pipe)
    division = divide(layouts, is_preview=True)
    specs = [unit.spec for unit in division.units]
    packable = may_pack(specs, LEAST_BYTES) if is_packed else ()
    units = [_packed(unit) if unit.spec.index in packable else unit.spec for unit in division.units]
    of_each = assumed or AssumedReserve(0)
    phases = [of_each.of(Phase((layout.name,), layout.is_repeated)) for layout in layouts]
    budget = budget_bytes_on("auto" if vram_budget is None else vram_budget, found)
    return make_plan(units, phases, budget, granularity=found.rounded_bytes(1), whole=division.whole())


def _packed(unit: Unit) -> UnitSpec:
    is_bfloat16 = all(bound.dtype is torch.bfloat16 for bound in unit.binding.tensors)
    return as_packed(unit.spec) if is_bfloat16 else unit.spec


def plan_anew(
    streamer: Streamer,
    vram_budget: int | str | None,
    device: torch.device | str | int | Device | None,
    assumed: AssumedReserve | None,
) -> Plan:
    """The plan of what streams under other arguments; those that are None are as they are now."""
    present, found = streamer.plan, streamer.device
    other = found if device is None else device_of(device)
    if other.torch_device != found.torch_device:  # where no times were measured
        found, vram_budget = other, "auto" if vram_budget is None else vram_budget
        present = replace(present, costs=None, granularity=other.rounded_bytes(1))
    budget = present.budget_bytes
    if vram_budget is not None:
        # The allocator is held to our own budget now; what would be free without it is all that others leave.
        total_bytes = found.total_bytes()
        free_bytes = total_bytes - found.context_bytes()
        budget = resolve_budget(vram_budget, free_bytes=free_bytes, total_bytes=total_bytes)
    return present.under(budget, assumed=assumed).with_next_gib()
