"""A phase of the call, and what a plan says of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from layerstream.blocks import UnitSpec
from layerstream.planning.pace import Prediction
from layerstream.planning.summary import PhaseSummary

# A copy that compute hides slows it by 3.5 % of its own time (H200): in so many passes by as much as a copy takes that
# nothing hides.
MANY_PASSES = 28


@dataclass(frozen=True)
class Phase:
    """A stretch of the pipeline's call that uses the same components.

    Attributes:
        is_repeated: its components run many times a call.
        reserve_bytes: what is on the device beside our weights while it runs, measured; None: not measured yet.
        is_assumed: `reserve_bytes` was given by somebody who plans ahead, rather than measured.
        is_of_others: `reserve_bytes` is what others hold; what the phase takes itself is not known.
        is_loop: it was seen to be entered with shapes that grow step by step: a pass is a token.
        is_brief: it is repeated, and had fewer than `MANY_PASSES` passes in the pipeline's last call.
    """

    components: tuple[str, ...]
    is_repeated: bool
    reserve_bytes: int | None = None
    is_assumed: bool = False
    is_of_others: bool = False
    is_loop: bool = False
    is_brief: bool = False

    @property
    def name(self) -> str:
        return " + ".join(self.components)

    def involves(self, unit: UnitSpec) -> bool:
        """Whether one of its components uses the unit."""
        return unit.component in self.components or any(component in self.components for component in unit.also)


@dataclass(frozen=True)
class AssumedReserve:
    """What somebody who plans ahead takes every phase to need beside the weights.

    Attributes:
        num_lanes: passes of a denoiser that run side by side, each of which needs as much.
    """

    num_bytes: int
    num_lanes: int = 1

    def of(self, phase: Phase) -> Phase:
        """The phase with this in the place of what was measured."""
        num_bytes = self.num_bytes * (self.num_lanes if phase.is_repeated else 1)
        return replace(phase, reserve_bytes=num_bytes, is_assumed=True)


@dataclass(frozen=True)
class PhasePlan:
    """What is on the device while a phase runs.

    Attributes:
        resident: units of the phase in buffers of their own: its bases, and the blocks that do not stream.
        kept: units of other phases that may stay meanwhile.
        slot_bytes: the largest streamed block.
        kept_ring: number and size of another phase's slots, which stay meanwhile; (0, 0): none do.
        wires: number and size of the buffers that packed units are copied to; (0, 0): none are packed.
        packed: units whose packed bytes are on the device, and are decoded into a slot at each use: its own, and those
            of other phases that may stay meanwhile.
        weights_bytes: the most that our weights take: residents, kept units, what is there packed, slots (its own or
            kept), and wires.
        least_bytes: the least weights under which the phase runs.
        prediction: of one pass, once every block was measured.
    """

    phase: Phase
    resident: frozenset[int]
    kept: frozenset[int]
    num_slots: int
    slot_bytes: int
    weights_bytes: int
    least_bytes: int
    prediction: Prediction | None = None
    kept_ring: tuple[int, int] = (0, 0)
    wires: tuple[int, int] = (0, 0)
    packed: frozenset[int] = frozenset()

    @property
    def ring(self) -> tuple[int, int]:
        """Number and size of the slots that are on the device: its own, or another phase's."""
        return (self.num_slots, self.slot_bytes) if self.num_slots else self.kept_ring

    @property
    def peak_bytes(self) -> int | None:
        reserve = self.phase.reserve_bytes
        return None if reserve is None else self.weights_bytes + reserve

    def summary(self) -> PhaseSummary:
        """What it says, as plain values."""
        return PhaseSummary(
            name=self.phase.name,
            is_repeated=self.phase.is_repeated,
            weights_bytes=self.weights_bytes,
            reserve_bytes=self.phase.reserve_bytes,
            is_assumed=self.phase.is_assumed,
            ms_per_pass=None if self.prediction is None else self.prediction.ms_per_pass,
            bound=None if self.prediction is None else self.prediction.bound,
            is_loop=self.phase.is_loop,
        )
