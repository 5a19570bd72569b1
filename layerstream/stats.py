"""What a streamer counted, as plain numbers; rendering is elsewhere. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Stats:
    """Counters of one streamer since it started. Bytes are ints, times are floats with the unit in the name.

    `loaded_bytes` counts what crossed the bus for block loads; `placed_bytes` what was copied once at the
    start (bases and resident blocks). `stall_ms` is device time that compute spent waiting for a load.
    """

    num_loads: int = 0
    loaded_bytes: int = 0
    placed_bytes: int = 0
    num_demand_loads: int = 0  # loads that nothing had predicted
    num_touch_loads: int = 0  # of those, loads because code read a weight outside its block's forward
    num_written_back: int = 0  # tensors that a forward wrote and that were copied back to the host
    num_stalls: int = 0
    stall_ms: float = 0.0
    peak_device_bytes: int = 0  # weights on the device: bases, residents, slots
    pinned_bytes: int = 0
    num_slots: int = 0
    slot_bytes: int = 0
    num_extra_slots: int = 0  # slots made beyond the plan because more blocks were in use at once
    num_resident_blocks: int = 0
    num_streamed_blocks: int = 0
    num_packed_blocks: int = 0
    num_paired_passes: int = 0
    enter_s: float = 0.0
    exit_s: float = 0.0

    def as_dict(self) -> dict[str, int | float]:
        """The counters by name, for JSON."""
        return asdict(self)
