"""How many packed units of a phase stay on the device as they are, to be decoded into a slot at each use. Pure numbers.

A byte of room spares the bus a byte of a packed unit that is kept as it is, and two thirds of one if it is resident.
But what is kept so takes decoding at each use, and passes through the slots as what streams does. So it is for passes
that wait for the bus; how many units make it worth while is estimated here, and then played (`draft.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeVar

_MOST_ESTIMATED = 96  # numbers of units that are compared by arithmetic
_MOST_PLAYED = 6  # of these, how many are played: 1.5 ms each of 84 units

_T = TypeVar("_T")


@dataclass(frozen=True)
class Streamable:
    """A unit that may stream.

    Attributes:
        resident_bytes, packed_bytes: more than none, in a buffer of its own on the device, as it is used, and packed.
        copy_ms, decode_ms: of its loads in a pass.
        may_stay: it is packed, and may stay on the device so.
    """

    resident_bytes: int
    packed_bytes: int
    copy_ms: float
    decode_ms: float
    may_stay: bool


def counts_to_play(units: Sequence[Streamable], room: int, compute_ms: float) -> list[tuple[float, int]]:
    """The numbers of units to stay packed under which a pass may be fastest, each behind what a pass then takes if
    nobody waits for a buffer: the one that is best by that first, and others evenly spread.

    Args:
        room: for all that stays, in either form.
        compute_ms: of a pass that decodes nothing.
    """
    candidates = [unit for unit in units if unit.may_stay]
    units = sorted(units, key=lambda unit: -unit.copy_ms / unit.resident_bytes)  # residents first
    parts = range(1, _MOST_ESTIMATED + 1)
    counts = sorted({-(-len(candidates) * part // _MOST_ESTIMATED) for part in parts} - {0})
    estimates = [(_least_ms(units, candidates, count, room, compute_ms), count) for count in counts]
    fitting = [(ms, count) for ms, count in estimates if ms < inf]
    if len(fitting) <= _MOST_PLAYED:
        return fitting
    # Buffers are waited for, too: more than seems enough may be better.
    likely = fitting.index(min(fitting))
    even = [len(fitting) * n // (_MOST_PLAYED - 1) - 1 for n in range(1, _MOST_PLAYED)]
    return [fitting[at] for at in dict.fromkeys([likely, *even])]


def spread(units: Sequence[_T], count: int) -> list[_T]:
    """So many of them, evenly."""
    return [units[i * len(units) // count] for i in range(count)]


def _least_ms(
    units: Sequence[Streamable], candidates: Sequence[Streamable], count: int, room: int, compute_ms: float
) -> float:
    """Of a pass in which nobody waits for a buffer, with so many units packed on the device."""
    packed = spread(candidates, count)
    stay = {id(unit) for unit in packed}
    left = room - sum(unit.packed_bytes for unit in packed)
    if left < 0:
        return inf
    bus_ms, decoding_ms = 0.0, sum(unit.decode_ms for unit in packed)
    # What is left goes to residents, a part of the last one included.
    for unit in units:
        if id(unit) in stay:
            continue
        share = 1 - min(1.0, left / unit.resident_bytes)
        left = max(0, left - unit.resident_bytes)
        bus_ms += share * unit.copy_ms
        decoding_ms += share * unit.decode_ms
    return max(bus_ms, compute_ms + decoding_ms)
