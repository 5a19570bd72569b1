"""What units cost: the times and uses that were measured, and what is assumed where they were not. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from layerstream.blocks import UnitSpec

# Assumed until measured: a link of PCIe 5 at 16 lanes, decoding on an H100, and a denoiser that computes 2.5 times
# faster than it loads.
LINK_GB_PER_S = 50.0
DECODE_GB_PER_S = 1500.0
_COMPUTE_MS_PER_GB = 8.0
_LEAST_PASSES_COUNTED = 8  # fewer do not tell what is used seldom
_SELDOM = 8  # what is used once in so many passes is loaded when it is needed
# Blocks of one stack and size take about as long as each other. What one took beyond so many times their median counts
# as a host that was late: planned with, it gets slots to fill a gap that other passes do not have.
_MOST_TIMES_MEDIAN = 4
_LEAST_ALIKE = 4  # of fewer, none is the odd one out


@dataclass(frozen=True)
class Costs:
    """Measured speeds.

    Attributes:
        compute_ms: of one use, by unit index; may lack some units.
        uses: how often a pass uses a unit, by unit index, where that is not once: see `uses_per_pass`.
        seldom: of the units that hardly any pass uses, those that were used at all.
        decode_gb_per_s: of bytes on the device, made of what has another form at home; None: nothing has.
        keepers_gb_per_s: from other GPUs in whose memory units are at home, by name.
    """

    link_gb_per_s: float
    compute_ms: Mapping[int, float]
    uses: Mapping[int, int] = field(default_factory=dict)
    seldom: frozenset[int] = frozenset()
    decode_gb_per_s: float | None = None
    keepers_gb_per_s: Mapping[str, float] = field(default_factory=dict)


def uses_per_pass(units: Sequence[UnitSpec], counts: Mapping[int, int]) -> dict[int, int] | None:
    """How often units are used while what most bytes lie in is used once: a token of a language model, say.

    A head that runs 28 steps for a token is used 28 times, an embedding that only a prompt needs, never. Told in powers
    of two, and only where it is not about once, so that counts that waver change nothing.

    Args:
        units: blocks of one phase.
        counts: uses of late, by unit index.
    Returns: None where there were too few passes to tell.
    """
    used = sorted((counts.get(u.index, 0), u.num_bytes) for u in units if counts.get(u.index, 0))
    half = sum(num_bytes for _, num_bytes in used) / 2
    usual = 0
    for count, num_bytes in used:
        usual, half = count, half - num_bytes
        if half <= 0:
            break
    if usual < _LEAST_PASSES_COUNTED:
        return None
    found: dict[int, int] = {}
    for unit in units:
        count = counts.get(unit.index, 0)
        if count * _SELDOM <= usual:
            found[unit.index] = 0
        elif count >= 2 * usual:
            found[unit.index] = 1 << (count // usual).bit_length() - 1
    return found


def compute_ms(units: Sequence[UnitSpec], costs: Costs | None) -> list[float]:
    """Of each unit; what was not measured is assumed to be like what was."""
    blocks = [u for u in units if u.is_block]
    measured = _without_odd_ones(blocks, costs.compute_ms) if costs is not None else {}
    known = [b for b in blocks if b.index in measured]
    num_bytes = sum(b.num_bytes for b in known)
    ms_per_byte = sum(measured[b.index] for b in known) / num_bytes if num_bytes else _COMPUTE_MS_PER_GB / 1e9
    return [measured.get(u.index, u.num_bytes * ms_per_byte if u.is_block else 0.0) for u in units]


def load_bytes(unit: UnitSpec, costs: Costs | None) -> float:
    """What a load of a unit takes of the link from the host, in bytes: of one that comes over a faster link less than
    it has."""
    num_bytes = unit.sizes.wire
    speed = costs.keepers_gb_per_s.get(unit.keeper) if costs is not None else None
    return num_bytes if speed is None or costs is None else num_bytes * costs.link_gb_per_s / speed


def decode_ms(unit: UnitSpec, costs: Costs | None) -> float:
    """To make of a unit's bytes at home those of the device; 0: they are the same."""
    if not unit.is_packed:
        return 0.0
    speed = costs.decode_gb_per_s if costs is not None else None
    return unit.num_bytes / (speed or DECODE_GB_PER_S) / 1e6


def _without_odd_ones(blocks: Sequence[UnitSpec], measured: Mapping[int, float]) -> dict[int, float]:
    alike: dict[tuple[str, str | None, int], list[int]] = {}
    for block in blocks:
        if block.index in measured:
            alike.setdefault((block.component, block.stack, block.num_bytes), []).append(block.index)
    found = dict(measured)
    for indices in alike.values():
        if len(indices) >= _LEAST_ALIKE:
            most = _MOST_TIMES_MEDIAN * median(measured[u] for u in indices)
            found.update((u, min(measured[u], most)) for u in indices)
    return found
