"""The homes of one streamer's units that are not the host memory they were found in: packed, on another GPU, or shared.

`exchange.py` gives a unit another home, `raw_again.py` one as it was found. Which units get which, and when:
`host_copy.py` as they are attached, `packing.py` and `storing.py` after that.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.blocks import UnitSpec
from layerstream.device.base import Device
from layerstream.engine.attachments import Attachments
from layerstream.engine.edits import Edits
from layerstream.engine.exchange import HomeExchanges
from layerstream.engine.host_copy import HostCopy
from layerstream.engine.ledger import Ledger
from layerstream.engine.packing import Packing
from layerstream.engine.raw_again import RawAgain
from layerstream.engine.scratch import Scratch
from layerstream.engine.session import Session
from layerstream.engine.storing import Storing
from layerstream.host.keeper import Keeper
from layerstream.host.ranks import HostRanks
from layerstream.stats import Stats
from layerstream.transfer.helper import Helper
from layerstream.transfer.transfer import TransferEngine
from layerstream.transfer.unit import StreamedUnit


@dataclass(frozen=True)
class Elsewhere:
    """What takes part beside the GPU that computes and the memory of this process.

    Attributes:
        keepers, is_all_stored: see `Storing`.
        ranks, shared_as: see `HostCopy`.
        helpers: other GPUs whose links to the host carry a share of loads.
    """

    keepers: Sequence[Keeper] = ()
    is_all_stored: bool = False
    ranks: HostRanks | None = None
    shared_as: str = ""
    helpers: Sequence[Helper] = ()

    @property
    def devices(self) -> list[Device]:
        """The other GPUs."""
        return [*(keeper.device for keeper in self.keepers), *(helper.device for helper in self.helpers)]


class Homes:
    """Has units given other homes on entering and while calls run, and their own again on leaving.

    Args:
        mutex: of the streamer.
        packing: see `Packing`.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        transfer: TransferEngine,
        edits: Edits,
        ledger: Ledger,
        session: Session,
        stats: Stats,
        mutex: threading.RLock,
        packing: str,
        elsewhere: Elsewhere,
    ) -> None:
        self._attached = attached
        self._helpers = elsewhere.helpers
        self.exchanges = HomeExchanges(device, attached, transfer, edits, session.changed)
        scratch = Scratch(device, ledger)
        self._raw_again = RawAgain(device, attached, ledger, scratch, self.exchanges, mutex)
        self.packing = Packing(device, attached, ledger, scratch, self.exchanges, self._raw_again, stats, packing)
        self.storing = Storing(
            device,
            attached,
            ledger,
            self.exchanges,
            self._raw_again,
            stats,
            elsewhere.keepers,
            is_all=elsewhere.is_all_stored,
            is_to_be_packed=self.packing.is_to_be_packed,
            may_be_packed=self.packing.may_be_packed_ahead,
        )
        self.host_copy = HostCopy(device, stats, elsewhere.ranks, elsewhere.shared_as)
        attached.share, attached.make_raw = self.host_copy.share, self._raw_again.make_raw
        self._raw_again.has_made.append(self._count_shared)

    def check(self, specs: Sequence[UnitSpec]) -> None:
        """Before anything changes: see that there is room elsewhere.

        Raises:
            StoreError: with numbers.
        """
        self.storing.check(specs)

    def prepare(self) -> None:
        """Before anything is page-locked: kernels are made, and buffers on other GPUs taken.

        Raises:
            StoreError: another GPU has no room for them.
        """
        self.packing.prepare()
        for helper in self._helpers:
            helper.open()

    def attached(self) -> None:
        """Components are there: give their units the homes that they are to have at once."""
        self.packing.attached()
        self.storing.attached()
        self.host_copy.entered()
        self._count_shared()

    def at_rest(self) -> None:
        """No component is in the middle of a call: go on with what is wanted, a unit at a time."""
        self.packing.at_rest()
        self.exchanges.at_rest()
        self.storing.at_rest()

    def check_way_back(self) -> None:
        """Before anything is handed back: see that host memory has room for what is elsewhere.

        Raises:
            HostMemoryError: with numbers.
        """
        self.storing.check_way_back()

    def leaving(self) -> contextlib.AbstractContextManager[None]:
        """Inside, units are handed back, one after the other."""
        return self._raw_again.leaving()

    def forget(self, units: Sequence[StreamedUnit]) -> None:
        """These units are let go of, in a pause."""
        self.packing.forget(units)

    def close(self) -> None:
        """All is handed back: give up what was asked of other GPUs and ranks."""
        self.exchanges.forget()
        with contextlib.ExitStack() as each:  # all of it, also when one fails
            each.callback(self.storing.close)
            each.callback(self.host_copy.close)

    def _count_shared(self, *changed: object) -> None:
        if self.host_copy.is_on:
            self.host_copy.count([unit.home for unit in self._attached.units.values()])
