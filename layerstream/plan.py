"""Decides what is resident, what streams, and through how many slots. Pure.

The budget here is of weights on the device: bases, resident blocks and slots. Residents are spread evenly
among the streamed blocks, so that the compute of each hides the load of a neighbour; components that run many
times a call come first, since each of their bytes saves the bus once per pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.blocks import Placement, UnitSpec
from layerstream.budget import format_bytes
from layerstream.errors import BudgetError

LEAST_SLOTS = 2  # one that compute reads, one that is loaded meanwhile
# A third slot evens out blocks of unlike compute; it is worth its bytes only where they are a small part.
_SLOTS_WITH_ROOM = 3
_ROOM_FOR_MORE_SLOTS = 8
# A component that repeats runs 20 to 100 times a call; the exact figure only ranks it before the others.
_REPEATS = 50


@dataclass(frozen=True)
class Plan:
    """Placements by unit index, and the slots.

    Attributes:
        slot_bytes: size of each slot: the largest streamed block.
        device_bytes: weights on the device at any time: residents and slots.
        least_bytes: the smallest budget under which these units stream.
        budget_bytes: what was allowed; None for "the least".
    """

    placements: tuple[Placement, ...]
    num_slots: int
    slot_bytes: int
    device_bytes: int
    least_bytes: int
    budget_bytes: int | None

    def is_resident(self, unit: int) -> bool:
        return self.placements[unit] is Placement.RESIDENT


def make_plan(units: Sequence[UnitSpec], budget_bytes: int | None, *, num_slots: int | None = None) -> Plan:
    """Place every unit within `budget_bytes` of device memory for weights; None places the least.

    Args:
        num_slots: fix the number of slots (at least 2) instead of choosing it.
    Raises:
        BudgetError: the bases and two slots do not fit; with the arithmetic and the least that does.
    """
    base_bytes = sum(u.num_bytes for u in units if not u.is_block)
    blocks = [u for u in units if u.is_block]
    least = base_bytes + _slot_count(len(blocks), LEAST_SLOTS) * max((b.num_bytes for b in blocks), default=0)
    total = base_bytes + sum(b.num_bytes for b in blocks)
    least = min(least, total)
    if budget_bytes is not None and budget_bytes < least:
        raise BudgetError(
            _too_small(units, budget_bytes, base_bytes, least), budget_bytes=budget_bytes, needed_bytes=least
        )
    resident, slots = _place(blocks, None if budget_bytes is None else budget_bytes - base_bytes, num_slots)
    streamed = [b for b in blocks if b.index not in resident]
    slot_bytes = max((b.num_bytes for b in streamed), default=0)
    return Plan(
        placements=tuple(
            Placement.STREAMED if u.is_block and u.index not in resident else Placement.RESIDENT for u in units
        ),
        num_slots=slots,
        slot_bytes=slot_bytes,
        device_bytes=total - sum(b.num_bytes for b in streamed) + slots * slot_bytes,
        least_bytes=least,
        budget_bytes=budget_bytes,
    )


def _slot_count(num_streamed: int, wanted: int) -> int:
    """More slots than streamed blocks would stay empty."""
    return min(num_streamed, wanted)


def _place(blocks: Sequence[UnitSpec], room: int | None, num_slots: int | None) -> tuple[set[int], int]:
    """The resident blocks and the number of slots that leave the fewest bytes to the bus.

    Every block size is tried as the slot size: blocks larger than it must be resident, and the slots are smaller
    for it, which pays where a few blocks are far larger than the rest.
    """
    if room is None:
        return set(), _slot_count(len(blocks), num_slots or LEAST_SLOTS)
    if sum(b.num_bytes for b in blocks) <= room:
        return {b.index for b in blocks}, 0
    best: tuple[int, set[int], int] | None = None
    for slot_bytes in sorted({b.num_bytes for b in blocks}, reverse=True):
        forced = [b for b in blocks if b.num_bytes > slot_bytes]
        others = [b for b in blocks if b.num_bytes <= slot_bytes]
        slots = num_slots or (_SLOTS_WITH_ROOM if room >= _ROOM_FOR_MORE_SLOTS * slot_bytes else LEAST_SLOTS)
        slots = _slot_count(len(others), slots)
        left = room - sum(b.num_bytes for b in forced) - slots * slot_bytes
        if left < 0:
            continue
        resident = {b.index for b in forced} | _spread(others, left)
        cost = sum(b.num_bytes * (_REPEATS if b.is_repeated else 1) for b in blocks if b.index not in resident)
        if best is None or cost < best[0]:
            best = cost, resident, slots
    if best is None:
        # Fewer slots than asked for fit; two always do, or the budget would have been refused.
        return set(), _slot_count(len(blocks), LEAST_SLOTS)
    return best[1], best[2]


def _spread(blocks: Sequence[UnitSpec], room: int) -> set[int]:
    """As many blocks as fit, evenly spaced; components that repeat first."""
    resident: set[int] = set()
    for is_repeated in (True, False):
        group = [b for b in blocks if b.is_repeated is is_repeated]
        for count in range(len(group), 0, -1):
            # The middle of each of `count` equal stretches.
            chosen = [group[(2 * i + 1) * len(group) // (2 * count)] for i in range(count)]
            if sum(b.num_bytes for b in chosen) <= room:
                resident |= {b.index for b in chosen}
                room -= sum(b.num_bytes for b in chosen)
                break
    return resident


def _too_small(units: Sequence[UnitSpec], budget_bytes: int, base_bytes: int, least: int) -> str:
    blocks = [u for u in units if u.is_block]
    if not blocks:
        return (
            f"vram_budget {format_bytes(budget_bytes)} is too small: nothing here streams block by block, and the "
            f"components need {format_bytes(base_bytes)} whole. Raise vram_budget to at least {least} bytes "
            f"({format_bytes(least)})."
        )
    largest = max(blocks, key=lambda b: b.num_bytes)
    slots = _slot_count(len(blocks), LEAST_SLOTS)
    return (
        f"vram_budget {format_bytes(budget_bytes)} is too small: {slots} slot(s) for `{largest.name}` "
        f"({format_bytes(largest.num_bytes)} each) and the components' weights outside their stacks "
        f"({format_bytes(base_bytes)}) need {format_bytes(least)} before activations. Raise vram_budget to at least "
        f"{least} bytes ({format_bytes(least)})."
    )
