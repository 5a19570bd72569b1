"""Packs one unit, and makes it raw again: on the device where that can be done, on the host where it cannot.

What is packed is on the host before it counts: it is read back from there, decoded, and compared with what it was made
of, bit by bit. Nothing is exchanged here but a unit that is made raw.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from layerstream import codec
from layerstream.device.base import Device, engine_tensors
from layerstream.engine.edits import Edits
from layerstream.engine.exchange import HomeExchanges
from layerstream.engine.ledger import Ledger
from layerstream.host.home import Home, PackedHome, RawHome
from layerstream.host.pages_ahead import PagesAhead
from layerstream.host.store import HostStore
from layerstream.planning.packed_choice import PACKED_SHARE
from layerstream.saying import warn
from layerstream.stats import Stats
from layerstream.transfer.unit import StreamedUnit

_log = logging.getLogger("layerstream.packing")

_LEAST_TIMED_BYTES = 2**24  # of a unit whose decoding tells how fast it is
_TIMED_UNITS = 9  # the last ones count


class Packer:
    """Makes homes of other kinds.

    Attributes:
        pages: mappings for what is packed, or made raw, next.
        is_leaving: units are handed back, one after the other; what they are handed back in is not loaded from.

    Args:
        was_made_raw: hears of a unit that was.
        next_of: the unit that is packed, or handed back, after this one; None: nobody knows.
    """

    def __init__(
        self,
        device: Device,
        edits: Edits,
        ledger: Ledger,
        exchanges: HomeExchanges,
        stats: Stats,
        was_made_raw: Callable[[StreamedUnit], None],
        next_of: Callable[[StreamedUnit], StreamedUnit | None],
    ) -> None:
        self.pages = PagesAhead()
        self.is_leaving = False
        self._device = device
        self._edits = edits
        self._ledger = ledger
        self._exchanges = exchanges
        self._stats = stats
        self._was_made_raw = was_made_raw
        self._next_of = next_of
        self._speeds: deque[float] = deque(maxlen=_TIMED_UNITS)  # of decoding, in GB/s

    def why_raw(self, unit: StreamedUnit) -> str:
        """Why a unit cannot be packed; "": it can."""
        binding = unit.binding
        if not all(bound.has_one_home and bound.home_device.type == "cpu" for bound in binding.tensors):
            return "its memory is not all ours"
        places = [at for bound, at in zip(binding.tensors, unit.home.offsets, strict=True) if bound.num_bytes]
        if len(set(places)) < len(places):
            return "weights of it are tied by their memory"
        if binding.statistics:
            return "its forward writes to it"
        if self._edits.holds(unit) or self._exchanges.is_looked_at(unit):
            return "somebody else has its memory"
        if any(bound.home.is_shared() for bound in binding.tensors):
            return "its memory is shared"
        return ""

    def packed(self, store: HostStore, unit: StreamedUnit) -> PackedHome | str:
        """A packed home of the same bytes; or why it stays raw: it gains too little, or does not come back as it was.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        device, old = self._device, unit.home
        num_bytes = old.device_bytes
        is_32_bits = all(bound.dtype is torch.float32 for bound in unit.binding.tensors)
        with contextlib.ExitStack() as undo:
            with self._scratch(num_bytes) as raw:
                raw.zero_()
                self._copy(old, raw)
                most_bytes = int((1 - codec.LEAST_GAIN) * num_bytes)
                found = None
                for word_bytes in (4, 2) if is_32_bits else (2,):
                    found = found or device.pack(raw, word_bytes, most_bytes)
                if found is None:
                    return f"packing gains less than {codec.LEAST_GAIN:.0%}"
                packed, layout = found
                pages = self.pages.take(packed.numel(), may_be_larger=True)
                if (following := self._next_of(unit)) is not None:
                    self.pages.prepare(int(PACKED_SHARE * following.home.device_bytes))
                home = PackedHome(device, old.offsets, num_bytes, layout=layout)
                undo.callback(store.release, home)
                device.copy_back(store.hold(home, pages, packed.numel()), packed)
                del packed, found
                if not self._is_same(home, raw):
                    self._stats.num_packing_mismatches += 1
                    warn(f"`{unit.spec.name}` does not come back as it was when it is packed; it stays as it is.")
                    return "it does not come back as it was"
            undo.pop_all()
            return home

    def _is_same(self, home: PackedHome, raw: torch.Tensor) -> bool:
        """Whether what is on the host decodes to these bytes, which are on the device."""
        with self._scratch(home.device_bytes) as again:
            again.fill_(0xA5)
            marks = self._decode(home, again)
            with engine_tensors():
                is_same = torch.equal(again, raw)  # the host has waited for the decoding by now
            ms = self._device.elapsed_ms(*marks)
            if is_same and ms and home.device_bytes >= _LEAST_TIMED_BYTES:
                self._speeds.append(home.device_bytes / ms / 1e6)
                self._ledger.planner.decode_gb_per_s = median(self._speeds)
            return is_same

    def make_raw(self, unit: StreamedUnit) -> None:
        """Give a unit that is packed its bytes back as they are, in memory of their own."""
        home = unit.home
        if not isinstance(home, PackedHome):
            return
        store = self._exchanges.store_of(unit)
        with engine_tensors():
            pages = self.pages.take(home.device_bytes)
            if (following := self._next_of(unit)) is not None:
                self.pages.prepare(following.home.device_bytes)
            raw = RawHome(self._device, home.offsets, home.device_bytes)
            self._decode_to_host(home, store.hold(raw, pages, home.device_bytes, is_locked=not self.is_leaving))
            self._exchanges.exchange(unit, raw, pages)
            try:
                self._exchanges.release()  # of the packed bytes, which the device has no more to do with, as a rule
            except Exception as error:  # of a device that has failed: weights come home all the same
                _log.warning("page locks could not be given up: %r", error)
            if not self.is_leaving:
                self._device.empty_cache()  # activations in pieces of what this took would keep these apart
        self._was_made_raw(unit)

    def _decode_to_host(self, home: PackedHome, buffer: torch.Tensor) -> None:
        """On the device, which is ten times faster; on the host where the device has no room, or has failed."""
        with self._ledger.forgiving():
            try:
                with self._scratch(home.device_bytes) as raw:
                    self._decode(home, raw)
                    self._device.copy_back(buffer, raw)
                return
            except Exception as error:
                _log.debug("decoding on the host: %r", error)
        self._device.unpack_on_host(home.wire, home.layout, buffer)

    def _decode(self, home: PackedHome, raw: torch.Tensor) -> tuple[Any, Any]:
        """Decode what is on the host into a device buffer; compute that follows comes after it.

        Returns: marks before and after the decoding.
        """
        device = self._device
        stream = device.compute_stream()
        with self._scratch(home.wire_bytes) as wire:
            unpacking = device.prepare_unpack(wire[: home.wire_bytes], home.layout, raw)
            self._copy(home, wire)
            start = device.mark(stream)
            device.wait(stream, device.unpack(unpacking, [device.record(stream)]))
            return start, device.mark(stream)

    def _copy(self, home: Home, buffer: torch.Tensor) -> None:
        """Copy what is on the host into a device buffer; compute that follows comes after it."""
        device, stream = self._device, self._device.compute_stream()
        copies = device.prepare([pair[:2] for pair in home.pairs(buffer)], is_locked=home.is_pinned)
        device.wait(stream, device.copy(copies, [device.record(stream)]))

    @contextlib.contextmanager
    def _scratch(self, num_bytes: int) -> Iterator[torch.Tensor]:
        """A device buffer for the moment (uint8 [num_bytes]). What is on its way to it by then is waited for."""
        self._ledger.spoil_interval()
        with engine_tensors():
            buffer = self._device.allocate(num_bytes)
            try:
                yield buffer
            except BaseException:
                with contextlib.suppress(Exception):
                    self._device.wait(self._device.compute_stream(), self._device.record_copies())
                raise
            finally:
                self._device.free(buffer)
