"""What a streamer counted, as plain numbers; rendering is elsewhere. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class PhaseStats:
    """What happened in one phase of the calls: counters since the streamer started.

    `num_tokens` counts the passes of token loops, whose inputs grow step by step; parts that are entered by themselves
    for each token (a head) are passes, too.
    `reserve_bytes` is what the phase takes on the device beside the weights, as last measured; None: not yet.
    `most_beside_bytes` is the most that there was beside the weights, other tensors included; None: not read yet.
    `stall_ms_by_unit` divides `stall_ms` by the unit (its index in the plan) whose load was waited for.
    """

    num_passes: int = 0
    num_tokens: int = 0
    num_loads: int = 0
    loaded_bytes: int = 0
    num_stalls: int = 0
    stall_ms: float = 0.0
    stall_ms_by_unit: dict[int, float] = field(default_factory=dict)
    peak_reserved_bytes: int = 0
    peak_weights_bytes: int = 0
    reserve_bytes: int | None = None
    most_beside_bytes: int | None = None


@dataclass(slots=True)
class Stats:
    """Counters of one streamer since it started. Bytes are ints, times are floats with the unit in the name.

    `loaded_bytes` counts what crossed the bus for weights. `stall_ms` is device time that compute spent waiting for a
    load. `peak_reserved_bytes` is the most that the process held on the device, activations and other tensors included;
    to measure it per phase the device's own peak counters are reset while streaming.
    """

    num_loads: int = 0
    loaded_bytes: int = 0
    num_demand_loads: int = 0  # loads that nothing had predicted
    num_touch_loads: int = 0  # of those, loads because code read a weight outside its block's forward
    num_written_back: int = 0  # tensors that a forward wrote and that were copied back to the host
    num_stalls: int = 0
    stall_ms: float = 0.0
    budget_bytes: int = 0  # 0: the least of weights, and no limit for the rest ("min")
    peak_reserved_bytes: int = 0
    peak_device_bytes: int = 0  # weights on the device: bases, residents, slots, and those that stay whole
    whole_bytes: int = 0  # of weights that are no plain tensors, and are on the device as they are
    context_bytes: int = 0  # outside torch's allocator, when streaming began
    foreign_bytes: int = 0  # held by others through torch's allocator, when streaming began
    pinned_bytes: int = 0
    num_paired_passes: int = 0  # calls answered with what had run beside the call before: one load served both
    num_discarded_passes: int = 0  # second passes that ran beside a first one for nothing
    num_packed_units: int = 0  # blocks, or pieces of them, whose bytes at home are packed
    packed_bytes: int = 0  # of those at home, and over the bus at each load
    unpacked_bytes: int = 0  # of the same on the device
    num_own_wires: int = 0  # the most units whose packed bytes stayed on the device, decoded into a slot at each use
    own_wires_bytes: int = 0  # of these, packed
    num_loads_without_copy: int = 0  # loads of such units that nothing crossed the bus for
    num_packing_mismatches: int = 0  # units that did not come back as they were, and stayed raw
    num_stored_units: int = 0  # whose bytes at home are in another GPU's memory
    stored_bytes: int = 0  # of these there
    num_shared_units: int = 0  # whose bytes at home are in memory that ranks of this host share
    shared_bytes: int = 0  # of these
    num_slots: int = 0  # of the phase that ran last
    slot_bytes: int = 0
    num_extra_slots: int = 0  # slots made beyond the plan because more blocks were in use at once
    num_plans: int = 0  # times the plan changed: something was measured, or shapes grew
    num_evicted: int = 0  # resident units that gave their room to another phase
    num_relaid: int = 0  # times a component was laid out anew: cast, or changed while paused
    num_resident_packed_blocks: int = 0  # by the present plan: nothing streams of them, and something stays packed
    num_resident_blocks: int = 0  # by the present plan, those that stay only while their phase runs included
    num_streamed_blocks: int = 0  # those of which only a piece streams included
    enter_s: float = 0.0
    pin_s: float = 0.0  # to page-lock what is attached, part of `enter_s` unless it was paused since
    exit_s: float = 0.0

    def as_dict(self) -> dict[str, int | float]:
        """The counters by name, for JSON."""
        return asdict(self)
