"""What is as it was when the last call began, and so need not be looked at again.

Every shortcut ends here: whoever changes something that a later call would find otherwise says `changed`, and all that
was known because nothing had changed is known no longer.
"""

from __future__ import annotations

from typing import TypeVar

from layerstream.blocks import UnitSpec
from layerstream.engine.attachments import Attachment
from layerstream.planning.phase_plan import PhasePlan

_K = TypeVar("_K")
_V = TypeVar("_V")


class Session:
    """The time since something changed.

    Attributes:
        epoch: another number for each.
        applied: the plan that slots were laid out by; None: what is on the device is not what a plan said.
        staying: whose units are all on the device and planned to stay there: their blocks' hooks have nothing to do.
        quiet_for: the plan under which there are no more units to take hooks off.
        stream_number: of the stream that all present units were waited for on; None: they were not, on one.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.applied: PhasePlan | None = None
        self.staying: set[Attachment] = set()
        self.quiet_for: PhasePlan | None = None
        self.stream_number: int | None = None
        self._known: list[dict[object, object]] = []

    def is_laid_out_for(self, unit: UnitSpec) -> bool:
        """Whether a unit is of the phase that is laid out, as far as one is."""
        return self.applied is None or self.applied.phase.involves(unit)

    def known(self) -> dict[_K, _V]:
        """A dictionary, empty now, which is emptied whenever something changes."""
        found: dict[_K, _V] = {}
        self._known.append(found)  # type: ignore[arg-type]
        return found

    def changed(self) -> None:
        """Something is no longer as it was when the last call began."""
        self.epoch += 1
        self.staying.clear()
        self.quiet_for = None
        for known in self._known:
            known.clear()

    def forget_plan(self) -> None:
        """What is on the device is no longer what a plan said: the next call lays out anew."""
        self.applied = None
        self.changed()
