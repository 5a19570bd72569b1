"""Makes units raw again: their bytes as they are, in host memory of their own, whatever kind of home they have.

Packed bytes are decoded on the device where that can be done, and on the host where it cannot. What is in another GPU's
memory is copied from there. What processes share is handed back as it is, to be copied page by page where somebody
writes to it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import torch

from layerstream.device.base import Device, engine_tensors
from layerstream.engine.attachments import Attachments
from layerstream.engine.exchange import HomeExchanges
from layerstream.engine.ledger import Ledger
from layerstream.engine.scratch import Scratch
from layerstream.host.home import Home, PackedHome, RawHome, SharedHome
from layerstream.host.memory import Pages, fill
from layerstream.host.pages_ahead import PagesAhead
from layerstream.transfer.unit import StreamedUnit

_log = logging.getLogger("layerstream.exchange")


class RawAgain:
    """Gives units a `RawHome` in place of another.

    Attributes:
        pages: mappings for what is made raw, or packed, next.
        is_leaving: units are handed back, one after the other; what they are handed back in is not loaded from.
        has_made: hear of a unit that was made raw, and of the home that it had.

    Args:
        mutex: of the streamer: weights are looked at from any thread, and loads are made beside that.
    """

    def __init__(
        self,
        device: Device,
        attached: Attachments,
        ledger: Ledger,
        scratch: Scratch,
        exchanges: HomeExchanges,
        mutex: threading.RLock,
    ) -> None:
        self.pages = PagesAhead()
        self.is_leaving = False
        self.has_made: list[Callable[[StreamedUnit, Home], object]] = []
        self._device = device
        self._attached = attached
        self._ledger = ledger
        self._scratch = scratch
        self._exchanges = exchanges
        self._mutex = mutex
        exchanges.make_raw = self.make_raw

    def make_raw(self, unit: StreamedUnit) -> None:
        """Give a unit its bytes back as they are, in memory of their own.

        Raises:
            WeightsLostError: they were in the memory of another GPU, which has failed.
        """
        with self._mutex:
            home = unit.home
            if not isinstance(home, RawHome):
                self._make_raw(unit, home)

    def _make_raw(self, unit: StreamedUnit, home: Home) -> None:
        store = self._exchanges.store_of(unit)
        with engine_tensors():
            is_handed_back_shared = self.is_leaving and isinstance(home, SharedHome)
            pages: Pages = _private(home) if is_handed_back_shared else self.pages.take(home.device_bytes)
            if (following := self._next_of(unit)) is not None:
                self.pages.prepare(following.home.device_bytes)
            raw = RawHome(self._device, home.offsets, home.device_bytes)
            # Copies from another GPU to memory that is not locked take ten times as long.
            is_locked = home.keeper is not None or not self.is_leaving
            buffer = store.hold(raw, pages, home.device_bytes, is_locked=is_locked)
            try:
                if not is_handed_back_shared:
                    self._bring(home, buffer)
            except BaseException:
                store.release(raw)
                raise
            self._exchanges.exchange(unit, raw, pages)
            try:
                self._exchanges.release()  # of what it had before, which the device has no more to do with, as a rule
            except Exception as error:  # of a device that has failed: weights come home all the same
                _log.warning("what `%s` had before could not be given up: %r", unit.spec.name, error)
            if not self.is_leaving:
                self._device.empty_cache()  # activations in pieces of what this took would keep these apart
        for hear in self.has_made:
            hear(unit, home)

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Inside, units are handed back, one after the other."""
        self.is_leaving = True
        try:
            yield
        finally:
            self.is_leaving = False
            self.pages.close()

    def _next_of(self, unit: StreamedUnit) -> StreamedUnit | None:
        """The unit that is handed back, and made raw, after this one; None: there is none, or nobody knows."""
        if not self.is_leaving:
            return None
        units = self._attached.of_component[unit.spec.component].units
        following = units[units.index(unit) + 1 :]
        return next((each for each in following if not isinstance(each.home, RawHome | SharedHome)), None)

    def _bring(self, home: Home, buffer: torch.Tensor) -> None:
        """Fill host memory (uint8 [device_bytes]) with the bytes as they are."""
        if isinstance(home, PackedHome):
            self._decode_to_host(home, buffer)
            return
        (segment,) = home.segments
        if home.keeper is None:
            fill([(buffer, segment.source)])
        else:
            home.keeper.fetch(segment.source, buffer[: segment.source.numel()])

    def _decode_to_host(self, home: PackedHome, buffer: torch.Tensor) -> None:
        """On the device, which is ten times faster; on the host where the device has no room, or has failed."""
        with self._ledger.forgiving():
            try:
                with self._scratch.buffer(home.device_bytes) as raw:
                    self._scratch.decode(home, raw)
                    self._device.copy_back(buffer, raw)
                return
            except Exception as error:
                _log.debug("decoding on the host: %r", error)
        wire = home.wire if home.keeper is None else home.keeper.fetch(home.wire)
        self._device.unpack_on_host(wire, home.layout, buffer)


def _private(home: Home) -> Pages:
    """The shared memory of a home, as this process may write to it."""
    assert isinstance(home, SharedHome)
    return home.pages.private().part(home.offset, home.device_bytes)
