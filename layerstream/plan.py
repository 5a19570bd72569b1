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
_MOST_SLOTS = 4  # what is left when no further block fits may buy more slots, which even out blocks of unlike compute


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
    shapes = [_shape(blocks, slot_bytes) for slot_bytes in sorted({b.num_bytes for b in blocks}, reverse=True)]
    total = base_bytes + sum(b.num_bytes for b in blocks)
    least = base_bytes + min((s.bytes_with(LEAST_SLOTS) for s in shapes), default=0)
    if budget_bytes is not None and budget_bytes < least:
        raise BudgetError(
            _too_small(shapes, budget_bytes, base_bytes, least), budget_bytes=budget_bytes, needed_bytes=least
        )
    if budget_bytes is None:
        room = min((s.bytes_with(num_slots or LEAST_SLOTS) for s in shapes), default=0)
    else:
        room = budget_bytes - base_bytes
    resident, slots = _place(blocks, shapes, room, num_slots)
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


@dataclass(frozen=True)
class _Shape:
    """One size of slot: larger blocks must be resident, the others may stream.

    The slots are smaller for it, which pays where a few blocks are far larger than the rest.
    """

    slot_bytes: int
    forced: tuple[UnitSpec, ...]
    others: tuple[UnitSpec, ...]

    @property
    def forced_bytes(self) -> int:
        return sum(b.num_bytes for b in self.forced)

    def bytes_with(self, wanted: int) -> int:
        """Device memory of the larger blocks and so many slots."""
        return self.forced_bytes + self.num_slots(wanted) * self.slot_bytes

    def num_slots(self, wanted: int) -> int:
        """More slots than blocks that stream would stay empty."""
        return min(len(self.others), wanted)


def _shape(blocks: Sequence[UnitSpec], slot_bytes: int) -> _Shape:
    return _Shape(
        slot_bytes,
        tuple(b for b in blocks if b.num_bytes > slot_bytes),
        tuple(b for b in blocks if b.num_bytes <= slot_bytes),
    )


def _place(
    blocks: Sequence[UnitSpec], shapes: Sequence[_Shape], room: int, num_slots: int | None
) -> tuple[set[int], int]:
    """The resident blocks and the number of slots that leave the fewest bytes to the bus, per call.

    Residents come before slots beyond two: prefetching further does not help where the bus is the limit (Ovis-Image on
    an H100: 269.0 ms a pass with two slots, 271.9 with three, 270.0 with four), residents do.
    """
    if sum(b.num_bytes for b in blocks) <= room:
        return {b.index for b in blocks}, 0
    best: tuple[tuple[int, int, int], set[int], int] | None = None
    for wanted in (num_slots or LEAST_SLOTS, LEAST_SLOTS):  # as many as asked for, if they fit
        for shape in shapes:
            slots = shape.num_slots(wanted)
            left = room - shape.forced_bytes - slots * shape.slot_bytes
            if left < 0:
                continue
            chosen = _spread(shape.others, left)
            left -= sum(b.num_bytes for b in chosen)
            resident = {b.index for b in (*shape.forced, *chosen)}
            if num_slots is None:
                slots = shape.num_slots(min(_MOST_SLOTS, slots + left // shape.slot_bytes))
            streamed = [b for b in blocks if b.index not in resident]
            # What repeats comes first, whole: each of its bytes saves the bus dozens of times a call.
            cost = (
                sum(b.num_bytes for b in streamed if b.is_repeated),
                sum(b.num_bytes for b in streamed if not b.is_repeated),
                shape.slot_bytes,
            )
            if best is None or cost < best[0]:
                best = cost, resident, min(slots, len(streamed))
        if best is not None:
            break
    assert best is not None  # the least of the shapes fits, or the budget would have been refused
    return best[1], best[2]


def _spread(blocks: Sequence[UnitSpec], room: int) -> list[UnitSpec]:
    """Evenly spaced blocks with the most bytes that fit; components that repeat first."""
    resident: list[UnitSpec] = []
    for is_repeated in (True, False):
        group = [b for b in blocks if b.is_repeated is is_repeated]
        best: list[UnitSpec] = []
        for count in range(1, len(group) + 1):
            # The middle of each of `count` equal stretches.
            chosen = [group[(2 * i + 1) * len(group) // (2 * count)] for i in range(count)]
            if sum(b.num_bytes for b in best) < sum(b.num_bytes for b in chosen) <= room:
                best = chosen
        resident += best
        room -= sum(b.num_bytes for b in best)
    return resident


def _too_small(shapes: Sequence[_Shape], budget_bytes: int, base_bytes: int, least: int) -> str:
    raise_to = f"Raise vram_budget to at least {least} bytes ({format_bytes(least)})."
    if not shapes:
        return (
            f"vram_budget {format_bytes(budget_bytes)} is too small: nothing here streams block by block, and the "
            f"components need {format_bytes(base_bytes)} whole. {raise_to}"
        )
    shape = min(shapes, key=lambda s: s.bytes_with(LEAST_SLOTS))
    largest = max(shape.others, key=lambda b: b.num_bytes)
    larger = f", {len(shape.forced)} larger block(s) ({format_bytes(shape.forced_bytes)})" if shape.forced else ""
    return (
        f"vram_budget {format_bytes(budget_bytes)} is too small: {shape.num_slots(LEAST_SLOTS)} slot(s) for "
        f"`{largest.name}` ({format_bytes(largest.num_bytes)} each){larger} and the components' weights outside their "
        f"stacks ({format_bytes(base_bytes)}) need {format_bytes(least)} before activations. {raise_to}"
    )
